"""A recipe that is to take an earlier one's place in a run's folder: a wrong one must not replace what was finished."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.errors import RunError
from trsp_deploy.launch import launched_as_several
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.runs import place_of, saved_recipe, seen_from
from trsp_deploy.reading import user_path
from trsp_deploy.recipe import Recipe, parse_drop
from trsp_deploy.stages.zeroshot import check_tasks
from trsp_deploy.tools.plan import read_plan
from trsp_deploy.tools.sources.models import model_config


def check_succession(job: Pipeline, plan: Path | None, *, chosen: bool) -> None:
    """Raise what is wrong with a run's new recipe, or its plan, before it is kept and anything is made by it.

    chosen: whether the folder was asked for; others are called by a model's name, which two models may have.
    """
    folder, before = job.run.path, saved_recipe(job.run)
    if before is None:
        return
    was, now = _where(seen_from(place_of(folder), before.model)), _where(job.inputs.model.name)
    if was != now and not chosen:
        raise RunError(f"{folder}: is a run of {was}; give --out for one of {now}")
    if was != now and not launched_as_several():  # of several machines the main process's alone may have the model
        _check_other_model(job, plan)
    elif job.inputs.model.is_another() or before != job.recipe or was != now:
        _check_other_settings(job, before, plan)


def _where(model: str) -> Path | str:
    """A model's folder in whatever way it was written; of one that has a name that name."""
    path = user_path(model)
    return path.resolve() if path.exists() else model


def _check_other_model(job: Pipeline, plan: Path | None) -> None:
    """Of a model that may have to be downloaded, before there is known to be room for it, its config alone is read."""
    inputs = job.inputs
    _check_cut(job.recipe, plan, model_config(inputs.model.name, inputs.say).num_hidden_layers)
    inputs.texts.calibration()
    inputs.texts.find_evaluation()
    if inputs.model.at_hand() is not None:
        inputs.texts.calibration_windows()


def _check_other_settings(job: Pipeline, before: Recipe, plan: Path | None) -> None:
    """What differs is tried; what was there before was tried then."""
    recipe = job.recipe
    _check_cut(recipe, plan, job.inputs.model.num_layers())
    if recipe.calibration != before.calibration or job.inputs.model.is_another():
        job.inputs.texts.calibration_windows()
    if (recipe.evaluation, recipe.evaluate) != (before.evaluation, before.evaluate):
        job.inputs.texts.read_evaluation()
    if recipe.evaluate.tasks != before.evaluate.tasks:
        check_tasks(job.inputs.texts.tasks())
    if recipe.bench != before.bench:
        job.inputs.model.check_bench(recipe.bench)


def _check_cut(recipe: Recipe, plan: Path | None, layers: int) -> None:
    parse_drop(recipe.drop, layers)
    if plan is not None:
        read_plan(plan, layers)
