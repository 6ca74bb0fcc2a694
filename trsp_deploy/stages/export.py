"""PyTorch to ONNX for text generation with past key values, through Optimum.

Optimum's own validation only warns, so it is left out: `stages/parity.py` is the check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import ExportSettings, Precision
from trsp_deploy.tools.quiet import quiet_libraries

FILE = "model.onnx"


def export_onnx(model: Path, precision: Precision, settings: ExportSettings, out: Path) -> tuple[str, ...]:
    """Export the model in a Hugging Face folder into `out`/model.onnx; returns the names of external data files.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.{key,value}; outputs: logits,
    present.N.{key,value}. Above 2 GB the weights go to files beside the graph.
    Raises ModelError when Optimum cannot export the architecture.
    """
    with quiet_libraries():
        # Importing Optimum loads half of transformers, and its loggers must be quiet before it speaks.
        from optimum.exporters.onnx import main_export, model_patcher

        try:
            with _additive_attention_masks(model_patcher):
                main_export(
                    str(model),
                    output=out,
                    task="text-generation-with-past",
                    opset=settings.opset,
                    dtype=precision,
                    local_files_only=True,
                    do_validation=False,
                    slim=settings.slim,
                )
        except (ValueError, KeyError, NotImplementedError) as problem:
            reason = " ".join(str(problem).split())[:300]
            raise ModelError(f"{model}: Optimum cannot export it to ONNX ({reason})") from problem
    return tuple(
        sorted(path.name for path in out.iterdir() if path.name.startswith(f"{FILE}_") or path.suffix == ".data")
    )


@contextlib.contextmanager
def _additive_attention_masks(patcher: ModuleType) -> Iterator[None]:
    """Turn boolean attention masks into masks of the query's own dtype while a model is traced.

    torch's ONNX exporter turns them into fp32 ones and adds those to fp16 scores: an invalid graph (GPT-2, GPT-NeoX,
    Phi). A finite minimum instead of -inf also keeps rows of padding, where everything is masked, free of NaN.
    Optimum's patcher calls torch's attention through a name of its own, so that name is what is replaced.
    """
    attention = patcher.original_scaled_dot_product_attention  # type: ignore[attr-defined]

    def additive(query: torch.Tensor, *args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            lowest = torch.tensor(torch.finfo(query.dtype).min, dtype=query.dtype)
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype), lowest)
        return attention(query, *args, attn_mask=attn_mask, **kwargs)

    patcher.original_scaled_dot_product_attention = additive  # type: ignore[attr-defined]
    try:
        yield
    finally:
        patcher.original_scaled_dot_product_attention = attention  # type: ignore[attr-defined]
