"""What was found: samples as they are kept from run to run, the figures of the targets, and the table."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError

from benchmarks import targets
from benchmarks.gpu.contenders import is_torch
from benchmarks.gpu.plan import Plan, Shape, shapes
from benchmarks.pages import markdown
from benchmarks.targets import at_least
from trsp_deploy.artifacts import Provenance, provenance, seal, writing
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners.passes import VERSION as PASSES

RESULTS = Path("benchmarks/results/gpu.jsonl")
TARGETS = {"bandwidth_share": at_least(0.8), "speedup_over_limit": at_least(0.95)}
VERSION = "2"  # raise when what is timed changes: every line is then measured anew


class Sample(Strict):
    """Seconds of one shape; one that failed has the reason instead."""

    phase: Literal["prefill", "decode"]
    batch: int
    past: int
    seconds: tuple[float, ...] = ()  # a prompt, or a decoding step
    reason: str | None = None
    fits: bool = True  # false where the reason is memory: another time it would be the same

    @property
    def shape(self) -> Shape:
        """What it times."""
        return Shape(self.phase, self.batch, self.past)


class Line(Strict):
    """One contender at one depth."""

    key: str  # of all that it depends on (`key_of`)
    contender: str
    layers: int
    machine: Provenance
    bandwidth_bytes_per_s: float
    bytes_of_a_step: float  # that decoding at batch 1 and the shortest past has to read
    samples: tuple[Sample, ...]

    @property
    def done(self) -> bool:
        """Whether measuring it again would tell nothing new."""
        return all(sample.seconds or not sample.fits for sample in self.samples)


def key_of(contender: str, layers: int, plan: Plan) -> str:
    """SHA-256 over all that a line depends on: only lines with the keys of here and now are reported."""
    spec = None if is_torch(contender) else load_engine_spec(contender).model_dump(mode="json")
    said = {"bench": VERSION, "contender": contender, "layers": layers, "spec": spec, "passes": PASSES}
    machine = provenance().model_dump(include={"trsp_deploy", "packages", "cpu", "gpus"})
    return seal({**said, **machine, "plan": plan.model_dump()})


def read() -> list[Line]:
    """The lines that are there; one that is none is left where it is, with a notice."""
    found = []
    for number, (_, line) in enumerate(_rows(), start=1):
        if line is None:
            print(f"{RESULTS}:{number}: not a line of this bench, or torn; left out", file=sys.stderr)
        else:
            found.append(line)
    return found


def keep(line: Line) -> None:
    """Add a line, in the place of one with its key; a kill leaves the file as it was."""
    rows = [row for row, there in _rows() if there is None or there.key != line.key]
    with writing(RESULTS) as partial:
        partial.write_bytes(b"".join(row + b"\n" for row in [*rows, line.model_dump_json().encode()]))


def _rows() -> list[tuple[bytes, Line | None]]:
    """Rows of the file and what they say."""
    rows = RESULTS.read_bytes().splitlines() if RESULTS.is_file() else []
    return [(row, _parsed(row)) for row in rows]


def _parsed(row: bytes) -> Line | None:
    try:
        return Line.model_validate_json(row)
    except ValidationError:
        return None


def figures(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> dict[str, float | None]:
    """Best engine's share of the bandwidth at batch 1, and the least speed-up over its limit; None where none ran.

    There is no least speed-up as long as an engine is lacking.
    """
    engines = [line for line in lines if not is_torch(line.contender)]
    shares = [share for line in engines if line.layers == plan.layers[0] and (share := share_of_bandwidth(line, plan))]
    kept = [part for line in engines if (part := _kept(line, lines, plan)) is not None]
    return {
        "bandwidth_share": max(shares, default=None),
        "speedup_over_limit": None if lacking(lines, plan, failed) else min(kept, default=None),
    }


def lacking(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> list[str]:
    """Engines that were measured or tried here, and the depth at which they have no decoding step at batch 1."""
    engines = [name for name in dict.fromkeys([*(line.contender for line in lines), *failed]) if not is_torch(name)]
    there = {(line.contender, line.layers) for line in lines if _step(line, plan) is not None}
    return [f"{name}, {layers} layers" for name in engines for layers in plan.layers if (name, layers) not in there]


def verdict(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> dict[str, Any]:
    """The line for scripts; what did not run is not met. failed: contenders whose process came to nothing."""
    found = figures(lines, plan, failed)
    return targets.verdict("gpu", TARGETS, found, decimals=3, lacking=lacking(lines, plan, failed))


def share_of_bandwidth(line: Line, plan: Plan) -> float | None:
    """Bytes that a step at batch 1 has to read over what the memory moves meanwhile."""
    seconds = _step(line, plan)
    return None if seconds is None else line.bytes_of_a_step / seconds / line.bandwidth_bytes_per_s


def _kept(line: Line, lines: list[Line], plan: Plan) -> float | None:
    """Speed-up of the shorter model over its limit, from the longer one's line."""
    dense, pruned = plan.layers
    other = next((found for found in lines if (found.contender, found.layers) == (line.contender, pruned)), None)
    if line.layers != dense or other is None:
        return None
    before, after = _step(line, plan), _step(other, plan)
    if before is None or after is None:
        return None
    return before / after / (line.bytes_of_a_step / other.bytes_of_a_step)


def _step(line: Line, plan: Plan) -> float | None:
    """Median seconds of a decoding step at batch 1 and the shortest past."""
    return _median(line, Shape("decode", 1, plan.pasts[0]))


def _median(line: Line, shape: Shape) -> float | None:
    sample = next((sample for sample in line.samples if sample.shape == shape), None)
    return median(sample.seconds) if sample is not None and sample.seconds else None


def text(lines: list[Line], plan: Plan, absent: dict[str, str]) -> str:
    """The table: milliseconds, and what kept a contender or a shape out."""
    body, reasons = [], []
    for line in lines:
        share = share_of_bandwidth(line, plan)
        cells = [_ms(_median(line, shape)) for shape in shapes(plan)]
        body.append([line.contender, str(line.layers), *cells, "-" if share is None else f"{share:.0%}"])
        where = f"{line.contender}, {line.layers} layers"
        reasons += [f"{where}, {sample.shape}: {sample.reason}" for sample in line.samples if sample.reason]
    head = ["contender", "layers", *map(str, shapes(plan)), "bandwidth"]
    reasons += [f"{name}: not run ({reason})" for name, reason in absent.items()]
    return "\n".join([markdown(head, body), "Milliseconds, medians; - has its reason below.", *reasons])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
