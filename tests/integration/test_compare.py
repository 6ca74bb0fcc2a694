"""`trsp-deploy compare`: runs, engine folders and ONNX files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from trsp_deploy.errors import RunError
from trsp_deploy.stages.bench import find_pair, label_of
from trsp_deploy.tools.measuring.subjects import Subject

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("form", ["run", "onnx"])
def test_compare_takes_runs_and_onnx_files(workspace: Path, baseline: Path, form: str, tmp_path: Path) -> None:
    paths = {"run": ["run"], "onnx": ["run/onnx/dense-fp32/model.onnx", "run/onnx/pruned-fp32/model.onnx"]}[form]
    options = ["--budget", "2", "--set", "prompt_tokens=[8,16]", "--set", "new_tokens=4"]
    done = trsp_deploy("compare", *paths, *options, "--out", str(tmp_path / "c.json"), "--json", cwd=workspace)
    assert done.code == 0, done.said
    found = json.loads(done.stdout)
    phases = found["comparison"]["phases"]
    assert len(phases) == 6 and all((phase["limit"] is None) == (form == "onnx") for phase in phases)
    unlimited = [note for note in found["notes"] if note.startswith("no limit of the speed-up is known: ")]
    assert len(unlimited) == (form == "onnx")
    assert found["comparison"]["size_bytes"]["dense"] > found["comparison"]["size_bytes"]["pruned"] > 0
    assert any("replicates of fresh processes" in note for note in found["notes"]), "as the text has it"
    assert json.loads((tmp_path / "c.json").read_text())["replicates"][0]["blocks"]["again"]


@BREADTH
def test_compare_takes_engine_folders_and_judges(workspace: Path, baseline: Path) -> None:
    folders = [f"run/engines/ort-cpu-fp32/{role}" for role in ("pruned", "dense")]  # the wrong way round
    options = ["--min-speedup", "1", "--budget", "60", "--set", "prompt_tokens=[8,16]"]
    done = trsp_deploy("compare", *folders, *options, cwd=workspace)
    assert done.code == 2, done.said
    assert "NOT THERE" in done.stdout and "at least 1 wanted: fail" in done.stdout
    assert "speed-up, end to end, batch 1, prompt " in done.stdout, "the shape that decided"
    assert "DENSE has 2 layers and PRUNED 6: they may be the wrong way round" in done.stdout


def test_of_one_run_both_engines_are_the_same(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    """A run that was killed between the two halves of an engine has another one that is whole."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    shutil.copytree(workspace / "run" / "engines" / "ort-cpu-fp32", tmp_path / "run" / "engines" / "b")
    shutil.copytree(tmp_path / "run" / "engines" / "b" / "dense", tmp_path / "run" / "engines" / "a" / "dense")
    dense, pruned = find_pair(tmp_path / "run", None, None)
    assert (dense.path.parent.name, pruned.path.parent.name) == ("b", "b")
    assert label_of(dense, pruned) == "ort-cpu-fp32"


def test_of_two_runs_both_engines_are_the_same(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    built = workspace / "run" / "engines" / "ort-cpu-fp32"
    for run, engines in (("one", "ab"), ("other", "bc"), ("third", "c")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").touch()
        for engine in engines:
            shutil.copytree(built, tmp_path / run / "engines" / engine)
    dense, pruned = find_pair(tmp_path / "one", tmp_path / "other", None)
    assert (dense.path.parts[-3:], pruned.path.parts[-3:]) == (
        ("engines", "b", "dense"),
        ("engines", "b", "pruned"),
    )
    with pytest.raises(RunError, match=r"one has engines of a, b, .*third of c: no comparison"):
        find_pair(tmp_path / "one", tmp_path / "third", None)


def test_beside_an_engine_a_run_gives_the_same_one(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    """Another precision would count as the removal's speed-up."""
    built = workspace / "run" / "engines" / "ort-cpu-fp32"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    for engine in ("a", "ort-cpu-fp32"):
        shutil.copytree(built, tmp_path / "run" / "engines" / engine)
    shutil.copytree(built / "pruned", tmp_path / "engine")
    dense, _ = find_pair(tmp_path / "run", tmp_path / "engine", None)
    assert dense.path.parts[-3:] == ("engines", "ort-cpu-fp32", "dense")
    _, pruned = find_pair(tmp_path / "engine", tmp_path / "run", None)
    assert pruned.path.parts[-3:] == ("engines", "ort-cpu-fp32", "pruned")


def test_engines_of_two_names_are_both_named() -> None:
    one, other = (
        Subject(path=Path(path), spec=None, vocabulary=9, cuts_logits=False, size=None)
        for path in ("onnx/dense-fp32/model.onnx", "pruned.onnx")
    )
    assert label_of(one, other) == "dense-fp32 against pruned"


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["nowhere"], ["nowhere: is not there"]),
        (["text.txt"], ["text.txt: is no .onnx file"]),
        (
            [*(f"run/engines/ort-cpu-fp32/{role}" for role in ("dense", "pruned")), "--engine", "nonsense"],
            ["--engine nonsense: chooses among a run's engines"],
        ),
        (["tiny"], ["tiny: is a folder without manifest.json or recipe.yaml"]),
        (["text.onnx"], ["text.onnx: no such file"]),
        (["run/engines/ort-cpu-fp32/dense"], ["PRUNED is missing; only a run folder"]),
        (["run", "--engine", "ort-cpu-fp3"], ["no engine 'ort-cpu-fp3'; did you mean 'ort-cpu-fp32'?"]),
    ],
)
def test_compare_says_what_it_cannot_use(workspace: Path, baseline: Path, paths: list[str], words: list[str]) -> None:
    done = trsp_deploy("compare", *paths, cwd=workspace)
    assert done.code == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_config_that_was_damaged_is_one_line(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    (tmp_path / "run/dense/config.json").unlink()  # else it may be another name of the model's own
    (tmp_path / "run/dense/config.json").write_text("{")
    done = trsp_deploy("compare", "run", cwd=tmp_path)
    assert done.code == 1 and "dense/config.json: is not valid JSON (" in done.last, done.stderr
