"""What is refused leaves everything as it was, and a run is the same from wherever it is used."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from tests.made_run import made_sweep
from tests.tiny import english, save_tiny, tiny_model
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, fingerprint
from trsp_deploy.errors import EngineUnavailable, RecipeError
from trsp_deploy.pipeline import Pipeline, engines, prune_and_build
from trsp_deploy.pipeline.runs import load_recipe, no_longer_has, place_of, save_recipe
from trsp_deploy.recipe import EngineSpec, read_recipe
from trsp_deploy.tools.exporters import optimum
from trsp_deploy.tools.resources import disk

SETTINGS = [
    "calibration.context_length=32",
    "calibration.max_windows=8",
    "calibration.validation_windows=2",
    "plan.method=shortgpt",
    "transfer.form=none",
    "evaluate.context_length=64",
    "engines=[ort-cpu-fp32]",
]
# Without lm-eval a task cannot be looked up, and that is what is said.
UNKNOWN_TASK = ["piqqa"] if importlib.util.find_spec("lm_eval") else ["zero-shot tasks need lm-eval"]
OPTIONS = [option for pair in SETTINGS for option in ("--set", pair)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts and a run of them."""
    folder = tmp_path_factory.mktemp("kept")
    save_tiny("llama", folder / "tiny")
    for name in ("train", "test"):
        (folder / f"{name}.txt").write_text(english()[:20_000])
    command = ["prune", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"]
    done = trsp_deploy(*command, *OPTIONS, "--set", "evaluation={manual: test.txt}", cwd=folder)
    assert done.code == 0, done.stderr
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, for what may change it."""
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# -- what is in the way ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(place: Path) -> Path:
    done = trsp_deploy("export", "run", cwd=place)
    assert done.code == 0, done.stderr
    return place / "run" / "onnx" / "pruned-fp32" / "model.onnx"


@pytest.mark.parametrize("out", ["graph", ".", ".."])
def test_an_engine_replaces_nothing_but_engines(graph: Path, tmp_path: Path, out: str) -> None:
    inner = Path(shutil.copytree(graph.parent, tmp_path / "outer" / "graph"))
    before = files(tmp_path)
    cwd = inner.parent if out == "graph" else inner
    done = trsp_deploy("build", "--onnx", str(graph), "--engine", "ort-cpu-fp32", "--out", out, cwd=cwd)
    assert done.code == 1 and f"--out {out}: " in done.last, done.stderr
    assert files(tmp_path) == before


def test_an_engine_is_replaced_by_another(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        command = ["build", "--onnx", str(graph), "--engine", "ort-cpu-fp32", "--out", "empty"]
        assert trsp_deploy(*command, cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "x"}',
        '{"spec": {}, "files": ["thesis.txt"]}',
        '{"spec": "x", "files": {"thesis.txt": "0"}}',
        "[]",
        "{",
    ],
)
def test_a_folder_with_another_kind_of_manifest_is_no_engine(graph: Path, tmp_path: Path, manifest: str) -> None:
    """Web sites have a manifest.json too, and whole ones were gone."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text(manifest)
    (tmp_path / "site" / "thesis.txt").write_text("years of work")
    before = files(tmp_path)
    done = trsp_deploy("build", "--onnx", str(graph), "--engine", "ort-cpu-fp32", "--out", "site", cwd=tmp_path)
    assert done.code == 1 and "--out site: holds other things than an engine" in done.last, done.stderr
    assert files(tmp_path) == before


@BREADTH
def test_an_engine_whose_manifest_is_no_record_still_says_what_is_its_own(graph: Path, tmp_path: Path) -> None:
    """As of another version; all that lay in its folder went with it."""
    command = ["build", "--onnx", str(graph), "--engine", "ort-cpu-fp32", "--out", "engine"]
    assert trsp_deploy(*command, cwd=tmp_path).code == 0
    manifest, notes = (tmp_path / "engine" / name for name in ("manifest.json", "notes.md"))
    manifest.write_text(manifest.read_text().replace('"backend_version"', '"version"'))
    notes.write_text("mine")
    done = trsp_deploy(*command, cwd=tmp_path)
    assert done.code == 1 and "notes.md in it is yours: move that away" in done.last, done.stderr
    assert notes.read_text() == "mine"
    notes.unlink()
    assert trsp_deploy(*command, cwd=tmp_path).code == 0 and '"backend_version"' in manifest.read_text()


def test_a_run_takes_no_folder_with_other_things_of_its_names(place: Path, tmp_path: Path) -> None:
    (tmp_path / "project" / "pruned").mkdir(parents=True)
    (tmp_path / "project" / "pruned" / "thesis.txt").write_text("years of work")
    command = ["prune", "--model", str(place / "tiny"), "--drop", "2", "--calibration", str(place / "train.txt")]
    done = trsp_deploy(*command, *OPTIONS, "--out", "project", cwd=tmp_path)
    assert done.code == 1 and "project: has pruned and is no run of trsp-deploy" in done.last, done.stderr
    assert list(files(tmp_path)) == ["project/pruned/thesis.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ["prune-and-build", "--recipe", "exp/recipe.yaml", "--out", "exp"],
        ["sweep", "--recipe", "exp/recipe.yaml", "--drop", "1..2", "--out", "exp"],
        ["report", "exp"],
        ["clean", "exp", "--keep", "engines"],
    ],
    ids=lambda command: command[0],
)
def test_a_recipe_of_ones_own_makes_no_run_of_a_folder(place: Path, tmp_path: Path, command: list[str]) -> None:
    """It was written over, and what lay beside it under a run's names was replaced."""
    (tmp_path / "exp" / "pruned").mkdir(parents=True)
    (tmp_path / "exp" / "plans").mkdir() if command[0] == "sweep" else None
    (tmp_path / "exp" / "pruned" / "thesis.txt").write_text("years of work")
    recipe = f"# chosen with care\nmodel: {place / 'tiny'}\ndrop: 2\ncalibration: {{texts: {place / 'train.txt'}}}\n"
    (tmp_path / "exp" / "recipe.yaml").write_text(recipe)
    before = files(tmp_path)
    options = OPTIONS if "--recipe" in command else []
    for _ in range(2):  # a refusal leaves nothing behind by which it would be one
        done = trsp_deploy(*command, *options, cwd=tmp_path)
        words = "no command of trsp-deploy has worked" if command[0] == "clean" else "is no run of trsp-deploy"
        assert done.code == 1 and words in done.last, done.stderr
        assert files(tmp_path) == before


