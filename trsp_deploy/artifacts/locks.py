"""Lock files that keep a second command out of a folder; the kernel drops a lock with its holder, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trsp_deploy.artifacts.layout import WRITING_LOCK
from trsp_deploy.artifacts.storage import storage_errors
from trsp_deploy.errors import RunError, StorageError

PATIENCE_S = 1.0  # with the lock of a process that was killed and has not quite gone
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(
    lock: Path, what: Path, patience_s: float | None = PATIENCE_S, waits: Callable[[str], None] = lambda line: None
) -> Iterator[None]:
    """Hold the file `lock`, and with it the right to write `what`.

    patience_s: with who holds it already; None waits for as long as it takes. waits: hears whom it waits for, then.
    Raises RunError that names the holder, and StorageError where the file cannot be made or has no locks.
    """
    handle = _open(lock)
    try:
        while True:
            taken = _taken(handle, lock, PATIENCE_S if patience_s is None else patience_s)
            if not taken and patience_s is None:
                waits(f"{what}: in use by another trsp-deploy ({_holder(handle)}); waiting for it")
                taken = _taken(handle, lock, None)
            if not taken:
                raise _in_use(what, handle)
            if _is_there(lock, handle):
                break
            os.close(handle)  # its holder has removed it: a third command would lock the next one
            lock.parent.mkdir(exist_ok=True)  # and the folder, where nothing else was in it
            handle = _open(lock)
        with storage_errors(lock):
            _sign(handle, lock)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing_alone(folder: Path, *, within: bool = False) -> Iterator[Path]:
    """Keep other commands from writing a folder that is no run, by a lock beside it.

    within: by one in the folder, of one that is added to and not replaced: where it is a volume, two containers share
    nothing else, and what is around it may be nobody's to write.
    Yields where to write: of a link the folder that it leads to, there or not, and the link stays one.
    """
    place = folder.resolve() if folder.is_symlink() else folder
    lock = place / WRITING_LOCK if within else place.absolute().with_name(f".{place.absolute().name}.lock")
    new = within and not place.exists()
    with storage_errors(folder):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as problem:
            raise StorageError(f"{folder}: cannot be created ({problem.strerror}); name another --out") from problem
    with locked(lock, folder):
        try:
            yield place
        finally:
            lock.unlink(missing_ok=True)
            if new:
                with contextlib.suppress(OSError):
                    place.rmdir()  # where nothing came of it


def check_not_written(folder: Path) -> None:
    """Raise RunError while a command writes a folder that has its lock within; nothing is made there."""
    lock = folder / WRITING_LOCK
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # nobody's
    try:
        if not _taken(handle, lock, PATIENCE_S, fcntl.LOCK_SH):
            raise _in_use(folder, handle)
    except StorageError:
        pass  # of a file system without locks, where nobody can hold one
    finally:
        os.close(handle)


def _open(lock: Path) -> int:
    with storage_errors(lock):
        try:
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # less the umask
        except OSError as problem:
            if problem.errno != errno.ELOOP:
                raise
            raise StorageError(f"{lock}: is a link, and what it leads to would be written over; remove it") from problem


def _sign(handle: int, lock: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
    except OSError:
        lock.unlink(missing_ok=True)  # a full disk takes a file's name, but no word in it
        raise


def _is_there(lock: Path, handle: int) -> bool:
    try:
        return os.path.samestat(lock.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _taken(handle: int, lock: Path, patience_s: float | None, kind: int = fcntl.LOCK_EX) -> bool:
    until = None if patience_s is None else time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, kind | (0 if until is None else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            if until is not None and time.monotonic() > until:
                return False
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            raise StorageError(
                f"{lock}: this file system has no locks ({problem.strerror}), so two commands could mix their files; "
                "name a folder on another one"
            ) from problem
        time.sleep(0.02)


def _in_use(what: Path, handle: int) -> RunError:
    return RunError(f"{what}: in use by another trsp-deploy ({_holder(handle)})")


def _holder(handle: int) -> str:
    """As its lock file says: a process, and on which machine where that is another one."""
    process, _, host = os.pread(handle, 300, 0).decode("utf-8", "replace").partition(" ")
    return f"process {process or 'unknown'}{f' on {host}' if host and host != socket.gethostname() else ''}"
