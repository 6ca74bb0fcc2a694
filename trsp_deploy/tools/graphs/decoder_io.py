"""What the inputs and outputs of an exported decoder mean, whichever runtime reads it.

Optimum's graph: `input_ids`, `attention_mask`, often `position_ids`, and for every layer
`past_key_values.N.key` / `.value` in, `logits` and `present.N.key` / `.value` out. The passes (attention.py, logits.py,
static_cache.py) add inputs of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from trsp_deploy.errors import EngineUnavailable, ShapeUnavailable
from trsp_deploy.recipe import Float

# name -> (dtype, shape); a dimension without a fixed length is given by its label in the graph
Bindings = dict[str, tuple[str, tuple[int | str, ...]]]
# total = past + sequence; kept = positions that logits are wanted for
Dimension = Literal["batch", "sequence", "past", "total", "kept"]

PAST = "past_key_values."
PRESENT = "present."
POSITIONS = "position_ids"
LOGITS_POSITIONS = "logits_positions"  # input, (kept,) int64: for which of the new tokens logits are wanted
# Input, (batch,) int64: the place of each row's first new token in a cache of fixed length.
WRITE_INDICES = "write_indices"
# Metadata of a graph whose `past` and `present` may be one memory, longer than the text that it holds.
IN_PLACE = "trsp_deploy.cache_in_place"
# Metadata: the most tokens of a text that a graph holds for. It says nothing when it computes a longer one.
LONGEST = "trsp_deploy.longest_text"
CACHE_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Of inputs and logits; "" where a graph does not say.
DTYPES = ("int64", "int32", "bool", "float64", "float32", "float16", "bfloat16", "")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # numpy itself knows no bfloat16

TOKENS: dict[int, Dimension] = {0: "batch", 1: "sequence"}
DYNAMIC_AXES: dict[str, dict[int, Dimension]] = {
    "input_ids": TOKENS,
    "position_ids": TOKENS,
    "attention_mask": {0: "batch", 1: "total"},
    WRITE_INDICES: {0: "batch"},
    LOGITS_POSITIONS: {0: "kept"},
}
CACHE_AXES: dict[int, Dimension] = {0: "batch", 2: "past"}  # (batch, heads, past, head_dim)


def check_decoder(inputs: Bindings, outputs: Bindings) -> None:
    """Raise EngineUnavailable unless this is a decoder with a KV cache whose inputs and dimensions are all known."""
    missing = {"input_ids", "attention_mask"} - inputs.keys()
    caches = cache_inputs(inputs)
    missing |= {"logits", *map(present, caches)} - outputs.keys()
    if missing or not caches:
        raise EngineUnavailable(
            "the graph is not a decoder with past key values"
            f" (no {', '.join(sorted(missing)) if missing else PAST + '*'}); export with task text-generation-with-past"
        )
    unknown = [name for name in inputs if name not in (*DYNAMIC_AXES, *caches)]
    if unknown:
        raise EngineUnavailable(
            f"the graph wants {', '.join(unknown)}, which nothing here feeds: export it without; "
            f"understood are {', '.join(DYNAMIC_AXES)} and {PAST}*"
        )
    for name, (dtype, shape) in (*inputs.items(), ("logits", outputs["logits"])):
        if dtype not in DTYPES:
            raise EngineUnavailable(f"the graph's {name} is {dtype}; understood are {', '.join(filter(None, DTYPES))}")
        if name in inputs:
            input_shape(name, shape, batch=1, sequence=1, past=0)


def check_logits(outputs: Bindings) -> None:
    """Raise EngineUnavailable unless the logits, as a session tells them, are of each token over a known vocabulary."""
    shape = outputs["logits"][1]
    if len(shape) != 3 or not isinstance(shape[-1], int):
        raise EngineUnavailable(
            f"the graph's logits are [{', '.join(map(str, shape))}]; understood is [batch, tokens, vocabulary], "
            "the last of them a number"
        )


def check_precision(inputs: Bindings, precision: Float | Literal["bf16"]) -> None:
    """Raise EngineUnavailable when the graph's KV cache is not in the precision that the spec asks for."""
    found = inputs[cache_inputs(inputs)[0]][0]
    if found != CACHE_DTYPE[precision]:
        raise EngineUnavailable(f"the spec asks for {precision}, but the ONNX graph's cache is {found}")


