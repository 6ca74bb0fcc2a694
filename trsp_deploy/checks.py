"""The regression check: is the speed-up still there, and at what cost? Pass, fail, or inconclusive.

    check = check_run(job, Tolerances(min_speedup={"total": 1.2}), None, "ort-cpu-fp32", job.recipe.bench)

Sits above the pipeline: it finishes what a run lacks, measures anew, and judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from trsp_deploy.artifacts import Provenance, provenance, write_json
from trsp_deploy.errors import BaselineError, EngineUnavailable, RecipeError, RunError, nearest
from trsp_deploy.pipeline import Pipeline, engines
from trsp_deploy.recipe import BenchSettings, EngineSpec, Positive, Strict
from trsp_deploy.results import Comparison, Phase
from trsp_deploy.stages import bench
from trsp_deploy.tools.judging.comparisons import ComparisonReport, disturbance, notes
from trsp_deploy.tools.judging.goals import Goal, most_latency, most_speedup_lost
from trsp_deploy.tools.judging.verdicts import Outcome, Requirement, Word, judge, worst
from trsp_deploy.tools.reports.baselines import (
    SCHEMA_VERSION,
    Baseline,
    Cut,
    EngineBaseline,
    check_machine,
    check_model,
    engine_baseline,
    engine_of,
    other_hardware,
    other_versions,
    read_baseline,
    this_machine,
    unusable_quality,
    weaknesses,
)
from trsp_deploy.tools.reports.quality import ChoicesReport, QualityReport, perplexity_outcomes
from trsp_deploy.tools.reports.rows import to_pytorch_rows
from trsp_deploy.tools.sources.overlap import overlap_note

CHECK_VERSION = 1  # of `check.json`
SHAPES = ("batch_sizes", "prompt_tokens", "new_tokens")  # settings of a measurement that a baseline decides


class Tolerances(Strict):
    """What a check requires; None and empty ask for nothing."""

    min_speedup: dict[Phase, Positive] = Field(default_factory=dict)  # dense time / pruned time
    max_latency_regression: float | None = None  # share of the baseline's time, end to end
    max_speedup_loss: float | None = None  # share of the baseline's speed-up, end to end
    max_ppl_ratio: Positive | None = None  # pruned / dense perplexity, on every text
    min_accuracy_retained: Positive | None = None  # pruned / dense mean accuracy over the recipe's tasks
    quality_source: str | None = None  # the option that both limits of quality come from; None: each has its own

    @property
    def relative(self) -> bool:
        """Whether a baseline is needed."""
        return self.max_latency_regression is not None or self.max_speedup_loss is not None

    @property
    def timed(self) -> bool:
        """Whether anything is required of times, and not of quality alone."""
        return bool(self.min_speedup) or self.relative


class Check(Strict):
    """`check.json`: the verdict and what it rests on."""

    schema_version: int
    verdict: Word
    engine: str
    outcomes: tuple[Outcome, ...]
    comparison: ComparisonReport
    samples: Comparison  # raw, that `comparison` is derived from
    quality: dict[str, QualityReport]
    choices: ChoicesReport | None
    notes: tuple[str, ...]
    tolerances: Tolerances
    provenance: Provenance


def check_run(
    job: Pipeline, tolerances: Tolerances, against: Path | None, engine: str | None, settings: BenchSettings
) -> Check:
    """Measure a run's engine anew, until every requirement is decided or the budget is spent, and judge it.

    settings: of the measurement; with a baseline its shapes are taken.
    Raises RecipeError when nothing is required, BaselineError when the baseline does not serve.
    """
    if tolerances == Tolerances():
        raise RecipeError("check: nothing is required; give --min-speedup, --max-ppl-ratio or another limit")
    earlier = _read_earlier(against, tolerances)
    # What needs no engine to be told is told before any is built.
    _check_asked(job, tolerances)
    _check_engine(job, engine)
    job.inputs.model.check_bench(_shaped(settings, _part(earlier, _expected(job, engine))))
    said = [] if earlier is None else check_model(earlier.baseline, earlier.path, cut_of(job))
    spec = engine_to_check(job, engine)
    before = _part(earlier, spec.name)
    settings = _shaped(settings, before)
    job.proof.check_engines()  # what does not compute what was trained has no speed worth checking
    # Quality first: it is quick where it is known, and may end the job with an error.
    quality, choices = job.proof.engine_quality(spec), job.proof.engine_choices(spec)
    _check_judgeable(job, spec, tolerances, quality, choices)
    comparison, goals = _measure(job, spec, tolerances, before, settings)
    derived = bench.derive(*job.engines.pair(spec), comparison)
    disturbed, cases = disturbance(derived), comparison.settings.cases
    outcomes = [goal.outcome(comparison.replicates, disturbed, cases) for goal in goals]
    outcomes += _quality(quality, choices, tolerances)
    said += [*_of_quality(job, spec, quality), *([] if choices is None else choices.cut)]
    said += _of_earlier(earlier, before)
    return Check(
        schema_version=CHECK_VERSION,
        verdict=worst(outcome.word for outcome in outcomes),
        engine=spec.name,
        outcomes=tuple(outcomes),
        comparison=derived,
        samples=comparison,
        quality=quality,
        choices=choices,
        notes=(*notes(derived), *said),
        tolerances=tolerances,
        provenance=provenance(),
    )


@dataclass(frozen=True)
class _Earlier:
    """A baseline, and where it was read from."""

    baseline: Baseline
    path: Path


def _read_earlier(path: Path | None, tolerances: Tolerances) -> _Earlier | None:
    """The baseline that a check is held against; raises RecipeError where one is needed, BaselineError where it does
    not serve."""
    if path is None:
        if tolerances.relative:
            raise RecipeError("check: --max-latency-regression and --max-speedup-loss need --against BASELINE.json")
        return None
    baseline = read_baseline(path)
    if tolerances.max_latency_regression is not None:
        check_machine(baseline, path, "--max-latency-regression")
    return _Earlier(baseline, path)


def _part(earlier: _Earlier | None, engine: str) -> EngineBaseline | None:
    """A baseline's part of an engine; None without a baseline."""
    return None if earlier is None else engine_of(earlier.baseline, engine, earlier.path)


