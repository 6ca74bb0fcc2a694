"""Where a bench keeps what it measured: a file a machine, for figures of two machines do not belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from trsp_deploy.artifacts import provenance, writing
from trsp_deploy.errors import RunError

RESULTS = Path("benchmarks/results")
Found = TypeVar("Found")  # what a bench found on one machine


def results_path(bench: str, cpu: str, ending: str = "json") -> Path:
    """A bench's file for the machine with this processor: engines-amd-epyc.json for "AMD EPYC"."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-")
    return RESULTS / f"{bench}-{name}.{ending}"


def keep(path: Path, *records: BaseModel) -> None:
    """Write a bench's records, a line each, whole or not at all."""
    with writing(path) as partial:
        partial.write_text("".join(f"{record.model_dump_json()}\n" for record in records), encoding="utf-8")


def every_machine(bench: str, ending: str = "json") -> list[bytes]:
    """What a bench's files hold, by machine's name; raises RunError when there are none."""
    paths = sorted(RESULTS.glob(f"{bench}-*.{ending}"))
    if not paths:
        raise RunError(f"{RESULTS}: no {bench}-*.{ending}; `make bench-{bench}` measures")
    return [path.read_bytes() for path in paths]


def judged(
    found: Sequence[Found],
    cpu_of: Callable[[Found], str],
    met_by: Callable[[Found], Mapping[str, bool]],
    here: str | None = None,
) -> Found:
    """What a report judges: this machine's where there is some, else of all machines the one that meets the least.

    here: what `cpu_of` would say of this machine; None is its processor's name.
    """
    own = [each for each in found if cpu_of(each) == (here or provenance().cpu)]
    return min(own or found, key=lambda each: sum(met_by(each).values()))
