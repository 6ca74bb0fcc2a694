"""Stage 2 against Trainer: on one GPU, judged before rounding, and kept only where the options are the defaults."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kept, train
from benchmarks.code import code_digest
from benchmarks.train import ENGINES, Block, Job, Training, decisive, one_gpu, page, parse, ratios, verdict
from tests.tiny import english, save_tiny
from trsp_deploy.artifacts import provenance


def block(step_s: float, peak_bytes: int = 100, device: str = "cpu") -> Block:
    steps = (step_s, step_s, 50 * step_s)  # one that was held up
    return Block(device=device, wall_s=steps, cpu_s=(2 * step_s,) * 3, peak_bytes=peak_bytes, mean_loss=3.0)


def training(ours: list[Block], theirs: list[Block], code: str = "earlier", gpus: tuple[str, ...] = ()) -> Training:
    blocks = dict(zip(ENGINES, (ours, ours, theirs), strict=True))
    return Training(
        machine=provenance().model_copy(update={"cpu": "AMD EPYC", "gpus": gpus}),
        code=code,
        omp_num_threads=None,
        options=decisive(parse([])),
        blocks={engine: tuple(taken) for engine, taken in blocks.items()},
    )


def test_targets_are_judged_before_they_are_rounded() -> None:
    found = training([block(1.0004, 8003)] * 2, [block(1.0, 10_000)] * 2)
    told = verdict(found)
    assert told["met"] == {"speed_ratio": False, "memory_ratio": False}
    assert all(0 < abs(told["figures"][name] - told["targets"][name]) < 5e-4 for name in told["met"])
    assert page(found).count("**not met**") == 2


def test_a_ratio_is_of_neighbours_and_has_an_interval_over_pairs() -> None:
    """The machine is twice as slow for the second pair, and both are."""
    found = ratios(training([block(1.0, 80), block(2.0, 84)], [block(1.1, 100), block(2.4, 100)]))
    assert found["speed_ratio"].ratio == pytest.approx(math.sqrt(1.1 * 1.2))
    assert found["speed_ratio"].low < 1.1 < 1.2 < found["speed_ratio"].high
    assert found["memory_ratio"].ratio == pytest.approx(math.sqrt(0.80 * 0.84))
    alone = training([block(1.0)], [block(1.2)])
    assert verdict(alone)["figures"]["speed_ratio"] == pytest.approx(1.2)
    assert "| at least 1 | 1.200 | met |" in page(alone) and "inf" not in page(alone)


def test_the_page_says_what_was_measured_on_what() -> None:
    taken = [block(2.0, 3 * 10**9)] * 2
    said = page(training(taken, taken))
    assert "**AMD EPYC**" in said and "measured of earlier code" in said
    assert (
        "| Trainer | 512.0 | 2.00 | 3.00 |" in said
    )  # 4 windows of 256 tokens; the step that was held up is no median
    today = code_digest(*train.CODE, without=train.NO_INFLUENCE)
    assert "earlier" not in page(training(taken, taken, code=today))
    by_processor = page(training(taken, taken), "cpu")
    assert "| Trainer | 256.0 | 4.00 | 3.00 |" in by_processor and "processor time" in by_processor
    on_gpu = [block(2.0, device="cuda")] * 2
    assert "**NVIDIA H100**" in page(training(on_gpu, on_gpu, gpus=("NVIDIA H100",)))


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
        return type("Done", (), {"stdout": f"noise\n{block(1.0).model_dump_json()}", "returncode": 0})()

    monkeypatch.setattr(train.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert train.block("Trainer", []) == block(1.0) and seen["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_mistake_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the process that meets it, and one of the bench."""
    monkeypatch.setattr(train, "end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train", "--model", "/nowhere", "--worker", "stage 2"])
    assert train.main() == 1
    assert capsys.readouterr().err.startswith("error: model '/nowhere': no such folder")
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=""))
    monkeypatch.setattr(sys, "argv", ["train", "--model", "/nowhere"])
    assert train.main() == 1
    assert capsys.readouterr().err == "error: stage 2: its process ended with 1; what it said is above\n"


def test_a_number_of_blocks_is_one_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--pairs", "0"])
    assert "argument --pairs: invalid count value: '0'" in capsys.readouterr().err


def test_only_the_defaults_are_kept_each_processor_in_its_file(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(train, "PAGE", tmp_path / "page.md")
    train.PAGE.write_text("before\n<!-- train:start -->\n<!-- train:end -->\nafter\n")
    monkeypatch.setattr(train, "block", lambda engine, arguments: block(1.0))
    monkeypatch.setattr(train, "machine", lambda: provenance().model_copy(update={"cpu": "AMD EPYC", "gpus": ()}))
    for options in (["--quick"], ["--steps", "4"], ["--model", str(tmp_path / "secret" / "model")]):
        monkeypatch.setattr(sys, "argv", ["train", *options])
        assert train.main() == 0 and "not kept" in capsys.readouterr().err
    assert not (tmp_path / "results").exists() and "EPYC" not in train.PAGE.read_text()
    monkeypatch.setattr(sys, "argv", ["train", "--clock", "cpu"])  # the samples have both clocks
    assert train.main() == 0
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "train-cpu-amd-epyc.json"
    kept_as = Training.model_validate_json(path.read_text())
    assert set(kept_as.blocks) == set(ENGINES) and kept_as.options.steps == parse([]).steps
    said = train.PAGE.read_text()
    assert "**AMD EPYC**" in said and "processor time" not in said and said.endswith("after\n")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train", "--report"])
    assert train.main() == 0 and train.PAGE.read_text() == said
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "train"


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def work(options: object) -> Block:
        called.append("work")
        return block(1.0)

    monkeypatch.setattr(train, "end_with_parent", lambda: called.append("end_with_parent"))
    monkeypatch.setitem(train.WORKERS, "Trainer", work)
    monkeypatch.setattr(sys, "argv", ["train", "--worker", "Trainer"])
    assert train.main() == 0 and called == ["end_with_parent", "work"]
