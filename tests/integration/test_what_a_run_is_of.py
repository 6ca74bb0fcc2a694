"""The model, texts and plan that a run was made of: what of them is looked at again, and where."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tests.breadth import BREADTH
from tests.command import Done, trsp_deploy
from tests.tiny import english, save_tiny
from trsp_deploy.artifacts import RunFolder, write_json
from trsp_deploy.cli import needs
from trsp_deploy.errors import LeftToMain, TextError
from trsp_deploy.pipeline import Pipeline, prune_and_build
from trsp_deploy.pipeline.dense_model import DenseModel
from trsp_deploy.pipeline.plan_origin import chosen_alike
from trsp_deploy.pipeline.runs import load_recipe, seen_from
from trsp_deploy.recipe import Recipe, read_recipe
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.sources import kept_texts
from trsp_deploy.tools.sources.kept_texts import kept_text
from trsp_deploy.tools.sources.models import resolve_model
from trsp_deploy.tools.sources.names import is_model_folder, meant_here
from trsp_deploy.tools.sources.texts import jsonl, load_texts

SETTINGS = [
    *("--set", "calibration.context_length=32", "--set", "calibration.max_windows=8"),
    *("--set", "calibration.validation_windows=4", "--method", "shortgpt", "--then", "none", "--drop", "2"),
]
SHORT = ["--set", "evaluate.context_length=32", "--set", "evaluate.max_tokens=320"]
BENCH = [f"--set=bench.{key}" for key in ("prompt_tokens=16", "new_tokens=4", "budget_s=4", "replicates=2")]
EVALUATED = "evaluate-own-{}"


def furnish(place: Path) -> Path:
    """A model, and a text to train on."""
    save_tiny("llama", place / "model")
    (place / "train.txt").write_text(english()[:30_000])
    return place


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return furnish(tmp_path)


def prune(place: Path, *more: str, model: str = "model", text: str = "train.txt", run: str = "run") -> Done:
    done = trsp_deploy("prune", "--model", model, "--calibration", text, "--out", run, *SETTINGS, *more, cwd=place)
    assert done.code == 0, done.stderr
    return done


def started(done: Done) -> list[str]:
    return [line.removeprefix("> ").partition(":")[0] for line in done.stderr.splitlines() if line.endswith("started")]


def dropped(place: Path) -> list[int]:
    found: list[int] = json.loads((place / "run" / "plan.json").read_text())["dropped"]
    return found


def hand_in(place: Path) -> Path:
    """A run with a plan that it would not choose."""
    prune(place)
    plan = json.loads((place / "run" / "plan.json").read_text())
    plan["dropped"] = [1, 3] if plan["dropped"] != [1, 3] else [1, 4]
    plan["kept"] = [layer for layer in range(6) if layer not in plan["dropped"]]
    (place / "given.json").write_text(json.dumps(plan))
    prune(place, "--plan", "given.json")
    return place / "given.json"


def test_a_card_that_comes_later_and_another_spelling_of_a_path_redo_nothing(place: Path) -> None:
    assert started(prune(place)) == ["dense", "plan", "prune"]
    (place / "model" / "README.md").write_text("# a card")
    (place / "model" / "LICENSE").write_text("terms")
    assert started(prune(place, text="./train.txt")) == []
    (place / "model" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert started(prune(place)) == ["dense", "plan", "prune"]


def test_a_run_within_its_models_folder_is_not_part_of_the_model(place: Path) -> None:
    inside = place / "model"
    first = trsp_deploy("prune", "--model", ".", "--calibration", "../train.txt", *SETTINGS, cwd=inside)
    assert first.code == 0 and "runs/model-drop2" in first.said, first.said
    assert "# model-shortgpt-2of6" in (inside / "runs" / "model-drop2" / "pruned" / "README.md").read_text()
    again = trsp_deploy("prune", "--model", ".", "--calibration", "../train.txt", *SETTINGS, cwd=inside)
    assert started(again) == []


@BREADTH
def test_a_config_that_is_written_in_place_is_not_the_runs(place: Path) -> None:
    prune(place)
    with (place / "model" / "config.json").open("a") as file:
        file.write(" ")
    assert not (place / "run" / "dense" / "config.json").read_text().endswith(" ")
    weights = (place / "model" / "model.safetensors").stat()
    assert weights.st_ino == (place / "run" / "dense" / "model.safetensors").stat().st_ino


@BREADTH
def test_a_model_of_that_name_elsewhere_does_not_take_its_place(place: Path) -> None:
    prune(place)
    (place / "model").rename(place / "moved")
    other = place / "elsewhere"
    shutil.copytree(place / "moved", other / "model")
    done = trsp_deploy("evaluate", "../run", "--eval", f"own={place / 'train.txt'}", *SHORT, cwd=other)
    assert done.code == 0 and started(done) == [EVALUATED.format("dense"), EVALUATED.format("pruned")], done.stderr
    assert "model 'model': no such folder here; going on with the run's copy of it" in done.stderr
    assert seen_from(place, "owner/name") == "owner/name"


@BREADTH
def test_a_folder_with_a_short_name_is_the_runs_alone_where_it_is_meant(place: Path) -> None:
    """A run was made anew from whatever folder of that name lay where a later command ran."""
    (place / "model").rename(place / "gpt2")
    prune(place, model="gpt2")
    other = place / "elsewhere"
    save_tiny("llama", other / "gpt2", seed=1)
    text = ["--eval", f"own={place / 'train.txt'}", *SHORT]
    done = trsp_deploy("evaluate", "../run", *text, cwd=other)
    assert done.code == 0 and started(done) == [EVALUATED.format("dense"), EVALUATED.format("pruned")], done.stderr
    assert started(prune(place, model="gpt2")) == []
    # What is there under the name is compared, from anywhere.
    shutil.rmtree(place / "gpt2")
    shutil.copytree(other / "gpt2", place / "gpt2")
    changed = trsp_deploy("evaluate", "../run", *text, cwd=other)
    assert changed.code == 0 and {"dense", "plan", "prune"} <= set(started(changed)), changed.stderr


def test_a_short_name_in_a_run_is_no_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub's model; a folder of the name lies where a later command runs."""
    monkeypatch.chdir(place)
    assert meant_here("gpt2") == "gpt2" and not is_model_folder("gpt2")
    (place / "model").rename(place / "gpt2")
    assert meant_here("gpt2") == "./gpt2" and not is_model_folder("gpt2") and is_model_folder("./gpt2")
    (place / "opt-125m").mkdir()
    assert meant_here("opt-125m") == "opt-125m", "a run of its name, or an empty folder"


