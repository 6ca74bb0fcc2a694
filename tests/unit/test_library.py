"""Every recipe and engine spec that ships is valid, and names resolve in a checkout and in a wheel alike."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import trsp_deploy
from tests.shapes import SHAPES, config_of
from trsp_deploy.decoder import count_weights
from trsp_deploy.errors import EngineSpecError, RecipeError
from trsp_deploy.recipe import override, read_recipe
from trsp_deploy.tools import library
from trsp_deploy.tools.resources.memory import MemoryEstimate
from trsp_deploy.tools.sources.names import SHORT_NAMES
from trsp_deploy.tools.sources.texts import SHORT_NAMES as TEXT_NAMES

SPEC = "description: d\nbackend: onnxruntime-cpu\nprecision: fp32\n"
STATE = re.compile(r"NOT MEASURED|Not measured|Measured: ")
STATED = re.compile(r"selection ([\d.]+) GB, transfer ([\d.]+) GB")


def memory_lines(name: str) -> list[tuple[str, str, str, str]]:
    """What a recipe's comments state: GB of the card, options, GB of selection and of transfer."""
    text = library.read_text("recipes", name)
    cards = re.findall(r"^# On (\d+) GB \(selection ([\d.]+) GB, transfer ([\d.]+) GB.*\n# `(.+)`", text, re.MULTILINE)
    own = [("", "", *found.groups()) for found in [STATED.search(text)] if found]
    return own + [(card, options, selection, transfer) for card, selection, transfer, options in cards]


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
    assert {*recipe.calibration.texts, *recipe.evaluation.values()} <= set(TEXT_NAMES)
    assert set(recipe.engines) - {"auto"} <= set(library.engine_names())
    text = library.read_text("recipes", name)
    assert text.startswith("# ") and STATE.search(text), "say on what it was measured, or that it was not"


@pytest.mark.parametrize("name", library.engine_names())
def test_shipped_engine_spec(name: str) -> None:
    assert library.load_engine_spec(name).name == name
    text = library.read_text("engines", name)
    assert text.startswith("# ") and STATE.search(text), "say on what it was measured, or that it was not"


def test_enough_models_and_targets() -> None:
    models = {library.load_recipe_values(name)[0].get("model") for name in library.recipe_names()} - {None}
    assert len(models) >= 12
    specs = [library.load_engine_spec(name) for name in library.engine_names()]
    gpus = {gpu for spec in specs for gpu in re.findall(r"sm\d+", spec.description)}
    assert gpus >= {"sm75", "sm80", "sm86", "sm89", "sm90", "sm120"}


@pytest.mark.parametrize("name", [spec for spec in library.engine_names() if "-rtx-" in spec])
def test_a_spec_for_one_card_is_compiled_for_it(name: str) -> None:
    spec = library.load_engine_spec(name)
    assert list(spec.compute_capabilities) == re.findall(r"sm\d+", spec.description)


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_are_those_of_the_hub(model: str) -> None:
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config_of(model))
    published, _ = SHAPES[model]
    assert count_weights(skeleton).total / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in library.recipe_names() if memory_lines(name)])
def test_memory_in_a_recipe_is_what_is_computed(name: str) -> None:
    values, source = library.load_recipe_values(name)
    device = values.get("device", "cpu")
    estimate = MemoryEstimate(config_of(values["model"]), device, fast_bf16=True)
    for card_gb, options, *stated in memory_lines(name):
        found = estimate.stages(read_recipe(override(values, re.findall(r"--set (\S+)", options)), source))
        needed = [stage.peak.total_bytes for stage in found]
        assert [f"{size / 1e9:.1f}" for size in needed] == stated, options
        assert not card_gb or max(needed) < 0.98 * float(card_gb) * 2**30


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
