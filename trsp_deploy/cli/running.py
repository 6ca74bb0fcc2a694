"""Entering a run: its folder and lock, the memory and disk it needs, and the lines it prints."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp_deploy.cli.recipe_options import with_lists
from trsp_deploy.errors import DeviceMemoryError, ModelError, RunError, one_line, redacted
from trsp_deploy.launch import launched_as_several
from trsp_deploy.reading import user_path

if TYPE_CHECKING:
    from trsp_deploy.cli.terminal import Output
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.recipe import EngineSpec, Recipe
    from trsp_deploy.tools.resources.disk import DiskPlan


LIBRARIES_BYTES = 1_100_000_000  # of addresses; 1.05e9 were seen with torch 2.13 for the CPU


@contextlib.contextmanager
def existing(
    run: Path,
    *,
    engine: list[str] | None = None,
    evaluation: list[str] | None = None,
    sets: list[str] | None = None,
) -> Iterator[Pipeline]:
    """Enter the folder of a run that was begun, with its recipe and the options on top."""
    _check_address_space()
    from trsp_deploy.artifacts import RUN_MARK
    from trsp_deploy.pipeline.runs import load_recipe, place_of
    from trsp_deploy.recipe import override, read_recipe

    place = place_of(run)
    named = _seen_from_here(place, engine, evaluation)
    values = override(with_lists(load_recipe(run), *named), sets or [])
    with run_of(read_recipe(values, str(run / RUN_MARK)), run, place=place) as job:
        yield job


def _seen_from_here(
    place: Path, engine: list[str] | None, evaluation: list[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """What this command names, where the run's other paths are relative to another folder than it."""
    if place == Path.cwd():
        return engine, evaluation

    def whole(text: str) -> str:
        path = user_path(text)
        return str(path.absolute()) if path.is_file() else text

    pairs = [pair.partition("=") for pair in evaluation or ()]
    texts = [f"{name}{sign}{whole(text)}" for name, sign, text in pairs]
    return engine and [whole(name) for name in engine], evaluation and texts


@contextlib.contextmanager
def run_of(
    recipe: Recipe, out: Path | None, plan: Path | None = None, place: Path | None = None, *, drops: str | None = None
) -> Iterator[Pipeline]:
    """Enter the folder of a run, or of a sweep, and keep the resolved recipe in it.

    place: that the recipe's relative paths are relative to; None is the working directory.
    drops: of a sweep, whose recipe has the first of them; looked at before anything of an earlier one is another.
    """
    dropping = f"{recipe.drop} of the layers" if plan is None else f"the layers of {plan}"
    say(f"{recipe.public.model}, dropping {dropping}")
    _check_address_space()
    from trsp_deploy.artifacts import RunFolder
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.pipeline.runs import default_folder, place_of, save_recipe, saved_recipe, seen_from, sweep_folder
    from trsp_deploy.recipe import parse_drops
    from trsp_deploy.tools.sources.models import model_config

    folder = out or (default_folder(recipe, plan, say) if drops is None else sweep_folder(recipe))
    _check_folder(folder, sweep=drops is not None)
    _check_outside(recipe.model, folder)
    if drops is not None:
        parse_drops(drops, model_config(recipe.model, say).num_hidden_layers)
    with RunFolder(folder, _Announcer()) as run:
        job = Pipeline(run, recipe, plan, say, place)
        before = saved_recipe(run)
        if before is not None:
            was, now = _where(seen_from(place_of(folder), before.model)), _where(job.inputs.model)
            if was != now and out is None:  # the folder is called by a model's name, and there are two of it
                raise RunError(f"{folder}: is a run of {was}; give --out for one of {now}")
            if before != recipe or was != now:
                _check_change(job, before, plan, was != now)  # before it takes the place of what was finished
        save_recipe(run, recipe, place)
        yield job


