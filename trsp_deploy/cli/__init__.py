"""The command line: each command parses, calls one library function and prints.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trsp_deploy.cli.supervision import ENDINGS, asked_to_end, supervised
from trsp_deploy.errors import (
    LeftToMain,
    ModelError,
    TrspError,
    UserError,
    machine_reason,
    no_command,
    one_line,
    redacted,
)
from trsp_deploy.launch import check_launch, in_a_group, lost_peer
from trsp_deploy.tools.resources.dependencies import missing_package

BUG = 70
LONGEST_LINE = 2000  # characters of an error, whatever a user or a library put into it


def main() -> None:
    """Entry point of `trsp-deploy`; exit codes are listed in docs/exit-codes.md."""
    # Threads that spin at barriers make two busy processes on few cores five times slower, and gain nothing alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_streams()
    _end(_said(lambda: supervised(lambda: run(sys.argv[1:]))))


def _open_streams() -> None:
    """Give a process that was started with closed streams some that lead nowhere, before a file gets their numbers.

    A character that the terminal's encoding lacks is written as an escape, rather than ending a command.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""

    def call() -> int:
        _check_surroundings()
        from trsp_deploy.cli.app import call  # here, where Ctrl-C is heard: it imports all the commands

        return call(arguments)

    from trsp_deploy.cli.terminal import lasting_streams

    with lasting_streams():
        return _said(call)


def _check_surroundings() -> None:
    """Raise UserError where the process cannot work, whatever the command."""
    try:
        Path.cwd()
    except FileNotFoundError as problem:  # libraries end the process there, some with a code that is a verdict's
        raise UserError("the working directory is gone; `cd` to one that exists") from problem
    check_launch()


def _said(work: Callable[[], int]) -> int:
    """The exit code of `work`, with a line for what it raised."""
    try:
        return work()
    except KeyboardInterrupt:
        return _interrupted()
    except LeftToMain as done:
        return done.exit_code
    except SystemExit as done:  # a library's
        if isinstance(done.code, str):
            return _say(done.code, 1)
        return done.code or 0
    except Exception as problem:
        if asked_to_end():  # a library made an error of its own of it
            return _interrupted()
        # A model is not to blame for a library's error that was the machine's, as running out of memory is.
        machine = isinstance(problem, ModelError) and machine_reason(problem) is not None
        if isinstance(problem, TrspError) and not machine:
            return _say(str(problem), problem.exit_code)
        # What a user's paths, disk, limits, launch or packages can cause, wherever; all else is a bug and shows its
        # traceback.
        reason = machine_reason(problem) or lost_peer(problem) or missing_package(problem)
        if reason is not None:
            return _say(reason, 1)
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return BUG


def _interrupted() -> int:
    return _say(
        "interrupted; finished steps are kept, and the same command goes on from there",
        128 + (asked_to_end() or signal.SIGINT),
    )


def _end(code: int) -> NoReturn:
    """End this process, without the interpreter's finalisation, once all is written.

    A native thread that asks for the interpreter while it is finalised is ended from within, which C++ answers with an
    abort: the likely end of a process that had finished, as gloo's threads outlive their process group. Unloading torch
    takes time, too.
    """
    # A group is left together (NCCL waits for all of it): where one fails alone, the launcher has to see it end.
    alone = code != 0 and in_a_group()
    if code - 128 not in ENDINGS and not alone:  # after those all is cleaned up
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    os._exit(code)


def _say(message: str, code: int) -> int:
    line = no_command(redacted(one_line(message)))  # with words of files that other people may have made
    with contextlib.suppress(OSError):  # nobody is there to read it
        print(f"error: {line if len(line) <= LONGEST_LINE else f'{line[:LONGEST_LINE]}…'}", file=sys.stderr)
    return code
