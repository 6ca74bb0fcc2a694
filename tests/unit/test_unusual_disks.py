"""Disks that refuse what others allow, and links to other ones: no finished work is lost, and a line says which."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.made_run import OUTPUTS, Nothing, made_run
from trsp_deploy.artifacts import RunFolder, fingerprint, share_weights, storage_errors, write_json, writing
from trsp_deploy.artifacts.run_folder import check_made
from trsp_deploy.artifacts.storage import link_tree
from trsp_deploy.errors import RunError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(number: int, what: Callable[[Path], bool] = lambda path: True) -> Callable[..., None]:
    """A function of the system that refuses some paths, and does nothing with others."""

    def refuse(path: str | Path, *_: object, **__: object) -> None:
        if what(Path(path)):
            raise OSError(number, os.strerror(number), str(path))

    return refuse


# -- NFS: a file that is open keeps a name in its folder ---------------------------------------------------------------


@pytest.fixture
def held_open(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of folders that cannot be emptied."""
    held: list[str] = []
    rmtree = shutil.rmtree

    def remove(path: Path, **options: bool) -> None:
        if Path(path).name in held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    return held


def write_model(folder: Path, content: str) -> None:
    with writing(folder) as partial:
        partial.mkdir()
        (partial / content).touch()


def test_what_a_finished_folder_replaces_may_stay(tmp_path: Path, held_open: list[str]) -> None:
    """The step was lost with a traceback, and so was every later one."""
    held_open += [".model.former", ".model.partial"]
    write_model(tmp_path / "model", "first")
    for content in ("second", "third"):
        write_model(tmp_path / "model", content)
        assert names(tmp_path / "model") == [content]
    assert names(tmp_path) == [".model.former", "model"]
    (tmp_path / ".model.partial").mkdir()  # as a kill leaves it
    write_model(tmp_path / "model", "fourth")
    assert names(tmp_path / "model") == ["fourth"] and names(tmp_path / ".model.partial") == []


def test_an_error_is_not_that_of_what_could_not_be_removed(tmp_path: Path, held_open: list[str]) -> None:
    held_open.append(".model.partial")
    with pytest.raises(ValueError, match="half-way"), writing(tmp_path / "model") as partial:
        partial.mkdir()
        raise ValueError("half-way")


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [True, False])
def test_a_link_that_leads_nowhere_is_named_before_the_work(tmp_path: Path, folder: bool) -> None:
    """A folder cannot take its place, which was found when hours of training were over."""
    (tmp_path / "pruned").symlink_to(tmp_path / "not mounted")
    with pytest.raises(StorageError, match="pruned: is a link that leads nowhere; mount"):
        if folder:
            write_model(tmp_path / "pruned", "x")
        else:
            write_json(tmp_path / "pruned", {})
    assert names(tmp_path) == ["pruned"]


@pytest.mark.parametrize("linked", ["pruned", "engines"])
def test_an_output_that_was_moved_and_linked_is_not_made_again(tmp_path: Path, linked: str) -> None:
    """It was said to be other than what was made, and trained again."""
    run = made_run(tmp_path / "run")
    shutil.move(run / linked, tmp_path / "disk")
    (run / linked).symlink_to(tmp_path / "disk")
    step, output = next((step, output) for step, output in OUTPUTS.items() if output.startswith(linked))
    words = f"{linked}: is a link out of the run; move the whole run and link that, or remove the link"
    with pytest.raises(RunError, match=words):
        done_again(run, step, output)
    with pytest.raises(RunError, match=words):
        check_made(run, step, output)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=f"{linked}: is a link that leads nowhere"):
        done_again(run, step, output)
    (run / linked).unlink()
    assert done_again(run, step, output)


def test_an_output_that_is_another_behind_a_link_is_made_again(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    shutil.move(run / "pruned", tmp_path / "disk")
    (tmp_path / "disk" / "more").touch()
    (run / "pruned").symlink_to(tmp_path / "disk")
    assert done_again(run, "prune", "pruned") and not (run / "pruned").is_symlink()
    assert (tmp_path / "disk" / "more").exists()


def test_a_whole_run_may_be_linked(tmp_path: Path) -> None:
    made_run(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert not done_again(tmp_path / "run", "prune", "pruned")


def done_again(run: Path, step: str, output: str) -> bool:
    """Whether a step of a made run works once more."""
    worked = []

    def work() -> Nothing:
        worked.append(step)
        write_model(run / output, "again")
        return Nothing()

    with RunFolder(run) as folder:
        folder.step(step, work, Nothing, settings={}, inputs={}, outputs=[output])
    return bool(worked)


# -- SMB: no modes and no times ----------------------------------------------------------------------------------------


def test_a_disk_without_modes_takes_weights_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("a.safetensors", "deep/b.onnx_data"):
        (source / name).write_text(name)
    for name in ("chmod", "utime", "link"):
        monkeypatch.setattr(os, name, refused(errno.EPERM))
    share_weights(source)
    link_tree(source, tmp_path / "copy")
    link_tree(source / "a.safetensors", tmp_path / "file")
    assert fingerprint(tmp_path / "copy") == fingerprint(source)
    assert (tmp_path / "file").read_text() == "a.safetensors"


def test_a_second_place_has_the_same_files_and_modes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("linked", "copied.data"):
        (source / name).touch()
        (source / name).chmod(0o640)
    source.chmod(0o750)
    link_tree(source, tmp_path / "copy", copied=(".data",))
    assert (source / "linked").samefile(tmp_path / "copy" / "linked")
    assert not (source / "copied.data").samefile(tmp_path / "copy" / "copied.data")
    assert [(tmp_path / "copy" / each).stat().st_mode & 0o777 for each in (".", "copied.data")] == [0o750, 0o640]


# -- what a disk is short of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "inodes", "words"),
    [
        (
            errno.EDQUOT,
            9,
            r"x: your quota is used up \(the disk itself has 2 MB free\); remove files of yours, or have",
        ),
        (
            errno.ENOSPC,
            0,
            r"x: the disk is full \(no inodes are left for more files; 2 MB free\); remove some files and",
        ),
        (errno.ENOSPC, 9, r"x: the disk is full \(2 MB free\); free some space and run the same command again"),
    ],
)
def test_what_there_is_too_little_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, inodes: int, words: str
) -> None:
    monkeypatch.setattr("trsp_deploy.artifacts.storage.free_bytes", lambda path: 2_000_000)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=10, f_favail=inodes))
    with pytest.raises(StorageError, match=words), storage_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
