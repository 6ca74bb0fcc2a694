"""Engine specs of single GPUs: those for TensorRT-RTX are compiled as they ship, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exported import Made, onnx_of
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.library import engine_names, load_engine_spec

SPECS = [load_engine_spec(name) for name in engine_names()]
TARGETS = [spec.name for spec in SPECS if spec.backend == "tensorrt-rtx" and spec.compute_capabilities]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_builds_for_its_gpu(name: str, exported: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    # The tiny model's products are too narrow for blocks of 128.
    spec = load_engine_spec(name).model_copy(update={"block_size": 64})
    model = "opt-wide" if spec.compute_capabilities == ("sm75",) else "llama-wide"
    manifest = build_engine(onnx_of(exported(model, "fp16"), "fp16"), spec, tmp_path / "engine")
    assert manifest.spec.compute_capabilities == spec.compute_capabilities
    assert manifest.size_bytes > 100_000


@pytest.mark.slow
def test_rotary_embeddings_are_not_for_turing(exported: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    source = onnx_of(exported("llama-wide", "fp16"), "fp16")
    with pytest.raises(EngineUnavailable, match=r"FP32 GEMM is not supported.*take an engine of `onnxruntime-cuda`"):
        build_engine(source, load_engine_spec("tensorrt-rtx-20-fp16"), tmp_path / "engine")
