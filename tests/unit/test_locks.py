"""Locks: the second is refused and told by whom, and what a file system or a garbled file does to them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from trsp_deploy.artifacts import RunFolder, locked, locks, writing, writing_alone
from trsp_deploy.artifacts.locks import check_not_written
from trsp_deploy.errors import RunError, StorageError


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    said = rf"engine: in use by another trsp-deploy \(process {os.getpid()}\)"
    with writing_alone(tmp_path / "engine"):
        with pytest.raises(RunError, match=said), writing_alone(tmp_path / "engine"):
            pytest.fail("two at once")
        with writing_alone(tmp_path / "other"):
            pass
    with writing_alone(tmp_path / "engine"):
        pass
    assert list(tmp_path.iterdir()) == []  # no lock file is left


def test_a_folder_that_is_added_to_has_its_lock_within(tmp_path: Path) -> None:
    """A lock beside a volume is beside it in one container alone."""
    with writing_alone(tmp_path / "models", within=True) as place:
        assert [path.name for path in tmp_path.rglob("*")] == ["models", ".writing.lock"]
        with pytest.raises(RunError, match="models: in use by another"), writing_alone(place, within=True):
            pytest.fail("two at once")
        with pytest.raises(RunError, match="models: in use by another"):
            check_not_written(place)
        (place / "m").mkdir()
    check_not_written(place)
    with pytest.raises(ZeroDivisionError), writing_alone(tmp_path / "refused", within=True):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["models", "m"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_a_lock_is_shared_as_far_as_its_makers_files_are(tmp_path: Path, umask: int, mode: int) -> None:
    """A group whose members write each other's runs found ".lock: no permission" in all but their own."""
    before = os.umask(umask)
    try:
        with RunFolder(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_what_waits_for_a_folder_that_goes_with_its_lock_makes_it_anew(tmp_path: Path) -> None:
    """Of a command that was refused, in a folder that it had made."""
    begun, ended = threading.Event(), threading.Event()

    def first() -> None:
        with writing_alone(tmp_path / "models", within=True):
            begun.set()
            ended.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(20)
    threading.Timer(0.2, ended.set).start()
    with writing_alone(tmp_path / "models", within=True) as place:
        assert (place / ".writing.lock").is_file()
    thread.join()


def test_a_lock_file_that_nobody_holds_keeps_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill leaves it, and on a file system where nobody can hold one."""
    (tmp_path / ".writing.lock").write_text("1 elsewhere")
    check_not_written(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    check_not_written(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_a_link_is_written_where_it_leads(there: bool, tmp_path: Path) -> None:
    link, folder = tmp_path / "engine", tmp_path / "large-disk" / "engine"
    folder.mkdir(parents=True) if there else folder.parent.mkdir()
    link.symlink_to(folder)
    with writing_alone(link) as place, writing(place) as partial:
        with pytest.raises(RunError, match="in use by another"), writing_alone(folder):
            pytest.fail("two at once, by two names")
        partial.mkdir()
        (partial / "model.onnx").write_text("built")
    assert link.is_symlink() and (folder / "model.onnx").read_text() == "built"


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def first() -> None:
        with writing_alone(tmp_path / "engine"), writing(tmp_path / "engine") as partial:
            partial.mkdir()
            (partial / "model.onnx").write_text("first")
            begun.set()
            ended.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(20)
    with pytest.raises(RunError), writing_alone(tmp_path / "engine"), writing(tmp_path / "engine"):
        pytest.fail("two at once")
    ended.set()
    thread.join()
    assert (tmp_path / "engine" / "model.onnx").read_text() == "first"


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_that_its_holder_removes_is_not_held_by_two(made_anew: bool, tmp_path: Path) -> None:
    """The one that waits has the old file open; a third one would make a new one and lock that, or has made it."""
    lock, found = tmp_path / ".engine.lock", []

    def wait() -> None:
        with locked(lock, tmp_path, patience_s=20):
            with pytest.raises(RunError), locked(lock, tmp_path, patience_s=0):
                pytest.fail("two at once")
            found.append(lock.is_file())

    with locked(lock, tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        lock.unlink()
        if made_anew:
            lock.touch()
    thread.join(20)
    assert found == [True]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe", "process "), (b"", "process unknown"), (b"12 elsewhere", "process 12 on elsewhere")],
)
def test_whatever_a_lock_file_holds_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(content)
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError) as caught, locked(lock, tmp_path, patience_s=0):
            pytest.fail("two at once")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_whoever_waits_says_for_whom(tmp_path: Path) -> None:
    """A second download beside one of minutes seemed to hang."""
    said: list[str] = []
    lock = tmp_path / ".lock"

    def wait() -> None:
        with locked(lock, tmp_path, patience_s=None, waits=said.append):
            said.append("held")

    with locked(lock, tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        assert said == [f"{tmp_path}: in use by another trsp-deploy (process {os.getpid()}); waiting for it"]
    thread.join(20)
    assert said[1:] == ["held"]


def test_this_machine_is_not_named(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    said = r"this file system has no locks .*name a folder on another one"
    with pytest.raises(StorageError, match=said), locked(tmp_path / ".lock", tmp_path):
        pytest.fail("not locked")


def test_a_full_disk_leaves_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had taken the name, and no word in the file."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "pwrite", refuse)
    with pytest.raises(StorageError, match="the disk is full"), writing_alone(tmp_path / "engine"):
        pytest.fail("not locked")
    assert list(tmp_path.iterdir()) == []
