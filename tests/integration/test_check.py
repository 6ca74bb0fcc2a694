"""The check, as a CI job runs it: exit codes, files, and what it says before any work."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from tests.planted import SECRETS, check_no_secret
from trsp_deploy import checks, cli
from trsp_deploy.cli import check_jobs
from trsp_deploy.errors import EngineUnavailable, RunError, UserError
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.recipe import BenchSettings

pytestmark = pytest.mark.alone


def test_a_speedup_that_is_there_passes(workspace: Path, tmp_path: Path) -> None:
    files = ["--junit", str(tmp_path / "check.xml"), "--out", str(tmp_path / "check.json")]
    limits = ["--min-speedup", "1.05", "--max-ppl-ratio", "100"]
    done = trsp_deploy("check", "run", *limits, *files, "--json", cwd=workspace, **SECRETS)
    assert done.code == 0, done.said
    assert check_no_secret(tmp_path, done.said) == 3
    found = json.loads(done.stdout)
    assert found["verdict"] == "pass" and [outcome["word"] for outcome in found["outcomes"]] == ["pass", "pass"]
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "0", None), "as Jenkins' schema"
    assert [each.get("skipped") for each in suite] == ["0"]
    kept = json.loads((tmp_path / "check.json").read_text())
    assert kept["comparison"]["replicates"] >= 5 and kept["provenance"]["cpu"]
    assert kept["schema_version"] == found["schema_version"] == 1
    assert any(note.startswith("ppl on manual to PyTorch: dense 1.0000x, pruned 1.0000x") for note in kept["notes"])
    assert len(kept["samples"]["replicates"]) == kept["comparison"]["replicates"] and "samples" not in found


def test_a_requirement_missed_fails_with_2_and_tells_github(workspace: Path, tmp_path: Path) -> None:
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    options = ["--set", "prompt_tokens=[8,16]", "--junit", str(tmp_path / "check.xml")]
    done = trsp_deploy("check", "run", "--min-speedup", "50", *options, cwd=workspace, **github, **SECRETS)
    assert done.code == 2, done.said
    assert check_no_secret(tmp_path, done.said) == 3
    assert "::error title=trsp-deploy check::speed-up, end to end, batch 1, prompt " in done.stdout, "of two the worse"
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


def test_a_verdict_that_cannot_be_written_is_shown(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full by then, and minutes of measuring ended in a line about the file."""
    folder, measured = tmp_path / "results", checks.check_run
    folder.mkdir()

    def then_the_folder_goes(*given: Any) -> Any:
        found = measured(*given)
        folder.rmdir()
        folder.write_text("")
        return found

    monkeypatch.setattr(checks, "check_run", then_the_folder_goes)
    options = ["--max-ppl-ratio", "100", "--budget", "1", "--out", str(folder / "check.json")]
    done = trsp_deploy("check", "run", *options, cwd=workspace)
    assert done.code == 1 and "its folder cannot be made" in done.stderr.splitlines()[-1], done.said
    assert done.stdout.splitlines()[-1] == "PASS"


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


def test_quality_that_is_lost_fails(workspace: Path) -> None:
    done = trsp_deploy("check", "run", "--quality-budget", "99.9%", "--budget", "1", cwd=workspace)
    assert done.code in (2, 3) and "perplexity over dense, manual" in done.stdout
    worse = trsp_deploy("check", "run", "--max-ppl-ratio", "0.01", "--budget", "1", cwd=workspace)
    assert worse.code == 2 and "FAIL" in worse.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-speedup", "1.1", "--junit", "."], ["--junit", "is a folder"]),
        (["--min-speedup", "1.1", "--out", ""], ["--out", "is empty, as of a variable"]),
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
        inputs=SimpleNamespace(model=SimpleNamespace(check_bench=lambda settings: None)),
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


@BREADTH
def test_a_task_that_is_none_is_not_kept_in_the_run(workspace: Path) -> None:
    before = (workspace / "run" / "recipe.yaml").read_bytes()
    done = trsp_deploy("check", "run", "--min-accuracy-retained", "90%", "--task", "piqqa", cwd=workspace)
    # Without lm-eval a task cannot be looked up, and that is what is said.
    words = "piqqa" if importlib.util.find_spec("lm_eval") else "zero-shot tasks need lm-eval"
    assert done.code == 1 and words in done.stderr.splitlines()[-1], done.said
    assert (workspace / "run" / "recipe.yaml").read_bytes() == before
