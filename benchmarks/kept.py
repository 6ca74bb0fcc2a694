"""Where a bench keeps what it measured: a file a machine, for figures of two machines do not belong together."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trsp_deploy.errors import RunError

RESULTS = Path("benchmarks/results")


def results_path(bench: str, cpu: str, ending: str = "json") -> Path:
    """A bench's file for the machine with this processor."""
    return RESULTS / f"{bench}-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}.{ending}"


def newest(bench: str) -> bytes:
    """What the newest of a bench's files holds; raises RunError when there are none."""
    paths = sorted(RESULTS.glob(f"{bench}-*.json"), key=os.path.getmtime)
    if not paths:
        raise RunError(f"{RESULTS}: no {bench}-*.json; `make bench-{bench}` measures")
    return paths[-1].read_bytes()
