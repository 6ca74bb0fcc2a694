"""Two engines compared: what they are, how long they take in turn, what was possible, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.recipe import BenchSettings, Case
from trsp_deploy.results import Comparison, Rates, Replicate
from trsp_deploy.results import Subject as Name
from trsp_deploy.tools.judging.comparisons import ComparisonReport, compare
from trsp_deploy.tools.judging.goals import Goal, settled_all
from trsp_deploy.tools.judging.limits import SpeedLimit, speed_limit, stored_by
from trsp_deploy.tools.measuring.rates import measure_rates
from trsp_deploy.tools.measuring.samples import measure
from trsp_deploy.tools.measuring.subjects import RUN_MARK, Subject, find_subject, whole_engine


def compare_engines(
    dense: Subject, pruned: Subject, label: str, settings: BenchSettings, seed: int, goals: Sequence[Goal] = ()
) -> Comparison:
    """Measure until the settings' precision is reached, or every goal is decided, or the budget is spent.

    Raises EngineUnavailable when one of them cannot run, RunError when they cannot be compared.
    """
    if dense.device != pruned.device:
        raise RunError(f"{dense.path} runs on {dense.device}, {pruned.path} on {pruned.device}: not a comparison")
    paths: Mapping[Name, Path] = {"dense": dense.path, "pruned": pruned.path}

    def decided(replicates: Sequence[Replicate]) -> bool:
        return settled_all(goals, replicates)

    return measure(
        paths,
        label,
        min(dense.vocabulary, pruned.vocabulary),
        settings,
        seed,
        rates=measure_rates(dense.device),
        decided=decided if goals else None,
        device=dense.device,
    )


def derive(dense: Subject, pruned: Subject, comparison: Comparison) -> ComparisonReport:
    """Every figure of a comparison; limits where both models' sizes are known and the precision is the same."""
    known = dense.size is not None and pruned.size is not None and dense.spec is not None and pruned.spec is not None
    if not known or dense.spec.precision != pruned.spec.precision:  # type: ignore[union-attr]
        return compare(comparison)
    return compare(comparison, lambda case: limits(dense, pruned, case, comparison.rates))


def limits(dense: Subject, pruned: Subject, case: Case, rates: Rates | None) -> SpeedLimit:
    """How much quicker pruned can be at one shape."""
    assert dense.size is not None and pruned.size is not None and pruned.spec is not None
    logits = 1 if dense.cuts_logits and pruned.cuts_logits else case.prompt_tokens
    return speed_limit(dense.size, pruned.size, stored_by(pruned.spec), case, rates=rates, logits=logits)


def find_pair(dense: Path, pruned: Path, engine: str | None) -> tuple[Subject, Subject]:
    """What two paths stand for; raises RunError, of an engine that cannot run here too: there is nothing else to do.

    Of one run folder both are the same engine's.
    """
    try:
        if engine is None and dense == pruned and (dense / RUN_MARK).is_file():
            engine = whole_engine(dense)
        return find_subject(dense, "dense", engine), find_subject(pruned, "pruned", engine)
    except EngineUnavailable as problem:
        raise RunError(str(problem)) from problem
