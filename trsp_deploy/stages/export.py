"""PyTorch to ONNX for text generation with past key values, by one of two exporters with one result."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from trsp_deploy.decoder import graph_positions, load_config
from trsp_deploy.errors import EngineUnavailable, ModelError
from trsp_deploy.model_code import copy_code
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.tools.exporters import dynamo, optimum
from trsp_deploy.tools.graphs.decoder_io import write_longest
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners.calibration import longest_text
from trsp_deploy.tools.runners.half_range import guard_range

FILE = "model.onnx"


def export_onnx(
    model: Path,
    precision: Float,
    settings: ExportSettings,
    out: Path,
    calibration: np.ndarray | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...]:
    """Export the model in a Hugging Face folder into `out`/model.onnx; returns the names of external data files.

    Inputs: input_ids, attention_mask, mostly position_ids, past_key_values.N.{key,value}; outputs: logits,
    present.N.{key,value}. The config and the weights stand beside the graph.
    calibration: (batch, sequence) int64 tokens of real text, which show what of an fp16 graph has to stay in fp32; None
    takes random ones.
    say: hears of a graph that could not be simplified.
    Raises ModelError when the exporter is not installed or cannot export the architecture.
    """
    with quiet_libraries():
        exporter = chosen(settings, model)
        out.mkdir(parents=True, exist_ok=True)
        if exporter == "optimum":
            note = optimum.export(model, precision, settings.opset or optimum.OPSET, settings.slim, out / FILE)
        else:
            note = dynamo.export(model, precision, _opset(settings), out / FILE)
        copy_code(model, out)  # the config beside the graph names it
        _note_longest(model, out)
        if precision == "fp16":
            _guard(out, calibration)
    if note is not None:
        say(f"export: {note}")
    return tuple(sorted(path.name for path in out.glob(f"{FILE}_data*")))


def _note_longest(model: Path, out: Path) -> None:
    """Let the graph say how long a text may be, where something in it ends.

    That is a table of learned positions, or where the model turns keys of longer texts otherwise: what was traced is
    the shorter of two ways (LongRoPE), or one of many (dynamic NTK). The config says that too.
    """
    limit = graph_positions(load_config(model))
    if limit is not None:
        config = out / "config.json"
        values = read_json(config, ModelError)
        config.write_text(json.dumps({**values, "max_position_embeddings": limit}, indent=2), encoding="utf-8")
    longest = longest_text(out / FILE)
    if longest is not None:
        write_longest(out / FILE, longest)


def _guard(out: Path, calibration: np.ndarray | None) -> None:
    """Let the graph stay within fp16's range; one that cannot is left as it is, and its engines are refused."""
    with tempfile.TemporaryDirectory(prefix="fp16-range-", dir=out) as scratch, contextlib.suppress(EngineUnavailable):
        graph, _ = guard_range(out / FILE, calibration, Path(scratch))
        if graph != out / FILE:
            for stale in out.glob(f"{FILE}*"):
                stale.unlink()
            for file in graph.parent.glob(f"{FILE}*"):
                file.rename(out / file.name)


def chosen(settings: ExportSettings, model: Path | None = None) -> str:
    """The exporter that the settings mean here; raises ModelError when that is Optimum's and lacks a package.

    model: a Hugging Face folder; `auto` is torch's own exporter for one that Optimum does not know.
    """
    exporter: str = settings.exporter
    if exporter == "auto":
        exporter = "optimum" if optimum.installed() and (model is None or optimum.knows(model)) else "dynamo"
    if exporter == "optimum" and not optimum.installed():
        raise ModelError(
            "export.exporter: optimum is not installed here: pip install 'trsp_deploy[optimum]', or take `dynamo`"
        )
    if exporter == "optimum" and settings.slim and not optimum.simplifies():
        raise ModelError(
            "export.slim: onnxslim is not installed here: pip install 'trsp_deploy[optimum]', or "
            "`--set export.slim=false`"
        )
    return exporter


def check_exportable(model: Path, settings: ExportSettings, say: Callable[[str], None]) -> None:
    """Raise ModelError, within seconds and without weights, where the exporter that is meant cannot trace the model.

    say: hears of torch's own where Optimum is installed and does not know the model.
    """
    with quiet_libraries():
        exporter = chosen(settings, model)
    if settings.exporter == "auto" and exporter == "dynamo" and optimum.installed():
        say("export: Optimum does not know this type of model, so torch's own exporter is taken (dynamo)")
    try:
        with quiet_libraries():
            if exporter == "optimum":
                optimum.check_traceable(model, settings.opset or optimum.OPSET)
            else:
                _opset(settings)
                dynamo.check_traceable(model)
    except ModelError as problem:
        raise ModelError(f"{problem}; `trsp-deploy prune` makes the checkpoint alone") from problem


def _opset(settings: ExportSettings) -> int:
    """The opset that torch's exporter is to write; one that it does not know it would silently replace by 18."""
    wanted, highest = settings.opset or dynamo.OPSET, onnx.defs.onnx_opset_version()
    if not dynamo.OPSET <= wanted <= highest:
        raise ModelError(f"export.opset: {wanted}, and this exporter writes {dynamo.OPSET} to {highest}")
    return wanted
