"""Recipes are strict, and every error is one line that names the key, the place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from trsp_deploy.cli.recipe_options import recipe_from_options
from trsp_deploy.errors import EngineSpecError, RecipeError
from trsp_deploy.reading import load_yaml, read_yaml
from trsp_deploy.recipe import override, parse_drop, read_bench_settings, read_engine_spec, read_recipe, shown_name

PROFILE = {
    "batch": {"min": 1, "opt": 1, "max": 4},
    "sequence": {"min": 1, "opt": 128, "max": 512},
    "past": {"min": 0, "opt": 128, "max": 1024},
}
SPEC = {"name": "x", "description": "d", "backend": "tensorrt", "precision": "fp16", "profiles": [PROFILE]}


def recipe_error(values: dict, source: str = "my.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(values, source)
    return one_line(caught.value)


def one_line(problem: Exception) -> str:
    text = str(problem)
    assert "\n" not in text
    return text


def test_model_alone_is_a_recipe_and_it_is_frozen() -> None:
    recipe = read_recipe({"model": "gpt2"}, "x")
    assert (recipe.drop, recipe.calibration.texts, recipe.engines) == ("25%", ("wikitext2",), ("auto",))
    with pytest.raises(ValidationError):
        recipe.model = "other"  # type: ignore[misc]


def test_drop_may_be_a_number_in_yaml() -> None:
    assert read_recipe({"model": "gpt2", "drop": 8}, "x").drop == "8"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["my.yaml", "'model' is missing"]),
        ({"model": "m", "calibraton": {}}, ["my.yaml", "unknown key 'calibraton'", "did you mean 'calibration'?"]),
        ({"model": "m", "transfer": {"step": 1}}, ["unknown key 'transfer.step'", "did you mean 'steps'?"]),
        ({"model": "m", "plan": {"zzz": 1}}, ["unknown key 'plan.zzz'", "valid: batch_size, candidates"]),
        ({"model": "m", "plan": {"steps": 0}}, ["'plan.steps'", "greater than or equal to 1", "got 0"]),
        ({"model": "m", "transfer": {"form": "l3"}}, ["'transfer.form'", "'l1', 'train' or 'none'", "got 'l3'"]),
        ({"model": "m", "plan": 3}, ["'plan'", "got 3"]),
        *(
            (
                {"model": "m", "transfer": {**form, "ce_weight": 0, "kl_weight": 0}},
                ["both 0, so nothing would be learned"],
            )
            for form in ({}, {"form": "anneal"}, {"form": "l2", "refit": "none", "weight": 0})
        ),
        (
            {"model": "m", "transfer": {"gradient_checkpointing": "none"}},
            ["key 'transfer.gradient_checkpointing': should be True, False or 'selective', got 'none'"],
        ),
        ({"model": "m", "seed": -1}, ["'seed'", "got -1"]),
        ({"model": "m", "engines": "auto"}, ["'engines'", "got 'auto'"]),
        ({"model": "m", "transfer": {"warmup_share": 1.5}}, ["'transfer.warmup_share'", "got 1.5"]),
        ({"model": "m", "transfer": {"steps": True}}, ["'transfer.steps': should be a number, got True"]),
        ({"model": "m", "transfer": {"weight": False}}, ["'transfer.weight': should be a number, got False"]),
        ({"model": "m", "bench": {"prompt_tokens": True}}, ["'bench.prompt_tokens.0': should be a number, got True"]),
    ],
)
def test_recipe_errors(values: dict, words: list[str]) -> None:
    message = recipe_error(values)
    for word in words:
        assert word in message


@pytest.mark.parametrize("form", [{"form": "none"}, {"form": "l1", "refit": "none"}])
def test_what_has_no_language_loss_may_have_weights_of_0(form: dict) -> None:
    read_recipe({"model": "m", "transfer": {**form, "ce_weight": 0, "kl_weight": 0}}, "my.yaml")


def test_override_sets_nested_keys_as_yaml_and_leaves_the_original() -> None:
    values = {"model": "m", "plan": {"steps": 8}}
    changed = override(values, ["plan.steps=2", "transfer.form=none", "engines=[a, b]", "export.slim=false", "drop=3"])
    assert values == {"model": "m", "plan": {"steps": 8}}
    recipe = read_recipe(changed, "x")
    assert (recipe.plan.steps, recipe.transfer.form, recipe.engines) == (2, "none", ("a", "b"))
    assert (recipe.export.slim, recipe.drop) == (False, "3")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("plan.steps", "expected key=value, such as transfer.steps=64"),
        ("=3", "expected key=value"),
        ("model.name=3", "'model' is a value, not a group of settings"),
        ("plan.steps=[1", "the value is not valid YAML"),
    ],
)
def test_override_errors(assignment: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override({"model": "m"}, [assignment])
    message = one_line(caught.value)
    assert words in message and f"--set '{assignment}'" in message


def test_of_a_key_that_is_set_twice_a_line_says_which_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """The last won without a word."""
    sets = ["seed=1", "transfer.steps=64", "transfer.steps=64", " seed=2"]
    assert recipe_from_options(model="m", sets=sets).seed == 2
    assert capsys.readouterr().err == "> --set 'seed=1': ' seed=2' behind it takes its place\n"
    recipe_from_options(model="m", sets=sets, kept={})
    assert not capsys.readouterr().err, "the same recipe once more"


def test_a_group_without_lines_can_be_set_in() -> None:
    assert override({"calibration": None}, ["calibration.texts=x"]) == {"calibration": {"texts": "x"}}


def test_override_of_an_unknown_key_is_found_on_reading() -> None:
    message = recipe_error(override({"model": "m"}, ["plan.stpes=2"]), "--set")
    assert "unknown key 'plan.stpes'; did you mean 'steps'?" in message


@pytest.mark.parametrize(
    ("drop", "layers", "expected"),
    [
        ("25%", 30, 8),  # 7.5 rounds half up
        ("25%", 32, 8),
        ("25%", 12, 3),
        ("12.5 %", 32, 4),
        (" 8 ", 30, 8),
        ("1", 2, 1),
        ("10%", 5, 1),
        ("29", 30, 29),
        ("58%", 25, 15),  # 14.5, which a float makes 14.499999999999998
        ("35%", 90, 32),
    ],
)
def test_parse_drop(drop: str, layers: int, expected: int) -> None:
    assert parse_drop(drop, layers) == expected


@pytest.mark.parametrize("drop", ["", "a quarter", "-3", "0.25", "25%%", "1e1", "8 layers"])
def test_parse_drop_refuses_what_is_neither_share_nor_count(drop: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_drop(drop, 30)
    assert f"--drop '{drop}': give a share such as 25% or a count of layers such as 8" in one_line(caught.value)


@pytest.mark.parametrize(("drop", "count"), [("0", 0), ("0%", 0), ("1%", 0), ("100%", 30), ("30", 30), ("31", 31)])
def test_parse_drop_refuses_nothing_and_everything(drop: str, count: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_drop(drop, 30)
    message = one_line(caught.value)
    assert f"--drop '{drop}' is {count} of the model's 30 layers" in message
    assert "1 to 29" in message and "2%" in message


def test_parse_drop_takes_the_smallest_share_that_its_error_names() -> None:
    for layers in range(2, 100):
        assert parse_drop(f"{-(-50 // layers)}%", layers) >= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "tensort"}, ["'backend'", "got 'tensort'"]),
        ({"profiles": []}, ["backend tensorrt needs at least one entry under `profiles`"]),
        ({"backend": "onnxruntime-cpu"}, ["backend onnxruntime-cpu takes no `profiles`"]),
        ({"profiles": [{**PROFILE, "batches": 1}]}, ["unknown key 'profiles.0.batches'", "did you mean 'batch'?"]),
        (
            {"profiles": [{**PROFILE, "past": {"min": 0, "opt": 9, "max": 8}}]},
            ["'profiles.0.past'", "needs min <= opt <= max, got 0, 9, 8"],
        ),
        ({"precison": "fp16"}, ["unknown key 'precison'", "did you mean 'precision'?"]),
        ({"compute_capabilities": ["sm89"]}, ["`compute_capabilities` is for backend tensorrt-rtx, got tensorrt"]),
        ({"keep_high_precision": True}, ["'keep_high_precision", "got True"]),
        ({"cuda_graphs": False}, ["`cuda_graphs` is for TensorRT backends with `cache_length`"]),
        (
            {"backend": "onnxruntime-cpu", "profiles": [], "workspace_gib": 2},
            ["backend onnxruntime-cpu takes no `workspace_gib`"],
        ),
    ],
)
def test_engine_spec_errors(changes: dict, words: list[str]) -> None:
    assert read_engine_spec(SPEC, "x").backend == "tensorrt"
    with pytest.raises(EngineSpecError) as caught:
        read_engine_spec({**SPEC, **changes}, "mine.yaml")
    message = one_line(caught.value)
    for word in ["mine.yaml", *words]:
        assert word in message


def test_a_task_counts_once() -> None:
    with pytest.raises(RecipeError, match=r"key 'evaluate.tasks': 'piqa' stands twice"):
        read_recipe({"model": "m", "evaluate": {"tasks": ["piqa", "copa", "piqa"]}}, "test")
    with pytest.raises(RecipeError, match=r"two files are called a\.jsonl, by which reports call a task; rename one"):
        read_recipe({"model": "m", "evaluate": {"tasks": ["one/a.jsonl", "two/a.jsonl"]}}, "test")


@pytest.mark.parametrize("name", ["batch_sizes", "prompt_tokens"])
def test_a_shape_that_stands_twice_is_refused(name: str) -> None:
    """It was measured twice, and verdicts named the one of the least speed-up and showed the other's figures."""
    with pytest.raises(RecipeError, match=f"key '{name}': '8' stands twice"):
        read_bench_settings({name: [8, 16, 8]}, "--set")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (b"- a\n- b\n", "holds a list, expected a mapping"),
        (b"seed: 1\nmodel: m\nseed: 2\n", "the key 'seed' stands twice"),
        (b"", "holds a NoneType, expected a mapping"),
        (None, "no such file"),
    ],
)
def test_yaml_errors(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path, RecipeError)
    message = one_line(caught.value)
    assert words in message and str(path) in message


