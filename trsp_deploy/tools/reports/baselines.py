"""A baseline: what a comparison found once, to hold later ones against. A JSON file, made by `trsp-deploy baseline`.

Times belong to the machine that they were taken on, and are refused on another; speed-ups carry over.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError, model_validator

from trsp_deploy.artifacts import Provenance, Sealed, provenance
from trsp_deploy.errors import BaselineError, nearest
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import BenchSettings, Strict
from trsp_deploy.results import PHASES, Comparison
from trsp_deploy.tools.judging.goals import Logs
from trsp_deploy.tools.judging.statistics import replicate_logs, replicate_ratios
from trsp_deploy.tools.reports.record import QualityReport
from trsp_deploy.tools.runners.requirements import driver_version

SCHEMA_VERSION = 1


class Machine(Strict):
    """The hardware that times belong to."""

    cpu: str
    cores: int
    gpus: tuple[str, ...]
    driver: str | None  # of the GPU

    def __str__(self) -> str:
        gpus = f"{', '.join(self.gpus)}, driver {self.driver}" if self.gpus else "no GPU"
        return f"{self.cpu}, {self.cores} cores, {gpus}"


class EngineBaseline(Strict):
    """One engine's samples, a value a replicate."""

    settings: BenchSettings
    latency: tuple[Logs, ...]  # log seconds of pruned, for each shape of the settings
    speedup: tuple[Logs, ...]  # log ratios dense / pruned
    quality: dict[str, QualityReport]  # through the engine, by text

    @model_validator(mode="after")
    def _samples_for_every_shape(self) -> EngineBaseline:
        shapes = len(self.settings.cases)
        for name in ("latency", "speedup"):
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
    engines: dict[str, EngineBaseline]
    provenance: Provenance


def this_machine() -> Machine:
    """The hardware here."""
    here = provenance()
    return Machine(cpu=here.cpu, cores=here.cores, gpus=here.gpus, driver=driver_version() if here.gpus else None)


def engine_baseline(comparison: Comparison, quality: dict[str, QualityReport]) -> EngineBaseline:
    """What is kept of a comparison."""
    cases = range(len(comparison.settings.cases))
    replicates = comparison.replicates
    return EngineBaseline(
        settings=comparison.settings,
        latency=tuple(
            {phase: tuple(replicate_logs(replicates, "pruned", case, phase)) for phase in PHASES} for case in cases
        ),
        speedup=tuple(
            {phase: tuple(replicate_ratios(replicates, case, phase)[0]) for phase in PHASES} for case in cases
        ),
        quality=quality,
    )


def read_baseline(path: Path) -> Baseline:
    """Read and check a baseline; raises BaselineError with one line."""
    values = read_json(path, BaselineError, f"--against {path}")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BaselineError(
            f"--against {path}: schema version {version}, this toolkit reads {SCHEMA_VERSION}; "
            "make it again with `trsp-deploy baseline RUN`"
        )
    try:
        return Baseline.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).rstrip(".")
        said = first["msg"].removeprefix("Value error, ")
        line = f"{where}: {said.lower()}" if where else f"{said}; `trsp-deploy baseline` makes one"
        raise BaselineError(f"--against {path}: {line}") from problem


def engine_of(baseline: Baseline, name: str, path: Path) -> EngineBaseline:
    """The engine's part; raises BaselineError when it has none."""
    if name not in baseline.engines:
        hint = nearest(name, baseline.engines)
        raise BaselineError(f"--against {path}: has no engine '{name}'{hint}; it has {', '.join(baseline.engines)}")
    return baseline.engines[name]


def check_machine(baseline: Baseline, path: Path, option: str) -> None:
    """Raise BaselineError, with both fingerprints, when times of this machine cannot be held against the baseline's."""
    here = this_machine()
    if here != baseline.machine:
        raise BaselineError(
            f"{option}: {path} was made on other hardware; there: {baseline.machine}; here: {here}; times do not carry "
            "over: make a baseline here, or ask for --max-speedup-loss or --min-speedup, which do"
        )


def other_versions(baseline: Baseline) -> list[str]:
    """Packages that have another version here, as lines."""
    before, now = baseline.provenance.packages, provenance().packages
    return [
        f"{name} {before.get(name, 'absent')} in the baseline, {now.get(name, 'absent')} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
