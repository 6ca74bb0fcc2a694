"""Somebody's model, and what shows whether anything of it has run that must not.

Fixtures `untrusted` (a tiny Llama at `model`, beside `text.txt`, in a working directory of the test's own) and `mark`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny import english, save_tiny
from trsp_deploy import cli


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("untrusted") / "tiny")


@pytest.fixture
def untrusted(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(english()[:20_000])
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once something has run that must not."""
    return tmp_path / "it-ran"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    assert cli.run(list(arguments)) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.out == ""
    return said.err.splitlines()[-1]


def prune(capsys: pytest.CaptureFixture[str], *more: str, model: str = "model") -> str:
    """The one line that `prune` of a model ends with."""
    return fails(capsys, "prune", "--model", model, "--drop", "2", "--calibration", "text.txt", "--out", "run", *more)
