"""Let the caller say for which tokens logits are wanted: generating needs the last one only.

A vocabulary's worth of features for every token of the prompt is a fifth of a small model's prefill.
"""

from __future__ import annotations

import onnx_ir as ir

from trsp_deploy.tools.graphs.decoder_io import LOGITS_POSITIONS
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer

AFTER_THE_HEAD = ("Add", "Cast", "Mul", "Div", "Tanh")  # bias, scaling and soft capping of logits


def cut_logits(model: ir.Model) -> int:
    """Add the input `logits_positions`, cut the hidden states before the LM head to it, and return 1.

    model: an exported decoder; changed in place. Raises NoMatch, with the model unchanged, when no LM head is found.
    """
    node = lm_head(model)
    writer = Writer(model, "logits")
    positions = ir.Value(name=LOGITS_POSITIONS, shape=ir.Shape(["kept"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(positions)
    kept = writer.one("Gather", [node.inputs[0], positions], {"axis": 1}, name="kept")  # (B, kept, features)
    node.replace_input_with(0, kept)
    writer.finish()
    return 1


def lm_head(model: ir.Model) -> ir.Node:
    """The product that makes the logits; raises NoMatch when there is none."""
    value: ir.Value | None = next((output for output in model.graph.outputs if output.name == "logits"), None)
    node = None if value is None else value.producer()
    while node is not None and node.op_type in AFTER_THE_HEAD:
        value = next((found for found in node.inputs if found is not None and found.const_value is None), None)
        node = None if value is None else value.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        raise NoMatch("no product with the LM head makes the logits")
    return node
