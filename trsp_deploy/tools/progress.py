"""Progress of long work on stderr: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trsp_deploy.artifacts import is_main_process

LOG_INTERVAL_S = 15.0


class Meter:
    """Shows one task: `with Meter("transfer", 128) as meter: ... meter.advance("loss 3.1")`."""

    def __init__(self, description: str, total: int, done: int = 0, console: Console | None = None) -> None:
        """total: units in all; done: those that an earlier run did."""
        self._description = description
        self._total = total
        self._done = self._done_before = done
        self._silent = not is_main_process()
        self._began = self._said = time.perf_counter()
        self._console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._done and not self._silent:
            self._console.print(f"  {self._description}: goes on after {self._done} of {self._total}", highlight=False)
        if self._console.is_terminal and not self._silent:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._description, total=self._total, completed=self._done, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def reach(self, done: int, figures: str = "") -> None:
        """Count up to `done` units in all, at least one more and never past the end."""
        self.advance(figures, max(1, min(done, self._total) - self._done))

    def advance(self, figures: str = "", by: int = 1) -> None:
        """Count `by` more units done, with figures such as the loss beside the bar."""
        self._done += by
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, advance=by, figures=figures)
        elif now - self._said >= LOG_INTERVAL_S and not self._silent:
            left = (now - self._began) / (self._done - self._done_before) * (self._total - self._done)
            self._console.print(
                f"  {self._description}: {self._done}/{self._total} {figures}, about {left:.0f} s left", highlight=False
            )
            self._said = now
