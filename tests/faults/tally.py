"""How generated input is judged: one of our errors with a short message or a valid value, soon."""

from __future__ import annotations

import time
from collections.abc import Callable

from trsp_deploy.errors import TrspError

LONGEST_S = 20.0  # a hang; the longest of a quiet machine is a hundredth of that
LONGEST_LINE = 20_000  # of an error; the command line cuts it


class Tally:
    """Counts examples, and holds each to the promise."""

    def __init__(self) -> None:
        self.tried = self.refused = 0
        self.longest_s = 0.0

    def __call__(self, *reads: Callable[[], object]) -> None:
        """One input and what reads it."""
        self.tried += 1
        before = self.refused
        for read in reads:
            self._read(read)
        self.refused = before + (self.refused > before)

    def _read(self, read: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            read()
        except TrspError as problem:
            self.refused += 1
            assert 0 < len(str(problem)) < LONGEST_LINE, f"{len(str(problem))} characters: {str(problem)[:300]}"
        finally:
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
        assert self.longest_s < LONGEST_S