def _of_quality(job: Pipeline, spec: EngineSpec, quality: dict[str, QualityReport]) -> Iterator[str]:
    """What to say beside the quality that was found."""
    for what, dense, pruned, tolerance in to_pytorch_rows(job.proof.check_perplexity(spec)):
        yield f"{what}: dense {dense}, pruned {pruned} ({tolerance})"
    yield from filter(None, (overlap_note(name, job.inputs.texts.overlap(name)) for name in quality))


def _of_earlier(earlier: _Earlier | None, before: EngineBaseline | None) -> list[str]:
    """What to say of the baseline, and of its part of the engine."""
    said = [] if earlier is None else [*other_hardware(earlier.baseline), *other_versions(earlier.baseline)]
    return said if before is None else [*said, *weaknesses(before)]


def _shaped(settings: BenchSettings, before: EngineBaseline | None) -> BenchSettings:
    """The settings at a baseline's shapes."""
    if before is None:
        return settings
    return settings.model_copy(update={name: getattr(before.settings, name) for name in SHAPES})


def _check_asked(job: Pipeline, tolerances: Tolerances) -> None:
    """Raise RecipeError when something required has nothing that it could be measured on."""
    if tolerances.max_ppl_ratio is not None and not job.recipe.evaluation:
        raise RecipeError(
            "check: a limit of perplexity needs texts, and the run's recipe has none (`evaluation`); give some with "
            "`trsp-deploy evaluate RUN --eval NAME=TEXTS`"
        )
    if tolerances.min_accuracy_retained is not None and not job.recipe.evaluate.tasks:
        raise RecipeError("check: --min-accuracy-retained needs tasks; give some with --task, such as --task piqa")


def _check_judgeable(
    job: Pipeline,
    spec: EngineSpec,
    tolerances: Tolerances,
    quality: dict[str, QualityReport],
    choices: ChoicesReport | None,
) -> None:
    """Raise when something required has no figure: what was not measured has not passed."""
    if spec.name in job.proof.failed:
        raise RunError(f"check: {spec.name} {job.proof.failed[spec.name]}")
    texts, tasks = job.recipe.evaluation, job.recipe.evaluate.tasks
    missing = [name for name in texts if name not in quality]
    if tolerances.max_ppl_ratio is not None and missing:
        raise RunError(f"check: {spec.name} has no perplexity on {', '.join(missing)}, and it is to be judged")
    if tolerances.min_accuracy_retained is not None and choices is None:
        raise RunError(f"check: {spec.name} has no accuracy on {', '.join(tasks)}, and it is to be judged")


def _measure(
    job: Pipeline, spec: EngineSpec, tolerances: Tolerances, before: EngineBaseline | None, settings: BenchSettings
) -> tuple[Comparison, list[Goal]]:
    dense, pruned = job.engines.pair(spec)
    goals = bench.speedup_goals(dense, pruned, tolerances.min_speedup, settings)
    if before is not None and tolerances.max_latency_regression is not None:
        share = tolerances.max_latency_regression
        goals.append(most_latency("total", share, "--max-latency-regression", before.earlier_latency))
    if before is not None and tolerances.max_speedup_loss is not None:
        share = tolerances.max_speedup_loss
        goals.append(most_speedup_lost("total", share, "--max-speedup-loss", before.earlier_speedup))
    return bench.compare_engines(dense, pruned, spec.name, settings, job.recipe.seed, goals, job.inputs.say), goals


