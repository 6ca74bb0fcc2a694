"""How many bytes an engine keeps of each number, scales and zero points among them: as `quantize` and `qdq` write it.

stored_by(spec).layers
"""

from __future__ import annotations

from typing import NamedTuple

from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, Float, Precision

HEAD_BITS, HEAD_BLOCK = 8, 64  # of the LM head beside 4-bit layers
LOOKUP_BITS, LOOKUP_BLOCK = 4, 32  # of a table that is looked up
# Of a weight in 8 bits, with a scale, and mostly a zero point, for each output: 1.009 with 576 inputs, less with more.
BY_OUTPUT = 1.01


class Stored(NamedTuple):
    """Bytes of one number, scales and zero points among them."""

    precision: Precision
    layers: float  # a weight of theirs
    head: float  # a weight of the LM head
    cached: float  # a key or a value
    computes: Precision | None = None  # of its products, whose rate counts; None in integers, and in older results


def in_floats(precision: Float | Precision) -> Stored:
    """How an engine in floats keeps numbers: weights, keys and values alike."""
    width: Float = "fp32" if precision == "fp32" else "fp16"  # bf16 is as wide
    return Stored(precision, FLOAT_BYTES[width], FLOAT_BYTES[width], FLOAT_BYTES[width], precision)


def stored_by(spec: EngineSpec) -> Stored:
    """How an engine built from a spec keeps its numbers."""
    if not spec.is_quantised:
        return in_floats(spec.precision)
    layers = BY_OUTPUT if spec.precision == "int8" else _of_block(spec, 4, spec.block_size)
    # TensorRT's weights of 4 bits alone are integers; ONNX Runtime rounds a product's inputs too.
    computes = spec.graph_precision if spec.precision == "int4" and spec.on_tensorrt else None
    return Stored(spec.precision, layers, _head(spec, layers), FLOAT_BYTES[spec.graph_precision], computes)


def table_bytes(spec: EngineSpec) -> float:
    """Bytes of a number in the table of tokens, which is looked up."""
    if spec.precision != "int4" or spec.on_tensorrt or spec.embedding_bits > HEAD_BITS:
        return FLOAT_BYTES[spec.graph_precision]
    return (spec.embedding_bits + 8 * FLOAT_BYTES[spec.graph_precision] / LOOKUP_BLOCK) / 8


def _head(spec: EngineSpec, layers: float) -> float:
    if spec.head_bits > HEAD_BITS:
        return spec.head_bits / 8
    if spec.head_bits < HEAD_BITS:
        return layers
    if spec.on_tensorrt:
        return 1.0  # a scale for each of so many outputs is next to nothing
    return _of_block(spec, HEAD_BITS, spec.block_size if spec.precision == "int8" else HEAD_BLOCK)


def _of_block(spec: EngineSpec, bits: int, block_size: int) -> float:
    """Bytes of a weight: each block has a scale in floats, and of 4 bits may have a zero point."""
    zero_point = bits if bits == 4 and spec.zero_points and not spec.on_tensorrt else 0
    return (bits + (8 * FLOAT_BYTES[spec.graph_precision] + zero_point) / block_size) / 8
