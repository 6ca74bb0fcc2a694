"""Where a bench keeps what it measured: a file a machine, for figures of two machines do not belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from trsp_deploy.artifacts import provenance, writing
from trsp_deploy.errors import RunError
from trsp_deploy.reading import what_is_wrong

RESULTS = Path("benchmarks/results")
Found = TypeVar("Found")  # what a bench found on one machine
Record = TypeVar("Record", bound=BaseModel)  # a line of a file


def results_path(bench: str, cpu: str, ending: str = "json") -> Path:
    """A bench's file for the machine with this processor: engines-amd-epyc.json for "AMD EPYC"."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-")
    return RESULTS / f"{bench}-{name}.{ending}"


def keep(path: Path, *records: BaseModel) -> None:
    """Write a bench's records, a line each, whole or not at all."""
    with writing(path) as partial:
        partial.write_text("".join(f"{record.model_dump_json()}\n" for record in records), encoding="utf-8")


def kept_in(path: Path, kind: type[Record], remedy: str) -> list[Record]:
    """A file's records, a line each; none where there is no file.

    remedy: for the RunError that a line is which holds no such record.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as problem:
            raise RunError(f"{path}: line {number}: {what_is_wrong(problem, kind)}; {remedy}") from problem
    return found


def every_machine(bench: str, kind: type[Record], ending: str = "json") -> list[list[Record]]:
    """The records of each of a bench's files, one in a json's, by machine's name; raises RunError without any."""
    found, remedy = [], f"`make bench-{bench}` measures it anew"
    for path in sorted(RESULTS.glob(f"{bench}-*.{ending}")):
        records = kept_in(path, kind, remedy)
        if ending == "json" and len(records) > 1:  # as a merge leaves them that keeps both sides
            raise RunError(f"{path}: holds {len(records)} records, expected one; {remedy}")
        if records:
            found.append(records)
    if not found:
        raise RunError(f"{RESULTS}: no {bench}-*.{ending}; `make bench-{bench}` measures")
    return found


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
