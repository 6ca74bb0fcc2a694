"""PyTorch to ONNX through Optimum's exporter, which traces the model as TorchScript.

Optimum's own validation only warns, so it is left out: `stages/parity.py` is the check. Two of Optimum's functions are
replaced while it works, each for a reason written beside the replacement; the releases they fit are pinned.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch

from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import Float

OPSET = 18
PROTOBUF_LIMIT = 2**31 - 2**27  # bytes of weights that still leave room for the graph in one protobuf file


def installed() -> bool:
    """Whether Optimum's exporter is there; transformers 5 has none."""
    return importlib.util.find_spec("optimum") is not None and (
        importlib.util.find_spec("optimum.exporters.onnx") is not None
    )


def export(model: Path, precision: Float, opset: int, slim: bool, out: Path) -> None:
    """Write a Hugging Face folder's model to the file `out`, and its config beside it; above 2 GB its weights too.

    slim: onnxslim simplifies the graph. Raises ModelError when Optimum cannot export the architecture.
    """
    # Loads half of transformers, and its loggers must be quiet before it speaks.
    from optimum.exporters.onnx import convert, main_export, model_patcher
    from optimum.onnx import graph_transformations

    attention = model_patcher.original_scaled_dot_product_attention
    with (
        _replaced(model_patcher, "original_scaled_dot_product_attention", _additive_masks(attention)),
        _replaced(convert, "check_and_save_model", _check_and_save),
        _replaced(graph_transformations, "check_and_save_model", _check_and_save),
    ):
        try:
            main_export(
                str(model),
                output=out.parent,
                task="text-generation-with-past",
                opset=opset,
                dtype=precision,
                local_files_only=True,
                do_validation=False,
                slim=slim,
            )
        except (ValueError, KeyError, NotImplementedError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise ModelError(f"{model}: Optimum cannot export it to ONNX ({reason})") from problem


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _additive_masks(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention whose boolean masks become masks of the query's own dtype.

    torch's ONNX exporter turns them into fp32 ones and adds those to fp16 scores: an invalid graph (GPT-2, GPT-NeoX,
    Phi). A finite minimum instead of -inf also keeps rows of padding, where everything is masked, free of NaN.
    """

    def additive(query: torch.Tensor, *args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("scale") is None:
            kwargs["scale"] = int(query.shape[-1]) ** -0.5  # a constant, where tracing would compute it at every step
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            lowest = torch.tensor(torch.finfo(query.dtype).min, dtype=query.dtype)
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype), lowest)
        return attention(query, *args, attn_mask=attn_mask, **kwargs)

    return additive


def _check_and_save(model: onnx.ModelProto, save_path: str | Path) -> None:
    """Save a graph, with its weights beside it where one protobuf file cannot hold them, and check it.

    Optimum asks the message for its size first, and today's protobuf raises an error above 2 GB instead of answering.
    """
    path = Path(save_path)
    weights = path.with_name(f"{path.name}_data")
    for stale in (path, weights):
        stale.unlink(missing_ok=True)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTOBUF_LIMIT:
        # Small tensors stay in the graph: shape inference reads them there.
        onnx.save(model, path, save_as_external_data=True, location=weights.name, size_threshold=1024)
    else:
        onnx.save(model, path)
    onnx.checker.check_model(path)
