"""PyTorch to ONNX for text generation with past key values, by one of two exporters with one result."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.tools.exporters import dynamo, optimum
from trsp_deploy.tools.quiet import quiet_libraries

FILE = "model.onnx"


def export_onnx(model: Path, precision: Float, settings: ExportSettings, out: Path) -> tuple[str, ...]:
    """Export the model in a Hugging Face folder into `out`/model.onnx; returns the names of external data files.

    Inputs: input_ids, attention_mask, mostly position_ids, past_key_values.N.{key,value}; outputs: logits,
    present.N.{key,value}. The config and the weights stand beside the graph.
    Raises ModelError when the exporter is not installed or cannot export the architecture.
    """
    exporter = chosen(settings)
    out.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        if exporter == "optimum":
            optimum.export(model, precision, settings.opset or optimum.OPSET, settings.slim, out / FILE)
        else:
            dynamo.export(model, precision, _opset(settings, dynamo.OPSET), out / FILE)
    return tuple(sorted(path.name for path in out.glob(f"{FILE}_data*")))


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
