"""Mappings turned into records; what is wrong with one is a line that names the key, its source and what is valid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trsp_deploy.errors import EngineSpecError, RecipeError, UserError, shown
from trsp_deploy.reading import Record, load_yaml, read_yaml, what_is_wrong
from trsp_deploy.recipe.engine_spec import EngineSpec
from trsp_deploy.recipe.settings import BenchSettings, EvaluateSettings, Recipe


def read_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate a mapping as a Recipe; `source` names the file or option for the error line."""
    return _validate(Recipe, values, source, RecipeError)


def kept_recipe(file: Path) -> Recipe | None:
    """The recipe that a run has kept; None where there is none, or none that can be read."""
    try:
        return read_recipe(read_yaml(file, RecipeError), str(file))
    except UserError:
        return None


def read_bench_settings(values: dict[str, Any], source: str) -> BenchSettings:
    """Validate a mapping as BenchSettings; `source` names where it came from for the error line."""
    return _validate(BenchSettings, values, source, RecipeError)


def read_evaluate_settings(values: dict[str, Any], source: str) -> EvaluateSettings:
    """Validate a mapping as EvaluateSettings; `source` names where it came from for the error line."""
    return _validate(EvaluateSettings, values, source, RecipeError)


def read_engine_spec(values: dict[str, Any], source: str) -> EngineSpec:
    """Validate a mapping as an EngineSpec; `source` names the file for the error line."""
    spec = _validate(EngineSpec, values, source, EngineSpecError)
    if spec.ignored is not None:
        raise EngineSpecError(f"{source}: {spec.ignored}")
    return spec


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `a.b=value` of `--set` applied; values are read as YAML."""
    result = copy.deepcopy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {shown(assignment)}: expected key=value, such as transfer.steps=64")
        try:
            value = load_yaml(text)
        except ValueError as problem:
            raise RecipeError(f"--set '{assignment}': the value is not valid YAML") from problem
        *parents, last = key.strip().split(".")
        target = result
        for parent in parents:
            if target.get(parent) is None:  # not there, or a group whose lines are all comments
                target[parent] = {}
            child = target[parent]
            if not isinstance(child, dict):
                raise RecipeError(f"--set '{assignment}': '{parent}' is a value, not a group of settings")
            target = child
        target[last] = value
    return result


def _validate(model: type[Record], values: dict[str, Any], source: str, error: type[UserError]) -> Record:
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        said = what_is_wrong(problem, model)
        if said.endswith(("string, got True", "string, got False")):
            said += "; YAML reads yes, no, on and off so: put the word into quotes"
        raise error(f"{source}: {said}") from problem
