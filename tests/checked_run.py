"""A small run that is surely faster, and its baseline: what checks and comparisons are tried on.

Fixtures `workspace` (a folder; its run is `run`) and `baseline` (a file in it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import trsp_deploy
from tests.tiny import english, save_tiny

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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
