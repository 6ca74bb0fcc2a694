"""The main job: model -> plan -> pruned checkpoint -> ONNX -> engines -> measurements -> report.

`prune_and_build` reads as the README's picture. Every part is a step of the run folder: what is finished and still
matches its inputs is reused, so each command can ask for the part it wants and gets what that depends on.

    inputs <- pruning <- engines <- proof <- reporting      a module each; each knows those on its left
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from trsp_deploy.artifacts import RunFolder, steps
from trsp_deploy.errors import RecipeError, TrspError
from trsp_deploy.launch import launched
from trsp_deploy.pipeline.engines import Engines, runnable
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.pipeline.reporting import make_report
from trsp_deploy.pipeline.runs import save_recipe
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import ROLES
from trsp_deploy.stages import export, zeroshot
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.resources import stage_names
from trsp_deploy.tools.training.processes import Processes
from trsp_deploy.tools.training.shared import pick_device


class Pipeline:
    """One run: its folder, its recipe, and its parts; what a part has worked out it keeps."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        plan_file: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
        place: Path | None = None,
    ) -> None:
        """place: that relative paths in the recipe are relative to; None is the working directory."""
        self.run = run
        self.recipe = recipe
        if launched():  # `accelerate launch`; joining costs an import that a single process can do without
            processes = Processes(pick_device(recipe))
            run.from_main = processes.from_main
            _check_shares(recipe, processes.count, plan_file is not None or run.record(steps.PLAN) is not None)
        self.inputs = Inputs(run, recipe, say, place)
        self.pruning = Pruning(self.inputs, plan_file)
        self.engines = Engines(self.inputs, self.pruning)
        self.proof = Proof(self.inputs, self.pruning, self.engines)

    def finished(self, count: int | None = None) -> frozenset[str]:
        """The steps that need not be done again, as the records tell before anything is made.

        count: of layers, where this is a sweep of them and its run with so many dropped is asked about.
        """
        run = None if count is None else RunFolder(self.run.layout.cut(count))
        found = self.pruning.finished(run, count)
        self.engines.ask(found)
        self.proof.ask(found)
        return frozenset(found.steps)

    def unfinished(self, counts: Sequence[int] = ()) -> list[str]:
        """Stages, by the estimates' names, with a step that has to be done; counts: of layers, of a sweep of them."""
        stages = {stage_names.SELECTION: [steps.PLAN], stage_names.TRANSFER: [steps.PRUNE]}
        texts = list(itertools.product(self.recipe.evaluation, ROLES))
        for spec in self.engines.specs:
            precision = spec.graph_precision
            stages[stage_names.export(precision)] = [steps.export(role, precision) for role in ROLES]
            stages[stage_names.build(spec.name)] = [steps.build(spec.name, role) for role in ROLES]
            stages[stage_names.run(spec.name)] = [
                steps.bench(spec.name),
                *(steps.evaluate(name, role, spec.name) for name, role in texts),
                *(steps.zero_shot(spec.name, role) for role in ROLES if self.recipe.evaluate.tasks),
            ]
        stages[stage_names.EVALUATION] = [steps.evaluate(name, role) for name, role in texts]
        done = [self.finished(count) for count in counts] or [self.finished()]
        left = [stage for stage, needed in stages.items() if not all(each.issuperset(needed) for each in done)]
        if counts:  # one search for all
            left = [stage for stage in left if stage != stage_names.SELECTION]
        return [stage_names.SELECTION, *left] if counts and not self.pruning.searched(counts) else left

    def report(self) -> Report:
        """Measure what is missing; write report.json, report.md, report.html and the manifest."""
        return make_report(self.proof)


def _check_shares(recipe: Recipe, count: int, planned: bool = False) -> None:
    """Raise RecipeError where a batch cannot be divided among processes, before anything is fetched.

    planned: whether there is a plan already, so that no gates are trained.
    """
    sizes = {"plan.batch_size": recipe.plan.batch_size} if recipe.plan.method == "trsp" and not planned else {}
    if recipe.transfer.form != "none":
        sizes["transfer.batch_size"] = recipe.transfer.batch_size
    uneven = {name: size for name, size in sizes.items() if size % count}
    if uneven:
        name, size = next(iter(uneven.items()))
        more = " ".join(f"--set {each}={count * -(-size // count)}" for each, size in uneven.items())
        raise RecipeError(f"{name} {size} with {count} processes; valid: a multiple of {count}, such as {more}")


def check_before_work(job: Pipeline) -> None:
    """Raise what would otherwise be raised after hours: texts and tasks that are not there, windows too long, a model
    that cannot be exported. What the run has, `dense/` too, is as it was by then.

    Texts come first: the model may have to be downloaded. Tasks that were answered are not asked for again, nor is an
    export that is there tried.
    """
    job.inputs.texts.calibration()
    _tried_by_main(job.run, job.inputs.texts.find_evaluation)
    job.inputs.check_lengths()
    job.inputs.texts.calibration_windows()

    def judged() -> None:
        job.inputs.texts.read_evaluation()
        finished, buildable = job.finished(), job.engines.buildable()
        answers = {steps.zero_shot(spec.name, role) for spec in runnable(buildable) for role in ROLES}
        if not answers or not answers <= finished:
            zeroshot.check_tasks(job.inputs.texts.tasks())
        if not finished.issuperset(steps.export("dense", spec.graph_precision) for spec in buildable):
            export.check_exportable(job.inputs.model.readable(), job.recipe.export, job.inputs.say)

    _tried_by_main(job.run, judged)


def _tried_by_main(run: RunFolder, check: Callable[[], None]) -> None:
    """What concerns the main process alone, such as what a model is judged on; its error is raised in all of them."""
    problem: TrspError | None = None
    if run.main:
        try:
            check()
        except TrspError as found:
            problem = found
    problem = run.from_main(problem)
    if problem is not None:
        raise problem


def prune_and_build(job: Pipeline) -> Report:
    """Run every stage that is not finished yet, and write the report.

    The recipe is kept in the run folder, so that every command goes on with it.
    """
    save_recipe(job.run, job.recipe, job.inputs.place)
    check_before_work(job)
    job.pruning.plan()
    job.pruning.prune()
    job.engines.export()
    job.proof.check_onnx()
    job.engines.build()
    job.proof.check_engines()
    job.proof.bench()
    job.proof.evaluate()
    return job.report()
