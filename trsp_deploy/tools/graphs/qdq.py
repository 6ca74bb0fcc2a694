"""Weights and activations in integers as TensorRT reads them: QuantizeLinear and DequantizeLinear around the products.

int4: weights in blocks along the inputs, two numbers a byte; the compiler unpacks them inside the product.
int8: weights with a scale for each output, and activations with one scale a tensor where a calibration text shows that
enough is left of them (`Activations.quantisable`): the product then runs in integers. Elsewhere the weights alone are
8-bit, which is what decoding gains by. So is the LM head, where errors go straight into the logits.

Measured by TensorRT-RTX 1.7's build log: 8-bit weights in blocks, and 4-bit ones of a single block, are unpacked into
memory at every step instead; neither is made here.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import Writer, constant
from trsp_deploy.tools.graphs.products import Activations, weight_of

SMALLEST = 2.0**-14  # of a scale: fp16's smallest normal number; a column of zeros has one too


def quantize_products(
    model: ir.Model, bits: int, block_size: int, head: str, activations: Mapping[str, Activations]
) -> int:
    """Quantise every product with a constant weight; returns how many.

    model: after `open_products`, which names the `head`; changed in place. bits: 8 or 4; 4-bit weights share a scale in
    blocks of `block_size` inputs. activations: by product, for 8 bits.
    """
    writer = Writer(model, "qdq")
    products = [node for node in model.graph if weight_of(node) is not None]
    for node in products:
        weight = constant(node.inputs[1])
        assert weight is not None
        blocks = bits == 4 and node.name != head and weight.shape[0] % block_size == 0 and weight.shape[0] > block_size
        node.replace_input_with(1, _in_blocks(writer, weight, block_size) if blocks else _by_output(writer, weight))
        found = activations.get(node.name or "")
        if bits == 8 and node.name != head and found is not None and found.quantisable:
            node.replace_input_with(0, _rounded(writer, node.inputs[0], found, weight.dtype))
    writer.finish()
    return len(products)


def _by_output(writer: Writer, weight: np.ndarray) -> ir.Value:
    """(in, out) in 8 bits with a scale for each output."""
    scale = _scale(np.abs(weight).max(axis=0), 127, weight.dtype)  # (out,)
    whole = np.rint(weight.astype(np.float32) / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    inputs = [writer.constant(whole, "weight"), writer.constant(scale, "scale")]
    return writer.one("DequantizeLinear", inputs, {"axis": 1})


def _in_blocks(writer: Writer, weight: np.ndarray, block_size: int) -> ir.Value:
    """(in, out) in 4 bits with a scale for each block of inputs of each output."""
    blocks = weight.astype(np.float32).reshape(-1, block_size, weight.shape[1])
    scale = _scale(np.abs(blocks).max(axis=1), 7, weight.dtype)  # (blocks, out)
    whole = np.rint(blocks / scale.astype(np.float32)[:, None]).clip(-8, 7).reshape(weight.shape)
    inputs = [writer.constant(whole.astype(ml_dtypes.int4), "weight"), writer.constant(scale, "scale")]
    return writer.one("DequantizeLinear", inputs, {"axis": 0, "block_size": block_size})


def _rounded(writer: Writer, value: ir.Value | None, found: Activations, dtype: np.dtype[np.generic]) -> ir.Value:
    """A value rounded to 8 bits with one scale; products that read the same share it."""
    scale = _scale(np.array(max(-found.lowest, found.highest)), 127, dtype)
    inputs = [writer.constant(scale, "scale"), writer.constant(np.array(0, dtype=np.int8), "zero")]
    return writer.one("DequantizeLinear", [writer.one("QuantizeLinear", [value, *inputs]), *inputs])


def _scale(largest: np.ndarray, steps: int, dtype: np.dtype[np.generic]) -> np.ndarray:
    scale: np.ndarray = np.maximum(largest.astype(np.float32) / steps, SMALLEST).astype(dtype)
    return scale
