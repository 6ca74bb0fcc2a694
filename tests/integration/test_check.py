"""The regression check, as a CI job runs it: exit codes, files, the action's own step, and baselines."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import pytest
import yaml

from tests.breadth import BREADTH
from tests.planted import SECRETS, check_no_secret
from tests.samples import made_up
from tests.tiny import english, save_tiny
from trsp_deploy import checks, cli
from trsp_deploy.cli import check_jobs
from trsp_deploy.errors import EngineUnavailable, RunError, UserError
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.stages.bench import find_pair, label_of
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES
from trsp_deploy.tools.measuring.bench_worker import PLANTED
from trsp_deploy.tools.measuring.subjects import Subject

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "calibration.context_length=32",
    "calibration.max_windows=8",
    "calibration.validation_windows=2",
    "plan.method=shortgpt",
    "transfer.form=none",
    "evaluate.context_length=64",
    "evaluate.max_tokens=640",
    "bench.prompt_tokens=16",
    "bench.new_tokens=4",
    "bench.budget_s=60",  # far more than five replicates take; a check ends when it is decided
    "bench.replicates=5",
    "bench.control=false",
]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def trsp_deploy(*arguments: str, cwd: Path, **variables: str) -> Done:
    """A command line in this process, which has torch loaded already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, variables),
    ):
        code = cli.run(list(arguments))
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose pruned model has a third of the layers, so that it is surely faster."""
    folder = tmp_path_factory.mktemp("check")
    save_tiny("llama", folder / "tiny", hidden_size=128, intermediate_size=512)
    (folder / "text.txt").write_text(english()[:30_000])
    options = [option for pair in SETTINGS for option in ("--set", pair)]
    options += ["--set", "engines=[ort-cpu-fp32]", "--set", "evaluation={manual: text.txt}"]
    done = trsp_deploy(
        "prune", "--model", "tiny", "--drop", "4", "--calibration", "text.txt", *options, "--out", "run", cwd=folder
    )
    assert done.code == 0, done.said
    return folder


@pytest.fixture(scope="module")
def baseline(workspace: Path) -> Path:
    options = ["--budget", "30", "--set", "precision=1", "--json"]  # it ends as soon as it decides
    done = trsp_deploy("baseline", "run", "--out", "baseline.json", *options, cwd=workspace)
    assert done.code == 0, done.said
    made = json.loads(done.stdout)
    assert made["engines"] == ["ort-cpu-fp32"] and made["replicates"]["ort-cpu-fp32"] >= 5
    assert (
        made["speedup"]["ort-cpu-fp32"][0]["ratio"] > 1
        and "ort-cpu-fp32: end to end, batch 1, prompt 16: " in done.stderr
    )
    return workspace / "baseline.json"


def test_a_speedup_that_is_there_passes(workspace: Path, tmp_path: Path) -> None:
    files = ["--junit", str(tmp_path / "check.xml"), "--out", str(tmp_path / "check.json")]
    limits = ["--min-speedup", "1.05", "--max-ppl-ratio", "100"]
    done = trsp_deploy("check", "run", *limits, *files, "--json", cwd=workspace, **SECRETS)
    assert done.code == 0, done.said
    assert check_no_secret(tmp_path, done.said) == 3
    found = json.loads(done.stdout)
    assert found["verdict"] == "pass" and [outcome["word"] for outcome in found["outcomes"]] == ["pass", "pass"]
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "0", "0")
    kept = json.loads((tmp_path / "check.json").read_text())
    assert kept["comparison"]["replicates"] >= 5 and kept["provenance"]["cpu"]
    assert kept["schema_version"] == found["schema_version"] == 1
    assert any(note.startswith("ppl on manual to PyTorch: dense 1.0000x, pruned 1.0000x") for note in kept["notes"])
    assert len(kept["samples"]["replicates"]) == kept["comparison"]["replicates"] and "samples" not in found


def test_a_requirement_missed_fails_with_2_and_tells_github(workspace: Path, tmp_path: Path) -> None:
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    junit = ["--junit", str(tmp_path / "check.xml")]
    done = trsp_deploy("check", "run", "--min-speedup", "50", *junit, cwd=workspace, **github, **SECRETS)
    assert done.code == 2, done.said
    assert check_no_secret(tmp_path, done.said) == 3
    assert "::error title=trsp-deploy check::speed-up, end to end: " in done.stdout
    assert "❌ fail" in (tmp_path / "summary.md").read_text()
    failure = ElementTree.parse(tmp_path / "check.xml").find(".//failure")
    assert failure is not None and "at least 50 wanted: fail" in failure.get("message", "")


def test_what_is_not_decided_in_the_budget_is_3(workspace: Path, tmp_path: Path) -> None:
    options = ["--budget", "1", "--set", "replicates=2", "--junit", str(tmp_path / "check.xml")]
    done = trsp_deploy("check", "run", "--min-speedup", "1.05", *options, cwd=workspace, GITHUB_ACTIONS="true")
    assert done.code == 3, done.said
    assert "::warning title=trsp-deploy check::" in done.stdout and "give a larger budget" in done.stdout
    assert ElementTree.parse(tmp_path / "check.xml").find(".//skipped") is not None


def test_a_summary_that_cannot_be_written_changes_no_verdict(workspace: Path) -> None:
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": "/proc/nowhere/summary.md"}
    limits = ["--min-speedup", "1.05", "--budget", "1", "--set", "replicates=2"]
    done = trsp_deploy("check", "run", *limits, "--json", cwd=workspace, **github)
    assert done.code == 3 and json.loads(done.stdout)["verdict"] == "inconclusive", done.said
    assert "warning: GITHUB_STEP_SUMMARY /proc/nowhere/summary.md: no summary is written" in done.stderr
    assert "::warning title=trsp-deploy check::" in done.stderr


def test_a_reader_that_left_changes_no_verdict(workspace: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    limits = ["--min-speedup", "1.05", "--budget", "1", "--set", "replicates=2", "--junit", str(tmp_path / "check.xml")]
    with os.fdopen(writer, "w") as gone, contextlib.chdir(workspace), contextlib.redirect_stdout(gone):
        assert cli.run(["check", "run", *limits]) == 3
    assert ElementTree.parse(tmp_path / "check.xml").find(".//skipped") is not None


def test_an_error_takes_the_place_of_an_earlier_verdict(workspace: Path, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    junit.write_text("<testsuites/>")
    options = ["--min-speedup", "1.05", "--engine", "ort-cpu-fp3", "--junit", str(junit)]
    done = trsp_deploy("check", "run", *options, cwd=workspace, GITHUB_ACTIONS="true")
    assert done.code == 1, done.said
    line = "run: has no engine 'ort-cpu-fp3'; did you mean 'ort-cpu-fp32'?; its recipe has ort-cpu-fp32"
    assert done.stdout == f"::error title=trsp-deploy check::{line}\n"
    assert done.stderr.splitlines()[-1] == f"error: {line}"
    suite = ElementTree.parse(junit).getroot()
    error = suite.find("./testsuite/testcase/error")
    assert suite.get("errors") == "1" and error is not None and error.get("message") == line


@pytest.mark.parametrize("command", ["bench", "check", "baseline", "compare"])
def test_a_prompt_beyond_the_models_positions_is_refused_before_work(
    workspace: Path, baseline: Path, tmp_path: Path, command: str
) -> None:
    before = (workspace / "run" / "recipe.yaml").read_bytes()
    key = "bench.prompt_tokens" if command == "bench" else "prompt_tokens"
    more = {"check": ["--min-speedup", "1"], "baseline": ["--out", str(tmp_path / "b.json")]}.get(command, [])
    done = trsp_deploy(command, "run", "--set", f"{key}=[16,253]", *more, cwd=workspace)
    assert done.code == 1 and "has 256 positions; valid: 256 or fewer of both together" in done.stderr, done.said
    assert "prompt_tokens 253 and new_tokens " in done.stderr.splitlines()[-1]
    assert (workspace / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("alone", "options", "seconds"),
    [
        (12.5, [], 12.5),  # what quality alone is given, where the recipe would give time more
        (600.0, [], 60.0),  # the recipe's own, where that is less
        (12.5, ["--budget", "77"], 77.0),
        (12.5, ["--set", "budget_s=78"], 78.0),
    ],
)
def test_quality_alone_takes_the_budget_that_it_is_given(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, alone: float, options: list[str], seconds: float
) -> None:
    def caught(job: Any, tolerances: Any, against: Any, engine: Any, settings: Any) -> Any:
        raise RunError(f"seconds: {settings.budget_s}")

    monkeypatch.setattr(checks, "check_run", caught)
    monkeypatch.setattr(check_jobs, "QUALITY_ALONE_S", alone)
    done = trsp_deploy("check", "run", "--max-ppl-ratio", "9", *options, cwd=workspace)
    assert f"seconds: {seconds}" in done.stderr


def unsealed(baseline: Path) -> dict[str, Any]:
    """A baseline's values without the seal, so that they can be changed."""
    values: dict[str, Any] = json.loads(baseline.read_text())
    del values["sha256"]
    return values


