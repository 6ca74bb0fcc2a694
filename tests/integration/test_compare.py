"""`trsp-deploy compare`: runs, engine folders and ONNX files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from trsp_deploy.comparison import _context_length
from trsp_deploy.errors import RecipeError, RunError
from trsp_deploy.recipe import EvaluateSettings
from trsp_deploy.stages.bench import find_pair, label_of
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.sources.texts import load_texts

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


ENGINES = [f"run/engines/ort-cpu-fp32/{role}" for role in ("dense", "pruned")]
GRAPHS = [f"run/onnx/{role}-fp32/model.onnx" for role in ("dense", "pruned")]
BRIEF = ["--budget", "2", "--set", "prompt_tokens=8", "--set", "new_tokens=2"]
TEXT = ["--eval", "manual=text.txt", "--set", "evaluate.context_length=64", "--set", "evaluate.max_tokens=640"]


@pytest.mark.parametrize("form", ["engines", "graphs"])
def test_compare_reads_a_text_with_both(workspace: Path, baseline: Path, form: str, tmp_path: Path) -> None:
    paths = {"engines": ENGINES, "graphs": GRAPHS}[form]
    out = tmp_path / "c.json"
    done = trsp_deploy(
        "compare", *paths, *BRIEF, *TEXT, "--max-ppl-ratio", "0.5", "--out", str(out), "--json", cwd=workspace
    )
    assert done.code == 2, done.said
    found = json.loads(done.stdout)
    assert [(each["requirement"]["name"], each["word"]) for each in found["outcomes"]] == [
        ("perplexity over dense, manual", "fail")
    ]
    assert "ppl on manual" in done.stderr, "in the table"
    raw = json.loads(out.read_text())
    documents = load_texts(str(workspace / "text.txt"), "evaluation").documents
    sha256 = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    known = {"sha256": sha256, "documents": len(documents), "tokens": 640, "bos": False, "overlap": None}
    named = {"name": "manual", "role": "evaluation", "origin": "text.txt"}
    assert raw["texts"] == found["texts"] == [named | known], "as a run's report has them"
    kept = raw["perplexity"]["manual"]
    for role in ("dense", "pruned"):
        of_run = json.loads((workspace / f"run/records/evaluate-ort-cpu-fp32-manual-{role}.json").read_text())["result"]
        assert kept[role]["nll"] == pytest.approx(of_run["nll"], rel=1e-4), "as the run's own evaluation has it"
        assert kept[role]["documents"], "so that the interval is over documents"
    assert found["quality"]["manual"]["tokens"] == 10 * 63


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
        (["run", "--max-ppl-ratio", "2"], ["--max-ppl-ratio needs a text to read; give one with --eval"]),
        (["run", *TEXT, "--set", "evaluate.tasks=[piqa]"], ["reads texts alone; tasks are asked of a run"]),
        (["run", *TEXT, "--set", "evaluate.max_tokens=0"], ["--set evaluate: key 'max_tokens': should be greater"]),
        (
            ["run", *TEXT, "--set", "evaluate.context_length=4000"],
            ["evaluate.context_length 4000: ", "tokens at once; --set evaluate.context_length="],
        ),
        (["run", "--eval", "manual=none.txt"], ["evaluation text 'none.txt'"]),
    ],
)
def test_compare_says_what_it_cannot_use(workspace: Path, baseline: Path, paths: list[str], words: list[str]) -> None:
    done = trsp_deploy("compare", *paths, cwd=workspace)
    assert done.code == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_window_is_as_long_as_both_engines_read() -> None:
    def holding(positions: int | None) -> Subject:
        return Subject(path=Path("e"), spec=None, vocabulary=9, cuts_logits=False, size=None, positions=positions)

    for dense, pruned, length in ((None, None, 2048), (512, 256, 256), (256, 512, 256), (None, 64, 64)):
        assert _context_length(holding(dense), holding(pruned), EvaluateSettings()) == length
    assert _context_length(holding(64), holding(None), EvaluateSettings(context_length=64)) == 64
    with pytest.raises(RecipeError, match=r"evaluate\.context_length 65: e reads 64 tokens at once"):
        _context_length(holding(None), holding(64), EvaluateSettings(context_length=65))


def test_graphs_without_a_tokenizer_need_to_be_given_one(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    for role, graph in zip(("dense", "pruned"), GRAPHS, strict=True):
        shutil.copytree((workspace / graph).parent, tmp_path / role, ignore=shutil.ignore_patterns("token*"))
    paths = [str(tmp_path / role / "model.onnx") for role in ("dense", "pruned")]
    done = trsp_deploy("compare", *paths, *BRIEF, *TEXT, cwd=workspace)
    assert done.code == 1 and "neither has a tokenizer beside it; give its folder with --tokenizer" in done.last
    done = trsp_deploy("compare", *paths, *BRIEF, *TEXT, "--tokenizer", "run/dense", cwd=workspace)
    assert done.code == 0 and "ppl on manual" in done.stdout, done.said


def test_two_tokenizers_that_disagree_are_refused(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    tokenizer = tmp_path / "run/pruned/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    tokenizer.unlink()  # else it may be another name of the model's own
    (first, one), (second, other), *_ = content["model"]["vocab"].items()
    content["model"]["vocab"] |= {first: other, second: one}
    tokenizer.write_text(json.dumps(content))
    text = tmp_path / "text.txt"
    text.write_text(f"{first} {second} " * 200)
    done = trsp_deploy("compare", "run", *BRIEF, *TEXT, cwd=tmp_path)
    assert done.code == 1 and "read it as different tokens" in done.last, done.said


def test_a_config_that_was_damaged_is_one_line(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "run", tmp_path / "run")
    (tmp_path / "run/dense/config.json").unlink()  # else it may be another name of the model's own
    (tmp_path / "run/dense/config.json").write_text("{")
    done = trsp_deploy("compare", "run", cwd=tmp_path)
    assert done.code == 1 and "dense/config.json: is not valid JSON (" in done.last, done.stderr
