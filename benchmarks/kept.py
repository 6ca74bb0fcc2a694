"""Where a bench keeps what it measured: a file a machine, for figures of two machines do not belong together."""

from __future__ import annotations

import re
from pathlib import Path

from trsp_deploy.errors import RunError

RESULTS = Path("benchmarks/results")


def results_path(bench: str, cpu: str, ending: str = "json") -> Path:
    """A bench's file for the machine with this processor: engines-amd-epyc.json for "AMD EPYC"."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-")
    return RESULTS / f"{bench}-{name}.{ending}"


def every_machine(bench: str) -> list[bytes]:
    """What a bench's files hold, by machine's name; raises RunError when there are none."""
    paths = sorted(RESULTS.glob(f"{bench}-*.json"))
    if not paths:
        raise RunError(f"{RESULTS}: no {bench}-*.json; `make bench-{bench}` measures")
    return [path.read_bytes() for path in paths]
