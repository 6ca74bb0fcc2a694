"""PyTorch to ONNX by torch.export: `torch.onnx.export(dynamo=True)`, for whatever transformers can run.

The model is wrapped in a module whose inputs and outputs are the graph's; everything in between is the model's own
code, traced with every length symbolic.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder import load_config
from trsp_deploy.errors import ModelError, TrspError, first_line, machine_reason, named, passes_through
from trsp_deploy.recipe import Float
from trsp_deploy.tools.exporters.weights import (
    DTYPES,
    Read,
    WithoutProducts,
    hollow_model,
    open_weights,
    save,
    try_on_ends,
    turn,
)
from trsp_deploy.tools.graphs.decoder_io import PAST, PRESENT

# The lowest that this exporter writes all of its decoders in; 23 has an Attention that ONNX Runtime gets wrong.
OPSET = 20
# Example lengths: 0 and 1 would be taken for constants, and equal ones for one length.
BATCH, SEQUENCE, CACHED = 2, 3, 5
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours, which torch's exporter puts into its errors


def export(model: Path, precision: Float, opset: int, out: Path) -> str | None:
    """Write a Hugging Face folder's model to the file `out`, its weights beside it, and its config into out's folder.

    It is traced without its weights, which come from the checkpoint one at a time, on their way to the disk.
    opset: 20 or more. Where what was traced cannot be optimised it stays as it is, and a line that says so comes back.
    Raises ModelError when torch cannot trace the model.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    network = hollow_model(load_config(model), DTYPES[precision])
    with _as_model_error(model), torch.no_grad():
        arguments, shapes = _arguments(network, DTYPES[precision])
        parts = [f"{layer}.{part}" for layer in range(len(arguments[-1]) // 2) for part in ("key", "value")]
        program = torch.onnx.export(
            _Step(network).eval(),
            arguments,
            dynamo=True,
            opset_version=opset,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"{PAST}{part}" for part in parts)],
            output_names=["logits", *(f"{PRESENT}{part}" for part in parts)],
            dynamic_shapes=shapes,
            optimize=False,  # it calculates with constants, and the weights are none yet
            verbose=False,
        )
    assert program is not None
    _fill(program.model.graph, network.state_dict().keys(), open_weights(model, network))
    graph, note = _optimised(program)
    _name_lengths(graph.graph)
    ClearMetadataAndDocStringPass()(graph)  # stack traces, with paths of the machine that traced it
    save(graph, out)
    network.config.save_pretrained(out.parent)
    return note


def _optimised(program: torch.onnx.ONNXProgram) -> tuple[ir.Model, str | None]:
    """What was traced, optimised; as it was traced, and a line, where that fails: it may, after hours of training."""
    traced = program.model.clone()
    try:
        program.optimize()
    except Exception as problem:  # it rewrites in place, by many rules
        if passes_through(problem):
            raise
        return traced, f"torch cannot optimise the graph ({named(problem)}): it stays as it was traced, and is slower"
    return program.model, None


def check_traceable(model: Path) -> None:
    """Raise ModelError where torch cannot trace the model; takes seconds and no weights, for a call before training."""
    with _as_model_error(model), torch.no_grad():
        try_on_ends(model, _try)


def _try(config: Any) -> None:
    """Trace a config's model as torch.onnx.export does, with nothing made of what was traced."""
    network = hollow_model(config, torch.float32)
    arguments, shapes = _arguments(network, torch.float32)
    try:
        torch.export.export(_Step(network).eval(), arguments, dynamic_shapes=shapes, strict=False)
    except Exception:  # torch.onnx.export then tries this
        torch.export.export(_Step(network).eval(), arguments, dynamic_shapes=shapes, strict=True)


def _arguments(network: PreTrainedModel, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """`_example` for a model whose weights are hollow."""
    network.config.use_cache = True
    quick = WithoutProducts()
    quick.begin()
    try:
        sizes = _cache_sizes(network)
    finally:
        quick.end()
    return _example(sizes, dtype)


def _fill(graph: ir.Graph, names: Collection[str], read: Read) -> None:
    """Let each of the model's weights be read from its checkpoint whenever it is asked for, and not be kept.

    Raises ModelError where the graph has a weight by a name that the model does not.
    """
    hollow = {f"network.{name}": name for name in names if f"network.{name}" in graph.initializers}
    matrices = [graph.initializers[key] for key in hollow]
    turned = turn(graph, [value for value in matrices if value.shape is not None and len(value.shape) == 2])
    for key, name in hollow.items():
        value = graph.initializers[key]
        assert value.dtype is not None and value.shape is not None
        there = functools.partial(_tensor, read, name, key in turned)
        value.const_value = ir.LazyTensor(there, dtype=value.dtype, shape=value.shape, name=key)
    left = [name for name, value in graph.initializers.items() if _is_hollow(getattr(value.const_value, "raw", None))]
    if left:
        raise ModelError(f"torch's trace names weights as the model does not, such as {left[0]}: it was not filled")


def _is_hollow(raw: object) -> bool:
    """Whether it is one number, repeated, in a weight's place."""
    return isinstance(raw, torch.Tensor) and raw.numel() > 1 and not any(raw.stride())


def _tensor(read: Read, name: str, transposed: bool) -> ir.TensorProtocol:
    weight = read(name)
    return ir.tensor(weight.t().contiguous() if transposed else weight, name=name)


def _example(sizes: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of a `_Step`, and which of their dimensions may change; sizes: of every layer's cache."""
    past = [torch.zeros(BATCH, heads, CACHED, size, dtype=dtype) for heads, *both in sizes for size in both]
    ids = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    positions = torch.arange(CACHED, CACHED + SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
    mask = torch.ones(BATCH, CACHED + SEQUENCE, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    tokens, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    return (ids, mask, positions, past), (tokens, tokens, tokens, [cache] * len(past))


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


def _cache_sizes(network: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Heads, a key's size and a value's of every layer's cache, as a call of the model leaves them.

    Raises ModelError for a cache that holds anything but keys and values of each layer, as of layers that scan a text
    (Mamba, short convolutions).
    """
    cache = network(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)  # BERT's, which may be a decoder of an encoder's states
    layers = list(getattr(cache, "layers", ()))
    parts = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    plain = all(isinstance(part, torch.Tensor) and part.ndim == 4 for part in parts)
    if not parts or not plain:
        raise ModelError(f"its cache is {type(cache).__name__}, not the keys and values of every layer")
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


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
def _as_model_error(model: Path) -> Iterator[None]:
    """Turn whatever tracing raises into a ModelError of one line, and hide what torch prints on the way."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # of a model that fails, all of its graph
            yield
    except Exception as problem:  # the tracer's errors share no base class
        if machine_reason(problem) is not None:
            raise
        reason = str(problem) if isinstance(problem, TrspError) else _reason(problem)
        raise ModelError(f"{model}: torch cannot export it to ONNX ({reason})") from problem


def _reason(problem: BaseException) -> str:
    """The first line of what led to an error of the exporter, whose own words are advice for its developers."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return ANSI.sub("", first_line(problem))
