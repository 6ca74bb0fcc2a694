"""Weights and activations in integers as TensorRT reads them: QuantizeLinear and DequantizeLinear around the products.

int4: weights in blocks along the inputs, two numbers a byte; the compiler unpacks them inside the product.
int8: weights with a scale for each output, and activations with one scale a tensor where a calibration text shows that
enough is left of them (`Activations.quantisable`): the product then runs in integers. Elsewhere the weights alone are
8-bit, which is what decoding gains by. So is the LM head, where errors go straight into the logits.

Measured by TensorRT-RTX 1.7's build log: 8-bit weights in blocks, and 4-bit ones of a single block, are unpacked into
memory at every step instead; neither is made here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import Writer, constant
from trsp_deploy.tools.graphs.products import Activations, weight_of
from trsp_deploy.tools.graphs.rounding import round_weight
from trsp_deploy.tools.graphs.stored import HEAD_BITS
from trsp_deploy.tools.progress import Meter

OPSET = 21  # the first whose DequantizeLinear has blocks; with scales in fp16 since 19
SMALLEST = 2.0**-14  # of a scale: fp16's smallest normal number; a column of zeros has one too


def quantize_products(
    model: ir.Model,
    bits: int,
    block_size: int,
    head: str,
    activations: Mapping[str, Activations],
    kept: Collection[str] = (),
    *,
    head_bits: int = HEAD_BITS,
) -> int:
    """Quantise every product with a constant weight; returns how many.

    model: after `open_products`, which names the `head`; changed in place. bits: 8 or 4; 4-bit weights share a scale in
    blocks of `block_size` inputs. activations: by product, for 8 bits. kept: products that
    get 8-bit weights in place of 4-bit ones, and stay in floats in place of 8 bits. head_bits: 8, or 16, which leaves
    it in floats.
    """
    writer = Writer(model, "qdq")
    floats = {*(() if bits == 4 else kept), *((head,) if head_bits > HEAD_BITS else ())}
    products = [node for node in model.graph if weight_of(node) is not None and node.name not in floats]
    with Meter(f"rounding to {bits} bits", len(products)) as meter:
        for node in products:
            weight = constant(node.inputs[1])
            assert weight is not None
            block = block_of(len(weight), block_size) if bits == 4 and node.name not in (head, *kept) else None
            found = activations.get(node.name or "")
            node.replace_input_with(
                1, _by_output(writer, weight) if block is None else _in_blocks(writer, weight, block, found)
            )
            if bits == 8 and node.name != head and found is not None and found.quantisable:
                node.replace_input_with(0, _rounded(writer, node.inputs[0], found, weight.dtype))
            meter.advance(node.name or "")
    writer.finish()
    return len(products)


def block_of(inputs: int, wanted: int) -> int | None:
    """Inputs that share a 4-bit weight's scale: as many as wanted, or 64 where that does not divide them; else none."""
    return next((size for size in (wanted, 64) if inputs % size == 0 and inputs > size), None)


def _by_output(writer: Writer, weight: np.ndarray) -> ir.Value:
    """(in, out) in 8 bits with a scale for each output."""
    scale = _scale(np.abs(weight).max(axis=0), 127, weight.dtype)  # (out,)
    whole = np.rint(weight.astype(np.float32) / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    inputs = [writer.constant(whole, "weight"), writer.constant(scale, "scale")]
    return writer.one("DequantizeLinear", inputs, {"axis": 1})


def _in_blocks(writer: Writer, weight: np.ndarray, block_size: int, found: Activations | None) -> ir.Value:
    """(in, out) in 4 bits with a scale for each block of inputs of each output, rounded by what the product reads."""
    rounded = round_weight(weight, block_size, None if found is None else found.moments, symmetric=True)
    whole = rounded.codes.astype(np.int8) - np.int8(8)
    inputs = [writer.constant(whole.astype(ml_dtypes.int4), "weight"), writer.constant(rounded.scales, "scale")]
    return writer.one("DequantizeLinear", inputs, {"axis": 0, "block_size": block_size})


def _rounded(writer: Writer, value: ir.Value | None, found: Activations, dtype: np.dtype[np.generic]) -> ir.Value:
    """A value rounded to 8 bits with one scale; products that read the same share it."""
    scale = _scale(np.array(max(-found.lowest, found.highest)), 127, dtype)
    inputs = [writer.constant(scale, "scale"), writer.constant(np.array(0, dtype=np.int8), "zero")]
    return writer.one("DequantizeLinear", [writer.one("QuantizeLinear", [value, *inputs]), *inputs])


def _scale(largest: np.ndarray, steps: int, dtype: np.dtype[np.generic]) -> np.ndarray:
    scale: np.ndarray = np.maximum(largest.astype(np.float32) / steps, SMALLEST).astype(dtype)
    return scale
