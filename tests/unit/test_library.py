"""Every recipe and engine spec that ships is valid, and names resolve in a checkout and in a wheel alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import trsp_deploy
from trsp_deploy.errors import EngineSpecError, RecipeError
from trsp_deploy.recipe import read_recipe
from trsp_deploy.tools import library
from trsp_deploy.tools.models import SHORT_NAMES
from trsp_deploy.tools.texts import SHORT_NAMES as TEXT_NAMES

SPEC = "description: d\nbackend: onnxruntime-cpu\nprecision: fp32\n"


def error_line(kind: type[Exception], function, *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_recipes_there() -> None:
    assert {"default", "smollm2-135m", "opt-6.7b"} <= set(library.recipe_names())


@pytest.mark.parametrize("name", library.recipe_names())
def test_shipped_recipe(name: str) -> None:
    values, source = library.load_recipe_values(name)
    recipe = read_recipe({"model": "gpt2", **values}, source)
    assert source == f"recipe '{name}'"
    assert name == "default" or recipe.model in SHORT_NAMES
    assert {recipe.calibration.texts, *recipe.evaluation.values()} <= set(TEXT_NAMES)
    assert set(recipe.engines) - {"auto"} <= set(library.engine_names())
    assert library.read_text("recipes", name).startswith("# ")


@pytest.mark.parametrize("name", library.engine_names())
def test_shipped_engine_spec(name: str) -> None:
    assert library.load_engine_spec(name).name == name
    assert library.read_text("engines", name).startswith("# ")


def test_names_resolve_inside_an_installed_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "trsp_deploy"
    checkout = Path(trsp_deploy.__file__).parent.parent
    for kind in ("recipes", "engines"):  # where pyproject.toml's force-include puts them
        shutil.copytree(checkout / kind, package / kind)
    expected = library.recipe_names()
    monkeypatch.setattr(trsp_deploy, "__file__", str(package / "__init__.py"))
    assert library.recipe_names() == expected
    assert library.load_recipe_values("default")[1] == "recipe 'default'"


def test_a_file_is_a_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: gpt2\n")
    assert library.load_recipe_values(str(path)) == ({"model": "gpt2"}, str(path))


def test_a_file_is_an_engine_spec_and_gives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC)
    assert library.load_engine_spec(str(path)).name == "mine"
    path.write_text(SPEC + "name: mine\n")
    assert library.load_engine_spec(str(path)).name == "mine"
    path.write_text(SPEC + "name: other\n")
    message = error_line(EngineSpecError, library.load_engine_spec, str(path))
    assert str(path) in message and "'name' is 'other'" in message and "'mine.yaml'" in message


def test_unknown_names(tmp_path: Path) -> None:
    message = error_line(RecipeError, library.load_recipe_values, "smolm2-135m")
    assert "recipe 'smolm2-135m': no such recipe; did you mean 'smollm2-135m'?" in message
    assert "available: default, " in message
    message = error_line(EngineSpecError, library.load_engine_spec, "quantum")
    assert "engine 'quantum': no such engine" in message and "available: " in message
    missing = str(tmp_path / "missing.yaml")
    assert error_line(RecipeError, library.load_recipe_values, missing) == f"{missing}: no such file"
    assert "no such recipe" in error_line(RecipeError, library.read_text, "recipes", "nope")
