"""The model, texts and plan that a run was made of: what of them is looked at again, and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command import Done, trsp_deploy
from tests.tiny import english, save_tiny
from trsp_deploy.pipeline.runs import seen_from

SETTINGS = [
    *("--set", "calibration.context_length=32", "--set", "calibration.max_windows=8"),
    *("--set", "calibration.validation_windows=4", "--method", "shortgpt", "--then", "none", "--drop", "2"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "train.txt").write_text(english()[:30_000])
    return tmp_path


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
    assert not (place / "run" / "dense" / "README.md").exists()
    (place / "model" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert started(prune(place)) == ["dense", "plan", "prune"]


def test_a_run_within_its_models_folder_is_not_part_of_the_model(place: Path) -> None:
    inside = place / "model"
    first = trsp_deploy("prune", "--model", ".", "--calibration", "../train.txt", *SETTINGS, cwd=inside)
    assert first.code == 0 and "runs/model-drop2" in first.said, first.said
    assert "# model-shortgpt-2of6" in (inside / "runs" / "model-drop2" / "pruned" / "README.md").read_text()
    again = trsp_deploy("prune", "--model", ".", "--calibration", "../train.txt", *SETTINGS, cwd=inside)
    assert started(again) == []


def test_a_config_that_is_written_in_place_is_not_the_runs(place: Path) -> None:
    prune(place)
    with (place / "model" / "config.json").open("a") as file:
        file.write(" ")
    assert not (place / "run" / "dense" / "config.json").read_text().endswith(" ")
    weights = (place / "model" / "model.safetensors").stat()
    assert weights.st_ino == (place / "run" / "dense" / "model.safetensors").stat().st_ino


def test_a_model_of_that_name_elsewhere_does_not_take_its_place(place: Path) -> None:
    prune(place)
    (place / "model").rename(place / "moved")
    other = place / "elsewhere"
    shutil.copytree(place / "moved", other / "model")
    done = trsp_deploy("export", "../run", cwd=other)
    assert done.code == 1 and f"model '{place / 'model'}': no such folder" in done.stderr
    assert seen_from(place, "owner/name") == "owner/name"


def test_a_plan_that_was_given_stays_with_another_text(place: Path) -> None:
    hand_in(place)
    given = dropped(place)
    with (place / "train.txt").open("a") as file:
        file.write("\nOne more line.\n")
    done = trsp_deploy("prune", "--model", "model", "--calibration", "train.txt", "--out", "run", *SETTINGS, cwd=place)
    assert done.code == 0 and dropped(place) == given and started(done) == ["prune"]
    assert "plan.json was given, not chosen here" in done.stderr


def test_other_settings_that_choose_layers_ask_whose_choice_it_is(place: Path) -> None:
    hand_in(place)
    command = ["prune", "--model", "model", "--calibration", "train.txt", "--out", "run", *SETTINGS]
    done = trsp_deploy(*command, "--method", "uidl", "--then", "none", cwd=place)
    assert done.code == 1 and "plan.json: was given, and settings that choose layers are others now" in done.stderr
    done = trsp_deploy(*command, "--method", "uidl", "--then", "none", "--plan", "given.json", cwd=place)
    assert done.code == 0 and "dropping the layers of given.json" in done.stderr