def test_a_sweep_takes_no_folder_for_one_of_its_runs(place: Path, tmp_path: Path) -> None:
    """Only its own folder was looked at, and each of its runs took whatever lay where it was to be."""
    (tmp_path / "theirs" / "drop-2" / "pruned").mkdir(parents=True)
    (tmp_path / "theirs" / "drop-2" / "pruned" / "thesis.txt").write_text("years of work")
    shutil.copytree(place / "run", tmp_path / "mine" / "drop-2")
    before = files(tmp_path)
    for folder, words in (
        ("theirs", "theirs/drop-2: has pruned and is no run of trsp-deploy; choose another --out"),
        ("mine", "mine/drop-2: is a run, and of no sweep, for mine is none yet; choose another --out"),
    ):
        command = ["sweep", "--model", str(place / "tiny"), "--drop", "1..2", "--out", folder]
        done = trsp_deploy(*command, "--calibration", str(place / "train.txt"), *OPTIONS, cwd=tmp_path)
        assert done.code == 1 and done.last == f"error: {words}", done.stderr
    assert files(tmp_path) == before and len(list(tmp_path.rglob(".lock"))) == 1


# -- settings ----------------------------------------------------------------------------------------------------------


@BREADTH
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "run", "--eval", "manual=tset.txt"], ["tset.txt", "no such file"]),
        (["export", "run", "--set", "evaluate.tasks=[piqqa]"], UNKNOWN_TASK),
        (["bench", "run", "--set", "calibration.context_length=4096"], ["4096", "positions"]),
        (["prune", "--model", "tiny", "--drop", "50", "--calibration", "train.txt", "--out", "run"], ["--drop '50'"]),
        (["check", "run", "--min-accuracy-retained", "90%", "--task", "piqqa"], UNKNOWN_TASK),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_leaves_the_run_its_settings(place: Path, run: Path, command: list[str], words: list[str]) -> None:
    for name in ("tiny", "train.txt"):
        (run.parent / name).symlink_to(place / name)
    before = files(run)
    done = trsp_deploy(*command, cwd=run.parent)
    assert done.code == 1 and all(word in done.last for word in words), done.stderr
    assert files(run) == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--drop", "50", "--calibration", "train.txt"], "--drop '50'"),
        (["--drop", "2", "--calibration", "tran.txt"], "tran.txt"),
    ],
)
def test_a_mistake_leaves_the_run_its_model(place: Path, run: Path, wrong: list[str], words: str) -> None:
    """What was wrong was said when another model lay in `dense/` already, of which the run is not."""
    save_tiny("llama", run.parent / "other", seed=9)
    (run.parent / "train.txt").symlink_to(place / "train.txt")
    before = files(run)
    done = trsp_deploy("prune", "--model", "other", *wrong, *OPTIONS, "--out", "run", cwd=run.parent)
    assert done.code == 1 and words in done.last, done.stderr
    assert files(run) == before


