"""A small run and the model repository of it, once for each module.

Fixtures `served_run` and `served_repository`: its folder, and that of a repository of its pruned and dense engines.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import trsp_deploy
from tests.planted import SECRETS, check_no_secret
from tests.tiny import english, save_tiny


@pytest.fixture(scope="module")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    save_tiny("llama", folder / "tiny", hidden_size=64)
    (folder / "text.txt").write_text(english()[:30_000])
    settings = ["calibration.context_length=32", "calibration.max_windows=4", "calibration.validation_windows=1"]
    settings += ["plan.method=shortgpt", "transfer.form=none", "engines=[ort-cpu-fp32]"]
    settings += ["bench.budget_s=2", "bench.replicates=2", "bench.prompt_tokens=8", "bench.new_tokens=4"]
    settings += ["evaluate.context_length=32", "evaluate.max_tokens=512", "evaluation={own: text.txt}"]
    options = [option for pair in settings for option in ("--set", pair)]
    common = ["--model", "tiny", "--drop", "2", "--calibration", "text.txt"]
    for command in (["prune", *common, *options, "--out", "run"], ["build", "run"]):
        done = trsp_deploy(*command, cwd=folder)
        assert done.code == 0, done.said
    return folder / "run"


@pytest.fixture(scope="module")
def served_repository(served_run: Path) -> Path:
    out = served_run.parent / "repository"
    options = ["--out", str(out), "--name", "pruned", "--dense", "--max-batch", "4", "--json"]
    done = trsp_deploy("triton", "run", *options, cwd=served_run.parent, **SECRETS)
    assert done.code == 0, done.said
    assert json.loads(done.stdout)["models"] == ["pruned", "pruned-dense"]
    assert check_no_secret(out, done.said) > 20
    return out
