"""Let the caller say for how many positions logits are wanted: generating needs the last one only.

A vocabulary's worth of features for every token of the prompt is a fifth of a small model's prefill.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.decoder_io import KEEP
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer

AFTER_THE_HEAD = ("Add", "Cast", "Mul", "Div", "Tanh")  # bias, scaling and soft capping of logits


def cut_logits(model: ir.Model) -> int:
    """Add the input `logits_to_keep`, cut the hidden states before the LM head to it, and return 1.

    model: an exported decoder; changed in place. Raises NoMatch, with the model unchanged, when no LM head is found.
    """
    node = lm_head(model)
    hidden = node.inputs[0]
    writer = Writer(model, "logits")
    keep = ir.Value(name=KEEP, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(keep)
    first = writer.one("Reshape", [writer.one("Neg", [keep]), writer.integers(1)], name="first")
    end, axis = writer.integers(np.iinfo(np.int64).max), writer.integers(1)
    kept = writer.one("Slice", [hidden, first, end, axis], name="kept")  # from -0 = 0 on: everything
    node.replace_input_with(0, kept)
    writer.finish()
    return 1


def lm_head(model: ir.Model) -> ir.Node:
    """The product that makes the logits; raises NoMatch when there is none."""
    value: ir.Value | None = next(output for output in model.graph.outputs if output.name == "logits")
    node = None if value is None else value.producer()
    while node is not None and node.op_type in AFTER_THE_HEAD:
        value = next((found for found in node.inputs if found is not None and found.const_value is None), None)
        node = None if value is None else value.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        raise NoMatch("no product with the LM head makes the logits")
    return node
