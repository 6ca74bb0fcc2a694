"""The commands that work on a run: prune-and-build, and each of its stages."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp_deploy.errors import DeviceMemoryError, ModelError, RecipeError, RunError, nearest

if TYPE_CHECKING:
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.recipe import Recipe
    from trsp_deploy.tools.memory import Stage

LIBRARIES_BYTES = 1_100_000_000  # of addresses; 1.05e9 were seen with torch 2.13 for the CPU

Model = Annotated[
    str | None, typer.Option("--model", help="A folder, a hub id, or a short name such as opt-6.7b.", metavar="M")
]
Drop = Annotated[
    str | None, typer.Option("--drop", help="Share of layers (25%) or count of layers (8) to remove.", metavar="D")
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="A name from `recipes ls` or a YAML file.", metavar="R")
]
Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", help="A name from `engines ls` or a YAML file; repeat for more.", metavar="E"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="Text to learn from: a .txt or .jsonl, dataset:split, or a name.", metavar="TEXTS"
    ),
]
Evaluation = Annotated[
    list[str] | None,
    typer.Option("--eval", help="Text to judge on, as NAME=TEXTS; repeat for more.", metavar="NAME=TEXTS"),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="Zero-shot choice task: piqa, copa (`fetch piqa`), or lm-eval's; repeat.", metavar="T"),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; runs/<model>-drop<k> when not given.", metavar="DIR")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice.", metavar="N")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one recipe key: transfer.steps=64.", metavar="KEY=VALUE")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Apply this plan.json instead of choosing layers.", metavar="FILE")
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="trsp, trsp-anneal, trsp-refit, shortgpt, sleb, uidl or fold.", metavar="M"),
]
Then = Annotated[
    str | None,
    typer.Option("--then", help="Transfer after any selection: anneal, l2, l1, train or none.", metavar="FORM"),
]
PlanMemory = Annotated[
    bool, typer.Option("--plan-memory", help="Show what training would need and what there is; load and train nothing.")
]
IgnoreMemory = Annotated[bool, typer.Option("--ignore-memory", help="Train even if the estimate does not fit.")]
IgnoreDisk = Annotated[bool, typer.Option("--ignore-disk", help="Begin even if the disk looks too small.")]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON line; all else goes to stderr.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]
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
        return _show_memory(chosen, plan, as_json)
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
        return _show_memory(chosen, plan, as_json)
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
    with quiet_libraries():
        manifest = build_engine(onnx, spec, out)
    size = f"{manifest.size_bytes / 1e6:.0f} MB"
    text = f"{out}: {spec.name}, {size}, built in {manifest.build_s:.0f} s (`trsp-deploy inspect {out}`)"
    _print_json(as_json, {"engine": manifest.model_dump(mode="json")}, text)


def bench(run: Run, engine: Engines = None, sets: Sets = None, as_json: Json = False) -> None:
    """Measure dense and pruned in turn on every engine that runs here."""
    with existing(run, engine, None, sets) as job:
        from trsp_deploy.tools.comparisons import sentence

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
    """Write report.json and report.md again, finishing what is missing."""
    with existing(run, None, None, None) as job:
        _finish(job, job.report(), as_json)


def recipe_from_options(
    model: str | None,
    drop: str | None,
    recipe: str | None,
    engine: list[str] | None,
    calibration: str | None,
    evaluation: list[str] | None,
    seed: int | None,
    sets: list[str] | None,
    method: str | None,
    then: str | None,
) -> Recipe:
    """The recipe named, or the model's own, or the default one, with every option on top."""
    from trsp_deploy.recipe import override, read_recipe
    from trsp_deploy.tools.library import load_recipe_values, recipe_names

    if model is None and recipe is None:
        raise RecipeError("--model is missing: give a folder, a hub id or a short name (or a --recipe that names one)")
    name = recipe or (model if model in recipe_names() else "default")
    values, source = load_recipe_values(name)
    for key, value in (("model", model), ("drop", drop), ("seed", seed)):
        if value is not None:
            values[key] = value
    options = {f"{group}.{key}": value for group, of in _method_settings(method).items() for key, value in of.items()}
    if calibration is not None:
        options["calibration.texts"] = calibration
    if then is not None:
        options["transfer.form"] = then
    values = override(values, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items()])
    values = _with_lists(values, engine, evaluation)
    return read_recipe(override(values, sets or []), f"{source} with the options given" if sets else source)


def task_sets(tasks: list[str] | None) -> list[str]:
    """`--task` as an override of the recipe."""
    return [] if tasks is None else [f"evaluate.tasks={json.dumps(tasks)}"]


def _method_settings(method: str | None) -> dict[str, dict[str, str | bool | int]]:
    from trsp_deploy.recipe import METHODS

    if method is None:
        return {}
    if method not in METHODS:
        raise RecipeError(
            f"--method '{method}': no such method{nearest(method, METHODS)} (available: {', '.join(METHODS)})"
        )
    return METHODS[method]


