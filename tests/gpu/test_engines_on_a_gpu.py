"""Engines that need a CUDA device: the whole job on a tiny model, for every backend whose package is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import english, save_tiny
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.pipeline import Pipeline, prune_and_build
from trsp_deploy.recipe import EngineSpec, ExportSettings, read_recipe
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import EngineUnavailable, check_can_build, check_can_run, open_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


LIVE = 1300  # tokens; masked attention in fp16 is reported wrong from about there (TensorRT-Model-Connect, pull 785)
TENSORRT = [
    f"{backend}-{kind}"
    for backend in ("tensorrt", "tensorrt-rtx")
    for kind in ("fp16", "fp16-static", "bf16", "int8", "int4")
]


def ready(engine: str) -> EngineSpec:
    """A spec that can be built and run here; else the test is skipped, with the reason."""
    spec = load_engine_spec(engine)
    try:
        check_can_build(spec)
        check_can_run(spec)
    except EngineUnavailable as reason:
        pytest.skip(str(reason))
    return spec


@pytest.mark.parametrize("engine", ["ort-cuda-fp16", *TENSORRT])
def test_engine_runs_and_agrees(engine: str, tmp_path: Path) -> None:
    ready(engine)
    model = save_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=512)
    (tmp_path / "text.txt").write_text(english()[:60_000])
    text = str(tmp_path / "text.txt")
    values = {
        "model": str(model),
        "drop": "2",
        "calibration": {"texts": text, "context_length": 32, "max_windows": 16, "validation_windows": 4},
        "evaluation": {"manual": text},
        "evaluate": {"context_length": 64, "max_tokens": 640},
        "plan": {"steps": 1, "candidates": 2},
        "transfer": {"steps": 2},
        "bench": {"prompt_tokens": 16, "new_tokens": 4, "budget_s": 10},
        "engines": [engine],
    }
    with RunFolder(tmp_path / "run") as run:
        report = prune_and_build(Pipeline(run, read_recipe(values, "test")))
    (found,) = report.engines
    assert found.status == "ran" and found.comparison is not None
    assert (found.comparison.of("decode").device is not None) == engine.startswith("tensorrt"), "CUDA events"
    assert {(p.subject, p.role) for p in report.parity} >= {(engine, "dense"), (engine, "pruned")}


@pytest.mark.parametrize("engine", [name for name in TENSORRT if name.endswith(("-static", "-bf16", "-int8", "-int4"))])
def test_decoding_behind_a_long_text_agrees(engine: str, tmp_path: Path) -> None:
    """What a short prompt does not show: attention with a mask over a long live cache."""
    spec = ready(engine)
    settings = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048}
    model = save_tiny("llama", tmp_path / "model", **settings)
    (tmp_path / "onnx").mkdir()
    export_onnx(model, spec.graph_precision, ExportSettings(), tmp_path / "onnx")
    build_engine(tmp_path / "onnx" / FILE, spec, tmp_path / "engine")
    prompt = np.random.default_rng(0).integers(3, 380, size=LIVE).tolist()
    reference = parity.make_reference(model, [prompt[:40], prompt])
    with open_engine(tmp_path / "engine") as runner:
        parity.check_parity(reference, runner, engine, "dense", spec.precision)