def test_off_is_read_as_a_word():
    assert read_recipe({"model": "gpt2", "autocast": yaml.safe_load("off")}, "test").autocast == "off"


def test_a_name_that_yaml_takes_for_no_is_said() -> None:
    values = load_yaml("{model: m, calibration: {texts: [no]}}")
    with pytest.raises(RecipeError, match=r"texts.0': .* got False; YAML reads yes, no, on and off so: put the word"):
        read_recipe(values, "r.yaml")
    assert read_recipe(load_yaml("{model: m, calibration: {texts: ['no']}}"), "").calibration.texts == ("no",)


def test_a_window_of_one_token_predicts_none() -> None:
    for group in ("calibration", "evaluate"):
        with pytest.raises(RecipeError, match=f"{group}.context_length"):
            read_recipe({"model": "m", group: {"context_length": 1}}, "test")


@pytest.mark.parametrize(
    ("given", "told"),
    [("/srv/acme/m", "m"), ("~/acme/m", "m"), ("../acme/m", "m"), ("owner/name", "owner/name"), ("c4", "c4")],
)
def test_others_are_told_no_place_of_this_machine(given: str, told: str) -> None:
    assert shown_name(given) == told
    assert read_recipe({"model": given}, "test").public.model == told


def test_a_name_is_as_long_as_a_file_can_be_called_by_two() -> None:
    """Of letters of three bytes a third are as many; their step's record could not be written, after all the work."""
    assert list(read_recipe({"model": "m", "evaluation": {"語" * 33: "t"}}, "test").evaluation) == ["語" * 33]
    with pytest.raises(RecipeError, match=r"'evaluation.*should have at most 100 bytes"):
        read_recipe({"model": "m", "evaluation": {"語" * 34: "t"}}, "test")
