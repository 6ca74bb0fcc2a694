"""Two engines compared: what they are, how long they take in turn, what was possible, and whether that is enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trsp_deploy.artifacts import ENGINE_MANIFEST, RUN_MARK, RunLayout
from trsp_deploy.errors import EngineUnavailable, RecipeError, RunError
from trsp_deploy.recipe import BenchSettings, Case, EngineSpec
from trsp_deploy.results import Comparison, Phase, Rates, Replicate, Role
from trsp_deploy.results import Subject as Name
from trsp_deploy.tools.graphs.stored import stored_by
from trsp_deploy.tools.judging.comparisons import ComparisonReport, LimitOf, compare
from trsp_deploy.tools.judging.goals import Goal, least_speedup, settled_all
from trsp_deploy.tools.judging.limits import SpeedLimit, speed_limit
from trsp_deploy.tools.measuring.bench_worker import PAUSED, PLANTED
from trsp_deploy.tools.measuring.rates import measure_rates
from trsp_deploy.tools.measuring.samples import measure
from trsp_deploy.tools.measuring.subjects import Subject, common_engine, find_subject
from trsp_deploy.tools.runners.manifest import read_manifest


def slowed_on_purpose() -> str:
    """The variables that plant a slow-down (`measuring/bench_worker.py`) with their values; empty where none is set."""
    planted = {name: os.environ.get(name, "") for name in (PLANTED, PAUSED)}
    return " ".join(f"{name}={value}" for name, value in planted.items() if value not in ("", "0"))


def compare_engines(
    dense: Subject,
    pruned: Subject,
    label: str,
    settings: BenchSettings,
    seed: int,
    goals: Sequence[Goal] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure until the settings' precision is reached, or every goal is decided, or the budget is spent.

    say: is told where the engines are slowed on purpose, before they are timed.
    Raises EngineUnavailable when one of them cannot run, RunError when they cannot be compared or were made anew
    meanwhile.
    """
    if dense.device != pruned.device:
        raise RunError(f"{dense.path} runs on {dense.device}, {pruned.path} on {pruned.device}: not a comparison")
    paths: Mapping[Name, Path] = {"dense": dense.path, "pruned": pruned.path}

    def decided(replicates: Sequence[Replicate]) -> bool:
        return settled_all(goals, replicates)

    if slowed := slowed_on_purpose():
        say(f"slowed on purpose: {slowed}")
    before = {path: _written(path) for path in paths.values()}
    comparison = measure(
        paths,
        label,
        min(dense.vocabulary, pruned.vocabulary),
        settings,
        seed,
        rates=measure_rates(dense.device),
        decided=decided if goals else None,
        device=dense.device,
    )
    for path, at in before.items():
        if _written(path) != at:  # each replicate opened it anew
            raise RunError(f"{path}: was made anew while it was measured: its times are of two engines; compare again")
    return comparison


def _written(path: Path) -> tuple[int, int] | None:
    """When an engine folder or ONNX file was written, and the bytes of the file that tells; None once it is gone."""
    try:
        told = (path / ENGINE_MANIFEST if path.is_dir() else path).stat()
    except FileNotFoundError:
        return None
    return told.st_mtime_ns, told.st_size


def check_positions(settings: BenchSettings, positions: int | None, name: str) -> None:
    """Raise RecipeError where a prompt and its new tokens are more than the model was made for.

    positions: of the model; None where they are not known.
    """
    prompt, new = max(settings.prompt_tokens), settings.new_tokens
    if positions is not None and prompt + new > positions:
        raise RecipeError(
            f"prompt_tokens {prompt} and new_tokens {new}: {name} has {positions} positions; valid: {positions} or "
            "fewer of both together"
        )


def check_pair(dense: Subject, pruned: Subject, settings: BenchSettings) -> None:
    """Raise RecipeError where one of two subjects has fewer positions than the settings ask for."""
    for subject in (dense, pruned):
        check_positions(settings, subject.positions, str(subject.path))


def pair_notes(dense: Subject, pruned: Subject) -> list[str]:
    """What speaks against two subjects being a model and its cut, a line each."""
    lines = []
    if dense.size is not None and pruned.size is not None:
        before, after = (len(subject.size.weights.layers) for subject in (dense, pruned) if subject.size is not None)
        if before < after:
            lines.append(f"DENSE has {before} layers and PRUNED {after}: they may be the wrong way round")
    if dense.architecture and pruned.architecture and dense.architecture != pruned.architecture:
        lines.append(f"two architectures, {dense.architecture} and {pruned.architecture}: not a model and its cut")
    if dense.vocabulary != pruned.vocabulary:
        lines.append(
            f"two vocabularies, of {dense.vocabulary:,} and {pruned.vocabulary:,} tokens: not a model and its cut"
        )
    lacking = without_limit(dense, pruned)
    return [*lines, f"no limit of the speed-up is known: {lacking}"] if lacking else lines


