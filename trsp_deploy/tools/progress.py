"""Progress of long work on stderr: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trsp_deploy.launch import is_main_process
from trsp_deploy.tools.host_memory import resident_bytes

LOG_INTERVAL_S = 15.0


class Meter:
    """Shows one task: `with Meter("transfer", 128) as meter: ... meter.advance("loss 3.1")`."""

    showing: ClassVar[int] = 0  # meters that are open

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
        Meter.showing += 1
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
                TextColumn("{task.fields[memory]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._description, total=self._total, completed=self._done, figures="", memory=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        Meter.showing -= 1
        if self._bar is not None:
            self._bar.stop()

    def reach(self, done: int, figures: str = "", of: int | None = None) -> None:
        """Count up to `done` units in all, at least one more and never past the end; of: where that is by now."""
        if of is not None and of != self._total:
            self._total = of
            if self._bar is not None:
                self._bar.update(self._task, total=of)
        self.advance(figures, max(1, min(done, self._total) - self._done))

    def advance(self, figures: str = "", by: int = 1) -> None:
        """Count `by` more units done, with figures such as the loss beside the bar."""
        self._done += by
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, advance=by, figures=figures, memory=memory_text())
        elif now - self._said >= LOG_INTERVAL_S and not self._silent:
            left = (now - self._began) / (self._done - self._done_before) * (self._total - self._done)
            units = f"{self._done}/{self._total} {figures}"
            self._console.print(
                f"  {self._description}: {units}, about {left:.0f} s left, {memory_text()}",
                highlight=False,
                soft_wrap=True,
            )
            self._said = now


class Heartbeat:
    """Says now and then that a stage goes on which counts nothing: an export, an engine's build.

    A context manager; silent while a Meter is open.
    """

    def __init__(self, description: str, interval_s: float = LOG_INTERVAL_S, console: Console | None = None) -> None:
        self._description = description
        self._interval_s = interval_s
        self._console = console or Console(file=sys.stderr)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if is_main_process():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        began = time.perf_counter()
        while not self._over.wait(self._interval_s):
            if not Meter.showing:
                elapsed = time.perf_counter() - began
                self._console.print(
                    f"  {self._description}: {elapsed:.0f} s so far, {memory_text()}", highlight=False, soft_wrap=True
                )


def memory_text() -> str:
    """This process's memory, and on a GPU what torch has allocated there."""
    resident, torch = resident_bytes(), sys.modules.get("torch")
    parts = [] if resident is None else [f"{resident / 1e9:.2f} GB"]
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.memory_allocated() / 1e9:.2f} GB of the GPU")
    return " and ".join(parts)
