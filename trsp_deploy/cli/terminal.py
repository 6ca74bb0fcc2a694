"""What every command prints with; light, so that those which only list answer at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trsp_deploy.errors import one_line, redacted

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PIPED_WIDTH = 140  # columns: the report's table, its longest names and intervals in one line each


def console(file: TextIO) -> Console:
    """A console on a stream, for text without markup; piped output gets a fixed width instead of a terminal's."""
    return Console(file=file, highlight=False, markup=False, emoji=False, width=None if file.isatty() else PIPED_WIDTH)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under headings, without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # a name or figure that is cut short would be another's
    for cells in rows:
        table.add_row(*cells)
    return table


def say(line: str) -> None:
    """A line on stderr about how far the work is, in several processes of the main one alone; without secrets."""
    from trsp_deploy.launch import is_main_process

    if not is_main_process():
        return
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(
        f"[bold cyan]>[/] {escape(redacted(one_line(line)))}"
    )


class Announcer:
    """Says when a step begins and ends, with its highest memory, and now and then that it goes on."""

    def __init__(self) -> None:
        self._going_on = contextlib.ExitStack()

    def __call__(self, step: str, state: str) -> None:
        from trsp_deploy.artifacts.run_folder import STOPPED
        from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes
        from trsp_deploy.tools.progress import Heartbeat

        self._going_on.close()
        peak = peak_resident_bytes()
        if state == "started":
            forget_peak()
        elif state != STOPPED and state.startswith("done") and peak is not None:
            state = f"{state}, at most {peak / 1e9:.2f} GB"
        if state != STOPPED:
            say(f"{step}: {state}")
        if state == "started":
            self._going_on.enter_context(Heartbeat(step))


class Output:
    """What a command prints: text on stdout; with --json text on stderr, and stdout is one line of JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    @property
    def stream(self) -> TextIO:
        """Where text goes, as the streams are at this moment."""
        return sys.stderr if self._as_json else sys.stdout

    def say(self, *lines: object) -> None:
        """Text, a line each."""
        for line in lines:
            print(line, file=self.stream)

    def result(self, found: Mapping[str, Any]) -> None:
        """What the command found, for programs; without --json nothing."""
        if self._as_json:
            from pydantic_core import to_json  # which `trsp-deploy --help` does without

            print(json.dumps(json.loads(to_json(found, inf_nan_mode="strings"))))  # JSON has no infinity


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Go on when nobody reads stdout or stderr any more, as after `| head` or without the terminal that a job in the
    background was started from: an exit code is the verdict's. So where the disk of stderr's log takes no more, which
    says how far the work is; stdout has the result."""
    with (
        contextlib.redirect_stdout(_lasting(sys.stdout)),
        contextlib.redirect_stderr(_lasting(sys.stderr, also=DISK_FULL)),
    ):
        try:
            yield
        finally:
            sys.stdout.flush()  # not at the end of the process, which would make an exit code of its own of it
            sys.stderr.flush()


def _lasting(stream: TextIO, also: Collection[int] = ()) -> TextIO:
    return cast(TextIO, _Lasting(stream, also))


class _Lasting:
    """A stream whose reader may leave; what is written then goes nowhere. Rich would end the process.

    also: numbers of other errors that it goes on after.
    """

    def __init__(self, stream: TextIO, also: Collection[int]) -> None:
        self._stream, self._also = stream, also

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            if not self._is_left(problem):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what it holds back is written once more when the process ends
            os.close(nowhere)

    def _is_left(self, problem: OSError) -> bool:
        """Whether a pipe's reader or the terminal is gone; a file's EIO is its disk's."""
        if problem.errno == errno.EIO:
            return stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)
        return problem.errno == errno.EPIPE or problem.errno in self._also

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