@pytest.mark.parametrize("model", ["tiny", "nope"])
def test_a_range_that_the_model_does_not_have_leaves_a_sweep_finished(place: Path, tmp_path: Path, model: str) -> None:
    """Its recipe had the first of the range by then, and its manifest was gone; of a new folder a run was left."""
    made_sweep(tmp_path / "sweep")
    before = files(tmp_path)
    for folder in ("sweep", "new"):
        command = ["sweep", "--model", model, "--drop", "3..99", "--out", str(tmp_path / folder)]
        done = trsp_deploy(*command, *OPTIONS, cwd=place)
        assert done.code == 1 and ("--drop '6' is 6 of" in done.last or "model 'nope'" in done.last), done.stderr
    assert files(tmp_path) == before


@BREADTH
def test_text_by_the_dense_model_is_no_reason_to_choose_layers_anew(run: Path) -> None:
    path = run / "plan.json"
    plan = json.loads(path.read_text())
    edited = {**plan, "dropped": [2], "kept": [0, 1, 3, 4, 5]}
    path.write_text(json.dumps(edited))
    with_text = trsp_deploy("export", str(run), "--set", "calibration.self_generated=0.25", cwd=run.parent)
    assert with_text.code == 0 and "plan.json was edited by hand: dropping 2" in with_text.stderr, with_text.stderr
    other = trsp_deploy("export", str(run), "--set", "seed=5", cwd=run.parent)
    assert other.code == 1 and "was edited by hand, and settings that choose layers are others now" in other.last
    assert json.loads(path.read_text()) == edited


KILLED_BEFORE_ITS_RECORD = """
import os, sys
from trsp_deploy.artifacts import run_folder
from trsp_deploy.cli import main

write = run_folder.write_json
def killed(path, value):
    if (path.parent.name, path.name) == ("records", "plan.json"):
        os._exit(137)
    write(path, value)
run_folder.write_json = killed
main()
"""


@BREADTH
@pytest.mark.parametrize("other", ["drop", "text"])
def test_layers_chosen_anew_by_a_killed_command_are_nobodys(place: Path, run: Path, other: str) -> None:
    """The old record stood beside the new plan.json then, which seemed edited by hand."""
    (run.parent / "tiny").symlink_to(place / "tiny")
    (run.parent / "train.txt").write_text(
        (place / "train.txt").read_text() + ("More of it." if other == "text" else "")
    )
    command = ["prune", "--model", "tiny", "--drop", "3" if other == "drop" else "2", "--calibration", "train.txt"]
    command += [*OPTIONS, "--set", "evaluation={}", "--out", "run"]
    killed = [sys.executable, "-c", KILLED_BEFORE_ITS_RECORD, *command]
    assert subprocess.run(killed, cwd=run.parent, capture_output=True, check=False).returncode == 137
    done = trsp_deploy(*command, cwd=run.parent)
    assert done.code == 0 and "edited by hand" not in done.stderr, done.stderr
    assert set(json.loads((run / "records" / "plan.json").read_text())["inputs"]) == {"model", "calibration"}