def label_of(dense: Subject, pruned: Subject) -> str:
    """Name of what is compared, for people: the engine's where both subjects have the same."""
    return pruned.name if dense.name == pruned.name else f"{dense.name} against {pruned.name}"


def speedup_goals(dense: Subject, pruned: Subject, least: Mapping[Phase, float], settings: BenchSettings) -> list[Goal]:
    """Least speed-ups, as `--min-speedup` asks for them; one that is above its limit passes none.

    A limit that is assumed holds none up: products that are bound otherwise may be above it.
    """
    limit_of = _limit_of(dense, pruned, measure_rates(dense.device)) if least else None
    limits = [] if limit_of is None else [limit_of(case) for case in settings.cases]
    return [
        least_speedup(
            phase,
            bound,
            "--min-speedup",
            len(settings.cases),
            [None if limit.assumed else limit for limit in limits],
        )
        for phase, bound in least.items()
    ]


def derive(dense: Subject, pruned: Subject, comparison: Comparison) -> ComparisonReport:
    """Every figure of a comparison, limits and sizes among them where they are known."""
    both: dict[Role, Subject] = {"dense": dense, "pruned": pruned}
    sizes = {role: each.size_bytes for role, each in both.items() if each.size_bytes is not None}
    limit_of = _limit_of(dense, pruned, comparison.rates)
    return compare(comparison, limit_of, _threads(both, comparison.threads), sizes)


def without_limit(dense: Subject, pruned: Subject) -> str:
    """Why the speed-up of one over the other has no known limit; empty where it has.

    It is by the models' sizes alone, so all else has to be alike.
    """
    for subject in (dense, pruned):
        if subject.spec is None:
            return f"{subject.path} is a graph alone; engine folders and runs have their model's sizes beside them"
        if subject.size is None:
            return f"{subject.path} has no model beside it"
    assert dense.spec is not None and pruned.spec is not None
    settings = EngineSpec.model_fields.keys() - {"name", "description"}
    unlike = sorted(name for name in settings if getattr(dense.spec, name) != getattr(pruned.spec, name))
    if unlike:
        return f"the specs of {dense.path} and {pruned.path} differ in {', '.join(unlike)}"
    return ""


def _limit_of(dense: Subject, pruned: Subject, rates: Rates | None) -> LimitOf | None:
    return None if without_limit(dense, pruned) else lambda case: limits(dense, pruned, case, rates)


def _threads(both: Mapping[Role, Subject], cores: int) -> dict[Role, int]:
    """Threads of each engine on a CPU; one that names none takes every core."""
    return {
        role: (each.spec.threads if each.spec is not None else None) or cores
        for role, each in both.items()
        if each.device == "cpu"
    }


def limits(dense: Subject, pruned: Subject, case: Case, rates: Rates | None) -> SpeedLimit:
    """How much quicker pruned can be at one shape. rates: of all cores, which say nothing of fewer threads."""
    assert dense.size is not None and pruned.size is not None and pruned.spec is not None
    rates = rates if pruned.spec.threads is None else None
    logits = 1 if dense.cuts_logits and pruned.cuts_logits else case.prompt_tokens
    return speed_limit(dense.size, pruned.size, stored_by(pruned.spec), case, rates=rates, logits=logits)


def find_pair(dense: Path, pruned: Path | None, engine: str | None) -> tuple[Subject, Subject]:
    """What two paths stand for, or one run folder; raises RunError, of an engine that cannot run here too: there is
    nothing else to do.

    Of run folders, and of a run beside an engine, both are the same engine's, for another precision would count as the
    removal's speed-up.
    """
    other = pruned or dense
    runs = [RunLayout(path).is_run for path in (dense, other)]
    try:
        if engine is None and all(runs):
            engine = common_engine(dense, other)
        elif engine is None and any(runs):
            alone = other if runs[0] else dense
            engine = read_manifest(alone).name if (alone / ENGINE_MANIFEST).is_file() else None
        first = find_subject(dense, "dense", engine)
        if pruned is None and not runs[0]:
            raise RunError(f"{dense}: PRUNED is missing; only a run folder ({RUN_MARK}) has both")
        second = find_subject(other, "pruned", engine)
        if engine is not None and not any(runs):
            raise RunError(
                f"--engine {engine}: chooses among a run's engines, and neither {dense} nor {other} is a run"
            )
        return first, second
    except EngineUnavailable as problem:
        raise RunError(str(problem)) from problem
