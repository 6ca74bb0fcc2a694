"""What the machine refuses is a line with what helps; a bug is not."""

from __future__ import annotations

import ast
import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

from tests.breadth import BREADTH
from trsp_deploy import cli, errors
from trsp_deploy.cli import app
from trsp_deploy.errors import (
    NO_MEMORY,
    EngineUnavailable,
    LeftToMain,
    ModelError,
    first_line,
    machine_reason,
    named,
    one_line,
    passes_through,
    shown,
)
from trsp_deploy.launch import launched_as_several


def wrapped(cause: Exception) -> Exception:
    try:
        raise RuntimeError("a library's own error") from cause
    except RuntimeError as problem:
        return problem


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "x"),
            "x: Too many open files; raise the limit with `ulimit -n 1024`",
        ),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "disk: No space left on device; free some space"),
        (MemoryError(), "not enough memory; close other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'not enough memory ("DefaultCPU'),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "y"), "y: File name too long"),
        (OSError(errno.ESTALE, "Stale file handle", "z"), "z: Stale file handle; the file system's server no longer"),
        (OSError(errno.EREMOTEIO, "Remote I/O error"), "disk: Remote I/O error; the file system's server could not"),
        (OSError(errno.ENOLCK, "No locks available"), "disk: No locks available; the file system has no locks to give"),
        (OSError(errno.EBUSY, "Busy", "z"), "z: Busy; end the process that holds it, and run the same command again"),
        (OSError(errno.ENOTEMPTY, "Not empty", "z"), "z: Not empty; end the process that holds a file in it open, and"),
        (OSError(errno.ETXTBSY, "Text file busy", "z"), "z: Text file busy; end the process that runs it, or writes"),
        (OSError(errno.ETIMEDOUT, "Timed out", "z"), "z: Timed out; the file system did not answer; run the same"),
        (OSError(errno.ENOTCONN, "Not connected", "z"), "z: Not connected; the file system is no longer connected; mo"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no other process can be started (Resource temp"),
    ],
)
def test_the_machine_is_named(problem, words):
    assert (machine_reason(problem) or "").startswith(words)


def test_no_folder_for_temporary_files_is_no_bug(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.mkdtemp()
    assert "set TMPDIR to one that can" in (machine_reason(caught.value) or "")


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234"


@pytest.mark.parametrize(
    ("problem", "size", "code"),
    [
        (RuntimeError(GLOO), "2", 1),
        (torch.distributed.DistNetworkError("The client socket has timed out"), "2", 1),
        (RuntimeError(GLOO), "1", cli.BUG),
        (RuntimeError("an odd shape"), "2", cli.BUG),
    ],
)
def test_another_process_that_ended_is_no_bug(problem, size, code, monkeypatch, capsys):
    def command(arguments):
        raise problem

    monkeypatch.setattr(app, "call", command)
    for name, value in {"RANK": "0", "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["prune"]) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == cli.BUG)
    line = f"error: another process of this launch ended, or cannot be reached ({problem}); its own line says why"
    assert said.startswith(line) == (code == 1)


def test_a_process_that_has_done_its_part_of_a_launch_ends_without_a_word(monkeypatch, capsys):
    def command(arguments):
        raise LeftToMain("the rest is the main process's work")

    monkeypatch.setattr(app, "call", command)
    assert cli.run(["prune"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("size", ["", "two", "2"])
def test_a_size_without_a_rank_is_no_launch(size, monkeypatch):
    """As a job's script leaves it: a traceback, or no word about memory that would not be enough."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert not launched_as_several()


def test_a_model_is_not_to_blame_for_the_machine(monkeypatch, capsys):
    def raises(cause):
        def command(arguments):
            raise ModelError("tiny: torch cannot export it") from cause

        monkeypatch.setattr(app, "call", command)
        assert cli.run(["doctor"]) == 1
        return capsys.readouterr().err

    assert raises(RuntimeError("DefaultCPUAllocator: can't allocate memory")).startswith("error: not enough memory")
    assert raises(RuntimeError("an odd shape")) == "error: tiny: torch cannot export it\n"


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("x"),
        KeyError("memory"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),  # a network's, whose own line says more
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0),
    ],
)
def test_bugs_are_not(problem):
    assert machine_reason(problem) is None


def test_long_values_are_shortened():
    assert shown("melt") == "'melt'"
    assert len(shown("a" * 10_000)) <= 200
    bomb: list[object] = ["x"] * 9
    for _ in range(9):
        bomb = [bomb] * 9
    assert len(shown(bomb)) < 100_000


@pytest.mark.parametrize(
    ("problem", "whole", "first", "with_kind"),
    [
        (
            ValueError(" bad   value \n at line 3"),
            "bad value at line 3",
            "bad value",
            "ValueError: bad value at line 3",
        ),
        (ValueError("x" * 400), "x" * 400, "x" * 300, "ValueError: " + "x" * 300),
        (RuntimeError(""), "RuntimeError", "RuntimeError", "RuntimeError"),
        (OSError("\n\t"), "OSError", "OSError", "OSError"),
    ],
)
def test_what_a_library_says_becomes_one_line(problem: Exception, whole: str, first: str, with_kind: str) -> None:
    assert (one_line(problem), first_line(problem), named(problem)) == (whole, first, with_kind)


def test_a_text_that_says_nothing_stays_so() -> None:
    assert one_line(" a \n b ") == "a b" and one_line("\n") == ""


def test_what_has_its_line_already_is_not_a_librarys() -> None:
    assert passes_through(EngineUnavailable("no GPU")) and passes_through(wrapped(MemoryError()))
    assert not passes_through(wrapped(ValueError("an odd shape")))


@pytest.mark.parametrize(
    "problem",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "context", "cublas"],
)
def test_a_full_gpu_is_no_matter_of_the_machines_limits(problem: RuntimeError) -> None:
    found = machine_reason(problem)
    assert found is not None and found.startswith(f"the GPU's memory is full ('{str(problem)[:20]}")
    assert "--plan-memory" in found and "ulimit" not in found
    assert NO_MEMORY.search(str(problem)), "another time it would be the same"


@BREADTH
def test_every_error_is_in_the_tree_that_is_drawn() -> None:
    root = Path(errors.__file__).parent
    parents = {
        kind.name: [base.id for base in kind.bases if isinstance(base, ast.Name)]
        for path in root.rglob("*.py")
        for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(kind, ast.ClassDef)
    }
    tree = {"TrspError"}
    while more := {name for name, bases in parents.items() if tree.intersection(bases)} - tree:
        tree |= more
    assert "RequestError" in tree  # of another module
    drawn = re.findall(r"^    [|` -]*(\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(tree)