def test_a_baseline_with_another_figure_is_refused(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    changed, values = tmp_path / "changed.json", json.loads(baseline.read_text())
    values["engines"]["ort-cpu-fp32"]["speedup"][0]["total"][0] += 0.1
    changed.write_text(json.dumps(values))
    done = trsp_deploy("check", "run", "--against", str(changed), "--max-speedup-loss", "3%", cwd=workspace)
    assert done.code == 1 and "changed.json: is not what was written (its SHA-256 is another)" in done.stderr, done.said
    assert "take its key `sha256` out to use what was edited by hand" in done.stderr


def test_a_baseline_of_another_model_is_refused_or_noted(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    values = unsealed(baseline)
    assert values["model"] == {"name": "tiny", "num_layers_dense": 6, "num_layers_pruned": 2}
    other = tmp_path / "other.json"
    limits = ["--against", str(other), "--max-speedup-loss", "60%", "--budget", "1", "--set", "replicates=2"]
    other.write_text(json.dumps({**values, "model": {**values["model"], "num_layers_pruned": 3}}))
    done = trsp_deploy("check", "run", *limits, cwd=workspace)
    assert done.code == 1 and done.stdout == "", done.said
    assert "is of tiny with 6 layers cut to 3, and this run is of tiny with 6 layers cut to 2" in done.stderr
    values["provenance"]["packages"]["numpy"] = "0.9"
    few = values["engines"]["ort-cpu-fp32"]
    few["speedup"][0]["total"] = few["speedup"][0]["total"][:2]
    other.write_text(json.dumps({**values, "model": {**values["model"], "name": "huge"}}))
    done = trsp_deploy("check", "run", *limits, cwd=workspace)
    assert done.code == 3, done.said
    assert "the baseline is of huge, this run of tiny\n" in done.stdout
    assert "numpy 0.9 in the baseline, " in done.stdout
    assert (
        "the baseline has 2 replicates, 5 are the fewest that decide: make it again with a larger --budget"
        in done.stdout
    )


def test_quality_that_is_lost_fails(workspace: Path) -> None:
    done = trsp_deploy("check", "run", "--quality-budget", "99.9%", "--budget", "1", cwd=workspace)
    assert done.code in (2, 3) and "perplexity over dense, manual" in done.stdout
    worse = trsp_deploy("check", "run", "--max-ppl-ratio", "0.01", "--budget", "1", cwd=workspace)
    assert worse.code == 2 and "FAIL" in worse.stdout


def decided_on_a_quiet_machine(done: Done) -> None:
    """Skip where the check left it open because of what else the machine does."""
    if done.code == 3 and "other work took" in done.said:
        pytest.skip("the machine is too busy to decide between two times")


def test_a_regression_against_the_baseline_is_found(workspace: Path, baseline: Path, tmp_path: Path) -> None:
    limits = ["--max-speedup-loss", "60%", "--max-latency-regression", "90%"]
    done = trsp_deploy("check", "run", "--against", str(baseline), *limits, cwd=workspace)
    decided_on_a_quiet_machine(done)
    assert done.code == 0, done.said
    values = unsealed(baseline)
    for logs in values["engines"]["ort-cpu-fp32"]["speedup"]:
        logs["total"] = [value + 2 for value in logs["total"]]  # the baseline was seven times as fast
    (tmp_path / "faster.json").write_text(json.dumps(values))
    slower = trsp_deploy(
        "check", "run", "--against", str(tmp_path / "faster.json"), "--max-speedup-loss", "3%", cwd=workspace
    )
    decided_on_a_quiet_machine(slower)
    assert slower.code == 2, slower.said


def test_times_of_other_hardware_are_refused_and_ratios_are_not(
    workspace: Path, baseline: Path, tmp_path: Path
) -> None:
    values = unsealed(baseline)
    values["machine"] |= {"cpu": "Other CPU", "gpus": ["NVIDIA X"], "driver": "1.2"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(values))
    refused = trsp_deploy("check", "run", "--against", str(other), "--max-latency-regression", "3%", cwd=workspace)
    assert refused.code == 1 and refused.stdout == ""
    line = refused.stderr.splitlines()[-1]
    assert "there: Other CPU" in line and "NVIDIA X, driver 1.2; here: " in line and "--max-speedup-loss" in line
    ratio = ["--max-speedup-loss", "60%", "--budget", "1"]
    taken = trsp_deploy("check", "run", "--against", str(other), *ratio, cwd=workspace)
    assert taken.code in (0, 3), taken.said


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no samples", "key 'engines.ort-cpu-fp32': `speedup` needs two samples or more"),
        ("a shape less", "key 'engines.ort-cpu-fp32': `latency` needs two samples or more"),
        ("other schema", "schema version 99, this toolkit reads 1"),
        ("an unknown key", "unknown key 'engines.ort-cpu-fp32.speed'; did you mean 'speedup'?; make it again with"),
    ],
)
def test_a_damaged_baseline_is_one_line(
    workspace: Path, baseline: Path, tmp_path: Path, damage: str, words: str
) -> None:
    values = unsealed(baseline)
    engine = values["engines"]["ort-cpu-fp32"]
    if damage == "no samples":
        engine["speedup"][0]["total"] = []
    elif damage == "a shape less":
        engine["latency"] = []
    elif damage == "other schema":
        values["schema_version"] = 99
    else:
        engine["speed"] = 1
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(values))
    done = trsp_deploy("check", "run", "--against", str(path), "--max-speedup-loss", "3%", cwd=workspace)
    line = done.stderr.splitlines()[-1]
    assert done.code == 1 and line.startswith(f"error: --against {path}: {words}"), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-speedup", "1.1", "--junit", "."], ["--junit", "is a folder"]),
        (["--min-speedup", "1.1", "--out", ""], ["--out", "is a folder"]),
        (
            ["--min-speedup", "1.1", "--against", "baseline.json", "--set", "prompt_tokens=[8]"],
            ["--set prompt_tokens does not go with --against"],
        ),
        ([], ["nothing is required", "--min-speedup"]),
        (["--min-speedup", "fast"], ["--min-speedup 'fast': expected a factor such as 1.2"]),
        (["--min-speedup", "prefil=1.2"], ["--min-speedup 'prefil=1.2'", "prefill=1.2"]),
        (["--max-speedup-loss", "3%"], ["--against"]),
        (["--max-latency-regression", "3"], ["--max-latency-regression '3'", "3%"]),
        (["--quality-budget", "9%"], ["--quality-budget '9%'", "99%"]),
        (["--against", "run/plan.json", "--max-speedup-loss", "3%"], ["plan.json: is no baseline", "`machine`"]),
        (["--min-speedup", "1.1", "--junit", "run/recipe.yaml/x.xml"], ["'--junit'", "run/recipe.yaml is no folder"]),
        (["--max-ppl-ratio", "9", "--engine", "x", "--out", "a", "--junit", "a"], ["--out and --junit are both a"]),
        (["--max-ppl-ratio", "1.2", "--quality-budget", "99%"], ["give it or your own"]),
        (["--min-speedup", "1.1", "--engine", "ort-cpu-fp16"], ["no engine 'ort-cpu-fp16'", "ort-cpu-fp32"]),
        (["--min-speedup", "1.1", "--against", "nothing.json"], ["nothing.json", "no such file"]),
        (["--min-speedup", "1.1", "--against", "text.txt"], ["text.txt", "not valid JSON"]),
        (["--min-speedup", "1.1", "--set", "budget=3"], ["unknown key 'budget'", "budget_s"]),
    ],
)
def test_bad_input_is_one_line(workspace: Path, options: list[str], words: list[str]) -> None:
    done = trsp_deploy("check", "run", *options, cwd=workspace)
    assert done.code == 1 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), done.stderr