def _check_folder(folder: Path, sweep: bool) -> None:
    """Raise RunError for a folder that a run would replace parts of and that is none; of sweeps the same."""
    from trsp_deploy.artifacts.layout import LOCK, PARTS, RunLayout, check_no_sweep, run_that_owns

    layout = RunLayout(folder)
    around = run_that_owns(folder)
    if around is not None:
        raise RunError(f"{folder}: is a part of the run {around.root}; choose another --out")
    if not sweep:
        check_no_sweep(folder)
    elif layout.is_run and layout.plan.is_file():
        raise RunError(f"{folder}: is a run of one cut and no sweep; choose another --out")
    if (folder / LOCK).exists() or layout.is_run or layout.is_sweep:
        return
    if (folder / "config.json").is_file():
        raise RunError(f"{folder}: is a model's folder; choose another --out")
    taken = [name for part in PARTS for name in part.paths if (folder / name).exists()]
    if taken:
        raise RunError(f"{folder}: has {', '.join(taken)} and is no run of trsp-deploy; choose another --out")


def _check_outside(model: str, folder: Path) -> None:
    """Raise RunError for a model that lies in the run's own folder, where its parts are replaced."""
    if (path := user_path(model)).is_dir() and path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"--model {model}: lies in {folder}, which the run writes into; choose another --out")


def _where(model: str) -> Path | str:
    """A model's folder in whatever way it was written; of one that has a name that name."""
    path = user_path(model)
    return path.resolve() if path.exists() else model


def _check_change(job: Pipeline, before: Recipe, plan: Path | None, another: bool) -> None:
    """Raise what is wrong with a recipe that is to take another's place in a run's folder.

    another: it is of another model, which `dense/` would become as soon as the run is asked for it.
    """
    from trsp_deploy.recipe import parse_drop
    from trsp_deploy.stages.zeroshot import check_tasks
    from trsp_deploy.tools.plan import read_plan
    from trsp_deploy.tools.sources.models import model_config

    recipe = job.recipe
    ahead = another and not launched_as_several()  # of several machines the main process's alone may have the model
    layers = model_config(job.inputs.model, say).num_hidden_layers if ahead else job.inputs.num_layers()
    parse_drop(recipe.drop, layers)
    if plan is not None:
        read_plan(plan, layers)
    if ahead:
        job.inputs.calibration_texts()
        job.inputs.find_evaluation()
        return
    if recipe.calibration != before.calibration:
        job.inputs.calibration_windows()
    if (recipe.evaluation, recipe.evaluate) != (before.evaluation, before.evaluate):
        job.inputs.read_evaluation()
    if recipe.evaluate.tasks != before.evaluate.tasks:
        check_tasks(recipe.evaluate.tasks)
    if recipe.bench != before.bench:
        job.inputs.check_bench(recipe.bench)


