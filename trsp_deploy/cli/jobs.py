"""The commands that work on a run: prune-and-build, and each of its stages."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trsp_deploy.cli.engine_jobs import build_from_onnx
from trsp_deploy.cli.needs import check_disk, check_memory, show_memory
from trsp_deploy.cli.options import (
    Calibration,
    Drop,
    Engines,
    Evaluation,
    IgnoreDisk,
    IgnoreMemory,
    Json,
    MethodName,
    Model,
    Out,
    PlanFile,
    PlanMemory,
    Private,
    PushToHub,
    RecipeName,
    Run,
    Seed,
    Sets,
    Tasks,
    Then,
)
from trsp_deploy.cli.recipe_options import recipe_from_options, task_sets
from trsp_deploy.cli.running import existing, run_of
from trsp_deploy.cli.terminal import Output
from trsp_deploy.errors import EngineUnavailable, RecipeError

if TYPE_CHECKING:
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.tools.reports.record import Report


OptionalRun = Annotated[Path | None, typer.Argument(help="Folder of a run.", metavar="RUN")]
OnnxFile = Annotated[
    Path | None, typer.Option("--onnx", help="Build from this decoder's ONNX file instead of a run.", metavar="FILE")
]
BuildOut = Annotated[
    Path | None, typer.Option("--out", help="Folder of the engine that --onnx is built into.", metavar="DIR")
]
BuildText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="With --onnx: text that 4, 8 and 16-bit engines make their choices on; random tokens when not given.",
        metavar="TEXTS",
    ),
]
BuildTokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="With --calibration: folder of the tokenizer, where it is not beside the ONNX file.",
        metavar="DIR",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (prune_and_build, prune, export, build, bench, evaluate, report):
        app.command(command.__name__.replace("_", "-"))(command)


def prune_and_build(
    model: Model = None,
    drop: Drop = None,
    recipe: RecipeName = None,
    engine: Engines = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    out: Out = None,
    seed: Seed = None,
    sets: Sets = None,
    plan: PlanFile = None,
    method: MethodName = None,
    then: Then = None,
    task: Tasks = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    plan_memory: PlanMemory = False,
    ignore_memory: IgnoreMemory = False,
    ignore_disk: IgnoreDisk = False,
    as_json: Json = False,
) -> None:
    """The whole job: prune, export, build engines, and judge the result against the dense model."""
    _check_push(push_to_hub, private)
    sets = [*(sets or []), *task_sets(task)]
    chosen = recipe_from_options(
        model=model,
        drop=drop,
        recipe=recipe,
        engine=engine,
        calibration=calibration,
        evaluation=evaluation,
        seed=seed,
        sets=sets,
        method=method,
        then=then,
    )
    if plan_memory:
        return show_memory(chosen, plan, Output(as_json), whole=True)

    def check(job: Pipeline) -> None:
        check_memory(job, plan, ignore_memory, whole=True)
        check_disk(job, plan, ignore_disk)

    with run_of(chosen, out, plan, check=check) as job:
        from trsp_deploy.pipeline import prune_and_build as run_all

        _finish(job, run_all(job), Output(as_json), push_to_hub, private)


def prune(
    model: Model = None,
    drop: Drop = None,
    recipe: RecipeName = None,
    calibration: Calibration = None,
    out: Out = None,
    seed: Seed = None,
    sets: Sets = None,
    plan: PlanFile = None,
    method: MethodName = None,
    then: Then = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    plan_memory: PlanMemory = False,
    ignore_memory: IgnoreMemory = False,
    as_json: Json = False,
) -> None:
    """Choose the layers, move their knowledge, remove them: writes plan.json and pruned/."""
    _check_push(push_to_hub, private)
    choose = functools.partial(
        recipe_from_options,
        model=model,
        drop=drop,
        recipe=recipe,
        calibration=calibration,
        seed=seed,
        sets=sets,
        method=method,
        then=then,
    )
    chosen = choose()
    if plan_memory:
        return show_memory(chosen, plan, Output(as_json))
    check = functools.partial(check_memory, plan_file=plan, ignore=ignore_memory)
    with run_of(chosen, out, plan, choose=choose, check=check) as job:
        job.inputs.texts.calibration()  # before the model, which may have to be downloaded
        result = job.pruning.prune()
        output = Output(as_json)
        output.say(
            f"dropped {', '.join(map(str, result.dropped))}; perplexity on held-out calibration text "
            f"{result.ppl_dense:.2f} dense, {result.ppl_after_removal:.2f} pruned; "
            f"checkpoint: {job.run.path / 'pruned'}"
        )
        plain = result.model_dump(mode="json", exclude={"lm_loss", "penalty"})
        pushed = _pushed(job, output, push_to_hub, private)
        output.result({**plain, "run": str(job.run.path), **pushed})


def _check_push(repo: str | None, private: bool) -> None:
    """Raise UserError for a push that would fail after hours of work."""
    if repo is not None:
        from trsp_deploy.tools.delivery.publishing import check_push

        check_push(repo)
    elif private:
        raise RecipeError("--private: is for --push-to-hub OWNER/NAME")


def _pushed(job: Pipeline, output: Output, repo: str | None, private: bool) -> dict[str, str]:
    """Push the run's checkpoint where that was asked for; what the command's result says of it."""
    if repo is None or not job.run.main:
        return {}
    from trsp_deploy.tools.delivery.publishing import plan_push, push

    plan = plan_push(job.run.path, repo)
    url = push(plan, private)
    output.say(f"{url}: {plan.what}")
    return {"repo": repo, "commit": url}


def export(run: Run, sets: Sets = None, as_json: Json = False) -> None:
    """Export dense and pruned to ONNX."""
    with existing(run, sets=sets) as job:
        output = Output(as_json)
        reasons = job.engines.not_buildable()
        _check_some(len(job.engines.specs), reasons)
        models = job.engines.export().values()
        output.say(
            *(f"{name}: unavailable, so that no graph is made for it ({reason})" for name, reason in reasons.items()),
            *(f"{run / model.folder}: {model.precision}, {model.size_bytes / 1e6:.0f} MB" for model in models),
        )
        output.result({"onnx": [model.model_dump(mode="json") for model in models]})


def build(
    run: OptionalRun = None,
    engine: Engines = None,
    onnx: OnnxFile = None,
    out: BuildOut = None,
    calibration: BuildText = None,
    tokenizer: BuildTokenizer = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Build engines for a run's dense and pruned models, or one engine from any decoder's ONNX file."""
    if onnx is not None:
        if sets:
            raise RecipeError("build --onnx: --set is for the recipe of a run; an engine's settings are its spec's")
        return build_from_onnx(run, onnx, engine or [], out, calibration, tokenizer, Output(as_json))
    if run is None or out is not None:
        raise RecipeError("build: give a run's folder, or --onnx FILE with --engine E and --out DIR")
    if calibration is not None or tokenizer is not None:
        raise RecipeError("build RUN: --calibration and --tokenizer are for --onnx; a run has its own text")
    with existing(run, engine=engine, sets=sets) as job:
        outcomes = job.engines.build()
        _check_some(len(outcomes), {o.spec.name: str(o.reason) for o in outcomes if not o.manifests})
        output = Output(as_json)
        for outcome in outcomes:
            state = "built" if outcome.manifests else "unavailable"
            output.say(f"{outcome.spec.name}: {state}" + (f" ({outcome.reason})" if outcome.reason else ""))
        output.result(
            {
                "engines": [
                    {"name": o.spec.name, "built": bool(o.manifests), "runs": o.reason is None, "reason": o.reason}
                    for o in outcomes
                ]
            }
        )


