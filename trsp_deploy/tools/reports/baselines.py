"""A baseline: what a comparison found once, to hold later ones against. A JSON file, made by `trsp-deploy baseline`.

Times belong to the machine that they were taken on, and are refused on another; speed-ups carry over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError, model_validator

from trsp_deploy.artifacts import Provenance, Sealed, provenance
from trsp_deploy.errors import BaselineError, nearest
from trsp_deploy.reading import read_json, what_is_wrong
from trsp_deploy.recipe import BenchSettings, Case, Strict
from trsp_deploy.results import PHASES, Comparison
from trsp_deploy.tools.judging.goals import Earlier, Logs
from trsp_deploy.tools.judging.statistics import Ratio, replicate_logs, replicate_ratios, widened
from trsp_deploy.tools.reports.quality import QualityReport
from trsp_deploy.tools.runners.requirements import instruction_sets

SCHEMA_VERSION = 1
LARGEST_LOG = 50.0  # of seconds or of a ratio: e^50 s are longer than there has been time


class Machine(Strict):
    """The hardware that times belong to."""

    cpu: str
    cores: int
    gpus: tuple[str, ...]
    driver: str | None  # of the GPU
    instructions: tuple[str, ...] | None = None  # sets of the CPU; None in files that are older than this key

    def __str__(self) -> str:
        gpus = f"{', '.join(self.gpus)}, driver {self.driver}" if self.gpus else "no GPU"
        cpu = f"{self.cpu} ({', '.join(self.instructions)})" if self.instructions else self.cpu
        return f"{cpu}, {self.cores} cores, {gpus}"


class Cut(Strict):
    """The model that was measured, and how much of it was left."""

    name: str
    num_layers_dense: int
    num_layers_pruned: int

    def __str__(self) -> str:
        return f"{self.name} with {self.num_layers_dense} layers cut to {self.num_layers_pruned}"


class EngineBaseline(Strict):
    """One engine's samples, one value per replicate."""

    settings: BenchSettings
    latency: tuple[Logs, ...]  # log seconds of pruned, for each shape of the settings
    speedup: tuple[Logs, ...]  # log ratios dense / pruned
    control: tuple[Logs, ...] = ()  # of dense against itself; empty without one, and in files older than this key
    disturbance: str = ""  # what the machine did beside; empty in files older than this key
    quality: dict[str, QualityReport]  # through the engine, by text

    @property
    def replicates(self) -> int:
        """Number of replicates that the samples are of, at the shape with the fewest."""
        return min(len(logs["total"]) for logs in self.speedup)

    @property
    def earlier_latency(self) -> Earlier:
        """Pruned times, to hold later ones against."""
        return Earlier(self.latency, self.control, self.disturbance)

    @property
    def earlier_speedup(self) -> Earlier:
        """Speed-ups, to hold later ones against."""
        return Earlier(self.speedup, self.control, self.disturbance)

    @model_validator(mode="after")
    def _samples_for_every_shape(self) -> EngineBaseline:
        shapes = len(self.settings.cases)
        for name in ("latency", "speedup", *(("control",) if self.control else ())):
            logs = getattr(self, name)
            if len(logs) != shapes or any(len(each.get(phase, ())) < 2 for each in logs for phase in PHASES):
                raise ValueError(
                    f"`{name}` needs two samples or more of {', '.join(PHASES)} for each of {shapes} shapes"
                )
        return self


class Baseline(Sealed):
    """`baseline.json`."""

    schema_version: int
    machine: Machine
    model: Cut | None = None  # None in files that are older than this key
    engines: dict[str, EngineBaseline]
    provenance: Provenance


def this_machine() -> Machine:
    """The hardware here."""
    here = provenance()
    return Machine(
        cpu=here.cpu,
        cores=here.cores,
        gpus=here.gpus,
        driver=here.driver,
        instructions=instruction_sets(),
    )


def engine_baseline(comparison: Comparison, quality: dict[str, QualityReport], disturbance: str = "") -> EngineBaseline:
    """The part of a comparison that a baseline keeps.

    disturbance: what the machine did beside, as `judging.comparisons.disturbance` says it.
    """
    cases = range(len(comparison.settings.cases))
    replicates = comparison.replicates
    ratios = [{phase: replicate_ratios(replicates, case, phase) for phase in PHASES} for case in cases]
    controlled = all(control is not None for phases in ratios for _, control in phases.values())
    return EngineBaseline(
        settings=comparison.settings,
        latency=tuple(
            {phase: tuple(replicate_logs(replicates, "pruned", case, phase)) for phase in PHASES} for case in cases
        ),
        speedup=tuple({phase: tuple(values) for phase, (values, _) in phases.items()} for phases in ratios),
        control=tuple({phase: tuple(control or ()) for phase, (_, control) in phases.items()} for phases in ratios)
        if controlled
        else (),
        disturbance=disturbance,
        quality=quality,
    )


