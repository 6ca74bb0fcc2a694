"""One decoder in the forms that ONNX has for the same, brought into the one that passes and quantisation look for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, InlinePass, LiftConstantsToInitializersPass

from trsp_deploy.errors import one_line, passes_through
from trsp_deploy.tools.graphs.decoder_io import PAST
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer, constant, load, made_by

MATRIX = 1024  # numbers that a node may hold itself and not be a weight
PRODUCTS = ("MatMul", "Gemm")


def open_graph(path: Path) -> ir.Model:
    """`nodes.load` of a graph without Identity, whose functions are written out where they are called; raises NoMatch.

    What a function holds is no node of the graph, and what is behind an Identity is another value: no pass would see
    the products in the one, or that the other is a weight, the cache or the logits.
    """
    model = load(path)
    if model.functions:
        try:
            InlinePass()(model)
        except (ValueError, ir.passes.PassError) as problem:  # another opset than the graph's, calls in a circle
            raise NoMatch(f"its functions cannot be written out: {one_line(problem)}") from problem
    kept = [node.inputs[0] for node in model.graph if node.op_type == "Identity"]
    if not any(value and value.is_graph_output() for value in kept):  # of two outputs one would lose its name
        IdentityEliminationPass()(model)
    return model


def fold_weights(model: ir.Model) -> None:
    """Let weights be initializers: those that nodes hold, and that nodes compute of constants (stored in fp16 and cast,
    or in integers already); and so tables that are cast before they are looked up.

    model: changed in place. What stays behind nodes: transposed weights, which need less memory so, tables in integers,
    and what an fp16 graph multiplies in fp32, for its range (fp16_range.py).
    """
    LiftConstantsToInitializersPass(size_limit=MATRIX)(model)
    writer, known = Writer(model, "weights"), dict[ir.Value, bool]()
    floats = floats_of(model)
    folded: dict[ir.Value, ir.Value] = {}
    weights = [(node, 1) for node in model.graph if node.op_type in PRODUCTS]
    tables = [(node, 0) for node in model.graph if node.op_type == "Gather" and made_by(node.inputs[0], "Cast")]
    for node, place in weights + tables:
        value = node.inputs[place]
        if value is None or value.const_value is not None or not never_changes(value, known) or widened(value, floats):
            continue
        transposed = made_by(value, "Transpose")
        if transposed is not None and constant(transposed.inputs[0]) is not None:
            continue
        if value not in folded:
            try:
                folded[value] = writer.constant(_computed(model, value), "folded")
            except Exception as problem:  # of ONNX Runtime, of protobuf above 2 GB: `in_floats` tells of what is left
                if passes_through(problem):
                    raise
                continue
        node.replace_input_with(place, folded[value])
    writer.drop_unread()


def floats_of(model: ir.Model) -> ir.DataType | None:
    """What the graph computes in: the type of its cache."""
    return next((value.dtype for value in model.graph.inputs if (value.name or "").startswith(PAST)), None)


def widened(value: ir.Value | None, floats: ir.DataType | None) -> bool:
    """Whether a value was cast to another type than the graph computes in."""
    cast = made_by(value, "Cast")
    return cast is not None and cast.attributes.get_int("to", ir.DataType.UNDEFINED) != floats


def never_changes(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """Whether a value depends on no input of the graph. known: what was found out before."""
    waiting = [value]
    while waiting:  # a graph may be deeper than calls may be
        current = waiting[-1]
        node = current.producer()
        inputs = [] if node is None else [each for each in node.inputs if each is not None]
        open_ones = [each for each in inputs if each not in known]
        if current.const_value is None and node is not None and open_ones:
            waiting += open_ones
            continue
        known[current] = current.const_value is not None or (node is not None and all(known[each] for each in inputs))
        waiting.pop()
    return known[value]


def _computed(model: ir.Model, value: ir.Value) -> np.ndarray:
    """What a value that depends on no input is, by ONNX Runtime: onnx itself lacks older operators."""
    import onnxruntime

    graph = ir.convenience.extract(model.graph, [], [value])
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    ir.external_data.load_to_model(part)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    graph_bytes = ir.to_proto(part).SerializeToString()
    session = onnxruntime.InferenceSession(graph_bytes, options, providers=["CPUExecutionProvider"])
    array: np.ndarray = session.run(None, {})[0]
    return array