def bench(run: Run, engine: Engines = None, sets: Sets = None, as_json: Json = False) -> None:
    """Measure dense and pruned in turn on every engine that runs here."""
    with existing(run, engine=engine, sets=sets) as job:
        from trsp_deploy.tools.judging.comparisons import sentence

        job.proof.check_engines()
        found = {name: job.proof.compared(name) for name in job.proof.bench()}
        lines = [sentence(name, comparison) for name, comparison in found.items()]
        plain = {name: comparison.model_dump(mode="json") for name, comparison in found.items()}
        reasons = {o.spec.name: o.reason for o in job.engines.build() if o.reason is not None}
        _check_some(len(job.engines.specs), reasons | job.proof.failed)
        failed = [f"{name} {reason}" for name, reason in job.proof.failed.items()]
        output = Output(as_json)
        output.say(*lines, *failed)
        output.result({"comparisons": plain, "failed": job.proof.failed, "unavailable": reasons})


def _check_some(engines: int, lacking: Mapping[str, str]) -> None:
    """Raise EngineUnavailable where none of a run's engines gets what was asked for. lacking: why not, by name."""
    if len(lacking) == engines:
        raise EngineUnavailable("; ".join(f"{name}: {reason}" for name, reason in lacking.items()))


def evaluate(run: Run, evaluation: Evaluation = None, sets: Sets = None, as_json: Json = False) -> None:
    """Perplexity of dense and pruned on held-out text."""
    with existing(run, evaluation=evaluation, sets=sets) as job:
        found = {
            name: {role: ppl.ppl for role, ppl in by_role.items()} for name, by_role in job.proof.evaluate().items()
        }
        output = Output(as_json)
        output.say(*(f"{name}: {ppl['dense']:.2f} dense, {ppl['pruned']:.2f} pruned" for name, ppl in found.items()))
        output.result({"perplexity": found})


def report(run: Run, as_json: Json = False) -> None:
    """Write report.json, report.md and report.html again, finishing what is missing."""
    with existing(run) as job:
        _finish(job, job.report(), Output(as_json))


def _finish(
    job: Pipeline, found: Report, output: Output, push_to_hub: str | None = None, private: bool = False
) -> None:
    """Show the report's table and verdict, and push the checkpoint where that was asked for."""
    from trsp_deploy.cli.tables import print_report
    from trsp_deploy.stages.report import summary

    print_report(found, job.run.path, output.stream)
    output.result({**summary(found, job.run.path), **_pushed(job, output, push_to_hub, private)})
