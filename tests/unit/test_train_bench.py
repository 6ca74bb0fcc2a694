"""Stage 2 against Trainer: on one GPU, judged before rounding, and kept only where the options are the defaults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_train, kept
from benchmarks.bench_train import ENGINES, Job, one_gpu, parse, verdict
from tests.tiny import english, save_tiny


def sample(step_s: float, peak_bytes: int) -> dict[str, Any]:
    return {
        "device": "cpu",
        "wall_s": [step_s] * 3,
        "cpu_s": [step_s] * 3,
        "peak_bytes": peak_bytes,
        "mean_loss": 3.0,
    }


def test_targets_are_judged_before_they_are_rounded() -> None:
    samples = {"stage 2": [sample(1.0004, 8003)], "Trainer": [sample(1.0, 10_000)]}
    found = verdict(samples, parse([]))
    assert found["met"] == {"speed_ratio": False, "memory_ratio": False}
    assert all(
        found["met"] != {} and 0 < abs(found["figures"][name] - found["targets"][name]) < 5e-4 for name in found["met"]
    )


@pytest.mark.parametrize(("engine", "weights"), [("stage 2", (1, 0)), ("stage 2 with teacher", (0.5, 1))])
def test_what_is_judged_has_trainers_loss(tmp_path: Path, engine: str, weights: tuple[float, float]) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(english()[:20_000])
    places = ["--model", str(tmp_path / "model"), "--texts", str(tmp_path / "text.txt")]
    job = Job(parse([*places, "--context", "32", "--steps", "1", "--worker", engine]))
    assert (job.recipe.transfer.ce_weight, job.recipe.transfer.kl_weight) == weights


def test_both_see_the_first_visible_gpu() -> None:
    assert one_gpu({"A": "b"}) == {"A": "b", "CUDA_VISIBLE_DEVICES": "0"}
    assert one_gpu({"CUDA_VISIBLE_DEVICES": "3,1"})["CUDA_VISIBLE_DEVICES"] == "3"
    assert one_gpu({"CUDA_VISIBLE_DEVICES": ""})["CUDA_VISIBLE_DEVICES"] == ""  # none


def test_blocks_run_with_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **_: object) -> Any:
        seen.update(env)
        return type("Done", (), {"stdout": "noise\n{}", "returncode": 0})()

    monkeypatch.setattr(bench_train.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert bench_train.block("Trainer", []) == {} and seen["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_mistake_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the process that meets it, and one of the bench."""
    monkeypatch.setattr(bench_train, "end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench_train", "--model", "/nowhere", "--worker", "stage 2"])
    assert bench_train.main() == 1
    assert capsys.readouterr().err.startswith("error: model '/nowhere': no such folder")
    monkeypatch.setattr(bench_train.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=""))
    monkeypatch.setattr(sys, "argv", ["bench_train", "--model", "/nowhere"])
    assert bench_train.main() == 1
    assert capsys.readouterr().err == "error: stage 2: its process ended with 1; what it said is above\n"


def test_a_number_of_blocks_is_one_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--pairs", "0"])
    assert "argument --pairs: invalid count value: '0'" in capsys.readouterr().err


def test_only_the_defaults_are_kept_each_processor_in_its_file(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench_train, "block", lambda engine, arguments: sample(1.0, 100))
    monkeypatch.setattr(bench_train, "machine", lambda: {"cpu": "AMD EPYC", "gpus": []})
    for options in (["--quick"], ["--steps", "4"], ["--model", str(tmp_path / "secret" / "model")]):
        monkeypatch.setattr(sys, "argv", ["bench_train", *options])
        assert bench_train.main() == 0 and "not kept" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(sys, "argv", ["bench_train", "--clock", "cpu"])  # the samples have both clocks
    assert bench_train.main() == 0
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "train-cpu-amd-epyc.json"
    kept_as = json.loads(path.read_text())
    assert set(kept_as["samples"]) == set(ENGINES) and kept_as["options"]["steps"] == parse([]).steps


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(bench_train, "end_with_parent", lambda: called.append("end_with_parent"))
    monkeypatch.setitem(bench_train.WORKERS, "Trainer", lambda options: called.append("work"))
    monkeypatch.setattr(sys, "argv", ["bench_train", "--worker", "Trainer"])
    assert bench_train.main() == 0 and called == ["end_with_parent", "work"]