@pytest.mark.parametrize(
    ("evaluation", "tasks", "limit", "line"),
    [
        (
            {"manual": "text.txt"},
            (),
            {"max_ppl_ratio": 1.3},
            "e has no perplexity on manual, and it is to be judged",
        ),
        ({}, ("piqa",), {"min_accuracy_retained": 0.9}, "e has no accuracy on piqa, and it is to be judged"),
    ],
)
def test_what_was_not_measured_does_not_pass(
    evaluation: dict[str, str], tasks: tuple[str, ...], limit: dict[str, float], line: str
) -> None:
    recipe = SimpleNamespace(evaluation=evaluation, evaluate=SimpleNamespace(tasks=tasks))
    job: Any = SimpleNamespace(recipe=recipe, proof=SimpleNamespace(failed={}))
    with pytest.raises(UserError, match=line):
        checks._check_judgeable(job, SimpleNamespace(name="e"), checks.Tolerances(**limit), {}, None)  # type: ignore[arg-type]


def unbuilt(evaluation: dict[str, str], *engines: str) -> Any:
    """A run that fails the test when an engine of it is built."""
    specs = [SimpleNamespace(name=name, backend="onnxruntime-cpu", precision="fp32") for name in engines]
    return SimpleNamespace(
        recipe=SimpleNamespace(evaluation=evaluation, evaluate=SimpleNamespace(tasks=())),
        engines=SimpleNamespace(specs=specs),
        inputs=SimpleNamespace(check_bench=lambda settings: None),
        run=SimpleNamespace(path=Path("run")),
    )


