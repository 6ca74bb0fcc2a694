"""Every family, full and cut: ONNX agrees with PyTorch in prefill and in decode with past, and TensorRT-RTX builds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.breadth import BREADTH, by_default
from tests.tiny import FAMILIES, save_tiny
from trsp_deploy.decoder import decoder_layers, load_model, load_tokenizer, remove_layers
from trsp_deploy.errors import ParityError
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import EngineManifest
from trsp_deploy.tools.runners.ort import OrtRunner

PROMPTS = [list(range(3, 20)), list(range(40, 49))]


def save_cut(family: str, folder):
    dense = save_tiny(family, folder / "whole", num_hidden_layers=4)
    model = load_model(dense)
    remove_layers(model, [1, 2])
    model.save_pretrained(folder / "cut")
    load_tokenizer(dense).save_pretrained(folder / "cut")
    return folder / "cut"


@pytest.mark.parametrize("role", by_default(["pruned"], ["dense", "pruned"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_agrees_with_pytorch(family, role, tmp_path):
    folder = save_tiny(family, tmp_path / "model") if role == "dense" else save_cut(family, tmp_path)
    export_onnx(folder, "fp32", ExportSettings(), tmp_path / "onnx")
    reference = parity.make_reference(folder, PROMPTS)
    with OrtRunner(tmp_path / "onnx" / "model.onnx") as runner:
        found = parity.check_parity(reference, runner, "onnx", role, "fp32")
    assert found.max_error < 1e-4
    assert found.tokens_equal == found.tokens_compared == 17 + 9 + 2 * parity.NEW_TOKENS


@BREADTH
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_agrees_too_and_rtx_builds_it(family, tmp_path):
    folder = save_cut(family, tmp_path)
    export_onnx(folder, "fp16", ExportSettings(), tmp_path / "onnx")
    reference = parity.make_reference(folder, PROMPTS)
    with OrtRunner(tmp_path / "onnx" / "model.onnx") as runner:
        assert parity.check_parity(reference, runner, "onnx", "pruned", "fp16").max_error > 0
    manifest = rtx_engine(tmp_path)
    assert len([name for name in manifest.inputs if name.endswith(".key")]) == 2


@BREADTH
def test_rtx_builds_the_dense_model(tmp_path):
    export_onnx(save_tiny("opt", tmp_path / "model"), "fp16", ExportSettings(), tmp_path / "onnx")
    manifest = rtx_engine(tmp_path)
    assert len([name for name in manifest.inputs if name.endswith(".key")]) == 6


def rtx_engine(folder: Path) -> EngineManifest:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'trsp_deploy[rtx]'")
    spec = load_engine_spec("tensorrt-rtx-fp16")
    manifest = build_engine(folder / "onnx" / "model.onnx", spec, folder / "engine")
    assert manifest.size_bytes > 100_000
    return manifest


@BREADTH
def test_a_stale_layer_index_is_caught_by_parity(tmp_path):
    """What Optimum's own validation lets through: it exports, and fails only when it runs."""
    folder = save_tiny("llama", tmp_path / "model")
    model = load_model(folder)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    del model.model.layers[0]
    model.config.num_hidden_layers = 3  # but the indices still say 1 to 3
    from optimum.exporters.onnx import onnx_export_from_model

    with quiet_libraries():
        onnx_export_from_model(model, tmp_path / "onnx", task="text-generation-with-past", do_validation=False)
    model.save_pretrained(tmp_path / "cut")
    reference = parity.make_reference(tmp_path / "cut", PROMPTS)
    with (
        pytest.raises(Exception, match=r"ONNX Runtime stopped|parity"),
        OrtRunner(tmp_path / "onnx" / "model.onnx") as runner,
    ):
        parity.check_parity(reference, runner, "onnx", "pruned", "fp32")


@BREADTH
def test_numbers_beyond_half_precision_are_named(tmp_path):
    folder = save_tiny("llama", tmp_path / "model", num_hidden_layers=2)
    model = load_model(folder)
    with torch.no_grad():  # as the massive activations of some models, which norms bring back to size
        decoder_layers(model)[1].mlp.down_proj.weight.mul_(1e7)
    model.save_pretrained(folder)
    export_onnx(folder, "fp16", ExportSettings(), tmp_path / "onnx")
    reference = parity.make_reference(folder, PROMPTS)
    assert np.isfinite(reference.logits).all()
    with (
        OrtRunner(tmp_path / "onnx" / "model.onnx") as runner,
        pytest.raises(ParityError, match=r"no numbers: activations beyond fp16's 65504 do that; take precision fp32"),
    ):
        parity.check_parity(reference, runner, "onnx", "dense", "fp16")
    shutil.rmtree(tmp_path / "onnx")
    export_onnx(folder, "fp32", ExportSettings(), tmp_path / "onnx")
    with OrtRunner(tmp_path / "onnx" / "model.onnx") as runner:
        assert parity.check_parity(reference, runner, "onnx", "dense", "fp32").passed