def input_shape(
    name: str, shape: tuple[int | str, ...], *, batch: int, sequence: int, past: int, kept: int | None = None
) -> tuple[int, ...]:
    """The shape of one input when `sequence` new tokens follow `past` cached ones.

    kept: for how many of the new tokens logits are wanted; None is all.
    Raises EngineUnavailable for a dimension that is neither fixed nor known by name and place.
    """
    lengths: dict[Dimension, int] = {
        "batch": batch,
        "sequence": sequence,
        "past": past,
        "total": past + sequence,
        "kept": sequence if kept is None else kept,
    }
    axes = CACHE_AXES if name.startswith(PAST) else DYNAMIC_AXES.get(name, {})
    result = []
    for axis, length in enumerate(shape):
        if isinstance(length, str) and axis not in axes:
            raise EngineUnavailable(
                f"graph input '{name}': dimension {axis} ('{length}') is not known to be batch, sequence or past"
            )
        result.append(length if isinstance(length, int) else lengths[axes[axis]])
    return tuple(result)


def cache_inputs(inputs: Bindings) -> list[str]:
    """Names of the KV cache's inputs, in the graph's order."""
    return [name for name in inputs if name.startswith(PAST)]


def cache_length(inputs: Bindings) -> int | None:
    """Tokens that a cache of fixed length holds; None where it grows with the text."""
    length = inputs[cache_inputs(inputs)[0]][1][2]
    return length if isinstance(length, int) else None


def cache_bytes(inputs: Bindings) -> int:
    """Bytes of keys and values that one token of one text takes."""
    shapes = (inputs[name] for name in cache_inputs(inputs))
    return sum(int(shape[1]) * int(shape[3]) * DTYPE_BYTES[dtype] for dtype, shape in shapes)


def present(name: str) -> str:
    """The output that becomes the cache input `name` of the next step."""
    return PRESENT + name.removeprefix(PAST)


def token_inputs(
    inputs: Bindings, input_ids: np.ndarray, attention_mask: np.ndarray, keep: int = 0
) -> dict[str, np.ndarray]:
    """Every input but the cache, in the graph's dtypes.

    input_ids: (batch, sequence). attention_mask: (batch, past + sequence), 0 on left padding.
    keep: for how many of the last new tokens logits are wanted, where the graph can be told; 0 is all.
    """
    batch, sequence = input_ids.shape
    past = attention_mask.shape[1] - sequence
    # Padding keeps position 0: any valid index will do there, as no token attends to it.
    positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -sequence:]
    length = cache_length(inputs)
    if length is not None:  # the mask is over every place of the cache
        attention_mask = np.pad(attention_mask, ((0, 0), (0, length - attention_mask.shape[1])))
    values = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": positions,
        WRITE_INDICES: np.full(batch, past),
        LOGITS_POSITIONS: np.arange(sequence)[-keep:],
    }
    return {
        name: np.asarray(value, dtype=inputs[name][0], order="C") for name, value in values.items() if name in inputs
    }


def write_longest(graph: Path, tokens: int) -> None:
    """Let an ONNX file say that it holds for texts of up to `tokens` tokens; one that says fewer is left as it is.

    The weights stay in their file.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    said = {each.key: each.value for each in model.metadata_props}
    if int(said.get(LONGEST, tokens + 1)) > tokens:
        onnx.helper.set_model_props(model, {**said, LONGEST: str(tokens)})
        onnx.save(model, graph)


def check_longest(what: Path, longest: int | None, length: int) -> None:
    """Raise ShapeUnavailable for a text of more tokens than a graph holds for (`LONGEST`); None is any length."""
    if longest is not None and length > longest:
        raise ShapeUnavailable(f"{what}: holds for texts of up to {longest} tokens, and this one has {length}")


def check_padding(what: Path, holds: bool, attention_mask: np.ndarray) -> None:
    """Raise ShapeUnavailable for padding in a batch of a graph that does not hide it."""
    if not holds and not attention_mask.all():
        raise ShapeUnavailable(
            f"{what}: its graph gets padded texts wrong, so it reads one text at a time, or texts of one length"
        )


def extended(attention_mask: np.ndarray, input_ids: np.ndarray) -> np.ndarray:
    """The mask with a 1 for every new token."""
    return np.concatenate([attention_mask, np.ones_like(input_ids)], axis=1)