@pytest.mark.parametrize(
    ("job", "limit", "line"),
    [
        (unbuilt({}, "e"), {"max_ppl_ratio": 1.3}, "a limit of perplexity needs texts"),
        (unbuilt({}, "e"), {"min_accuracy_retained": 0.9}, "--min-accuracy-retained needs tasks"),
        (unbuilt({}, "ex"), {"min_speedup": {"total": 1.1}}, "has no engine 'e'; did you mean 'ex'"),
    ],
)
def test_what_cannot_be_judged_is_said_before_anything_is_built(job: Any, limit: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        checks.check_run(job, checks.Tolerances(**limit), None, "e", BenchSettings())


def test_a_baseline_without_the_engine_is_said_before_anything_is_built(baseline: Path) -> None:
    limits = checks.Tolerances(max_speedup_loss=0.1)
    for engine in ("ort-cpu-fp3", None):
        with pytest.raises(UserError, match="has no engine 'ort-cpu-fp3'; did you mean 'ort-cpu-fp32'"):
            checks.check_run(unbuilt({}, "ort-cpu-fp3"), limits, baseline, engine, BenchSettings())


def test_an_engine_that_fails_leaves_the_others_their_figures() -> None:
    outcomes = [SimpleNamespace(spec=SimpleNamespace(name=name), reason=None) for name in ("a", "b", "c")]
    said: list[str] = []
    proof: Any = Proof(
        SimpleNamespace(run=None, recipe=None, say=said.append),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        SimpleNamespace(build=lambda: outcomes),  # type: ignore[arg-type]
    )

    def measure(spec: Any) -> int:
        if spec.name == "b":
            raise EngineUnavailable("no profile covers a prompt of 9")
        return len(spec.name)

    assert proof._of_each("cannot be timed", measure) == {"a": 1, "c": 1}
    assert said == ["b: cannot be timed: no profile covers a prompt of 9"]
    assert proof._of_each("cannot be timed", measure) == {"a": 1, "c": 1} and len(said) == 1, "not asked again"


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["run", "onnx"])
def test_compare_takes_runs_and_onnx_files(workspace: Path, baseline: Path, form: str, tmp_path: Path) -> None:
    paths = {"run": ["run"], "onnx": ["run/onnx/dense/model.onnx", "run/onnx/pruned/model.onnx"]}[form]
    options = ["--budget", "2", "--set", "prompt_tokens=[8,16]", "--set", "new_tokens=4"]
    done = trsp_deploy("compare", *paths, *options, "--out", str(tmp_path / "c.json"), "--json", cwd=workspace)
    assert done.code == 0, done.said
    found = json.loads(done.stdout)
    phases = found["comparison"]["phases"]
    assert len(phases) == 6 and all((phase["limit"] is None) == (form == "onnx") for phase in phases)
    assert [note.partition(":")[0] for note in found["notes"]] == ["no limit of the speed-up is known"] * (
        form == "onnx"
    )
    assert json.loads((tmp_path / "c.json").read_text())["replicates"][0]["blocks"]["again"]


