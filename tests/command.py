"""A command line of the tool, run in this process, or in one of its own.

done = trsp_deploy("check", "run", "--min-speedup", "1.2", cwd=folder)
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from trsp_deploy import cli

# A whole job that takes seconds on a tiny model.
QUICK = [
    "calibration.context_length=32",
    "calibration.max_windows=16",
    "calibration.validation_windows=4",
    "plan.steps=2",
    "plan.candidates=2",
    "transfer.steps=4",
    "evaluate.context_length=64",
    "evaluate.max_tokens=640",
    "bench.prompt_tokens=16",
    "bench.new_tokens=4",
    "bench.budget_s=4",
    "bench.replicates=2",
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Of processes that a launcher starts: one run in some 30 was ended by a native abort, and the next one says where.
LAUNCHED = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


# What a program in Python begins with: a `#!` line takes no interpreter whose path holds a space.
PYTHON_SCRIPT = f"""#!/bin/sh
'''exec' {shlex.quote(sys.executable)} "$0" "$@"
' '''
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr

    @property
    def last(self) -> str:
        return self.stderr.splitlines()[-1]


def trsp_deploy(*arguments: str, cwd: Path, **variables: str) -> Done:
    """A command line in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, variables),
    ):
        code = cli.run(list(arguments))
    return Done(code, out.getvalue(), err.getvalue())


def own_process(*arguments: str, cwd: Path, **variables: str) -> Done:
    """A command line in a process of its own, without a network."""
    command = [sys.executable, "-c", "from trsp_deploy.cli import main; main()", *arguments]
    environment = {**os.environ, **OFFLINE, **variables}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def one_line(problem: Exception) -> str:
    """An error's message, which is a line."""
    message = str(problem)
    assert "\n" not in message
    return message
