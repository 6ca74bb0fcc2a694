"""The recipe of a run folder: where it lies, how it is kept and read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from trsp_deploy.artifacts import RUN_MARK, RunFolder, check_is_run, writing
from trsp_deploy.artifacts.layout import PLACE
from trsp_deploy.errors import RunError
from trsp_deploy.launch import launched
from trsp_deploy.reading import read_yaml, user_path
from trsp_deploy.recipe import Recipe, has_own_items, kept_recipe, named_by_file, parse_drop
from trsp_deploy.tools.plan import read_plan
from trsp_deploy.tools.sources.models import model_config
from trsp_deploy.tools.sources.texts import SHORT_NAMES as TEXT_NAMES


def default_folder(recipe: Recipe, plan: Path | None, say: Callable[[str], None]) -> Path:
    """`runs/<model>-drop<k>` for k layers: 25% and 8 of 32 are the same run. Of a hub model its config is read.

    plan: that was handed in, which says how many go whatever the recipe does.
    """
    if launched():
        raise RunError("--out is missing: several processes have to be told where they meet")
    layers = model_config(recipe.model, say).num_hidden_layers
    count = parse_drop(recipe.drop, layers) if plan is None else len(read_plan(plan, layers).dropped)
    return Path("runs") / f"{plain_name(recipe.model)}-drop{count}"


def sweep_folder(recipe: Recipe) -> Path:
    """`runs/<model>-sweep`, whatever the range."""
    return Path("runs") / f"{plain_name(recipe.model)}-sweep"


def plain_name(model: str, place: Path = Path()) -> str:
    """What a run is called by its model; of `.` and `..`, which have no name, by the folder that they are."""
    name = Path(model).name
    return name if name not in ("", "..") else (place / model).resolve().name


def save_recipe(run: RunFolder, recipe: Recipe, place: Path | None = None) -> None:
    """Keep the resolved recipe in the run folder, for the commands that are given only the folder.

    place: that its relative paths are relative to; None is the working directory.
    """
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if not run.main:
        return
    # The place is no part of what a run is, so its manifest has nothing of it; a folder's name need not be UTF-8.
    for path, content in ((run.path / PLACE, os.fsencode(place or Path.cwd())), (run.path / RUN_MARK, text.encode())):
        if path.is_file() and path.read_bytes() == content:
            continue
        if path.name == RUN_MARK:
            run.outdate_manifest()
        with writing(path) as partial:
            partial.write_bytes(content)


def place_of(run: Path) -> Path:
    """What the relative paths of a run's recipe are relative to: where its command ran, else where this one does."""
    try:
        place = Path(os.fsdecode((run / PLACE).read_bytes()))
    except OSError:
        return Path.cwd()
    return place if place.is_dir() else Path.cwd()


def seen_from(place: Path, text: str, known: Collection[str] = ()) -> str:
    """A file or folder of a recipe as this process finds it; known: names that mean no file.

    What is there no more is not looked for here, where another one of its name may lie. A name that is no path in
    either place stays as it was written.
    """
    path = user_path(text)
    if text in known or path.is_absolute() or place == Path.cwd():
        return text
    return str(place / path) if (place / path).exists() or path.exists() else text


def engine_seen_from(place: Path, engine: str) -> str:
    """The same of one of a recipe's engines, which is a file or the name of a spec that comes with the toolkit."""
    return _seen_from(place, engine, named_by_file)


def _seen_from(place: Path, name: str, is_file: Callable[[str], bool]) -> str:
    return seen_from(place, name) if is_file(name) else name


def saved_recipe(run: RunFolder) -> Recipe | None:
    """The recipe that a run's folder holds; None where there is none, or none that can be read."""
    return kept_recipe(run.path / RUN_MARK)


def kept_judging(run: RunFolder) -> dict[str, Any]:
    """What the recipe in a run's folder says of engines and judging, with its files as this process finds them; empty
    where there is none that can be read."""
    before, place = saved_recipe(run), place_of(run.path)
    if before is None:
        return {}
    values = before.model_dump(mode="json", include={"evaluation", "evaluate", "engines", "bench"})
    values["evaluation"] = {name: seen_from(place, text, TEXT_NAMES) for name, text in before.evaluation.items()}
    values["evaluate"]["tasks"] = [_seen_from(place, task, has_own_items) for task in before.evaluate.tasks]
    values["engines"] = [engine_seen_from(place, engine) for engine in before.engines]
    return values


def no_longer_has(run: RunFolder, now: Recipe, place: Path | None = None) -> list[str]:
    """Texts, tasks and engines of the recipe in a run's folder, if there is one, that another in its place lacks.

    place: that the other's relative paths are relative to; None is the working directory.
    """
    if (before := saved_recipe(run)) is None:
        return []
    was, is_ = place_of(run.path), place or Path.cwd()

    def lacking(had: Sequence[str], has: Sequence[str], is_file: Callable[[str], bool]) -> list[str]:
        kept = {_at(is_, name, is_file) for name in has}  # a file may be named in another way
        return [name for name in had if _at(was, name, is_file) not in kept]

    texts = [f"evaluation text {name}" for name in before.evaluation if name not in now.evaluation]
    tasks = lacking(before.evaluate.tasks, now.evaluate.tasks, has_own_items)
    engines = lacking(before.engines, now.engines, named_by_file)
    return texts + [f"zero-shot task {name}" for name in tasks] + [f"engine {name}" for name in engines]


def _at(place: Path, name: str, is_file: Callable[[str], bool]) -> Path | str:
    return place / user_path(name) if is_file(name) else name


def load_recipe(run: Path) -> dict[str, Any]:
    """The values of the recipe that a run folder was made with; raises RunError when it is no run folder."""
    check_is_run(run, "make one with `trsp-deploy prune`")
    return read_yaml(run / RUN_MARK, RunError)