@BREADTH
def test_compare_takes_engine_folders_and_judges(workspace: Path, baseline: Path) -> None:
    folders = [f"run/engines/ort-cpu-fp32/{role}" for role in ("pruned", "dense")]  # the wrong way round
    done = trsp_deploy("compare", *folders, "--min-speedup", "1", "--budget", "60", cwd=workspace)
    assert done.code == 2, done.said
    assert "NOT THERE" in done.stdout and "at least 1 wanted: fail" in done.stdout
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


def test_engines_of_two_names_are_both_named() -> None:
    one, other = (
        Subject(path=Path(path), spec=None, vocabulary=9, cuts_logits=False, size=None)
        for path in ("onnx/dense/model.onnx", "pruned.onnx")
    )
    assert label_of(one, other) == "dense against pruned"


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


# -- the action --------------------------------------------------------------------------------------------------------


@pytest.fixture
def action() -> Any:
    return yaml.safe_load((ROOT / "action.yml").read_text())


def program(tmp_path: Path) -> Path:
    """A folder with `trsp-deploy` in it, as a runner has it in its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    file = folder / "trsp-deploy"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from trsp_deploy.cli import main; main()" "$@"\n')
    file.chmod(0o755)
    return folder


def run_action(action: Any, workspace: Path, tmp_path: Path, planted: str = "0", **inputs: str) -> tuple[int, str, str]:
    """The action's step as a runner runs it: bash, inputs in variables, exit code, outputs.

    planted: a slow-down of measuring processes, as `bench_worker` takes it.
    """
    (step,) = action["runs"]["steps"]
    values = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()} | inputs
    variables = {}
    for name, expression in step["env"].items():
        key = expression.removeprefix("${{ inputs.").removesuffix(" }}")
        variables[name] = values[key]
    assert "${{" not in step["run"], "an input must not become part of the script"
    script = tmp_path / "step.sh"
    script.write_text(step["run"])
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"
    environment = {
        **os.environ,
        **variables,
        PLANTED: planted,
        "PATH": f"{program(tmp_path)}:{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    # What GitHub runs for `shell: bash`.
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, outputs.read_text() if outputs.exists() else "", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("planted", "inputs", "code", "verdict"),
    [
        # Four times the time for each call: no machine is so busy that it stays open whether pruned is the quicker one.
        ("pruned=3", {"min-speedup": "decode=0.01\n1.05\n", "junit": ""}, 2, "fail"),
        pytest.param("0", {"min-speedup": "1.05", "budget": "1", "out": ""}, 3, "inconclusive", marks=pytest.mark.slow),
        pytest.param(
            "0",
            {"min-speedup": "1.05", "budget": "1", "inconclusive-passes": "true"},
            0,
            "inconclusive",
            marks=pytest.mark.slow,
        ),
        ("0", {"min-speedup": "$(touch hacked)"}, 1, ""),
    ],
)
def test_the_actions_step_ends_as_the_check_does(
    action: Any,
    workspace: Path,
    baseline: Path,
    tmp_path: Path,
    planted: str,
    inputs: dict[str, str],
    code: int,
    verdict: str,
) -> None:
    given = {"budget": "60", "out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml"), **inputs}
    found, outputs, said = run_action(action, workspace, tmp_path, planted, run="run", **given)
    assert found == code, said
    assert ("::error title=trsp-deploy check::speed-up, end to end: " in said) == (verdict == "fail")
    assert outputs == (f"verdict={verdict}\n" if verdict else "")
    assert not (workspace / "hacked").exists()


@pytest.fixture(scope="module")
def sound_baseline(workspace: Path) -> Path:
    """With replicates enough to decide."""
    options = ["--budget", "30", "--set", "replicates=6", "--set", "precision=0.1", "--set", "prompt_tokens=[64]"]
    done = trsp_deploy("baseline", "run", "--out", "sound.json", *options, "--json", cwd=workspace)
    assert done.code == 0, done.said
    if json.loads(done.stdout)["replicates"]["ort-cpu-fp32"] < FEWEST_REPLICATES:
        pytest.skip("the machine is too busy to measure on")
    return workspace / "sound.json"


@BREADTH
@pytest.mark.parametrize(("planted", "code", "verdict"), [("0", 0, "pass"), ("pruned=0.3", 2, "fail")])
def test_the_action_is_green_until_pruned_gets_slower(
    action: Any, workspace: Path, sound_baseline: Path, tmp_path: Path, planted: str, code: int, verdict: str
) -> None:
    """A pull request that makes the pruned engine 30% slower loses 23% of the speed-up; a tenth may be lost."""
    files = {"out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml")}
    limits = {"against": str(sound_baseline), "max-speedup-loss": "10%", "budget": "30", **files}
    for _ in range(2):  # what a busy machine leaves open says nothing; a wrong verdict is never tried again
        found, outputs, said = run_action(action, workspace, tmp_path, planted=planted, run="run", **limits)
        if found != 3:
            break
        (tmp_path / "outputs").unlink()
    else:
        pytest.skip("the machine is too busy to decide")
    assert found == code, said
    assert outputs == f"verdict={verdict}\n"
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert suite.get("failures") == ("1" if verdict == "fail" else "0")


def documented_steps() -> tuple[dict[str, Any], dict[str, Any]]:
    """The workflow's step that builds, and its step that checks."""
    page = (ROOT / "docs" / "ci.md").read_text()
    block = page.partition("<!-- workflow:start -->\n```yaml\n")[2].partition("```")[0]
    steps = yaml.safe_load(block)["jobs"]["check"]["steps"]
    (build,) = [step for step in steps if "run" in step]
    (check,) = [step for step in steps if "trsp_deploy" in step.get("uses", "")]
    return build, check


