"""The commands that work on a run: prune-and-build, and each of its stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    RecipeName,
    Run,
    Seed,
    Sets,
    Tasks,
    Then,
)
from trsp_deploy.cli.recipe_options import recipe_from_options, task_sets
from trsp_deploy.cli.running import check_disk, check_memory, existing, run_of, show_memory
from trsp_deploy.errors import RecipeError, RunError

if TYPE_CHECKING:
    from trsp_deploy.pipeline import Pipeline


OptionalRun = Annotated[Path | None, typer.Argument(help="Folder of a run.", metavar="RUN")]
OnnxFile = Annotated[
    Path | None, typer.Option("--onnx", help="Build from this decoder's ONNX file instead of a run.", metavar="FILE")
]
BuildOut = Annotated[
    Path | None, typer.Option("--out", help="Folder of the engine that --onnx is built into.", metavar="DIR")
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
    plan_memory: PlanMemory = False,
    ignore_memory: IgnoreMemory = False,
    ignore_disk: IgnoreDisk = False,
    as_json: Json = False,
) -> None:
    """The whole job: prune, export, build engines, and judge the result against the dense model."""
    sets = [*(sets or []), *task_sets(task)]
    chosen = recipe_from_options(model, drop, recipe, engine, calibration, evaluation, seed, sets, method, then)
    if plan_memory:
        return show_memory(chosen, plan, as_json)
    with run_of(chosen, out, plan) as job:
        check_memory(job, plan, ignore_memory)
        check_disk(job, ignore_disk)
        from trsp_deploy.pipeline import prune_and_build as run_all

        _finish(job, run_all(job), as_json)


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
    plan_memory: PlanMemory = False,
    ignore_memory: IgnoreMemory = False,
    as_json: Json = False,
) -> None:
    """Choose the layers, move their knowledge, remove them: writes plan.json and pruned/."""
    chosen = recipe_from_options(model, drop, recipe, None, calibration, None, seed, sets, method, then)
    if plan_memory:
        return show_memory(chosen, plan, as_json)
    with run_of(chosen, out, plan) as job:
        check_memory(job, plan, ignore_memory)
        result = job.pruning.prune()
        _print_json(
            as_json,
            {**result.model_dump(mode="json", exclude={"lm_loss", "penalty"}), "run": str(job.run.path)},
            f"dropped {', '.join(map(str, result.dropped))}; perplexity on held-out calibration text "
            f"{result.ppl_dense:.2f} dense, {result.ppl_after_removal:.2f} pruned; "
            f"checkpoint: {job.run.path / 'pruned'}",
        )


def export(run: Run, sets: Sets = None, as_json: Json = False) -> None:
    """Export dense and pruned to ONNX."""
    with existing(run, None, None, sets) as job:
        models = job.engines.export()
        _print_json(
            as_json,
            {"onnx": [model.model_dump(mode="json") for model in models.values()]},
            "\n".join(
                f"{run / model.folder}: {model.precision}, {model.size_bytes / 1e6:.0f} MB" for model in models.values()
            ),
        )


def build(
    run: OptionalRun = None,
    engine: Engines = None,
    onnx: OnnxFile = None,
    out: BuildOut = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Build engines for a run's dense and pruned models, or one engine from any decoder's ONNX file."""
    if onnx is not None:
        return _build_from_onnx(run, onnx, engine or [], out, as_json)
    if run is None or out is not None:
        raise RecipeError("build: give a run's folder, or --onnx FILE with --engine E and --out DIR")
    with existing(run, engine, None, sets) as job:
        outcomes = job.engines.build()
        lines = []
        for outcome in outcomes:
            state = ("built" if outcome.manifests else "unavailable") + (
                f" ({outcome.reason})" if outcome.reason else ""
            )
            lines.append(f"{outcome.spec.name}: {state}")
        _print_json(
            as_json,
            {
                "engines": [
                    {"name": o.spec.name, "built": bool(o.manifests), "runs": o.reason is None, "reason": o.reason}
                    for o in outcomes
                ]
            },
            "\n".join(lines),
        )


def _build_from_onnx(run: Path | None, onnx: Path, engines: list[str], out: Path | None, as_json: bool) -> None:
    if run is not None or len(engines) != 1 or out is None:
        raise RecipeError("build --onnx FILE: needs one --engine and --out DIR, and no run's folder")
    from trsp_deploy.stages.build import build_engine
    from trsp_deploy.tools.library import load_engine_spec
    from trsp_deploy.tools.quiet import quiet_libraries

    spec = load_engine_spec(engines[0])
    _check_engine_folder(out)
    with quiet_libraries():
        manifest = build_engine(onnx, spec, out)
    size = f"{manifest.size_bytes / 1e6:.0f} MB"
    text = f"{out}: {spec.name}, {size}, built in {manifest.build_s:.0f} s (`trsp-deploy inspect {out}`)"
    _print_json(as_json, {"engine": manifest.model_dump(mode="json")}, text)


def _check_engine_folder(out: Path) -> None:
    """Raise RecipeError for a folder that an engine would replace, and that is none."""
    from trsp_deploy.tools.measuring.subjects import ENGINE_MARK

    if Path.cwd().is_relative_to(out.resolve()):
        raise RecipeError(f"--out {out}: is the folder that this runs in, or one around it; name a new one")
    if out.is_dir() and any(out.iterdir()) and not (out / ENGINE_MARK).is_file():
        raise RecipeError(f"--out {out}: holds other things than an engine; name a new folder, or an engine's")


def bench(run: Run, engine: Engines = None, sets: Sets = None, as_json: Json = False) -> None:
    """Measure dense and pruned in turn on every engine that runs here."""
    with existing(run, engine, None, sets) as job:
        from trsp_deploy.tools.judging.comparisons import sentence

        job.proof.check_engines()
        found = {name: job.proof.compared(name) for name in job.proof.bench()}
        lines = [sentence(name, comparison) for name, comparison in found.items()]
        plain = {name: comparison.model_dump(mode="json") for name, comparison in found.items()}
        failed = [f"{name} {reason}" for name, reason in job.proof.failed.items()]
        if failed and not found:
            raise RunError(f"{run}: {'; '.join(failed)}")
        _print_json(
            as_json,
            {"comparisons": plain, "failed": job.proof.failed},
            "\n".join([*lines, *failed]) or "no engine of this run can run on this machine",
        )


def evaluate(run: Run, evaluation: Evaluation = None, sets: Sets = None, as_json: Json = False) -> None:
    """Perplexity of dense and pruned on held-out text."""
    with existing(run, None, evaluation, sets) as job:
        found = {
            name: {role: ppl.ppl for role, ppl in by_role.items()} for name, by_role in job.proof.evaluate().items()
        }
        lines = [f"{name}: {ppl['dense']:.2f} dense, {ppl['pruned']:.2f} pruned" for name, ppl in found.items()]
        _print_json(as_json, {"perplexity": found}, "\n".join(lines))


def report(run: Run, as_json: Json = False) -> None:
    """Write report.json, report.md and report.html again, finishing what is missing."""
    with existing(run, None, None, None) as job:
        _finish(job, job.report(), as_json)


def _print_json(as_json: bool, value: dict[str, Any], text: str) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(value))


def _finish(job: Pipeline, found: Any, as_json: bool) -> None:
    """Show the report's table and verdict; with --json its summary is the last line of stdout."""
    from trsp_deploy.cli.tables import print_report
    from trsp_deploy.stages.report import summary

    print_report(found, job.run.path, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary(found, job.run.path)))