def _quality(quality: dict[str, QualityReport], choices: ChoicesReport | None, tolerances: Tolerances) -> list[Outcome]:
    outcomes = []
    if tolerances.min_accuracy_retained is not None and choices is not None:
        kept = Requirement(
            name="zero-shot accuracy over dense",
            source=tolerances.quality_source or "--min-accuracy-retained",
            sense="at least",
            bound=tolerances.min_accuracy_retained,
        )
        outcomes.append(judge(kept, choices.retained, choices.doubt))
    source = tolerances.quality_source or "--max-ppl-ratio"
    return outcomes + perplexity_outcomes(quality, tolerances.max_ppl_ratio, source)


def cut_of(job: Pipeline) -> Cut:
    """What the run has done to which model."""
    layers = job.inputs.model.num_layers()
    kept = layers - len(job.pruning.plan().dropped)
    return Cut(name=job.inputs.model.shown, num_layers_dense=layers, num_layers_pruned=kept)


def _check_engine(job: Pipeline, engine: str | None) -> None:
    """Raise RunError for a name that none of the run's engines has."""
    names = [spec.name for spec in job.engines.specs]
    if engine is not None and engine not in names:
        hint = nearest(engine, names)
        raise RunError(f"{job.run.path}: has no engine '{engine}'{hint}; its recipe has {', '.join(names)}")


def _expected(job: Pipeline, engine: str | None) -> str:
    """The engine that will be checked, as far as it can be told before any is built."""
    specs = job.engines.specs
    return engine or next(iter(engines.runnable(specs)), specs[0]).name


def engine_to_check(job: Pipeline, engine: str | None) -> EngineSpec:
    """The engine to check: the one named, or the run's first that runs here. Raises RunError when there is none."""
    _check_engine(job, engine)  # before any is built
    outcomes = {outcome.spec.name: outcome for outcome in job.engines.build()}
    wanted = list(outcomes.values()) if engine is None else [outcomes[engine]]
    running = [outcome.spec for outcome in wanted if outcome.reason is None]
    if not running:
        reasons = "; ".join(f"{outcome.spec.name}: {outcome.reason}" for outcome in wanted)
        raise RunError(f"{job.run.path}: no engine that runs here ({reasons})")
    return running[0]


def make_baseline(job: Pipeline, engine: str | None, settings: BenchSettings, out: Path) -> Baseline:
    """Measure every engine of a run that runs here (or the one named), and write what later checks are held against.

    An engine that cannot be measured, or whose quality is no number, is said and left out. Raises RunError when none is
    left, or it is the one named, BaselineError where engines are slowed on purpose.
    """
    if slowed := bench.slowed_on_purpose():
        raise BaselineError(
            f"baseline: {slowed} slows engines on purpose, and nothing is to be held against such times; unset it"
        )
    job.inputs.model.check_bench(settings)
    first = engine_to_check(job, engine)
    others = [spec for spec in job.engines.specs if spec != first and job.engines.engine(spec).reason is None]
    job.proof.check_engines()  # what does not compute what was trained is nothing to hold others against
    found, lacking = {}, dict(job.proof.failed)
    specs = [spec for spec in (first, *(others if engine is None else ())) if spec.name not in lacking]
    # Before anything is timed: it may end the job with an error.
    quality = {spec.name: job.proof.engine_quality(spec) for spec in specs}

    def leave_out(spec: EngineSpec, why: str) -> None:
        lacking[spec.name] = why
        job.inputs.say(f"{spec.name}: {why}; not in the baseline")

    for spec in specs:
        if unusable := next(unusable_quality(quality[spec.name]), None):
            leave_out(spec, f"nothing can be held against its {unusable}")
            continue
        try:
            pair = job.engines.pair(spec)
            comparison = bench.compare_engines(*pair, spec.name, settings, job.recipe.seed, (), job.inputs.say)
        except EngineUnavailable as problem:  # such as shapes beyond its profiles, or a GPU that is full
            leave_out(spec, f"cannot be timed: {problem}")
            continue
        disturbed = disturbance(bench.derive(*pair, comparison))
        found[spec.name] = engine_baseline(comparison, quality[spec.name], disturbed)
    if not found:
        raise RunError(f"{job.run.path}: no baseline ({'; '.join(f'{name} {why}' for name, why in lacking.items())})")
    baseline = Baseline(
        schema_version=SCHEMA_VERSION,
        machine=this_machine(),
        model=cut_of(job),
        engines=found,
        provenance=provenance(),
    )
    write_json(out, baseline)
    return baseline