@BREADTH
def test_a_plan_whose_record_is_damaged_is_kept_aside(place: Path, run: Path) -> None:
    path, record = run / "plan.json", run / "records" / "plan.json"
    edited = {**json.loads(path.read_text()), "dropped": [2, 4], "kept": [0, 1, 3, 5]}
    path.write_text(json.dumps(edited))
    record.write_bytes(record.read_bytes()[:200])
    for name in ("tiny", "train.txt"):
        (run.parent / name).symlink_to(place / name)
    command = ["prune", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", *OPTIONS, "--out", "run"]
    done = trsp_deploy(*command, "--set", "evaluation={}", cwd=run.parent)
    assert done.code == 0 and "kept as run/plan-before.json" in done.stderr, done.stderr
    assert json.loads((run / "plan-before.json").read_text()) == edited
    assert json.loads(path.read_text())["dropped"] != [2, 4]
    with RunFolder(run) as folder:
        assert "plan-before.json" in folder.write_manifest().files
    assert trsp_deploy("verify", "run", cwd=run.parent).code == 0, "it was a file that nobody had made"


@BREADTH
def test_a_model_that_cannot_write_is_refused_before_layers_are_chosen(place: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place / "tiny", tmp_path / "mute"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": None}))
    command = ["prune", "--model", "mute", "--drop", "2", "--calibration", str(place / "train.txt"), *OPTIONS]
    with_text = ["--set", "calibration.self_generated=0.25", "--set", "transfer.form=train", "--set", "evaluation={}"]
    done = trsp_deploy(*command, *with_text, "--out", "run", cwd=tmp_path)
    assert done.code == 1 and "has nothing to begin a text with" in done.last, done.stderr
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.fixture
def changed(place: Path, run: Path) -> Path:
    """The run, beside another model under the name of its own, which holds for shorter texts."""
    for name in ("train.txt", "test.txt"):
        shutil.copy(place / name, run.parent)
    (run / ".place").write_text(str(run.parent))
    save_tiny("llama", run.parent / "tiny", seed=1, max_position_embeddings=24)
    return run


@pytest.mark.parametrize(
    "command",
    [
        ["export", "run"],
        ["prune", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"],
        ["prune", "--model", "tiny", "--drop", "3", "--calibration", "train.txt", "--out", "run"],
        ["prune-and-build", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"],
    ],
)
def test_a_model_that_changed_under_its_name_takes_no_place_where_it_is_refused(
    changed: Path, command: list[str]
) -> None:
    """It was `dense/` by the time that it was."""
    before = files(changed)
    options = [*OPTIONS, "--set", "evaluation={manual: test.txt}"] if command[0].startswith("prune") else []
    done = trsp_deploy(*command, *options, cwd=changed.parent)
    assert done.code == 1 and "calibration.context_length 32: tiny has 24 positions" in done.last, done.stderr
    assert files(changed) == before


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_changed_model_that_cannot_be_judged_takes_no_place(changed: Path, command: str) -> None:
    save_tiny("llama", changed.parent / "tiny", seed=1, max_position_embeddings=40)
    before = files(changed)
    done = trsp_deploy(command, "run", cwd=changed.parent)
    assert done.code == 1 and "evaluate.context_length 64: tiny has 40 positions" in done.last, done.stderr
    assert files(changed) == before


def test_a_model_that_changed_under_its_name_takes_no_place_in_a_run_that_is_made_from_python(changed: Path) -> None:
    before = files(changed)
    with (
        RunFolder(changed) as run,
        pytest.raises(RecipeError, match="tiny has 24 positions"),
    ):
        prune_and_build(Pipeline(run, read_recipe(load_recipe(changed), "run"), place=changed.parent))
    assert files(changed) == before


def test_an_edited_plan_is_asked_about_before_a_changed_model_takes_its_place(changed: Path) -> None:
    save_tiny("llama", changed.parent / "tiny", seed=1)
    path = changed / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dropped": [2, 4], "kept": [0, 1, 3, 5]}))
    before = fingerprint(changed / "dense")
    command = ["prune", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"]
    done = trsp_deploy(*command, *OPTIONS, "--set", "plan.method=uidl", cwd=changed.parent)
    assert done.code == 1 and "was edited by hand, and settings that choose layers are others now" in done.last
    assert fingerprint(changed / "dense") == before


def test_what_a_changed_model_needs_is_asked_before_it_takes_its_place(
    place: Path, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was there, as far as the records tell: an estimate took everything for finished."""
    save_tiny("llama", changed.parent / "tiny", seed=1)
    before = files(changed)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    command = ["prune-and-build", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"]
    more = ["--set", "evaluation={manual: test.txt}", "--set", "engines=[ort-cpu-int8]"]  # whose build reads the text
    done = trsp_deploy(*command, *OPTIONS, *more, cwd=changed.parent)
    assert done.code == 1 and "pruned there" not in done.said and "0.00 GB are free" in done.last, done.stderr
    assert files(changed) == before


@BREADTH
def test_pruning_anew_keeps_what_a_run_is_judged_on(place: Path, run: Path) -> None:
    """It was refused for the default recipe's texts, of which `prune` has no option and reads none."""
    for name in ("tiny", "train.txt"):
        (run.parent / name).symlink_to(place / name)
    choosing = [pair for pair in SETTINGS if not pair.startswith(("evaluate.", "engines="))]
    options = [option for pair in [*choosing, "bench.new_tokens=4"] for option in ("--set", pair)]
    command = ["prune", "--model", "tiny", "--drop", "3", "--calibration", "train.txt", "--out", "run", *options]
    done = trsp_deploy(*command, cwd=run.parent)
    assert done.code == 0, done.stderr
    recipe = read_recipe(load_recipe(run), "run")
    assert (recipe.drop, recipe.evaluation) == ("3", {"manual": str(place / "test.txt")})
    assert (recipe.evaluate.context_length, recipe.engines, recipe.bench.new_tokens) == (64, ("ort-cpu-fp32",), 4)


@BREADTH
def test_a_recipe_that_says_nothing_of_judging_changes_nothing_of_it(place: Path, run: Path) -> None:
    """The default recipe's engines, texts and measurement took the place of the run's, the last two without a word."""
    (run.parent / "mine.yaml").write_text("bench: {new_tokens: 4}\ntransfer: {form: none, refit: none}\n")
    choosing = [pair for pair in SETTINGS if not pair.startswith(("evaluate.", "engines=", "transfer."))]
    options = [option for pair in choosing for option in ("--set", pair)]
    model, text = str(place / "tiny"), str(place / "train.txt")
    command = ["prune", "--recipe", "mine.yaml", "--model", model, "--drop", "3", "--calibration", text, "--out", "run"]
    done = trsp_deploy(*command, *options, cwd=run.parent)
    assert done.code == 0 and "no longer has" not in done.stderr, done.stderr
    recipe = read_recipe(load_recipe(run), "run")
    assert (recipe.drop, recipe.evaluation) == ("3", {"manual": str(place / "test.txt")})
    assert (recipe.evaluate.context_length, recipe.engines, recipe.bench.new_tokens) == (64, ("ort-cpu-fp32",), 4)


def test_tasks_that_a_recipe_no_longer_has_are_named(run: Path) -> None:
    """`check RUN --task copa` after `--task piqa`: the answers of hours, replaced without a word."""
    had = read_recipe({"model": "tiny", "evaluate": {"tasks": ["piqa", "arc-easy"]}}, "had")
    has = read_recipe({"model": "tiny", "evaluate": {"tasks": ["copa", "arc-easy"]}}, "has")
    with RunFolder(run) as folder:
        save_recipe(folder, had)
        assert no_longer_has(folder, has) == ["zero-shot task piqa"] and no_longer_has(folder, had) == []


@BREADTH
def test_an_export_for_engines_that_cannot_be_built_here_is_no_silence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(spec: EngineSpec) -> None:
        if spec.name != "ort-cpu-fp32":
            raise EngineUnavailable("no such hardware")

    shutil.rmtree(run / "onnx", ignore_errors=True)  # another test's
    monkeypatch.setattr(engines, "check_can_build", nowhere)
    assert cli.run(["export", str(run), "--set", "engines=[ort-cpu-int8]"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: ort-cpu-int8: no such hardware"
    assert not (run / "onnx").exists()
    assert cli.run(["export", str(run), "--set", "engines=[ort-cpu-int8,ort-cpu-fp32]"]) == 0
    told = capsys.readouterr().out
    assert "ort-cpu-int8: unavailable, so that no graph is made for it (no such hardware)" in told
    assert "dense-fp32: fp32" in told and (run / "onnx").exists()


@BREADTH
@pytest.mark.parametrize("command", ["build", "bench"])
def test_a_build_or_bench_of_no_engine_at_all_is_no_success(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(spec: EngineSpec) -> None:
        if spec.name != "ort-cpu-fp32":
            raise EngineUnavailable("no such hardware")

    monkeypatch.setattr(engines, "check_can_build", nowhere)
    assert cli.run([command, str(run), "--set", "engines=[ort-cpu-int8,ort-cpu-int4]", "--json"]) == 1
    said = capsys.readouterr()
    line = "error: ort-cpu-int8: no such hardware; ort-cpu-int4: no such hardware"
    assert said.err.splitlines()[-1] == line and said.out == ""
    assert cli.run([command, str(run), "--set", "engines=[ort-cpu-int8,ort-cpu-fp32]", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    if command == "bench":
        assert list(found["comparisons"]) == ["ort-cpu-fp32"]
        assert found["unavailable"] == {"ort-cpu-int8": "no such hardware"}
    else:
        assert [engine["built"] for engine in found["engines"]] == [False, True]


@BREADTH
@pytest.mark.skipif(not optimum.installed(), reason="Optimum is not installed: pip install 'trsp_deploy[optimum]'")
@pytest.mark.parametrize("exporter", ["auto", "optimum"])
def test_graphs_stay_where_their_exporter_is_not_installed(
    run: Path, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any command of a run with `optimum` was refused there; with `auto` all was exported, built and measured anew."""
    shutil.rmtree(run / "onnx", ignore_errors=True)  # another test's
    steps = ("export-dense-fp32", "export-pruned-fp32")
    made = trsp_deploy("export", "run", "--set", f"export.exporter={exporter}", cwd=run.parent)
    assert made.code == 0, made.stderr
    monkeypatch.setattr(optimum, "installed", lambda: False)
    again = trsp_deploy("export", "run", cwd=run.parent)
    assert again.code == 0 and all(f"> {step}: reused" in again.stderr for step in steps), again.stderr
    with RunFolder(run) as folder:
        job = Pipeline(folder, read_recipe(load_recipe(run), "test"), place=place_of(run))
        assert job.finished().issuperset(steps)
    shutil.rmtree(run / "onnx" / "pruned-fp32")
    anew = trsp_deploy("export", "run", cwd=run.parent)
    if exporter == "optimum":
        assert anew.code == 1 and "export.exporter: optimum is not installed here" in anew.last, anew.stderr
    else:  # a pair by two exporters would differ in more than its layers
        assert anew.code == 0 and all(f"> {step}: started" in anew.stderr for step in steps), anew.stderr
        said = "export: onnx/dense-fp32 was made by optimum, and `auto` is dynamo here; made again"
        assert f"> {said}" in anew.stderr.splitlines()


@BREADTH
def test_texts_and_engines_that_a_recipe_no_longer_has_are_named(place: Path, run: Path) -> None:
    """They were replaced without a word, and a later report lacked them."""
    said = "recipe.yaml no longer has: "
    test = str(place / "test.txt")
    more = trsp_deploy("evaluate", str(run), "--eval", f"new={test}", "--eval", f"manual={test}", cwd=run.parent)
    assert more.code == 0 and said not in more.stderr, more.stderr
    fewer = trsp_deploy("evaluate", str(run), "--eval", f"new={test}", cwd=run.parent)
    assert fewer.code == 0 and f"> {said}evaluation text manual\n" in fewer.stderr, fewer.stderr
    other = trsp_deploy("export", str(run), "--set", "engines=[ort-cpu-int8]", cwd=run.parent)
    assert other.code == 0 and f"> {said}engine ort-cpu-fp32\n" in other.stderr, other.stderr
    # By every command that brings another recipe; an engine of the toolkit's is the same one from anywhere.
    command = ["prune", "--model", str(place / "tiny"), "--drop", "2", "--calibration", str(place / "train.txt")]
    chosen = [*OPTIONS, "--set", "evaluation={}", "--set", "engines=[ort-cpu-int8]"]
    anew = trsp_deploy(*command, *chosen, "--out", str(run), cwd=place)
    assert anew.code == 0 and f"> {said}evaluation text new\n" in anew.stderr, anew.stderr


def test_two_engines_of_one_name_are_refused(place: Path, run: Path) -> None:
    spec = trsp_deploy("engines", "show", "ort-cpu-fp32", cwd=place).stdout
    (run.parent / "ort-cpu-fp32.yaml").write_text(spec)
    done = trsp_deploy("build", "run", "--engine", "ort-cpu-fp32", "--engine", "ort-cpu-fp32.yaml", cwd=run.parent)
    assert done.code == 1 and "have the same name; rename one file" in done.last, done.stderr


# -- from elsewhere ----------------------------------------------------------------------------------------------------


@BREADTH
def test_a_run_is_of_its_own_model_and_texts_from_anywhere(place: Path, tmp_path: Path) -> None:
    """Even where other ones lie by the same names; what a command names itself is of where it runs."""
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "tiny")
    shutil.copy(place / "tiny" / "tokenizer.json", tmp_path / "tiny")
    for name in ("train", "test", "mine"):
        (tmp_path / f"{name}.txt").write_text("something else " * 2000)
    before = fingerprint(place / "run" / "pruned")
    again = trsp_deploy("export", str(place / "run"), cwd=tmp_path)
    assert again.code == 0 and "prune: reused" in again.stderr and "prune: started" not in again.stderr, again.stderr
    judged = trsp_deploy("evaluate", str(place / "run"), "--eval", "m=mine.txt", cwd=tmp_path)
    assert judged.code == 0 and "prune: started" not in judged.stderr, judged.stderr
    back = trsp_deploy("evaluate", "run", "--eval", "manual=test.txt", cwd=place)
    assert back.code == 0, back.stderr
    assert fingerprint(place / "run" / "pruned") == before


def test_a_run_that_was_moved_with_what_it_is_of(place: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(place, tmp_path / "moved"))
    (moved / "run" / ".place").write_text(str(tmp_path / "where it was"))
    done = trsp_deploy("export", "run", cwd=moved)
    assert done.code == 0 and "prune: reused" in done.stderr, done.stderr


@BREADTH
def test_a_working_directory_need_not_be_named_in_utf8(place: Path, tmp_path: Path) -> None:
    """What a run's relative paths are relative to was written as UTF-8: a traceback, and no run."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in ("tiny", "train.txt", "test.txt"):
        (folder / name).symlink_to(place / name)
    command = ["prune", "--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run"]
    done = trsp_deploy(*command, *OPTIONS, "--set", "evaluation={manual: test.txt}", cwd=folder)
    assert done.code == 0, done.stderr
    (tmp_path / "elsewhere").symlink_to(folder / "run")
    elsewhere = trsp_deploy("evaluate", "elsewhere", cwd=tmp_path)
    assert elsewhere.code == 0 and "prune: reused" in elsewhere.stderr, elsewhere.stderr


def test_another_model_of_the_same_name_does_not_take_a_runs_place(place: Path, tmp_path: Path) -> None:
    for folder in ("tiny", "other/tiny"):
        shutil.copytree(place / "tiny", tmp_path / folder)
    command = ["prune", "--drop", "2", "--calibration", str(place / "train.txt"), *OPTIONS]
    assert trsp_deploy(*command, "--model", "tiny", cwd=tmp_path).code == 0
    before = files(tmp_path / "runs")
    done = trsp_deploy(*command, "--model", "other/tiny", cwd=tmp_path)
    assert done.code == 1 and "runs/tiny-drop2: is a run of " in done.last and "give --out" in done.last, done.stderr
    assert files(tmp_path / "runs") == before


def test_a_sweep_of_another_model_of_the_same_name_does_not_take_a_sweeps_place(place: Path, tmp_path: Path) -> None:
    """All of its runs would have been made anew, of the other."""
    for folder in ("tiny", "other/tiny"):
        shutil.copytree(place / "tiny", tmp_path / folder)
    (made_sweep(tmp_path / "runs" / "tiny-sweep") / ".place").write_text(str(tmp_path))
    before = files(tmp_path / "runs")
    command = ["sweep", "--drop", "2..3", "--calibration", str(place / "train.txt"), *OPTIONS]
    done = trsp_deploy(*command, "--set", "evaluation={}", "--model", "other/tiny", cwd=tmp_path)
    words = f"runs/tiny-sweep: is a run of {tmp_path / 'tiny'}; give --out for one of {tmp_path / 'other' / 'tiny'}"
    assert done.code == 1 and words in done.last, done.stderr
    assert files(tmp_path / "runs") == before


def test_what_is_passed_on_says_nothing_of_where_things_lie(place: Path) -> None:
    """A whole path that the user gave, too."""
    command = ["prune", "--model", str(place / "tiny"), "--drop", "2", "--calibration", str(place / "train.txt")]
    assert trsp_deploy(*command, *OPTIONS, "--out", "whole", cwd=place).code == 0
    for run in ("run", "whole"):
        assert json.loads((place / run / "plan.json").read_text())["model"] == "tiny"
        assert all(str(place).encode() not in path.read_bytes() for path in (place / run / "pruned").iterdir())
