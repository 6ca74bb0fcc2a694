"""What the machine refuses is a line with what helps; a bug is not."""

from __future__ import annotations

import errno

import pytest
import torch

from trsp_deploy import cli
from trsp_deploy.cli import app
from trsp_deploy.errors import ModelError, first_line, machine_reason, shown


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
    ],
)
def test_the_machine_is_named(problem, words):
    assert (machine_reason(problem) or "").startswith(words)


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
    "problem", [ValueError("x"), KeyError("memory"), FileNotFoundError(errno.ENOENT, "No such file")]
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
    ("problem", "line"),
    [
        (ValueError(" bad   value \n at line 3"), "bad value"),
        (ValueError("x" * 400), "x" * 300),
        (RuntimeError(""), "RuntimeError"),
        (OSError("\n\t"), "OSError"),
    ],
)
def test_what_a_library_says_becomes_one_line(problem: Exception, line: str) -> None:
    assert first_line(problem) == line


def test_a_full_gpu_is_no_matter_of_the_machines_limits() -> None:
    found = machine_reason(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    assert found is not None and found.startswith("the GPU's memory is full ('CUDA out of memory. Tried to")
    assert "--plan-memory" in found and "ulimit" not in found
