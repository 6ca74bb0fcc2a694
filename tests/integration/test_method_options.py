"""`--method` and `--then`: every selection with every transfer that makes sense, on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.breadth import BREADTH, by_default
from tests.tiny import english, save_tiny
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.cli import run
from trsp_deploy.cli.recipe_options import recipe_from_options
from trsp_deploy.decoder import load_tokenizer
from trsp_deploy.errors import RecipeError
from trsp_deploy.pipeline import Pipeline, pruning
from trsp_deploy.pipeline.runs import load_recipe, place_of
from trsp_deploy.recipe import METHODS, read_recipe
from trsp_deploy.stages import transfer
from trsp_deploy.tools.resources import memory_plan
from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows
from trsp_deploy.tools.training.checkpoints import Checkpoints

QUICK = ["calibration.context_length=32", "calibration.max_windows=48", "plan.steps=1", "transfer.steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_tiny("llama", folder / "model")
    (folder / "text.txt").write_text(english()[:40_000])
    return folder


@pytest.fixture
def prune(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)

    def go(*options: str) -> tuple[dict, dict]:
        settings = [option for pair in QUICK for option in ("--set", pair)]
        command = ["prune", "--model", "model", "--drop", "2", "--ignore-memory", "--out", str(tmp_path / "run")]
        if "--calibration" not in options:
            command += ["--calibration", "text.txt"]
        assert run([*command, *settings, *options, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        return result, json.loads((tmp_path / "run" / "plan.json").read_text())

    return go


@pytest.mark.parametrize("method", by_default(["trsp", "sleb"], METHODS))
def test_each_method_prunes(prune, method):
    result, plan = prune("--method", method)
    assert result["num_layers_pruned"] == 4 and len(result["dropped"]) == 2
    assert plan["method"] == METHODS[method]["plan"]["method"]
    assert result["form"] == METHODS[method]["transfer"]["form"]
    if method in ("uidl", "fold"):
        assert result["dropped"][1] == result["dropped"][0] + 1


@pytest.mark.parametrize("sets", [[], ["transfer.lora_rank=4"]], ids=["", "set-adapters"])
@pytest.mark.parametrize("recipe", ["smollm2-135m-131k", "llama2-7b", "adapters"])
def test_the_papers_method_has_its_released_settings_in_every_recipe(recipe, sets, tmp_path):
    if recipe == "adapters":
        (tmp_path / "adapters.yaml").write_text("model: model\ntransfer: {lora_rank: 4}\n")
        recipe = str(tmp_path / "adapters.yaml")
    found = recipe_from_options(recipe=recipe, method="trsp", sets=sets)
    assert (found.transfer.form, found.transfer.weight, found.transfer.learning_rate) == ("l2", 1e-3, 2e-5)
    assert found.transfer.train == ("layers" if found.transfer.lora_rank else "all")
    assert found.calibration.self_generated == 0 and (found.plan.gate, found.plan.l1) == ("output", 5e-3)


@pytest.mark.parametrize("options", [{}, {"method": "trsp"}, {"then": "l2"}], ids=str)
def test_a_group_of_settings_that_is_a_word_is_one_line(options, tmp_path):
    (tmp_path / "word.yaml").write_text("model: model\ntransfer: quick\n")
    with pytest.raises(RecipeError, match="'transfer'"):
        recipe_from_options(recipe=str(tmp_path / "word.yaml"), **options)


@pytest.mark.parametrize("options", [{"seed": -1}, {"then": "bogus"}], ids=str)
def test_a_wrong_option_is_not_blamed_on_the_recipe_alone(options, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: model\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml with the options given: "):
        recipe_from_options(recipe=str(tmp_path / "mine.yaml"), **options)


@BREADTH
@pytest.mark.parametrize(
    ("package", "setting"), [("peft", "transfer.lora_rank=2"), ("bitsandbytes", "transfer.optimizer=adamw-8bit")]
)
def test_a_package_that_the_training_lacks_is_said_before_layers_are_chosen(
    place, monkeypatch, capsys, tmp_path, package, setting
):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--calibration", "text.txt", "--ignore-memory", "--out", str(tmp_path / "run")]
    settings = [option for pair in [*QUICK, setting] for option in ("--set", pair)]
    assert run(["prune", "--model", "model", "--drop", "2", *options, *settings]) == 1
    assert f"{package} is not installed; pip install 'trsp_deploy[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.parametrize("method", ["shortgpt", "fold"])
def test_then_train_is_the_control(prune, method):
    result, _ = prune("--method", method, "--then", "train", "--set", "transfer.kl_weight=1.0")
    assert result["form"] == "train" and result["tokens"] == 3 * 4 * 32
    assert result["ppl_before_removal"] == result["ppl_after_removal"]  # nothing is left to remove


def test_removal_of_a_folded_span_changes_nothing(prune):
    result, _ = prune("--method", "fold")
    assert result["tokens"] == 0
    assert result["ppl_before_removal"] == result["ppl_after_removal"]


@BREADTH
def test_any_selection_can_be_folded(prune):
    folded, plan = prune("--method", "sleb", "--set", "transfer.refit=span", "--set", "plan.batch_size=8")
    plain, _ = prune("--method", "sleb", "--set", "plan.batch_size=8")
    assert plan["method"] == "sleb" and folded["dropped"] == plain["dropped"]
    assert folded["ppl_after_removal"] != plain["ppl_after_removal"]


@BREADTH
def test_annealed_refit_leaves_nothing_for_the_removal(prune):
    result, _ = prune("--method", "trsp-refit", "--set", "transfer.kl_weight=1.0")
    assert result["form"] == "anneal" and result["tokens"] == 3 * 4 * 32
    assert result["ppl_before_removal"] == pytest.approx(result["ppl_after_removal"], rel=1e-6)


@BREADTH
def test_the_dense_model_writes_a_part_of_the_training_text(prune, tmp_path):
    plain, plan = prune()
    file = tmp_path / "run" / "self-generated.jsonl"
    assert not file.exists()
    half = ["--set", "calibration.self_generated=0.5"]
    result, same_plan = prune(*half)
    windows = tokenize_windows(load_texts(str(file), "calibration"), load_tokenizer(tmp_path / "run" / "dense"), 32)
    assert len(windows) >= 24
    assert plan["picks"] == same_plan["picks"], "layers are chosen on the calibration text alone"
    assert result["tokens"] == plain["tokens"] and result["ppl_after_removal"] != plain["ppl_after_removal"]
    made = file.stat().st_mtime_ns
    longer, _ = prune(*half, "--set", "transfer.steps=5")
    assert longer["tokens"] > result["tokens"] and file.stat().st_mtime_ns == made, "written once"


@BREADTH
def test_a_text_that_is_gone_is_a_transfer_to_do(prune, tmp_path):
    """Written again it may be another one: memory and disk were not estimated for the training that may follow."""
    prune("--set", "calibration.self_generated=0.5")

    def finished() -> frozenset[str]:
        with RunFolder(tmp_path / "run") as run:
            recipe = read_recipe(load_recipe(tmp_path / "run"), "test")
            return Pipeline(run, recipe, place=place_of(tmp_path / "run")).finished()

    assert finished() == {"dense", "plan", "self-generated", "prune"}
    (tmp_path / "run" / "self-generated.jsonl").unlink()
    assert finished() == {"dense", "plan"}


def test_a_command_that_trains_again_says_first_what_that_needs(prune, monkeypatch, capsys, tmp_path):
    """`evaluate`, `report` and their like began it without a word, however much more memory a changed setting takes."""
    prune("--method", "shortgpt")
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 1_000_000)  # for no training at all

    def evaluated(*options: str) -> list[str]:
        settings = ["--eval", "own=text.txt", "--set", "evaluate.context_length=32", "--set", "evaluate.max_tokens=320"]
        assert run(["evaluate", str(tmp_path / "run"), *settings, *options]) == 0
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if "needs main memory" in line or line.startswith("> prune: ")]

    assert evaluated() == ["> prune: reused"]
    needs, again, started, done = evaluated("--set", "transfer.form=train")
    assert re.match(r"> needs main memory: selection \S+ GB, transfer \S+ GB; 0\.00 GB there", needs)
    assert again.endswith("; done again") and started.endswith("started") and "done in" in done


@BREADTH
def test_records_are_asked_about_another_model_without_it(prune, tmp_path):
    """How much of the text a model writes takes its tokens: `dense/` was another by then."""
    prune("--set", "calibration.self_generated=0.5")
    save_tiny("llama", tmp_path / "other", seed=7)
    before = (tmp_path / "run" / "dense" / "model.safetensors").read_bytes()
    with RunFolder(tmp_path / "run") as folder:
        recipe = read_recipe({**load_recipe(tmp_path / "run"), "model": str(tmp_path / "other")}, "test")
        assert Pipeline(folder, recipe, place=place_of(tmp_path / "run")).finished() == frozenset()
    assert (tmp_path / "run" / "dense" / "model.safetensors").read_bytes() == before


@BREADTH
def test_checkpoints_of_what_trains_no_layers_are_of_no_package_that_it_does_not_use(prune, monkeypatch):
    """Selection began anew where peft or bitsandbytes was another version."""
    found = {}

    def watched(folder, *rest, packages, **more):
        found[folder.name] = list(packages)
        return Checkpoints(folder, *rest, packages=packages, **more)

    monkeypatch.setattr(pruning, "Checkpoints", watched)
    monkeypatch.setattr(pruning, "trains_with", lambda settings: ["bitsandbytes"])
    prune("--set", "calibration.self_generated=0.5")
    assert found == {"plan": [], "self-generated": [], "prune": ["bitsandbytes"]}


@pytest.fixture
def given(monkeypatch) -> list[torch.Tensor]:
    """The windows that each transfer trains on."""
    found: list[torch.Tensor] = []

    def watched(*, train, **rest):
        found.append(train)
        return transfer.transfer_and_remove(train=train, **rest)

    monkeypatch.setattr(pruning, "transfer", SimpleNamespace(transfer_and_remove=watched))
    return found


@BREADTH
def test_a_short_calibration_text_is_read_whole_beside_the_models_own(prune, place, given):
    short = place / "short.txt"
    short.write_text(english()[:1_200])
    for share in ("0", "0.5"):
        prune("--calibration", str(short), "--set", f"calibration.self_generated={share}")
    alone, beside = given
    assert 3 <= len(alone) < 24 and len(beside) == 2 * len(alone)
    assert torch.equal(beside[: len(alone)], alone)


@BREADTH
def test_several_calibration_texts_are_read_in_equal_parts(prune, place, given, tmp_path):
    other = place / "other.txt"
    other.write_text(english()[40_000:60_000])
    _, plan = prune("--calibration", "text.txt", "--calibration", str(other))
    (mixed,) = given
    tokenizer = load_tokenizer(tmp_path / "run" / "dense")
    read = [tokenize_windows(load_texts(str(file), "calibration"), tokenizer, 32) for file in ("text.txt", other)]
    assert [int((mixed[:, None] == windows).all(-1).any(1).sum()) for windows in read] == [24, 24]
    assert plan["calibration"] == "text.txt + other.txt"
    assert "calibrated on text.txt + other.txt." in (tmp_path / "run" / "pruned" / "README.md").read_text()
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    prune("--set", "seed=0", "--calibration", "text.txt", "--calibration", str(other))
    assert len(given) == 1, "the same texts are the same run"
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe
    prune("--calibration", "text.txt")
    alone = given[1]
    assert len(alone) == 48 and not torch.equal(alone, mixed)


@BREADTH
@pytest.mark.parametrize(
    "second, line",
    [
        ("text.txt", "'text.txt' stands twice"),
        ("copy.txt", "--calibration 'copy.txt': holds the same documents as 'text.txt'; each text counts once"),
        ("missing.txt", "calibration text 'missing.txt': no such file"),
        ("tiny.txt", "--calibration 'tiny.txt': holds 3 tokens, fewer than one window of 32"),
    ],
)
def test_calibration_texts_that_cannot_go_together(place, monkeypatch, capsys, tmp_path, second, line):
    monkeypatch.chdir(place)
    (place / "copy.txt").write_text((place / "text.txt").read_text())
    (place / "tiny.txt").write_text("word")
    command = ["prune", "--model", "model", "--drop", "2", "--out", str(tmp_path / "run"), "--calibration", "text.txt"]
    settings = [option for pair in QUICK for option in ("--set", pair)]
    assert run([*command, "--calibration", second, *settings]) == 1
    assert line in capsys.readouterr().err


@BREADTH
@pytest.mark.parametrize(
    ("job", "options", "named"),
    [
        ("prune", ["--calibration", "extra.txt"], "--calibration 'extra.txt'"),
        ("prune-and-build", ["--calibration", "text.txt", "--eval", "own=extra.txt"], "--eval own 'extra.txt'"),
    ],
)
def test_a_token_that_the_model_lacks_is_said_before_the_work(
    place, monkeypatch, capsys, tmp_path, job, options, named
):
    """Its embedding would not be found, of a text that the model is judged on after all the training."""
    monkeypatch.chdir(place)
    model = save_tiny("llama", tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    (place / "extra.txt").write_text("One <extra> and another <extra>. " + english()[:8_000])
    settings = [option for pair in [*QUICK, "evaluate.context_length=32"] for option in ("--set", pair)]
    command = [job, "--model", str(model), "--drop", "2", "--ignore-memory", "--out", str(tmp_path / "run")]
    assert run([*command, *options, *settings]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{named}: 2 of its tokens are not among the model's 384, such as 384 ('<extra>')" in line
    assert not (tmp_path / "run" / "plan.json").exists()


@BREADTH
@pytest.mark.parametrize(("windows", "alone"), [(4, True), (48, False)])
def test_a_text_of_which_only_the_beginning_is_read_is_named(place, monkeypatch, capsys, tmp_path, windows, alone):
    monkeypatch.chdir(place)
    sets = [*QUICK, f"calibration.max_windows={windows}", "calibration.validation_windows=2"]
    settings = [option for pair in sets for option in ("--set", pair)]
    command = ["prune", "--model", "model", "--drop", "2", "--ignore-memory", "--out", str(tmp_path / "run")]
    assert run([*command, "--calibration", "text.txt", "--method", "shortgpt", *settings]) == 0
    line = "calibration text 'text.txt': windows are drawn from its first 3,072 tokens alone"  # 16 x (4 + 2) windows
    assert capsys.readouterr().err.count(line) == alone


@BREADTH
def test_a_text_of_one_window_is_said_to_be_trained_on_and_judged_by(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    (place / "short.txt").write_text(english()[:100])
    settings = [option for pair in QUICK for option in ("--set", pair)]
    command = ["prune", "--model", "model", "--drop", "2", "--ignore-memory", "--method", "shortgpt", *settings]
    line = "holds one window of 32 tokens alone, which is trained on and held out too"
    for text, said in (("short.txt", True), ("text.txt", False)):
        assert run([*command, "--calibration", text, "--out", str(tmp_path / text)]) == 0
        assert (f"calibration text '{text}': {line}" in capsys.readouterr().err) == said


@BREADTH
def test_any_selection_with_any_transfer(prune):
    result, plan = prune("--method", "sleb", "--then", "anneal")
    assert (plan["method"], result["form"]) == ("sleb", "anneal")
    assert plan["settings"]["forward_passes"] == 6 + 5


@BREADTH
def test_a_penalty_needs_the_layers_that_a_fold_would_replace(prune):
    result, plan = prune("--method", "fold", "--then", "l2")
    assert (plan["method"], result["form"], result["refit"]) == ("fold", "l2", "none")
    assert result["ppl_before_removal"] != result["ppl_after_removal"]  # small is not zero


def test_unknown_method_and_senseless_pair(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["prune", "--model", "model", "--drop", "2"]
    assert run([*command, "--method", "slep"]) == 1
    assert "--method 'slep': no such method; did you mean 'sleb'?" in capsys.readouterr().err
    assert run([*command, "--method", "fold", "--set", "transfer.form=l2"]) == 1
    assert "transfer.form must be anneal, train or none, got l2" in capsys.readouterr().err


@BREADTH
def test_default_folder_names_model_and_count(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    settings = [option for pair in QUICK for option in ("--set", pair)]
    command = ["prune", "--model", "model", "--calibration", "text.txt", *settings, "--method", "shortgpt", "--json"]
    for drop in ("34%", "2"):
        assert run([*command, "--drop", drop]) == 0
        assert json.loads(capsys.readouterr().out)["run"] == "runs/model-drop2"
    plan = json.loads(Path("runs/model-drop2/plan.json").read_text())
    everything = range(plan["num_layers"])
    Path("three.json").write_text(json.dumps({**plan, "dropped": [1, 2, 3], "kept": [0, *everything[4:]]}))
    assert run([*command, "--plan", "three.json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "runs/model-drop3", "the run of two layers stays"
