"""`kill -9` in the middle of either training, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import english, save_tiny

SETTINGS = [
    "calibration.context_length=32",
    "calibration.max_windows=16",
    "calibration.validation_windows=4",
    "plan.candidates=2",
    "checkpoint_s=0",
    "autocast='off'",
]
STEPS = {"plan": ["plan.steps=40", "transfer.steps=4"], "prune": ["plan.steps=2", "transfer.steps=80"]}
DEADLINE_S = 240


def command(out: str, stage: str) -> list[str]:
    """One `prune` with many short steps in the stage that is to be killed."""
    start = [sys.executable, "-c", "from trsp_deploy.cli import main; main()"]
    options = ["--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", out, "--json"]
    return [*start, "prune", *options, *[part for pair in SETTINGS + STEPS[stage] for part in ("--set", pair)]]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    save_tiny("llama", folder / "tiny")
    (folder / "train.txt").write_text(english()[:30_000])
    return folder


def finish(workspace: Path, out: str, stage: str) -> dict:
    done = subprocess.run(
        command(out, stage), cwd=workspace, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    return {"stderr": done.stderr, **json.loads(done.stdout)}


def kill_within(workspace: Path, out: str, stage: str) -> None:
    """Start the command and kill it once the stage has left a few checkpoints."""
    state = workspace / out / "checkpoints" / stage / "state.safetensors"
    process = subprocess.Popen(command(out, stage), cwd=workspace, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    seen, until = set(), time.monotonic() + DEADLINE_S
    while len(seen) < 4:
        assert process.poll() is None and time.monotonic() < until, f"{stage} was over before it could be killed"
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stage", [pytest.param("plan", marks=pytest.mark.slow), "prune"])
def test_killed_and_run_again_is_as_never_killed(workspace, stage):
    whole = finish(workspace, f"{stage}-whole", stage)
    kill_within(workspace, f"{stage}-killed", stage)
    resumed = finish(workspace, f"{stage}-killed", stage)
    assert "goes on after" in resumed["stderr"]
    runs = [workspace / f"{stage}-{end}" for end in ("whole", "killed")]
    plans, records = [[json.loads((run / name).read_text()) for run in runs] for name in ("plan.json", RECORD)]
    assert plans[0] == plans[1]
    assert records[0]["result"] == records[1]["result"]  # every loss, and both perplexities
    weights = [AutoModelForCausalLM.from_pretrained(run / "pruned").state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole["ppl_after_removal"] == resumed["ppl_after_removal"]
    for run in runs:
        assert not (run / "checkpoints").exists() and not list(run.rglob(".*.partial"))


RECORD = "records/prune.json"
