"""Compute query, key and value of a layer in one product: one pass over the hidden states, one wait for all threads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.fused import Input, fused_attention
from trsp_deploy.tools.graphs.nodes import Writer, constant, made_by, scalar


def pack_projections(model: ir.Model) -> int:
    """Join the three weights (and biases) of each fused attention node and return how many nodes that were.

    model: a decoder after `fuse_attention`; changed in place. Layers whose three are not products of the same hidden
    states with constant weights stay as they are.
    """
    writer = Writer(model, "projections")
    nodes = fused_attention(model.graph)
    packed = 0
    for node in nodes:
        parts = [_linear(node.inputs[place]) for place in (Input.QUERY, Input.KEY, Input.VALUE)]
        if None in parts:
            continue
        (hidden, weight, bias), *others = [part for part in parts if part is not None]
        if any(other[0] is not hidden or (other[2] is None) != (bias is None) for other in others):
            continue
        weights = [weight, *(other[1] for other in others)]
        value = writer.one("MatMul", [hidden, writer.constant(np.concatenate(weights, axis=1), "weight")], name="qkv")
        if bias is not None:
            biases = [bias, *(other[2] for other in others if other[2] is not None)]
            value = writer.one("Add", [value, writer.constant(np.concatenate(biases), "bias")], name="qkv_bias")
        node.replace_input_with(Input.QUERY, value)
        node.replace_input_with(Input.KEY, None)
        node.replace_input_with(Input.VALUE, None)
        packed += 1
    writer.finish()
    return packed


def _linear(value: ir.Value | None) -> tuple[ir.Value, np.ndarray, np.ndarray | None] | None:
    """Hidden states, weight (in, out) and bias (out,) or None of what makes a value; None when it is something else."""
    scaled = made_by(value, "Mul")  # OPT scales its queries
    factor = None if scaled is None else next((f for f in map(scalar, scaled.inputs) if f is not None), None)
    if scaled is not None and factor is not None:
        value = scaled.inputs[0] if scalar(scaled.inputs[0]) is None else scaled.inputs[1]
    bias, added = None, made_by(value, "Add")
    if added is not None:
        side = 1 if constant(added.inputs[1]) is not None else 0
        bias, value = constant(added.inputs[side]), added.inputs[1 - side]
        if bias is None or bias.ndim != 1:
            return None
    product = made_by(value, "MatMul")
    weight = None if product is None else constant(product.inputs[1])
    if product is None or product.inputs[0] is None or weight is None or weight.ndim != 2:
        return None
    scale = np.asarray(1 if factor is None else factor, dtype=weight.dtype)
    return product.inputs[0], weight * scale, None if bias is None else bias * scale
