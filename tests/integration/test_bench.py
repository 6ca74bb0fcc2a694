"""Comparisons of real engines: what they keep, and that no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.breadth import BREADTH
from tests.exported import Made, onnx_of
from trsp_deploy.artifacts import fingerprint
from trsp_deploy.artifacts.fingerprints import known_files
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, device_s, speedup
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring import samples as measuring
from trsp_deploy.tools.measuring.bench_worker import PAUSED, PLANTED
from trsp_deploy.tools.measuring.worker import Worker

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def onnx(exported: Made) -> Path:
    return onnx_of(exported("llama"))


def settings(**changes: object) -> BenchSettings:
    return BenchSettings.model_validate(
        {"prompt_tokens": 8, "new_tokens": 4, "budget_s": 1, "replicates": 2, **changes}
    )


def test_raw_samples_of_every_shape_are_kept(onnx: Path) -> None:
    wanted = settings(batch_sizes=[1, 2], prompt_tokens=[8, 16], budget_s=3)
    found = measuring.measure({"dense": onnx, "pruned": onnx}, "e", 384, wanted, seed=0)
    assert len(wanted.cases) == 4 and len(found.replicates) >= 2
    for replicate in found.replicates:
        assert set(replicate.blocks) == {"dense", "again", "pruned"} == set(replicate.load_s)
        for cases in replicate.blocks.values():
            assert len(cases) == 4
            for blocks in cases:
                assert len(blocks) % replicate.blocks_per_cycle == 0 and len(blocks) > 0
                for block in blocks:
                    assert len(block.decode_s) == 4 and block.total_s > block.prefill_s + sum(block.decode_s) > 0
                    assert device_s(block, "decode") is None
    assert {replicate.order[0] for replicate in found.replicates} >= {"dense", "again"}, "each goes first in turn"


def test_without_room_for_all_each_turn_has_a_process_of_its_own(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_fit_together", lambda engines, settings, device: False)
    found = measuring.measure({"dense": onnx, "pruned": onnx}, "e", 384, settings(), seed=0)
    for replicate in found.replicates:
        assert not replicate.together and set(replicate.blocks) == {"dense", "pruned"}
    control = speedup(found.replicates, 0, "total").control
    assert control is not None and control.low < control.high, "two turns of dense are two fresh processes"


def test_a_planted_slow_down_is_found(onnx: Path) -> None:
    waits = {PAUSED: "1.0"}  # off the clock: what waiting does to the next call is in both
    planted = {"dense": waits, "again": waits, "pruned": {PLANTED: "1.0"}}
    found = measuring.measure(
        {"dense": onnx, "pruned": onnx}, "e", 384, settings(budget_s=6), seed=0, environment=planted
    )
    for phase in ("prefill", "decode"):
        assert 0.3 < speedup(found.replicates, 0, phase).found.ratio < 0.8, phase  # one half, on a busy machine


@BREADTH
def test_measuring_ends_when_everything_is_decided(onnx: Path) -> None:
    found = measuring.measure(
        {"dense": onnx, "pruned": onnx}, "e", 384, settings(budget_s=300), seed=0, decided=lambda speedups: True
    )
    assert found.stopped == "decided" and len(found.replicates) == FEWEST_REPLICATES


def test_a_worker_that_dies_says_how(onnx: Path, tmp_path: Path) -> None:
    with Worker(onnx) as worker:
        worker._process.kill()
        with pytest.raises(EngineUnavailable, match="the measuring process died with code -9"):
            worker.block([[1, 2]], 1)
    with pytest.raises(EngineUnavailable, match="no engine here"):
        measuring.measure({"dense": tmp_path, "pruned": tmp_path}, "e", 384, settings(), seed=0)


def test_a_worker_that_says_much_is_not_stopped_by_it(onnx: Path) -> None:
    """A pipe that nobody reads holds 64 kB; then whoever writes to it waits for ever."""
    talk = (
        "import sys; print('word ' * 100_000, file=sys.stderr); input(); print('{}', flush=True); sys.exit('the last')"
    )
    worker = Worker(onnx, (sys.executable, "-c", talk))
    try:
        assert worker.ask({}) == {}
        with pytest.raises(EngineUnavailable, match=r"died with code 1 \(the last\)"):
            worker.ask({})
    finally:
        worker.close()


def speak(engine: Path, lines: list[dict[str, object]], **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """A measuring process spoken to by hand until its stdin ends: exit code and replies."""
    command = [sys.executable, "-m", "trsp_deploy.tools.measuring.bench_worker", str(engine)]
    said = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(
        command, input=said, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, timeout=120
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_measuring_process_speaks_its_lines_and_ends_with_them(onnx: Path) -> None:
    block = {"prompt": [[1, 2, 3], [4, 5, 6]], "new_tokens": 3}
    code, (loaded, first, second) = speak(onnx, [{"load": True}, block, block], **{PLANTED: "0.5"})
    assert code == 0 and loaded["load_s"] > 0
    for reply in (first, second):
        assert len(reply["decode_s"]) == 3
        assert reply["total_s"] >= reply["prefill_s"] + sum(reply["decode_s"])
        assert reply["peak_rss_bytes"] > 2**20


def test_a_measuring_process_says_what_is_wrong_with_an_engine(tmp_path: Path) -> None:
    code, (reply,) = speak(tmp_path, [{"load": True}])
    assert code == 1 and "no engine here" in reply["error"]


def test_an_engine_is_checked_once_and_not_in_every_process(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its files again was most of `load_s`, and spent a comparison's budget."""
    engine = tmp_path / "engine"
    build_engine(onnx, load_engine_spec("ort-cpu-fp32"), engine)
    weights = engine / "model.onnx.data"
    long_ago = time.time_ns() - 10**12
    os.utime(weights, ns=(long_ago, long_ago))
    fingerprint(weights)
    known = next(each for each in known_files() if each[1] == weights.stat().st_ino)
    wrong = {"known": [[*known[:-1], "0" * 64]]}
    code, (reply,) = speak(engine, [{"known": [known]}])
    assert code == 0 and reply["load_s"] > 0
    code, (reply,) = speak(engine, [wrong])
    assert code == 1 and "has SHA-256 000000000000…" in reply["error"], "the parent's word counts"
    os.utime(weights, ns=(long_ago + 1, long_ago + 1))
    assert speak(engine, [wrong])[0] == 0, "what was touched since is read"

    started: list[Path] = []
    monkeypatch.setattr(measuring, "Worker", lambda path, **_: started.append(path))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineUnavailable, match="its manifest says"):
        measuring.measure({"dense": engine, "pruned": engine}, "e", 384, settings(), seed=0)
    assert not started


def test_a_paused_process_does_not_outlive_its_parent(onnx: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from trsp_deploy.tools.measuring.worker import Worker\n"
        "worker = Worker(Path(sys.argv[1])); worker.load(); worker.pause()\n"
        "print(worker._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(onnx)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until = time.monotonic() + 10  # the signal takes its time on a busy machine
    while psutil.Process(child).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and psutil.pid_exists(child):
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(child)
