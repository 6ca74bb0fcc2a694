"""PyTorch to ONNX by torch.export: `torch.onnx.export(dynamo=True)`, for whatever transformers can run.

The model is wrapped in a module whose inputs and outputs are the graph's; everything in between is the model's own
code, traced with every length symbolic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from trsp_deploy.decoder import load_model
from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import Float
from trsp_deploy.tools.graphs.decoder_io import PAST, PRESENT

DTYPES: dict[Float, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
OPSET = (
    20  # the lowest that this exporter writes all of its decoders in; 23 has an Attention that ONNX Runtime gets wrong
)
# Example lengths: 0 and 1 would be taken for constants, and equal ones for one length.
BATCH, SEQUENCE, CACHED = 2, 3, 5


def export(model: Path, precision: Float, opset: int, out: Path) -> None:
    """Write a Hugging Face folder's model to the file `out`, its weights beside it, and its config into out's folder.

    opset: 20 or more. Raises ModelError when torch cannot trace the model.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    network = load_model(model, dtype=DTYPES[precision]).requires_grad_(False)
    network.config.use_cache = True
    heads = _cache_heads(network)
    step = _Step(network)
    layers = range(len(heads))
    names = ["input_ids", "attention_mask", "position_ids"]
    caches = [f"{PAST}{layer}.{part}" for layer in layers for part in ("key", "value")]
    presents = [f"{PRESENT}{layer}.{part}" for layer in layers for part in ("key", "value")]
    past = [torch.zeros(BATCH, count, CACHED, size, dtype=DTYPES[precision]) for count, size in heads for _ in range(2)]
    ids = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    positions = torch.arange(CACHED, CACHED + SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
    mask = torch.ones(BATCH, CACHED + SEQUENCE, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    tokens, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    with _one_line(model), torch.no_grad():
        program = torch.onnx.export(
            step,
            (ids, mask, positions, past),
            dynamo=True,
            opset_version=opset,
            input_names=[*names, *caches],
            output_names=["logits", *presents],
            dynamic_shapes=(tokens, tokens, tokens, [cache] * len(past)),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    _name_lengths(program.model.graph)
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with paths of the machine that traced it
    ir.save(program.model, out, external_data=f"{out.name}_data")
    network.config.save_pretrained(out.parent)


class _Step(nn.Module):
    """One call of the model, with the cache as plain tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def _cache_heads(network: nn.Module) -> list[tuple[int, int]]:
    """Heads and head size of every layer's cache, as a call of the model leaves them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        network(input_ids=torch.ones(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]


def _name_lengths(graph: ir.Graph) -> None:
    """Call the dimensions of the inputs what they are; the tracer numbers them."""
    for value in graph.inputs:
        name = value.name or ""
        if value.shape is not None and name == "attention_mask":
            value.shape = ir.Shape(["batch_size", "total_length"])
        elif value.shape is not None and name.startswith(PAST):
            value.shape = ir.Shape(["batch_size", value.shape[1], "past_length", value.shape[3]])
        elif value.shape is not None:
            value.shape = ir.Shape(["batch_size", "sequence_length"])


@contextlib.contextmanager
def _one_line(model: Path) -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # the tracer's errors share no base class
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"{model}: torch cannot export it to ONNX ({reason})") from problem