@BREADTH
def test_a_run_of_a_model_that_is_called_as_a_part_of_it_is_used_from_within(place: Path) -> None:
    (place / "model").rename(place / "pruned")
    prune(place, model="pruned")
    text = ["--eval", f"own={place / 'train.txt'}", *SHORT]
    done = trsp_deploy("evaluate", ".", *text, cwd=place / "run")
    assert done.code == 0, done.stderr


@pytest.fixture(scope="module")
def unplugged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, judged; the folder that its command ran in, with its model and texts, is called otherwise by now."""
    place = furnish(tmp_path_factory.mktemp("origin"))
    (place / "judge.txt").write_text(english()[30_000:50_000])
    prune(place)
    done = trsp_deploy("evaluate", "run", "--eval", "own=judge.txt", *SHORT, cwd=place)
    assert done.code == 0, done.stderr
    return place.rename(place.with_name("unplugged")) / "run"


@pytest.fixture
def taken(unplugged: Path, tmp_path: Path) -> Path:
    """The run where it was taken to."""
    (tmp_path / "spec.yaml").write_text("description: eight bits\nbackend: onnxruntime-cpu\nprecision: int8\n")
    return Path(shutil.copytree(unplugged, tmp_path / "taken"))


@BREADTH
def test_a_run_is_built_and_judged_where_its_model_and_texts_are_not(taken: Path) -> None:
    elsewhere = taken.parent
    built = trsp_deploy("build", taken.name, "--engine", "spec.yaml", *BENCH, cwd=elsewhere)
    assert built.code == 0 and not {"dense", "plan", "prune"} & set(started(built)), built.stderr
    assert "build-spec-pruned" in started(built)  # its integers are chosen on the calibration text
    for what in ("model 'model': no such folder here", "calibration text 'train.txt': no such file here"):
        assert f"{what}; going on with the run's copy of it" in built.stderr
    found = trsp_deploy("report", taken.name, cwd=elsewhere)
    assert found.code == 0 and "ppl on own" in found.stdout, found.stderr
    assert "evaluation text 'judge.txt': no such file here; going on with the run's copy of it" in found.stderr
    assert not any(step in started(found) for step in ("dense", "plan", "prune", EVALUATED.format("dense")))
    assert trsp_deploy("verify", taken.name, cwd=elsewhere).code == 0


@BREADTH
def test_prune_copies_the_texts_at_hand_that_its_model_will_be_judged_on(place: Path) -> None:
    (place / "judge.txt").write_text(english()[30_000:50_000])
    texts = {"own": "judge.txt", "gone": "gone.txt", "hub": "wikitext2"}
    done = prune(place, *(f"--set=evaluation.{called}={text}" for called, text in texts.items()))
    assert [*started(done)] == ["dense", "plan", "prune"] and "judge.txt" not in done.stderr
    copies = sorted(path.name for path in (place / "run" / "texts").iterdir())
    assert copies == ["calibration-1.json", "evaluation-own.json"]
    run = shutil.copytree(place / "run", place.with_name(f"{place.name}-elsewhere") / "run")
    found = trsp_deploy("evaluate", "run", "--eval", "own=judge.txt", *SHORT, cwd=run.parent)
    assert found.code == 0 and started(found) == [EVALUATED.format("dense"), EVALUATED.format("pruned")], found.stderr


def test_a_copy_that_was_damaged_is_not_gone_on_with(taken: Path) -> None:
    with (taken / "dense" / "config.json").open("a") as file:
        file.write(" ")
    done = trsp_deploy("export", taken.name, cwd=taken.parent)
    assert done.code == 1 and done.last.startswith("error: model 'model': neither a folder nor a short name")


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace("the", "teh", 1), lambda text: text[:-20], lambda text: ""]
)
def test_a_text_that_was_damaged_is_not_gone_on_with(taken: Path, damage: Callable[[str], str]) -> None:
    copy = taken / "texts" / "calibration-1.json"
    copy.write_text(damage(copy.read_text()))
    done = trsp_deploy("export", taken.name, cwd=taken.parent)
    assert done.code == 1 and done.last == "error: calibration text 'train.txt': no such file"


@BREADTH
def test_a_name_of_the_hub_means_what_the_run_read_under_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    entry = place / "hub" / "models--owner--name"
    shutil.copytree(place / "model", entry / "snapshots" / ("0" * 40))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    assert started(prune(place, model="owner/name")) == ["dense", "plan", "prune"]
    save_tiny("llama", entry / "snapshots" / ("1" * 40), seed=1)
    (entry / "refs" / "main").write_text("1" * 40)
    assert started(prune(place, model="owner/name")) == []
    shutil.rmtree(entry)
    done = prune(place, model="owner/name")
    assert started(done) == [] and "asking the Hugging Face hub" not in done.stderr
    with pytest.raises(AssertionError, match="owner/name"):  # which another run does not know
        prune(place, model="owner/name", run="other")


def test_another_text_is_not_the_copy_of_the_one_before(taken: Path) -> None:
    done = trsp_deploy("export", taken.name, "--set", "calibration.texts=[other.txt]", cwd=taken.parent)
    assert done.code == 1 and done.last == "error: calibration text 'other.txt': no such file"


@BREADTH
def test_a_run_of_before_copies_its_model_once_more_and_makes_nothing_else(place: Path) -> None:
    prune(place)
    record = place / "run" / "records" / "dense.json"
    before = {**json.loads(record.read_text()), "result": {}}  # it said nothing of where the model came from
    del before["sha256"]
    record.write_text(json.dumps(before))
    shutil.rmtree(place / "run" / "texts")
    assert started(prune(place)) == ["dense"]
    assert started(prune(place)) == [] and (place / "run" / "texts" / "calibration-1.json").is_file()


def test_a_run_that_is_made_from_python_is_the_commands_too(place: Path) -> None:
    """It had no recipe, so that no command took its folder for a run."""
    recipe = Recipe(model="model", calibration={"texts": "train.txt"}, evaluation={"test": "gone.txt"})  # type: ignore[arg-type]
    with (
        RunFolder(place / "run") as run,
        pytest.raises(TextError, match="no such file"),
    ):
        prune_and_build(Pipeline(run, recipe, place=place))
    assert read_recipe(load_recipe(place / "run"), "test") == recipe
    done = trsp_deploy("report", "run", cwd=place)
    assert done.last.startswith("error: calibration.context_length 2048: model has 256 positions"), "it went on with it"


LATER = {  # settings that a run of before knows nothing of, of a step
    "plan": (("autocast",), ("calibration", "self_generated"), ("plan", "trial_windows")),
    "prune": (("weights",), ("calibration", "self_generated"), ("transfer", "micro_batch")),
}


@BREADTH
def test_a_run_of_before_a_setting_was_there_is_not_trained_again(place: Path) -> None:
    """An update that brought a setting threw finished training away, and `check` judged what was trained then."""
    prune(place)
    with RunFolder(place / "run") as run:
        for step, later in LATER.items():
            record = run.record(step)
            settings = record.model_dump(mode="json")["settings"]
            for *within, name in later:
                del functools.reduce(dict.__getitem__, within, settings)[name]
            key = run.key(step, settings=settings, inputs=record.inputs)
            write_json(run.layout.record(step), record.model_copy(update={"settings": settings, "key": key}))
        recipe = read_recipe(load_recipe(place / "run"), "test")
        assert Pipeline(run, recipe, place=place).pruning.unfinished() == []
        assert chosen_alike(run, Pipeline(run, recipe, place=place).pruning._plan_settings)
    assert started(prune(place)) == []
    done = prune(place, "--set", "weights=bf16")
    assert started(done) == ["plan", "prune"] and "prune: weights is 'bf16', was 'fp32'; plan is another" in done.stderr


@BREADTH
def test_a_text_that_changed_is_copied_anew(place: Path) -> None:
    prune(place)
    (place / "train.txt").write_text(english()[5_000:40_000])
    assert started(prune(place)) == ["plan", "prune"]
    assert kept_text(place / "run" / "texts" / "calibration-1.json", "train.txt") == load_texts(
        str(place / "train.txt"), "calibration"
    ).model_copy(update={"name": "train.txt"})


@BREADTH
def test_a_folder_of_a_dataset_that_changed_is_read_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file is; the run's copy was taken for it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    rows, name = place / "data" / "own" / "train.jsonl", "data/own:train"
    rows.parent.mkdir(parents=True)
    rows.write_text(jsonl([english()[:30_000]]))
    assert started(prune(place, text=name)) == ["dense", "plan", "prune"]
    assert started(prune(place, text=name)) == []
    rows.write_text(jsonl([english()[5_000:40_000]]))
    assert started(prune(place, text=name)) == ["plan", "prune"]
    (place / "elsewhere").mkdir()
    rows.write_text(jsonl([english()[:30_000]]))
    done = trsp_deploy("export", "../run", cwd=place / "elsewhere")  # where that name means no folder
    assert done.code == 0 and not {"plan", "prune"} & set(started(done)), done.stderr


@BREADTH
def test_a_text_that_is_too_large_is_not_copied(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "train.txt").write_text(english()[:15_000])
    monkeypatch.setattr(kept_texts, "LARGEST", 20_000)
    prune(place)
    assert [*(place / "run" / "texts").iterdir()] == [place / "run" / "texts" / "calibration-1.json"]
    (place / "train.txt").write_text(english()[:30_000])
    done = prune(place)
    assert (
        "train.txt: too large for a copy in the run; where the run is taken, the text has to be as well" in done.stderr
    )
    assert [*(place / "run" / "texts").iterdir()] == []  # nor is a copy left of what it was before
    with RunFolder(place / "run") as run:
        run.write_manifest()
    prune(place)
    assert (place / "run" / "MANIFEST.json").is_file()  # which is outdated by what is written alone


@BREADTH
def test_a_plan_that_was_given_stays_with_another_text(place: Path) -> None:
    hand_in(place)
    given = dropped(place)
    with (place / "train.txt").open("a") as file:
        file.write("\nOne more line.\n")
    done = trsp_deploy("prune", "--model", "model", "--calibration", "train.txt", "--out", "run", *SETTINGS, cwd=place)
    assert done.code == 0 and dropped(place) == given and started(done) == ["plan", "prune"]
    assert "plan.json was given, not chosen here" in done.stderr
    with RunFolder(place / "run") as run:
        recipe = read_recipe(load_recipe(place / "run"), "test")
        assert Pipeline(run, recipe, place=place).pruning.unfinished() == []


@BREADTH
def test_what_a_persons_plan_leaves_to_do(place: Path) -> None:
    prune(place)
    path = place / "run" / "plan.json"
    plan = json.loads(path.read_text())

    def unfinished() -> list[str]:
        with RunFolder(place / "run") as run:
            return Pipeline(run, read_recipe(load_recipe(place / "run"), "test"), place=place).pruning.unfinished()

    path.write_text(json.dumps({**plan, "dropped": [1, 3], "kept": [0, 2, 4, 5]}))
    assert unfinished() == ["transfer"]
    for _ in range(2):  # it says so again
        assert "plan.json was edited by hand: dropping 1, 3" in prune(place).stderr
    with (place / "train.txt").open("a") as file:
        file.write("\nOne more line.\n")
    assert unfinished() == ["transfer"], "no layers are chosen"
    prune(place)
    assert unfinished() == []
    path.unlink()
    assert unfinished() == ["selection", "transfer"], "others may be chosen"


@BREADTH
def test_a_run_of_before_keeps_its_given_plan(place: Path) -> None:
    """Its record names the text among the settings."""
    hand_in(place)
    given, path = dropped(place), place / "run" / "records" / "plan.json"
    record = json.loads(path.read_text())
    record["settings"]["calibration"]["texts"], _ = "train.txt", record.pop("sha256")
    path.write_text(json.dumps(record))
    done = trsp_deploy("export", "run", cwd=place)
    assert done.code == 0 and dropped(place) == given, done.stderr


@BREADTH
def test_a_recorded_plan_of_another_version_is_another_one_than_was_handed_in(place: Path) -> None:
    """It was a traceback, before anything began."""
    hand_in(place)
    recipe, path = read_recipe(load_recipe(place / "run"), "test"), place / "run" / "records" / "plan.json"
    with RunFolder(place / "run") as run:
        assert Pipeline(run, recipe, place / "run" / "plan.json", place=place).pruning.unfinished() == []
        record = json.loads(path.read_text())
        record["result"]["of_a_later_version"], _ = True, record.pop("sha256")
        path.write_text(json.dumps(record))
        left = Pipeline(run, recipe, place / "run" / "plan.json", place=place).pruning.unfinished()
    assert left == ["selection", "transfer"]


@BREADTH
def test_a_sweep_with_another_text_is_not_searched(place: Path) -> None:
    (place / "other.txt").write_text(english()[30_000:60_000])
    prune(place)
    with RunFolder(place / "run") as run:
        recipe = read_recipe(load_recipe(place / "run"), "test")
        job = Pipeline(run, recipe, place=place).pruning
        job.plans((1, 2))
        assert job.searched((1, 2))
        other = recipe.model_copy(
            update={"calibration": recipe.calibration.model_copy(update={"texts": ("other.txt",)})}
        )
        assert not Pipeline(run, other, place=place).pruning.searched((1, 2))


def test_processes_of_other_machines_need_not_have_the_models_folder(place: Path) -> None:
    """The main one has it in a cache of its own, and writes `dense` for all."""
    prune(place)
    recipe = read_recipe(load_recipe(place / "run"), "test")
    source = resolve_model(str(place / "model"), lambda _: None).model_copy(update={"path": "/nowhere/on/this/machine"})
    sent = iter([(source, ""), source])
    with RunFolder(place / "run") as run:
        run.main, run.from_main = False, lambda value: next(sent)
        assert DenseModel(run, recipe, lambda _: None, place).copied() == source


def test_processes_beside_the_main_one_leave_by_an_exception_that_a_program_can_catch(place: Path) -> None:
    """SystemExit ended a program that has the pipeline as a library."""
    prune(place)
    with RunFolder(place / "run") as run:
        plan = run.record("plan").result  # type: ignore[union-attr]
        done = PrunedCheckpoint.model_validate(run.record("prune").result)  # type: ignore[union-attr]
        job = Pipeline(run, read_recipe(load_recipe(place / "run"), "test"), place=place).pruning
        source = resolve_model(str(place / "model"), lambda _: None)
        sent = iter([(source, ""), source, PruningPlan.model_validate(plan), done])
        run.main, run.from_main = False, lambda value: next(sent)
        with pytest.raises(LeftToMain, match="the model is pruned, and the rest is the main process's work"):
            job.prune()


@BREADTH
def test_other_settings_that_choose_layers_ask_whose_choice_it_is(place: Path) -> None:
    hand_in(place)
    settings = ["uidl" if word == "shortgpt" else word for word in SETTINGS]
    command = ["prune", "--model", "model", "--calibration", "train.txt", "--out", "run", *settings]
    done = trsp_deploy(*command, cwd=place)
    assert done.code == 1 and "plan.json: was given, and settings that choose layers are others now" in done.stderr
    assert "keep it with `prune` and --plan run/plan.json, or delete it" in done.stderr
    done = trsp_deploy(*command, "--plan", "given.json", cwd=place)
    assert done.code == 0 and "dropping the layers of given.json" in done.stderr


@BREADTH
def test_other_words_about_an_engine_build_nothing(place: Path) -> None:
    prune(place)
    spec = place / "mine.yaml"
    for words, state in (("mine", "started"), ("other words about it", "reused")):
        spec.write_text(f"description: {words}\nbackend: onnxruntime-cpu\nprecision: fp32\n")
        done = trsp_deploy("build", "run", "--engine", "mine.yaml", cwd=place)
        assert done.code == 0 and f"> build-mine-pruned: {state}" in done.stderr, done.stderr


@BREADTH
def test_an_engine_of_a_file_that_is_gone_is_built_by_what_the_run_has_of_it(place: Path) -> None:
    """Every command of such a run ended with "no such file", on another machine and here."""
    prune(place)
    spec, said = "mine.yaml", "engine 'mine.yaml': no such file here; going on with the run's copy of its spec"
    (place / spec).write_text("description: mine\nbackend: onnxruntime-cpu\nprecision: fp32\nfuse: false\n")
    built = trsp_deploy("build", "run", "--engine", spec, "--set=evaluation={}", *BENCH, cwd=place)
    assert built.code == 0, built.stderr
    place = place.rename(place.with_name(f"{place.name}-called otherwise"))
    (place / spec).unlink()
    found = trsp_deploy("report", "run", cwd=place)
    assert found.code == 0 and said in found.stderr and "> build-mine-dense: reused" in found.stderr, found.stderr
    shutil.rmtree(place / "run" / "engines")  # as `clean` does
    again = trsp_deploy("build", "run", cwd=place)
    assert again.code == 0 and {"build-mine-dense", "build-mine-pruned"} <= set(started(again)), again.stderr
    manifest = json.loads((place / "run" / "engines" / "mine" / "pruned" / "manifest.json").read_text())
    assert manifest["spec"]["fuse"] is False
    other = trsp_deploy("build", "run", "--engine", "others/mine.yaml", cwd=place)
    assert other.code == 1 and other.last == "error: others/mine.yaml: no such file", "of which the run has none"


@BREADTH
def test_the_disk_that_a_run_needs_is_by_its_plan(place: Path) -> None:
    """It was by the recipe's `drop`, whatever plan was handed in, or had been edited."""
    given = hand_in(place)  # of two layers
    plan = json.loads(given.read_text())
    given.write_text(json.dumps({**plan, "dropped": [1, 2, 3, 4], "kept": [0, 5]}))
    recipe = read_recipe(load_recipe(place / "run"), "test")

    def pruned_bytes(file: Path | None) -> int:
        with RunFolder(place / "run") as run:
            job = Pipeline(run, recipe, file, place=place)
            found = needs._disk_plan(job, file, job.inputs.model.config(), [], ())
        return next(stage.kept_bytes for stage in found.stages if stage.stage == "pruned")

    of_two, of_four = pruned_bytes(None), pruned_bytes(given)
    assert of_four < of_two
    shutil.copy(given, place / "run" / "plan.json")
    assert pruned_bytes(None) == of_four
