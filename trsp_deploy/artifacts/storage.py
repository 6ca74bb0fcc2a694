"""Writing so that files and folders appear whole or not at all, and a disk's refusal is one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trsp_deploy.artifacts.fingerprints import Sealed, seal
from trsp_deploy.errors import AGAIN, RunError, StorageError, TrspError

NOTHING_LEFT = 1 << 20  # bytes: a disk with less is full, whatever a library calls its error
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)  # of folders: some network drives; not readable
HELD_OPEN = (errno.ENOTEMPTY, errno.EBUSY)  # of a folder on NFS: a file that is open stays, under another name
LEADS_NOWHERE = "is a link that leads nowhere; mount the disk that it leads to, or remove the link to have it made here"
SHORT = ("file too large", "unexpected pos", "requested and")  # torch's and NumPy's words for a write that is not whole


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write below `path` into one StorageError line.

    Writers outside Python (safetensors, protobuf, NumPy, ONNX Runtime, TensorRT) report a full disk as
    errors of their own, so an unknown error on a disk with nothing left counts as one too.
    """
    try:
        yield
    except TrspError:
        raise
    except Exception as problem:
        refusal = _refusal(path, problem)
        if refusal is None:
            raise
        raise refusal from problem


def _refusal(path: Path, problem: Exception) -> StorageError | None:
    """What a disk's error means; None for errors that are no disk's."""
    number = problem.errno if isinstance(problem, OSError) else None
    said = str(problem).lower()
    full = "no space left" in said or free_bytes(path) < NOTHING_LEFT
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and full):
        place = _on_full_disk(path, problem)
        return StorageError(f"{place}: {_lacking(place, number)} and {AGAIN}")
    if isinstance(problem, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{problem.filename or path}: no permission to write ({problem.strerror})")
    if number is None and any(words in said for words in SHORT):
        return StorageError(f"{path}: a file may not be that large here (`ulimit -f`); {problem}")
    return None


def _lacking(place: Path, number: int | None) -> str:
    """What a disk that takes no more is short of, and how there is more of it."""
    free = f"{free_bytes(place) / 1e6:.0f} MB free"
    if number == errno.EDQUOT:
        return f"your quota is used up (the disk itself has {free}); remove files of yours, or have it raised,"
    disk = os.statvfs(nearest_existing(place))
    if number == errno.ENOSPC and disk.f_files and not disk.f_favail:
        return f"the disk is full (no inodes are left for more files; {free}); remove some files"
    return f"the disk is full ({free}); free some space"


def _on_full_disk(path: Path, problem: Exception) -> Path:
    """What there was no room for: `path`, or on another disk a file that the error names, or the temporary files."""
    named = problem.filename if isinstance(problem, OSError) else None
    if isinstance(named, str) and _disk(Path(named)) != _disk(path):
        return Path(named)
    scratch = None if tempfile.tempdir is None else Path(tempfile.tempdir)  # None: nothing was written there so far
    if named is None and scratch is not None and free_bytes(scratch) < NOTHING_LEFT <= free_bytes(path):
        return scratch
    return path


def _disk(path: Path) -> int:
    return nearest_existing(path).stat().st_dev


def nearest_existing(path: Path) -> Path:
    """A path that may not be there yet, or the nearest folder around it that is."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Free on the disk that a path is on, or would be."""
    return shutil.disk_usage(nearest_existing(path)).free


def place_to_write(path: Path) -> Path:
    """Where a file that a user named is written: a link is written through, and stays one.

    Tried out, so that it is said before hours of work and not after them. Raises StorageError where no file can be.
    """
    try:
        _check_kind(path)
        place = path.resolve() if path.is_symlink() else path
        if place.is_symlink():
            raise StorageError(f"{path}: is a link to itself; name a regular file, or one that is not there yet")
        if place.is_dir():
            raise StorageError(f"{path} is a folder; give the file to write")
        folder = next(parent for parent in place.absolute().parents if parent.exists() or parent.is_symlink())
        if not folder.is_dir():
            raise StorageError(f"{path}: cannot be written ({folder} is no folder)")
        with tempfile.NamedTemporaryFile(prefix=f".{place.name}.", dir=folder):  # as long a name as `writing` takes
            return place
    except (OSError, RuntimeError, ValueError) as problem:  # a link to itself, in Python 3.12; a NUL
        said = problem.strerror if isinstance(problem, OSError) else problem
        raise StorageError(f"{path}: cannot be written ({said}); name a file in a folder of yours") from problem


def _check_kind(target: Path) -> None:
    """Raise StorageError for what a rename would take the place of and nobody could read from any more."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise StorageError(f"{target}: is a pipe or device; name a regular file, or one that is not there yet")


@contextlib.contextmanager
def writing(target: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it takes target's place on success.

    staging: a folder of the same disk to have that in, and what is replaced, where neither may stand beside target.
    After an error or a kill the target is what it was before, or, of a folder, gone: it is never half of anything. When
    this returns it is on the disk by its name, which a power cut then leaves.
    """
    aside = target.parent if staging is None else staging
    there = nearest_existing(target.absolute().parent)
    with storage_errors(target):
        _check_kind(target)
        if target.is_symlink() and not target.exists():  # a folder cannot take its place, which would show at the end
            raise StorageError(f"{target}: {LEADS_NOWHERE}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as problem:
            said = f"{problem.filename}: {problem.strerror}"
            raise StorageError(f"{target}: its folder cannot be made ({said})") from problem
        partial, former = (_cleared(aside, target.name, state) for state in ("partial", "former"))
        try:
            with storage_errors(target):  # before the next lines make room again: how full the disk is explains much
                yield partial
                _sync(partial)
            if target.is_dir() and not partial.is_dir():
                raise RunError(f"{target}: is a folder; it is not replaced by a file")
            # A folder cannot replace a folder in one rename, so the old one steps aside first.
            if target.is_dir():
                target.replace(former)
            partial.replace(target)
            remove(partial)  # which is still there where both are names of one file: a rename does nothing then
            for folder in target.absolute().parents:
                _sync_names(folder)
                if folder == there:  # the ones below are new, and their names too
                    break
        except BaseException:
            with contextlib.suppress(OSError):  # what happened says more
                remove(partial)
            if former.exists() and not target.exists():
                former.replace(target)
            raise
        with contextlib.suppress(OSError):  # the new one is whole; `clean` takes what is left of the old one
            remove(former)


def _cleared(folder: Path, name: str, state: str, number: int = 1) -> Path:
    """A path in a folder that nothing lies at: what a kill left there goes, or, held open on NFS, has it for itself."""
    path = folder / (f".{name}.{state}" if number == 1 else f".{name}.{number}.{state}")
    try:
        remove(path)
    except OSError as problem:
        if problem.errno not in HELD_OPEN:
            raise
        return _cleared(folder, name, state, number + 1)
    return path


def share_weights(folder: Path) -> None:
    """Let whoever may read a new folder read its safetensors, which their writer (0.8) keeps to the user alone."""
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # of a disk without modes, as SMB has them
            file.chmod(folder.stat().st_mode & 0o666)


def link_tree(source: Path, target: Path, copied: tuple[str, ...] = ()) -> None:
    """Give a finished file or folder a second place: hard links, or copies where the file system has none.

    copied: ends of names of files that are copied in any case.
    """

    with writing(target) as partial:
        _link(source, partial, copied)


def _link(source: Path, target: Path, copied: tuple[str, ...]) -> None:
    if source.is_dir():
        target.mkdir()
        for each in source.iterdir():
            _link(each, target / each.name, copied)
    else:
        if not source.name.endswith(copied):
            with contextlib.suppress(OSError):
                os.link(source, target)
                return
        shutil.copyfile(source, target)
    with contextlib.suppress(OSError):  # of a disk without modes or times
        shutil.copystat(source, target)


def write_json(path: Path, value: BaseModel | Mapping[str, Any]) -> None:
    """Write a record or mapping as indented JSON, whole or not at all."""
    plain = json.loads(value.model_dump_json()) if isinstance(value, BaseModel) else dict(value)
    if isinstance(value, Sealed):
        plain["sha256"] = seal(plain)
    with writing(path) as partial:
        partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, where one is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for each in [path, *path.rglob("*")]:
        if each.is_dir():
            _sync_names(each)
        elif each.is_file():
            with each.open("rb") as handle:
                os.fsync(handle.fileno())


def _sync_names(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as problem:
        if problem.errno not in NO_SYNC:
            raise
