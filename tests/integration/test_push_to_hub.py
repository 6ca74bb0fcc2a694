"""`--push-to-hub` on real jobs of a tiny model, to a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.breadth import BREADTH
from tests.command import QUICK, trsp_deploy
from tests.hub import TOKEN, Hub, stand_in
from tests.tiny import english, save_tiny


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with stand_in(monkeypatch) as hub:
        yield hub


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "tiny")
    (tmp_path / "train.txt").write_text(english()[:30_000])
    (tmp_path / "test.txt").write_text(english()[60_000:90_000])
    return tmp_path


def arguments(command: str, repo: str = "me/tiny") -> list[str]:
    settings = [
        *QUICK,
        "bench.budget_s=1",
        "bench.control=false",
        "engines=[ort-cpu-fp32]",
        "evaluation={held: test.txt}",
    ]
    options = ["--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", "run", "--push-to-hub", repo]
    return [command, *options, "--json", *(part for pair in settings for part in ("--set", pair))]


def weights(workspace: Path) -> bytes:
    return (workspace / "run/pruned/model.safetensors").read_bytes()


@BREADTH
def test_prune_pushes_its_checkpoint_at_the_end(workspace: Path, hub: type[Hub]) -> None:
    done = trsp_deploy(*arguments("prune"), "--private", cwd=workspace)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout).items() >= {"repo": "me/tiny", "commit": f"{hub.address}/me/tiny/commit/abc"}.items()
    assert "/me/tiny/commit/abc: " in done.stderr and TOKEN not in done.stderr
    assert [repository["private"] for repository in hub.created] == [True]
    assert hub.files["model.safetensors"] == weights(workspace)

    hub.files.clear()
    again = trsp_deploy(*arguments("prune"), cwd=workspace)
    assert again.code == 0 and "prune: started" not in again.stderr
    assert hub.files["model.safetensors"] == weights(workspace), "a finished run pushes again"
    assert [repository["private"] for repository in hub.created] == [True, False]

    hub.status = 403
    refused = trsp_deploy(*arguments("prune"), cwd=workspace)
    assert refused.code == 1 and "nothing was committed" in refused.stderr.splitlines()[-1]
    assert weights(workspace)


@pytest.mark.breadth
def test_a_whole_job_pushes_what_it_measured_too(workspace: Path, hub: type[Hub]) -> None:
    done = trsp_deploy(*arguments("prune-and-build"), cwd=workspace)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["commit"] == f"{hub.address}/me/tiny/commit/abc" and found["verdict"]
    assert hub.files["model.safetensors"] == weights(workspace)
    assert b"## Measured" in hub.files["README.md"]


@pytest.mark.parametrize("command", ["prune", "prune-and-build"])
def test_what_cannot_be_pushed_is_refused_before_any_work(
    command: str, workspace: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*said: str) -> str:
        done = trsp_deploy(*said, cwd=workspace)
        assert done.code == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "push to 'tiny': no name of a repository; expected OWNER/NAME" in line(*arguments(command, "tiny"))
    assert "push to 'me/a--b': the hub has no such names" in line(*arguments(command, "me/a--b"))
    assert "--private: is for --push-to-hub OWNER/NAME" in line(command, "--model", "tiny", "--private")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so the hub may not be asked" in line(*arguments(command))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workspace / "no-token"))
    assert "there is no token for the hub; run `hf auth login`, or set HF_TOKEN" in line(*arguments(command))
    assert not (workspace / "run").exists() and not hub.tokens
