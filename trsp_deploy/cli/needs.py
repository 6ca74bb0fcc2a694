"""The memory and disk that a run needs, said and refused before anything slow begins."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp_deploy.cli.terminal import say
from trsp_deploy.errors import DeviceMemoryError, ModelError
from trsp_deploy.launch import launched_as_several
from trsp_deploy.tools.resources import stage_names

if TYPE_CHECKING:
    from trsp_deploy.cli.terminal import Output
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.recipe import EngineSpec, Recipe
    from trsp_deploy.tools.resources.disk import DiskPlan


LIBRARIES_BYTES = 1_100_000_000  # of addresses; 1.05e9 were seen with torch 2.13 for the CPU


def check_address_space() -> None:
    """Raise DeviceMemoryError where not even the libraries have room: OpenBLAS would try to load for ever."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < LIBRARIES_BYTES:
        raise DeviceMemoryError(
            f"too little memory: `ulimit -v` allows {allowed / 1e9:.1f} GB of addresses, and the libraries alone take "
            f"{LIBRARIES_BYTES / 1e9:.1f} GB: ulimit -v unlimited"
        )


def show_memory(recipe: Recipe, plan_file: Path | None, output: Output, *, whole: bool = False) -> None:
    """The table of `--plan-memory`; with --json the same figures are the last line of stdout.

    Raises DeviceMemoryError, with settings that would fit, where a stage needs more than this machine has.
    whole: whether those after the transfer are the command's too; they are shown in any case.
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
    check_plan(recipe, config, found, dropped, engines if whole else None)


def check_memory(
    job: Pipeline, plan_file: Path | None, ignore: bool, *, whole: bool = False, counts: Sequence[int] = ()
) -> None:
    """Refuse what cannot fit before anything slow begins; stages whose result is there are not asked about.

    whole: exports, engines and evaluation will follow. counts: of layers, where this is a sweep of them.
    """
    from trsp_deploy.pipeline.engines import runnable
    from trsp_deploy.tools.resources.memory_plan import Engines, plan_fitting, plan_memory
    from trsp_deploy.tools.training.shared import pick_device

    missing: list[str] = list(job.pruning.unfinished())
    if missing:
        pick_device(job.recipe)  # before a model is fetched for a device that is not here
    engines = Engines(job.engines.buildable(), runnable(job.engines.specs)) if whole and job.run.main else None
    if launched_as_several() or not (missing or engines):
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config = job.inputs.model.config()
        if engines is not None:
            missing = job.unfinished(counts)
        if plan_file is not None:
            missing = [stage for stage in missing if stage != stage_names.SELECTION]
        dropped = _planned(job, plan_file, config)
        # The smallest cut of a sweep leaves the most to train, the largest has the most spans to fold.
        ends = [{"drop": str(count)} for count in sorted({min(counts), max(counts)})] if counts else [{}]
        recipes = [job.recipe.model_copy(update=end) for end in ends]
        if ignore:
            plans = [plan_memory(recipe, config, dropped, engines) for recipe in recipes]
        else:
            plans = [plan_fitting(recipe, config, missing, dropped, engines) for recipe in recipes]
        for line in max(plans, key=lambda plan: plan.peak_bytes).lines():
            say(line)


def _planned(job: Pipeline, plan_file: Path | None, config: Any) -> tuple[int, ...] | None:
    """The layers that go, by the plan that was handed in or is there; None where they are still to be chosen."""
    from trsp_deploy.tools.plan import read_plan

    plan = plan_file or job.run.layout.plan
    if plan_file is None and (not plan.is_file() or stage_names.SELECTION in job.pruning.unfinished()):
        return None
    return read_plan(plan, config.num_hidden_layers).dropped


def _disk_plan(
    job: Pipeline, plan_file: Path | None, config: Any, specs: Sequence[EngineSpec], counts: Sequence[int]
) -> DiskPlan:
    from trsp_deploy.tools.resources.disk import plan_disk, plan_sweep

    run, recipe = job.run.path, job.recipe
    if counts:
        finished = {count: job.finished(count) for count in counts}
        return plan_sweep(run, recipe, config, specs, counts, finished=finished, begun=job.finished())
    dropped = _planned(job, plan_file, config)
    count = None if dropped is None else len(dropped)
    return plan_disk(run, recipe, config, specs, finished=job.finished(), dropped=count)


def check_disk(job: Pipeline, plan_file: Path | None, ignore: bool, counts: Sequence[int] = ()) -> None:
    """Say what each stage will leave on the disk, and refuse what cannot fit there; counts: as in `check_memory`."""
    from trsp_deploy.tools.resources.disk import check_download, check_fits

    if launched_as_several() and job.run.recorded():
        job.inputs.model.copied()  # by all processes: what the main one holds the records against may need it
    if not job.run.main:
        return
    with contextlib.suppress(ModelError):  # of a model that cannot be used the pipeline says more
        config, specs = job.inputs.model.config(), job.engines.buildable()
        plan = _disk_plan(job, plan_file, config, specs, counts)
        say(plan.line())
        if not ignore:
            check_download(config, job.run.path)
            check_fits(plan, {spec.name: _disk_plan(job, plan_file, config, [spec], counts) for spec in specs})