def _check_address_space() -> None:
    """Raise DeviceMemoryError where not even the libraries have room: OpenBLAS would try to load for ever."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < LIBRARIES_BYTES:
        raise DeviceMemoryError(
            f"too little memory: `ulimit -v` allows {allowed / 1e9:.1f} GB of addresses, and the libraries alone take "
            f"{LIBRARIES_BYTES / 1e9:.1f} GB: ulimit -v unlimited"
        )


def show_memory(recipe: Recipe, plan_file: Path | None, output: Output) -> None:
    """The table of `--plan-memory`; with --json the same figures are the last line of stdout.

    Raises DeviceMemoryError, with settings that would fit, where a stage needs more than this machine has.
    """
    from trsp_deploy.cli.tables import print_memory
    from trsp_deploy.pipeline.engines import buildable, runnable, specs_of
    from trsp_deploy.tools.plan import read_plan
    from trsp_deploy.tools.resources.memory_plan import Engines, check_plan, plan_memory
    from trsp_deploy.tools.sources.models import model_config

    config = model_config(recipe.model, say)
    dropped = None if plan_file is None else read_plan(plan_file, config.num_hidden_layers).dropped
    specs = specs_of(recipe.engines)
    engines = Engines(buildable(specs), runnable(specs))
    found = plan_memory(recipe, config, dropped, engines)
    print_memory(found, output.stream)
    output.result(found.summary())
    check_plan(recipe, config, found, dropped, engines)


def check_memory(
    job: Pipeline, plan_file: Path | None, ignore: bool, *, whole: bool = False, counts: Sequence[int] = ()
) -> None:
    """Refuse what cannot fit before anything slow begins; stages whose result is there are not asked about.

    whole: exports, engines and evaluation will follow. counts: of layers, where this is a sweep of them.
    """
    from trsp_deploy.pipeline.engines import runnable
    from trsp_deploy.tools.plan import read_plan
    from trsp_deploy.tools.resources.memory_plan import Engines, check_memory, plan_memory
    from trsp_deploy.tools.sources.models import model_config
    from trsp_deploy.tools.training.shared import pick_device

    missing: list[str] = list(job.pruning.unfinished())
    if missing:
        pick_device(job.recipe)  # before a model is fetched for a device that is not here
    engines = Engines(job.engines.buildable(), runnable(job.engines.specs)) if whole and job.run.main else None
    if launched_as_several() or not (missing or engines):
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config = model_config(job.inputs.model, say)
        if engines is not None:
            missing = job.unfinished(counts)
        if plan_file is not None:
            missing = [stage for stage in missing if stage != "selection"]
        plan = plan_file or job.run.layout.plan
        chosen = plan.is_file() and "selection" not in missing
        dropped = read_plan(plan, config.num_hidden_layers).dropped if chosen else None
        # The smallest cut of a sweep leaves the most to train.
        recipe = job.recipe.model_copy(update={"drop": str(min(counts))}) if counts else job.recipe
        if ignore:
            found = plan_memory(recipe, config, dropped, engines)
        else:
            found = check_memory(recipe, config, missing, dropped, engines)
        for line in found.lines():
            say(line)


def _disk_plan(job: Pipeline, config: Any, specs: Sequence[EngineSpec], counts: Sequence[int]) -> DiskPlan:
    from trsp_deploy.tools.resources.disk import plan_disk, plan_sweep

    run, recipe = job.run.path, job.recipe
    if counts:
        finished = {count: job.finished(count) for count in counts}
        return plan_sweep(run, recipe, config, specs, counts, finished=finished)
    return plan_disk(run, recipe, config, specs, finished=job.finished())


def check_disk(job: Pipeline, ignore: bool, counts: Sequence[int] = ()) -> None:
    """Say what each stage will leave on the disk, and refuse what cannot fit there; counts: as in `check_memory`."""
    from trsp_deploy.tools.resources.disk import check_disk
    from trsp_deploy.tools.sources.models import model_config

    if launched_as_several() and job.run.recorded():
        job.inputs.dense()  # by all processes: what the main one holds the records against may need it
    if not job.run.main:
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config, specs = model_config(job.inputs.model, say), job.engines.buildable()
        plan = _disk_plan(job, config, specs, counts)
        say(plan.line())
        if not ignore:
            check_disk(plan, {spec.name: _disk_plan(job, config, [spec], counts) for spec in specs})


class _Announcer:
    """Says when a step begins and ends, with its highest memory, and now and then that it goes on."""

    def __init__(self) -> None:
        self._going_on = contextlib.ExitStack()

    def __call__(self, step: str, state: str) -> None:
        from trsp_deploy.artifacts.run_folder import STOPPED
        from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes
        from trsp_deploy.tools.progress import Heartbeat

        self._going_on.close()
        peak = peak_resident_bytes()
        if state == "started":
            forget_peak()
        elif state != STOPPED and state.startswith("done") and peak is not None:
            state = f"{state}, at most {peak / 1e9:.2f} GB"
        if state != STOPPED:
            say(f"{step}: {state}")
        if state == "started":
            self._going_on.enter_context(Heartbeat(step))


def say(line: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from trsp_deploy.artifacts import is_main_process

    if not is_main_process():
        return
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(
        f"[bold cyan]>[/] {escape(redacted(one_line(line)))}"
    )
