"""Checks against a baseline: what is held against it, and what is no baseline for this run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.breadth import BREADTH
from tests.command import Done, trsp_deploy
from tests.samples import MADE_UP_QUALITY, made_up
from trsp_deploy import checks
from trsp_deploy.errors import BaselineError, EngineUnavailable, ParityError, RunError
from trsp_deploy.tools.measuring.bench_worker import PAUSED, PLANTED
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.reports.baselines import read_baseline

pytestmark = pytest.mark.alone


def unsealed(baseline: Path) -> dict[str, Any]:
    """A baseline's values without the seal, so that they can be changed."""
    values: dict[str, Any] = json.loads(baseline.read_text())
    del values["sha256"]
    return values


def decided_on_a_quiet_machine(done: Done) -> None:
    """Skip where the check left it open because of what else the machine does."""
    if done.code == 3 and "other work took" in done.said:
        pytest.skip("the machine is too busy to decide between two times")


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
    commands = {"name": "tiny\n::add-mask::0\n##[add-mask]0", "num_layers_dense": 6, "num_layers_pruned": 3}
    other.write_text(json.dumps({**values, "model": commands}))
    done = trsp_deploy("check", "run", *limits, cwd=workspace)
    assert done.code == 1 and done.stdout == "", done.said
    line = done.last
    assert "is of tiny ::add-mask::0 ## [add-mask]0 with 6 layers" in line and "##[" not in line, "no runner's commands"
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


@BREADTH
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
    assert "the baseline is of other hardware: Other CPU" in taken.stdout


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


def job_of_three(folder: Path, said: list[str], engine_quality: Any = lambda spec: {}) -> Any:
    """A run of the engines a, b and c, of which c does not agree with PyTorch."""
    subject = Subject(path=folder, spec=None, vocabulary=9, cuts_logits=True, size=None)
    return SimpleNamespace(
        engines=SimpleNamespace(
            specs=[SimpleNamespace(name=name) for name in ("a", "b", "c")],
            engine=lambda spec: SimpleNamespace(reason=None),
            pair=lambda spec: (subject, subject),
        ),
        proof=SimpleNamespace(
            failed={"c": "cannot be checked"},
            check_engines=lambda: said.append("parity"),
            engine_quality=engine_quality,
        ),
        recipe=SimpleNamespace(seed=0),
        inputs=SimpleNamespace(say=said.append, model=SimpleNamespace(check_bench=lambda settings: None)),
        run=SimpleNamespace(path=folder),
    )


@pytest.fixture
def runnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that is named, else the first."""
    monkeypatch.setattr(
        checks, "engine_to_check", lambda job, engine: next(s for s in job.engines.specs if s.name == (engine or "a"))
    )
    cut = checks.Cut(name="m", num_layers_dense=6, num_layers_pruned=4)
    monkeypatch.setattr(checks, "cut_of", lambda job: cut)


@pytest.mark.usefixtures("runnable")
def test_a_baseline_leaves_out_an_engine_that_cannot_be_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = made_up()
    said: list[str] = []
    job = job_of_three(tmp_path, said)

    def compare(dense: Any, pruned: Any, name: str, *rest: Any) -> Any:
        if name == lacking:
            raise EngineUnavailable("the GPU is full")
        return made

    monkeypatch.setattr(checks.bench, "compare_engines", compare)
    lacking = "b"
    assert list(checks.make_baseline(job, None, made.settings, tmp_path / "b.json").engines) == ["a"]
    assert said == ["parity", "b: cannot be timed: the GPU is full; not in the baseline"]
    lacking = "a"
    with pytest.raises(RunError, match=r"no baseline \(c cannot be checked; a cannot be timed: the GPU is full\)"):
        checks.make_baseline(job, "a", made.settings, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.usefixtures("runnable")
def test_a_perplexity_that_ends_a_baseline_ends_it_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the second engine's the first one's minutes were lost."""
    timed: list[str] = []

    def quality(spec: Any) -> dict[str, Any]:
        if spec.name == "b":
            raise ParityError("b has perplexity 17.00")
        return {}

    monkeypatch.setattr(checks.bench, "compare_engines", lambda *given: timed.append(given[2]) or made_up())
    with pytest.raises(ParityError, match="b has perplexity"):
        checks.make_baseline(job_of_three(tmp_path, [], quality), None, made_up().settings, tmp_path / "b.json")
    assert not timed


@pytest.mark.usefixtures("runnable")
def test_a_baseline_leaves_out_an_engine_whose_perplexity_is_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was written, and every check refused it."""
    broken = MADE_UP_QUALITY.model_copy(update={"pruned_ppl": math.inf})
    said: list[str] = []
    job = job_of_three(tmp_path, said, lambda spec: {"wiki": broken if spec.name == "b" else MADE_UP_QUALITY})
    monkeypatch.setattr(checks.bench, "compare_engines", lambda *given: made_up())
    out = tmp_path / "b.json"
    assert list(checks.make_baseline(job, None, made_up().settings, out).engines) == ["a"]
    assert "nothing can be held against its quality.wiki.pruned_ppl: expected a finite number" in said[-1]
    assert list(read_baseline(out).engines) == ["a"]


@pytest.mark.parametrize("variable", [PLANTED, PAUSED])
def test_no_baseline_is_of_engines_that_are_slowed_on_purpose(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "pruned=0.3")
    with pytest.raises(BaselineError, match=f"{variable}=pruned=0.3 slows engines on purpose"):
        checks.make_baseline(job_of_three(tmp_path, []), None, made_up().settings, tmp_path / "b.json")
