"""How much should go? One search for layers, then a run for every number of them, each through real engines.

    found, failed = sweep(job, counts, Targets(min_speedup=1.25), say)

Every number of layers is a run folder of its own, `drop-K/`, to be looked at, continued and shipped like any other.
What concerns the dense model alone is made once and linked or copied into the others. Sits above the pipeline.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from trsp_deploy.artifacts import RunFolder, RunLayout, StepRecord, link_tree, provenance, steps, write_json, writing
from trsp_deploy.artifacts.layout import PLANS, SWEEP, SWEEP_PAGE, cut_name
from trsp_deploy.errors import ModelError, ParityError, PlanError, RecipeError, TrspError, machine_reason
from trsp_deploy.pipeline import Pipeline, check_before_work, prune_and_build
from trsp_deploy.pipeline.engines import runnable, specs_of
from trsp_deploy.pipeline.reporting import write_pages
from trsp_deploy.pipeline.runs import save_recipe
from trsp_deploy.recipe import Recipe
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.reports.sweeps import Point, Sweep, Targets, choose

OF_ONE_CUT = (ModelError, ParityError, PlanError)  # what may be wrong with one cut while the others are right
# Copied, not linked: onnx and onnx_ir refuse weights with a second hard link, and another engine may be built of them.
EXTERNAL_DATA = (".onnx.data", ".onnx_data")
Runs = list[tuple[Pipeline, Report]]


def check_targets(recipe: Recipe, targets: Targets) -> None:
    """Raise RecipeError for a target that nothing in the recipe, or nothing on this machine, measures."""
    if targets.max_ppl_ratio is not None and not recipe.evaluation:
        raise RecipeError("sweep: --max-ppl-ratio needs texts, and the recipe has none: --eval NAME=TEXTS")
    speeds = {"--target-speedup": targets.min_speedup, "--target-latency": targets.max_latency_s}
    wanted = [option for option, target in speeds.items() if target is not None]
    if wanted and not runnable(specs := specs_of(recipe.engines)):
        raise RecipeError(
            f"sweep: {wanted[0]} needs an engine that runs here, and none of the recipe's does "
            f"({', '.join(spec.name for spec in specs)}; `trsp-deploy doctor` says why): --engine E"
        )


def sweep(
    job: Pipeline, counts: tuple[int, ...], targets: Targets, say: Callable[[str], None]
) -> tuple[Sweep, TrspError | None]:
    """Make or finish every run of a sweep, smallest cut first, and choose among them.

    job: its folder is the sweep's; its recipe serves every run, with another number of layers each.
    Beside the sweep it returns what to raise once that was shown, where some cuts failed. Raises RecipeError as
    `check_targets` does, and at once what is wrong with every cut.
    """
    check_targets(job.recipe, targets)
    check_before_work(job)
    job.run.outdate_manifest()
    (job.run.path / PLANS).mkdir(exist_ok=True)  # a sweep by its first sign, and no run to go on with
    plans = job.pruning.plans(counts)
    job.inputs.texts.keep_calibration()
    job.inputs.texts.keep_evaluation()
    runs: Runs = []
    failed: dict[int, TrspError] = {}
    with contextlib.ExitStack() as held:  # every run's lock: its last pages are of the report that was made here
        for number, count in enumerate(counts, start=1):
            say(f"[{number}/{len(counts)}] {count} of {job.inputs.model.num_layers()} layers")
            try:
                runs.append(_run(job, count, plans[count], runs, say, held))
            except OF_ONE_CUT as problem:
                if _is_of_every_cut(problem, runs, failed):
                    raise
                failed[count] = type(problem)(str(problem))  # without the traceback, which holds on to models
                say(f"{cut_name(count)}: {problem}")
            else:
                found = _found(job, counts, targets, runs)
                _write(found, job.run.path)
        if not runs:
            raise _of_cuts(failed)
        for one, report in runs:  # again, with the curve that is now whole
            write_pages(one.proof, report)
        job.run.write_manifest()
    left = ", ".join(map(str, failed))
    then = f"; the other cuts are there: leave {left} out of --drop, or put that right and run the same again"
    return found, _of_cuts(failed, then) if failed else None


def _is_of_every_cut(problem: TrspError, runs: Runs, failed: Mapping[int, TrspError]) -> bool:
    """Whether the cuts to come would fail alike: of the machine's disk or memory; or, where none is right so far and
    another failed in the same words, of the dense model."""
    return machine_reason(problem) is not None or (not runs and str(problem) in map(str, failed.values()))


def _of_cuts(failed: Mapping[int, TrspError], then: str = "") -> TrspError:
    """One error for all cuts that failed, of the first one's class and so with its exit code; then: the line's end."""
    said = "; ".join(f"{cut_name(count)}: {problem}" for count, problem in failed.items())
    return type(next(iter(failed.values())))(f"{said}{then}")


def _found(job: Pipeline, counts: tuple[int, ...], targets: Targets, runs: Runs) -> Sweep:
    """The sweep as far as it is."""
    points = _points({one.run.path.name: report for one, report in runs})
    judged = {point.engine for point in points}
    return Sweep(
        model=job.inputs.model.shown,
        num_layers=job.inputs.model.num_layers(),
        points=points,
        targets=targets,
        choice=choose(points, targets, counts),
        provenance=provenance(),
        asked=counts,
        not_judged=tuple(spec.name for spec in job.engines.specs if spec.name not in judged),
    )


def _of_earlier_call(sweep: RunFolder, folder: Path) -> RunFolder | None:
    """The run that has most of what is made of the dense model, for a new one; None for one that was begun before."""
    others = [] if RunLayout(folder).is_run else [RunFolder(run.root) for run in sweep.layout.runs]
    return max(others, key=lambda run: len(_made_of_dense(run)), default=None)


def _run(
    job: Pipeline,
    count: int,
    plan: Path,
    before: Runs,
    say: Callable[[str], None],
    held: contextlib.ExitStack,
) -> tuple[Pipeline, Report]:
    """Make or finish one run, after those `before`; `held` has its lock from then on."""
    folder = job.run.layout.cut(count)
    source = before[0][0].run if before else _of_earlier_call(job.run, folder)
    recipe = job.recipe.model_copy(update={"drop": str(count)})
    run = held.enter_context(RunFolder(folder, lambda step, state: say(f"{folder.name}: {step}: {state}")))
    for made in filter(None, (source, job.run)):  # the sweep itself has the dense model
        _adopt_dense(made, run)
    one = Pipeline(run, recipe, plan, say, job.inputs.place)
    save_recipe(run, recipe, job.inputs.place)
    return one, prune_and_build(one)


def _adopt_dense(source: RunFolder, target: RunFolder) -> None:
    """Link what was made of the dense model into another run; the run's own records say whether it still holds.

    What the other run has made by itself it keeps, and what was measured of that: an engine is another each time.
    """
    lacking: set[str] = set()  # what the source has made and the other run has not
    for step, record in _made_of_dense(source).items():
        own = target.record(step)
        holds = own is not None and own.key == record.key and target.has_outputs(own)
        # Without its outputs it is of an engine that was cleaned away.
        if not holds and lacking.isdisjoint(record.inputs.values()) and source.has_outputs(record):
            target.outdate_manifest()
            for output in record.outputs:
                link_tree(source.path / output, target.path / output, copied=EXTERNAL_DATA)
            link_tree(source.layout.record(step), target.layout.record(step))
            own = record
        lacking |= set(record.outputs.values()) - set(own.outputs.values() if own is not None else ())


def _made_of_dense(run: RunFolder) -> dict[str, StepRecord]:
    return {step: record for step in steps.of_dense(run.recorded()) if (record := run.record(step)) is not None}


def _points(reports: Mapping[str, Report]) -> tuple[Point, ...]:
    """A point of each run, by its folder; all of one engine: that which ran in most of them, of several the first."""
    ran = Counter(each.name for report in reports.values() for each in report.engines if each.comparison is not None)
    name = max(ran, key=ran.__getitem__, default=None)
    return tuple(_point(report, folder, name) for folder, report in reports.items())


def _point(report: Report, folder: str, name: str | None) -> Point:
    engine = next((each for each in report.engines if each.name == name and each.comparison is not None), None)
    read = engine if engine is not None and engine.quality.keys() == report.quality.keys() else None  # every text
    return Point(
        num_dropped=len(report.plan.dropped),
        dropped=report.plan.dropped,
        folder=folder,
        engine=None if engine is None else engine.name,
        parameters_dropped_share=report.model.parameters_dropped_share,
        quality=report.quality if read is None else read.quality,
        quality_in_pytorch=read is None,
        choices=None if engine is None else engine.choices,
        comparison=None if engine is None else engine.comparison,
        size_bytes=None if engine is None or engine.pruned is None else engine.pruned.size_bytes,
        dense_size_bytes=None if engine is None or engine.dense is None else engine.dense.size_bytes,
        measured=report.measured,
    )


def _write(found: Sweep, root: Path) -> None:
    from trsp_deploy.tools.reports import sweep_page  # draws with matplotlib

    write_json(root / SWEEP, found)
    with writing(root / SWEEP_PAGE) as partial:
        partial.write_text(sweep_page.render(found), encoding="utf-8")
