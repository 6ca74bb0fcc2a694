"""Let the caller say for which tokens logits are wanted: generating needs the last one only.

A vocabulary's worth of features for every token of the prompt is a fifth of a small model's prefill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from trsp_deploy.tools.graphs.decoder_io import LOGITS_POSITIONS
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer, constant

# Bias, scaling and soft capping of logits, bounds, tokens that are never wanted, and what fills up the vocabulary.
AFTER_THE_HEAD = ("Add", "Sub", "Cast", "Mul", "Div", "Tanh", "Clip", "Where", "Slice")
VOCABULARY_AXES = (-1, 2)


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
        value = _before(node)
        node = None if value is None else value.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        raise NoMatch("no product with the LM head makes the logits")
    return node


def _before(node: ir.Node) -> ir.Value | None:
    """What one of the nodes after the LM head makes its logits of; None where that is not told."""
    if node.op_type == "Slice":
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        of_vocabulary = axes is not None and all(axis in VOCABULARY_AXES for axis in axes.tolist())
        return node.inputs[0] if of_vocabulary else None
    if node.op_type == "Where":
        branches = list(_that_change(node.inputs[1:]))
        return branches[0] if len(branches) == 1 else None
    return next(_that_change(node.inputs), None)


def _that_change(values: Iterable[ir.Value | None]) -> Iterator[ir.Value]:
    return (value for value in values if value is not None and ir.convenience.get_const_tensor(value) is None)
