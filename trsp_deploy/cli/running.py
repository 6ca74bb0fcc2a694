"""Entering a run: its folder, with the recipe that is kept there, and its lock."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trsp_deploy.cli.needs import check_address_space, check_memory
from trsp_deploy.cli.recipe_options import say_twins, with_lists
from trsp_deploy.cli.terminal import Announcer, say
from trsp_deploy.errors import PlanError, RunError
from trsp_deploy.reading import read_record, user_path

if TYPE_CHECKING:
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.recipe import Recipe


@contextlib.contextmanager
def existing(
    run: Path,
    *,
    engine: list[str] | None = None,
    evaluation: list[str] | None = None,
    sets: list[str] | None = None,
) -> Iterator[Pipeline]:
    """Enter the folder of a run that was begun, with its recipe and the options on top.

    What selection and transfer need is shown where they are to be done again, and refuses nothing: the commands over a
    run have no `--ignore-memory`, with which the run may have been begun.
    """
    check_address_space()
    from trsp_deploy.artifacts import RUN_MARK
    from trsp_deploy.pipeline.runs import load_recipe, place_of
    from trsp_deploy.recipe import override, read_recipe

    place = place_of(run)
    named = _seen_from_here(place, engine, evaluation)
    values = override(with_lists(load_recipe(run), *named), sets or [])
    say_twins(sets)
    source = f"{run / RUN_MARK} with the options given" if engine or evaluation or sets else str(run / RUN_MARK)
    check = functools.partial(check_memory, plan_file=None, ignore=True)
    with run_of(read_recipe(values, source), run, place=place, check=check) as job:
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
    recipe: Recipe,
    out: Path | None,
    plan: Path | None = None,
    place: Path | None = None,
    *,
    drops: str | None = None,
    choose: Callable[..., Recipe] | None = None,
    check: Callable[[Pipeline], None] = lambda job: None,
) -> Iterator[Pipeline]:
    """Enter the folder of a run, or of a sweep, and keep the resolved recipe in it.

    place: that the recipe's relative paths are relative to; None is the working directory.
    drops: of a sweep, whose recipe has the first of them; looked at before anything of an earlier one is another.
    choose: gives the recipe once more where it keeps what an earlier one in the folder says of judging (`kept`); of a
    command that has no options for that.
    check: what the machine has to hold, which it may not; the recipe is kept only of what it can.
    """
    dropping = f"{recipe.drop} of the layers" if plan is None else f"the layers of {plan}"
    say(f"{recipe.public.model}, dropping {dropping}")
    check_address_space()
    from trsp_deploy.artifacts import RUN_MARK, RunFolder
    from trsp_deploy.artifacts.layout import check_can_hold, check_can_hold_cuts
    from trsp_deploy.pipeline import Pipeline
    from trsp_deploy.pipeline.dense_model import DenseModel
    from trsp_deploy.pipeline.runs import (
        default_folder,
        kept_judging,
        no_longer_has,
        save_recipe,
        seen_from,
        sweep_folder,
    )
    from trsp_deploy.pipeline.succession import check_succession
    from trsp_deploy.recipe import parse_drops
    from trsp_deploy.tools.plan import PruningPlan
    from trsp_deploy.tools.sources.names import SHORT_NAMES

    if plan is not None:  # before a folder is made for it; whether it is one for this model shows later
        read_record(plan, PruningPlan, PlanError)
    folder = out or (default_folder(recipe, plan, say) if drops is None else sweep_folder(recipe))
    check_can_hold(folder, sweep=drops is not None)
    _check_outside(seen_from(place or Path.cwd(), recipe.model, SHORT_NAMES), folder)
    if drops is not None:
        model = DenseModel(RunFolder(folder), recipe, say, place or Path.cwd())
        config = model.config()  # of a sweep that was begun its own copy's
        check_can_hold_cuts(folder, parse_drops(drops, config.num_hidden_layers))
    with RunFolder(folder, Announcer()) as run:
        if choose is not None and (kept := kept_judging(run)):
            recipe = choose(kept=kept)
        job = Pipeline(run, recipe, plan, say, place)
        check_succession(job, plan, chosen=out is not None)
        check(job)
        gone = no_longer_has(run, recipe, place)
        save_recipe(run, recipe, place)
        if gone:
            say(f"{RUN_MARK} no longer has: {', '.join(gone)}")
        yield job


def _check_outside(model: str, folder: Path) -> None:
    """Raise RunError for a model that lies in the run's own folder, where its parts are replaced."""
    if (path := user_path(model)).is_dir() and path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"--model {model}: lies in {folder}, which the run writes into; choose another --out")