@pytest.mark.slow  # run by `make test-docs`
def test_the_documented_workflow_runs(action: Any, workspace: Path, baseline: Path, tmp_path: Path) -> None:
    build, check = documented_steps()
    recipe = (workspace / "run" / "recipe.yaml").read_text()
    (workspace / "recipe.yaml").write_text(recipe.replace("budget_s: 60.0", "budget_s: 1.0"))
    environment = {**os.environ, "RUN": "run", "PATH": f"{program(tmp_path)}:{os.environ['PATH']}"}
    command = ["bash", "-eo", "pipefail", "-c", build["run"]]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (workspace / "run" / "report.html").is_file(), done.stderr
    files = {"out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml")}
    inputs = {**check["with"], "run": "run", "budget": "1", **files}  # a second decides nothing, but of quality
    code, outputs, said = run_action(action, workspace, tmp_path, **inputs)
    assert (code, outputs) in ((2, "verdict=fail\n"), (3, "verdict=inconclusive\n")), said


def test_the_documented_workflow_fits_the_action(action: Any) -> None:
    _, check = documented_steps()
    assert set(check["with"]) <= set(action["inputs"])
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= set(check["with"])


def test_a_baseline_leaves_out_an_engine_that_cannot_be_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = made_up()
    said: list[str] = []
    specs = [SimpleNamespace(name=name) for name in ("a", "b", "c")]
    subject = Subject(path=tmp_path, spec=None, vocabulary=9, cuts_logits=True, size=None)
    job: Any = SimpleNamespace(
        engines=SimpleNamespace(
            specs=specs, engine=lambda spec: SimpleNamespace(reason=None), pair=lambda spec: (subject, subject)
        ),
        proof=SimpleNamespace(
            failed={"c": "cannot be checked"},
            check_engines=lambda: said.append("parity"),
            engine_quality=lambda spec: {},
        ),
        recipe=SimpleNamespace(seed=0),
        inputs=SimpleNamespace(say=said.append, check_bench=lambda settings: None),
        run=SimpleNamespace(path=tmp_path),
    )

    def compare(dense: Any, pruned: Any, name: str, *rest: Any) -> Any:
        if name == lacking:
            raise EngineUnavailable("the GPU is full")
        return made

    monkeypatch.setattr(checks, "runnable", lambda job, engine: next(s for s in specs if s.name == (engine or "a")))
    monkeypatch.setattr(checks.bench, "compare_engines", compare)
    cut = checks.Cut(name="m", num_layers_dense=6, num_layers_pruned=4)
    monkeypatch.setattr(checks, "cut_of", lambda job: cut)
    lacking = "b"
    assert list(checks.make_baseline(job, None, made.settings, tmp_path / "b.json").engines) == ["a"]
    assert said == ["parity", "b: cannot be timed: the GPU is full; not in the baseline"]
    lacking = "a"
    with pytest.raises(RunError, match=r"no baseline \(c cannot be checked; a cannot be timed: the GPU is full\)"):
        checks.make_baseline(job, "a", made.settings, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_task_that_is_none_is_not_kept_in_the_run(workspace: Path) -> None:
    before = (workspace / "run" / "recipe.yaml").read_bytes()
    done = trsp_deploy("check", "run", "--min-accuracy-retained", "90%", "--task", "piqqa", cwd=workspace)
    # Without lm-eval a task cannot be looked up, and that is what is said.
    words = "piqqa" if importlib.util.find_spec("lm_eval") else "zero-shot tasks need lm-eval"
    assert done.code == 1 and words in done.stderr.splitlines()[-1], done.said
    assert (workspace / "run" / "recipe.yaml").read_bytes() == before
