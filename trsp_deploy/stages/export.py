"""PyTorch to ONNX for text generation with past key values, by one of two exporters with one result."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np

from trsp_deploy.errors import EngineUnavailable, ModelError
from trsp_deploy.model_code import copy_code
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.tools.exporters import dynamo, optimum
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners.half_range import guard_range

FILE = "model.onnx"


def export_onnx(
    model: Path, precision: Float, settings: ExportSettings, out: Path, calibration: np.ndarray | None = None
) -> tuple[str, ...]:
    """Export the model in a Hugging Face folder into `out`/model.onnx; returns the names of external data files.

    Inputs: input_ids, attention_mask, mostly position_ids, past_key_values.N.{key,value}; outputs: logits,
    present.N.{key,value}. The config and the weights stand beside the graph.
    calibration: (batch, sequence) int64 tokens of real text, which show what of an fp16 graph has to stay in fp32; None
    takes random ones.
    Raises ModelError when the exporter is not installed or cannot export the architecture.
    """
    exporter = chosen(settings)
    out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        if exporter == "optimum":
            optimum.export(model, precision, settings.opset or optimum.OPSET, settings.slim, out / FILE)
        else:
            dynamo.export(model, precision, _opset(settings, dynamo.OPSET), out / FILE)
        copy_code(model, out)  # the config beside the graph names it
        if precision == "fp16":
            _guard(out, calibration)
    return tuple(sorted(path.name for path in out.glob(f"{FILE}_data*")))


def _guard(out: Path, calibration: np.ndarray | None) -> None:
    """Let the graph stay within fp16's range; one that cannot is left as it is, and its engines are refused."""
    with tempfile.TemporaryDirectory(prefix="fp16-range-", dir=out) as scratch, contextlib.suppress(EngineUnavailable):
        graph, _ = guard_range(out / FILE, calibration, Path(scratch))
        if graph != out / FILE:
            for stale in out.glob(f"{FILE}*"):
                stale.unlink()
            for file in graph.parent.glob(f"{FILE}*"):
                file.rename(out / file.name)


def chosen(settings: ExportSettings) -> str:
    """The exporter that the settings mean here; raises ModelError when that is Optimum's and it is not installed."""
    if settings.exporter == "auto":
        return "optimum" if optimum.installed() else "dynamo"
    if settings.exporter == "optimum" and not optimum.installed():
        raise ModelError(
            "export.exporter: optimum is not installed here: pip install 'trsp_deploy[optimum]', or take `dynamo`"
        )
    return settings.exporter


def _opset(settings: ExportSettings, lowest: int) -> int:
    if settings.opset is not None and settings.opset < lowest:
        raise ModelError(f"export.opset: {settings.opset}, and this exporter begins at {lowest}")
    return settings.opset or lowest
