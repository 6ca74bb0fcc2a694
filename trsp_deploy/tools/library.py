"""The named recipes and engine specs that come with the toolkit: YAML in `recipes/` and `engines/`.

In a checkout or an editable install these folders lie beside the package; a wheel carries them inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import trsp_deploy
from trsp_deploy import reading
from trsp_deploy.errors import EngineSpecError, RecipeError, UserError, nearest
from trsp_deploy.reading import read_yaml, user_path
from trsp_deploy.recipe import AUTO_ENGINES, EngineSpec, named_by_file, read_engine_spec

Kind = Literal["recipes", "engines"]

ERRORS: dict[Kind, type[UserError]] = {"recipes": RecipeError, "engines": EngineSpecError}


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return _names("recipes")


def engine_names() -> list[str]:
    """Names of the shipped engine specs, sorted."""
    return _names("engines")


def load_recipe_values(name_or_path: str) -> tuple[dict[str, Any], str]:
    """The values of a shipped recipe or of a YAML file, unvalidated, and how to call it in an error line.

    Overrides go on top before `recipe.read_recipe` validates. Raises RecipeError.
    """
    path = _find("recipes", name_or_path)
    source = f"recipe '{name_or_path}'" if path.parent == _folder("recipes") else str(path)
    return read_yaml(path, RecipeError), source


def load_engine_spec(name_or_path: str) -> EngineSpec:
    """A shipped engine spec, or one from a YAML file; its name is the file's stem. Raises EngineSpecError."""
    path = _find("engines", name_or_path)
    values = read_yaml(path, EngineSpecError)
    stated = values.get("name", path.stem)
    if stated != path.stem:
        raise EngineSpecError(f"{path}: 'name' is {stated!r}, but the file is called '{path.name}'; leave `name` out")
    return read_engine_spec({**values, "name": path.stem}, str(path))


def wanted_engines(engines: Sequence[str]) -> list[str]:
    """Names and files of a recipe's engines in its order, each once, `auto` being what this machine is for."""
    names: list[str] = []
    for name in engines:
        names += AUTO_ENGINES[_device()] if name == "auto" else [name]
    return list(dict.fromkeys(names))


def _device() -> Literal["cpu", "cuda"]:
    import torch  # which lists of names do without

    return "cuda" if torch.cuda.is_available() else "cpu"


def spec_file(name_or_path: str) -> Path | None:
    """The YAML file that an engine spec is read from; None for a shipped one. Raises EngineSpecError."""
    path = _find("engines", name_or_path)
    return None if path.parent == _folder("engines") else path


def read_text(kind: Kind, name: str) -> str:
    """The YAML of a recipe or engine spec as it was written, comments included. Raises UserError."""
    return reading.read_text(_find(kind, name), ERRORS[kind])


def _folder(kind: Kind) -> Path:
    package = Path(trsp_deploy.__file__).resolve().parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def _names(kind: Kind) -> list[str]:
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def _find(kind: Kind, name_or_path: str) -> Path:
    names = _names(kind)
    if name_or_path in names:
        return _folder(kind) / f"{name_or_path}.yaml"
    path = user_path(name_or_path)
    if named_by_file(name_or_path):
        if path.is_file():
            return path
        raise ERRORS[kind](f"{path}: no such file")
    what = kind.removesuffix("s")
    raise ERRORS[kind](
        f"{what} '{name_or_path}': no such {what}{nearest(name_or_path, names)} "
        f"(available: {', '.join(names) or 'none'}; or the path of a .yaml file)"
    )
