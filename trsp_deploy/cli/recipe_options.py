"""Turns command-line options into a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trsp_deploy.cli.terminal import say
from trsp_deploy.errors import RecipeError, nearest, shown

if TYPE_CHECKING:
    from trsp_deploy.recipe import Recipe


def recipe_from_options(
    *,
    model: str | None = None,
    drop: str | None = None,
    recipe: str | None = None,
    engine: list[str] | None = None,
    calibration: list[str] | None = None,
    evaluation: list[str] | None = None,
    seed: int | None = None,
    sets: list[str] | None = None,
    method: str | None = None,
    then: str | None = None,
    kept: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe named, or the model's own, or the default one, with every option on top.

    kept: groups of settings of an earlier recipe: in the place of those of one that was not asked for by name, and
        beside those of one that was.
    """
    from trsp_deploy.recipe import override, read_recipe
    from trsp_deploy.tools.library import load_recipe_values, recipe_names
    from trsp_deploy.tools.sources.names import meant_here

    if model is None and recipe is None:
        raise RecipeError("--model is missing: give a folder, a hub id or a short name (or a --recipe that names one)")
    name = recipe or (model if model in recipe_names() else "default")
    values, source = load_recipe_values(name)
    values = {**values, **(kept or {})} if recipe is None else {**(kept or {}), **values}
    for key, value in (("model", model), ("drop", drop), ("seed", seed)):
        if value is not None:
            values[key] = value
    options: dict[str, Any] = {
        f"{group}.{key}": value for group, of in _method_settings(method).items() for key, value in of.items()
    }
    transfer = override(values, sets or []).get("transfer")
    if isinstance(transfer, dict) and transfer.get("lora_rank") is not None:  # adapters are for the layers alone
        options.pop("transfer.train", None)
    if calibration:
        options["calibration.texts"] = calibration
    if then is not None:
        options["transfer.form"] = then
    if then in ("l1", "l2"):  # they need the layers that a refit puts new weights in the place of
        options["transfer.refit"] = "none"
    values = override(values, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items()])
    values = with_lists(values, engine, evaluation)
    values = override(values, sets or [])
    if kept is None:  # asked for once more, it was said
        say_twins(sets)
    if isinstance(values.get("model"), str):
        values["model"] = meant_here(values["model"])
    given = any((model, drop, engine, calibration, evaluation, method, then, sets)) or seed is not None
    return read_recipe(values, f"{source} with the options given" if given else source)


def say_twins(sets: list[str] | None) -> None:
    """A line for each key that `--set` has twice: a list of usual settings may stand before one in another's place."""
    last = {_key(text): text for text in sets or []}
    for text in sets or []:
        if (taken := last[_key(text)]) != text:
            say(f"--set {shown(text)}: {shown(taken)} behind it takes its place")


def _key(text: str) -> str:
    return text.partition("=")[0].strip()


def task_sets(tasks: list[str] | None) -> list[str]:
    """`--task` as an override of the recipe."""
    return [] if tasks is None else [f"evaluate.tasks={json.dumps(tasks)}"]


def _method_settings(method: str | None) -> dict[str, dict[str, str | bool | int | float]]:
    from trsp_deploy.recipe import METHODS

    if method is None:
        return {}
    if method not in METHODS:
        raise RecipeError(
            f"--method '{method}': no such method{nearest(method, METHODS)} (available: {', '.join(METHODS)})"
        )
    return METHODS[method]


def with_lists(values: dict[str, Any], engine: list[str] | None, evaluation: list[str] | None) -> dict[str, Any]:
    """A recipe's values with the lists that options give in place of its own."""
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