def read_baseline(path: Path) -> Baseline:
    """Read and check a baseline; raises BaselineError with one line."""
    values = read_json(path, BaselineError, f"--against {path}")
    if missing := [key for key in ("machine", "engines") if not isinstance(values.get(key), dict)]:
        raise BaselineError(
            f"--against {path}: is no baseline, for it has no `{missing[0]}`; `trsp-deploy baseline RUN` makes one"
        )
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BaselineError(
            f"--against {path}: schema version {version}, this toolkit reads {SCHEMA_VERSION}; "
            "make it again with `trsp-deploy baseline RUN`"
        )
    try:
        found = Baseline.model_validate(values)
    except ValidationError as problem:
        reason = what_is_wrong(problem, Baseline)
        # Of the file as a whole there is one check alone, its seal.
        by_hand = "" if problem.errors()[0]["loc"] else ", or take its key `sha256` out to use what was edited by hand"
        raise BaselineError(
            f"--against {path}: {reason}; make it again with `trsp-deploy baseline RUN`{by_hand}"
        ) from problem
    if not found.engines:
        raise BaselineError(f"--against {path}: engines: holds none; make it again with `trsp-deploy baseline RUN`")
    if unusable := next(_unusable(found), None):
        raise BaselineError(f"--against {path}: {unusable}")
    return found


def _unusable(baseline: Baseline) -> Iterator[str]:
    """Figures that nothing can be held against, a line each: where they are, and what is expected there."""
    for engine, part in baseline.engines.items():
        for place, value in _samples(part):
            if not math.isfinite(value):
                yield f"engines.{engine}.{place}: expected a finite number, got {value}"
            elif abs(value) > LARGEST_LOG:
                yield f"engines.{engine}.{place}: expected a logarithm within ±{LARGEST_LOG:g}, got {value:g}"
        yield from (f"engines.{engine}.{line}" for line in unusable_quality(part.quality))


def unusable_quality(found: dict[str, QualityReport]) -> Iterator[str]:
    """Figures by text that nothing can be held against, a line each."""
    for text, quality in found.items():
        for field, value in quality.model_dump(exclude={"origin", "pairs"}).items():
            if not 0 < value < math.inf:
                yield f"quality.{text}.{field}: expected a finite number above 0, got {value}"


def _samples(part: EngineBaseline) -> Iterator[tuple[str, float]]:
    """Where each sample is in an engine's part, and its value."""
    for name, shapes in (("latency", part.latency), ("speedup", part.speedup), ("control", part.control)):
        for shape, logs in enumerate(shapes):
            for phase, values in logs.items():
                for index, value in enumerate(values):
                    yield f"{name}.{shape}.{phase}.{index}", value


def speedups_of(part: EngineBaseline) -> list[tuple[Case, Ratio]]:
    """Each shape's speed-up, end to end; a check holds its own against it."""
    controls = part.control or ({},) * len(part.speedup)
    return [
        (case, widened(logs["total"], control.get("total")).found)
        for case, logs, control in zip(part.settings.cases, part.speedup, controls, strict=True)
    ]


def weaknesses(part: EngineBaseline) -> list[str]:
    """What keeps a baseline from deciding anything, or makes it decide more than it should, a line each."""
    lines = [] if part.control else ["the baseline has no control: how much noise it was made in is not known"]
    doubt = part.earlier_speedup.doubt
    return [doubt, *lines] if doubt else lines


def check_model(baseline: Baseline, path: Path, here: Cut) -> list[str]:
    """What to say of a baseline of another model, as lines; raises BaselineError where its layers are other ones."""
    there = baseline.model
    if there is None:
        return ["the baseline does not say of which model it is, as older ones did not"]
    if (there.num_layers_dense, there.num_layers_pruned) != (here.num_layers_dense, here.num_layers_pruned):
        raise BaselineError(
            f"--against {path}: is of {there}, and this run is of {here}; make one of this run with "
            "`trsp-deploy baseline RUN`"
        )
    return [] if there.name == here.name else [f"the baseline is of {there.name}, this run of {here.name}"]


def engine_of(baseline: Baseline, name: str, path: Path) -> EngineBaseline:
    """A baseline's part of an engine; raises BaselineError when it has none."""
    if name not in baseline.engines:
        hint = nearest(name, baseline.engines)
        raise BaselineError(f"--against {path}: has no engine '{name}'{hint}; it has {', '.join(baseline.engines)}")
    return baseline.engines[name]


def check_machine(baseline: Baseline, path: Path, option: str) -> None:
    """Raise BaselineError, with both fingerprints, when times of this machine cannot be held against the baseline's."""
    if (here := _machine_as(baseline)) != baseline.machine:
        raise BaselineError(
            f"{option}: {path} was made on other hardware; there: {baseline.machine}; here: {here}; times do not carry "
            "over: make a baseline here, or ask for --max-speedup-loss or --min-speedup, which do"
        )


def other_hardware(baseline: Baseline) -> list[str]:
    """What to say of a baseline of another machine, whose speed-ups carry over as far as the same binds on both."""
    here = _machine_as(baseline)
    return [] if here == baseline.machine else [f"the baseline is of other hardware: {baseline.machine}; here: {here}"]


def _machine_as(baseline: Baseline) -> Machine:
    """The hardware here, as far as a baseline tells of its own."""
    here = this_machine()
    return here.model_copy(update={"instructions": None}) if baseline.machine.instructions is None else here


def other_versions(baseline: Baseline) -> list[str]:
    """What has another version here, as lines: the toolkit, Python, packages; hardware is told by itself."""
    hardware = ("processor", "cores", "GPU", "driver")
    return [
        f"{name} {there} in the baseline, {here} here"
        for name, (there, here) in baseline.provenance.differences(provenance()).items()
        if name not in hardware
    ]