def _with_lists(values: dict[str, Any], engine: list[str] | None, evaluation: list[str] | None) -> dict[str, Any]:
    if engine:
        values["engines"] = engine
    if evaluation:
        pairs = [text.partition("=") for text in evaluation]
        for name, equals, texts in pairs:
            if not (name and equals and texts):
                raise RecipeError(f"--eval '{name}{equals}{texts}': expected NAME=TEXTS, such as wiki=wiki-demo")
        names = [name for name, _, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RecipeError(f"--eval '{twice}=...': given twice; each text needs a name of its own")
        values["evaluation"] = {name: texts for name, _, texts in pairs}
    return values


@contextlib.contextmanager
def existing(
    run: Path,
    engine: list[str] | None = None,
    evaluation: list[str] | None = None,
    sets: list[str] | None = None,
) -> Iterator[Pipeline]:
    """Enter the folder of a run that was begun, with its recipe and the options on top."""
    _check_address_space()
    from trsp_deploy.pipeline.runs import load_recipe
    from trsp_deploy.recipe import override, read_recipe

    values = override(_with_lists(load_recipe(run), engine, evaluation), sets or [])
    with run_of(read_recipe(values, str(run / "recipe.yaml")), run, None) as job:
        yield job


@contextlib.contextmanager
def run_of(recipe: Recipe, out: Path | None, plan: Path | None) -> Iterator[Pipeline]:
    """Enter the run folder and keep the resolved recipe in it."""
    say(f"{recipe.model}, dropping {recipe.drop} of the layers")
    _check_address_space()
    from trsp_deploy.artifacts import RunFolder
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.pipeline.runs import default_folder, save_recipe

    with RunFolder(out or default_folder(recipe, say), _announce) as run:
        job = Pipeline(run, recipe, plan, say)
        save_recipe(run, recipe)
        yield job


def _check_address_space() -> None:
    """Raise DeviceMemoryError where not even the libraries have room: OpenBLAS would try to load for ever."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < LIBRARIES_BYTES:
        raise DeviceMemoryError(
            f"too little memory: `ulimit -v` allows {allowed / 1e9:.1f} GB of addresses, and the libraries alone take "
            f"{LIBRARIES_BYTES / 1e9:.1f} GB: ulimit -v unlimited"
        )


def _show_memory(recipe: Recipe, plan_file: Path | None, as_json: bool) -> None:
    """The table of `--plan-memory`; with --json the same figures are the last line of stdout."""
    from trsp_deploy.cli.tables import print_memory
    from trsp_deploy.tools.device_memory import model_config, plan_memory
    from trsp_deploy.tools.plan import read_plan

    config = model_config(recipe.model, say)
    dropped = None if plan_file is None else read_plan(plan_file, config.num_hidden_layers).dropped
    found = plan_memory(recipe, config, dropped)
    print_memory(found, sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(found.summary()))


def check_memory(job: Pipeline, plan_file: Path | None, ignore: bool) -> None:
    """Refuse what cannot fit before anything slow begins; stages whose result is there are not asked about."""
    from trsp_deploy.tools.device_memory import check_memory, launched_as_several, model_config
    from trsp_deploy.tools.plan import read_plan
    from trsp_deploy.tools.training import pick_device

    plan = plan_file or job.run.path / "plan.json"
    stages: dict[Stage, bool] = {"selection": plan.is_file(), "transfer": (job.run.path / "pruned").is_dir()}
    missing = [stage for stage, done in stages.items() if not done]
    if missing:
        pick_device(job.recipe)  # before a model is fetched for a device that is not here
    if ignore or not missing or launched_as_several():
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config = model_config(job.recipe.model, say)
        dropped = read_plan(plan, config.num_hidden_layers).dropped if plan.is_file() else None
        found = check_memory(job.recipe, config, missing, dropped)
        parts = ", ".join(f"{each.stage} {each.peak.total_bytes / 1e9:.2f} GB" for each in found.stages)
        there = "unknown" if found.available_bytes is None else f"{found.available_bytes / 1e9:.2f} GB"
        say(f"needs {found.device} memory: {parts}; {there} there")


def check_disk(job: Pipeline, ignore: bool) -> None:
    """Say what each stage will leave on the disk, and refuse what cannot fit there."""
    from trsp_deploy.tools.device_memory import model_config
    from trsp_deploy.tools.disk import check_disk, plan_disk

    if not job.run.main:
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config, specs = model_config(job.recipe.model, say), job.engines.buildable()
        plan = plan_disk(job.run.path, job.recipe, config, specs, job.engines.specs[0].graph_precision)
        say(plan.line())
        if not ignore:
            check_disk(plan, job.recipe, config, specs)


def _announce(step: str, state: str) -> None:
    say(f"{step}: {state}")


def say(line: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from trsp_deploy.artifacts import is_main_process
    from trsp_deploy.errors import redacted

    if not is_main_process():
        return
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(
        f"[bold cyan]>[/] {escape(redacted(' '.join(line.split())))}"
    )


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
