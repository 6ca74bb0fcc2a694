"""What a model's files make transformers run, read or write unasked: none of it happens.

Code that a model names openly, which runs by its fingerprint, is in test_own_code.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import modeling_utils
from transformers.integrations import hub_kernels

from tests.untrusted import prune
from trsp_deploy.decoder import load_config, load_model, load_tokenizer
from trsp_deploy.errors import ModelError


@pytest.fixture
def model(untrusted: Path) -> Path:
    return untrusted


def with_keys(file: Path, **keys: Any) -> None:
    """Let a JSON file have these keys too."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture
def kernels(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package `kernels` is installed, which downloads and imports what it is asked for."""

    def get_kernel(*_: object, **__: object) -> None:
        mark.touch()
        raise RuntimeError("no network")

    monkeypatch.setattr(hub_kernels, "_kernels_available", True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel, raising=False)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["a/b", "flash_attention_2"])
def test_a_config_gets_no_attention_from_the_hub(
    model: Path, mark: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers before 5.3 downloads it, and runs it, whatever `trust_remote_code` is (CVE-2026-4372)."""
    with_keys(model / "config.json", **{key: value})
    said = f"config.json: by `{key}`, which is '{value}', transformers may load code or another config"
    with pytest.raises(ModelError, match=re.escape(said)):
        load_model(model)
    assert not mark.exists()
    assert said in prune(capsys)


@pytest.mark.parametrize("value", ["a/b", {"": "a/b"}, ["eager"]])
def test_nor_does_a_config_within_another(model: Path, value: Any) -> None:
    with_keys(model / "config.json", attn_implementation="sdpa", _attn_implementation=None)
    load_model(model)
    with_keys(model / "config.json", parts=[{"text_config": {"attn_implementation": value}}])
    for load in (load_model, load_config, load_tokenizer):
        with pytest.raises(ModelError, match="by `attn_implementation`, which is "):
            load(model)


def test_a_config_does_not_trust_the_code_beside_another(
    model: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers before 5.5 takes LightGlue's own word that it may run (CVE-2026-5241)."""
    other = model.with_name("other")
    other.mkdir()
    (other / "configuration_mine.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (other / "config.json").write_text(json.dumps(own))
    points = {"model_type": "mine", "_name_or_path": str(other)}
    glue = {"model_type": "lightglue", "trust_remote_code": True, "keypoint_detector_config": points}
    (model / "config.json").write_text(json.dumps(glue))
    assert "by `keypoint_detector_config`, which is " in prune(capsys)
    assert not mark.exists()


def test_a_config_that_stands_for_others_is_refused(model: Path) -> None:
    shutil.copy(model / "config.json", model / "config.4.0.0.json")
    with_keys(model / "config.json", configuration_files=["config.4.0.0.json"])
    with pytest.raises(ModelError, match="by `configuration_files`, which is "):
        load_config(model)


def test_an_adapter_that_somebody_put_into_a_run_leads_nowhere(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ModelError, match=r"has adapter_config\.json, by which"):
        load_model(model)


def test_a_chat_template_is_not_saved_where_its_name_leads(model: Path, tmp_path: Path) -> None:
    """transformers before 5.10 makes a path of it (CVE-2026-9856)."""
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "tool_use")]
    with_keys(model / "tokenizer_config.json", chat_template=named)
    load_tokenizer(model)
    named[1]["name"] = "../../escaped"
    with_keys(model / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ModelError, match=r"is called '\.\./\.\./escaped', no plain name"):
        load_tokenizer(model).save_pretrained(tmp_path / "pruned")
    assert not (tmp_path / "escaped.jinja").exists()
