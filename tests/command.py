"""A command line of the tool, run in this process.

done = trsp_deploy("check", "run", "--min-speedup", "1.2", cwd=folder)
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from trsp_deploy import cli


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
