"""Which tokens end a text, whoever says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny
from trsp_deploy.decoder import end_tokens, load_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


def says(folder: Path, file: str, value: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), "eos_token_id": value}))


def test_the_generation_config_is_asked_first(model: Path) -> None:
    says(model, "config.json", 5)
    says(model, "generation_config.json", [7, 9])
    assert end_tokens(model) == (7, 9)
    says(model, "generation_config.json", None)
    assert end_tokens(model) == (5,)
    (model / "generation_config.json").unlink()
    assert end_tokens(model) == (5,)


def test_a_config_that_says_nothing_means_what_its_class_does(model: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"}))
    assert end_tokens(model) == (2,), "LlamaConfig's"


def test_the_tokenizer_is_asked_last(model: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        says(model, file, None)
    tokenizer = load_tokenizer(model)
    assert end_tokens(model) == (tokenizer.eos_token_id,)
    (model / "config.json").unlink()
    (model / "generation_config.json").unlink()
    assert end_tokens(model) == (tokenizer.eos_token_id,), "a folder with a tokenizer alone"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert end_tokens(model) == ()
