"""Keep in fp32 what would leave the range of fp16, in a graph whose numbers are fp16.

fp16 ends at 65,504. Which values come near it shows when a text is read in fp32: `widen` makes a copy of the graph that
computes so, `add_largest` lets it tell the largest magnitude of every value, and `keep_wide` puts the nodes that make
or read those beyond the limit into fp32, with a Cast where fp16 begins again. ModelOpt's AutoCast decides by the same
measure; it holds onnx at 1.21 and ONNX Runtime at 1.24, and begins with an fp32 graph, in which what the exporter keeps
in fp32 (normalisations, rotary embeddings) can no longer be told apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.fp16_range import LARGEST, LIMIT, Kept
from trsp_deploy.tools.graphs.nodes import SMALL_BYTES, NoMatch, Writer

# What hides a score. The lowest number of fp16, which exporters take, becomes -inf as soon as a score below -16 is
# added; where every score of a row is hidden, as on left padding, softmax then gives NaN, and NaN times 0 is NaN too.
HIDDEN, HIDES = -1e4, -6e4
HALF, WHOLE, BRAIN = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16
BOUNDED = ("Clip", "Max", "Min")
CONSTANTS = ("Constant", "ConstantOfShape")
MOVES = ("Gather", "Transpose")  # copy numbers, whatever their type
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def infer_types(model: ir.Model) -> None:
    """Let every value know its type; raises NoMatch for graphs within graphs, whose values are not followed here."""
    from onnx_ir.passes.common import ShapeInferencePass

    inner = next((node.name for node in model.graph for a in node.attributes.values() if a.type in GRAPHS), None)
    if inner is not None:
        raise NoMatch(f"'{inner}' holds a graph of its own")
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)


def hide_within_range(model: ir.Model) -> int:
    """Lower the magnitude of constants that hide scores; returns how many there were. Bounds of numbers are none."""
    hidden = np.array(HIDDEN, dtype=np.float16)
    changed = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and _hides(tensor) and not _bounds(value):
            value.const_value = ir.tensor(np.full(tensor.numpy().shape, hidden), name=value.name)
            changed += 1
    for node in model.graph:
        attribute = node.attributes.get("value") if node.op_type in CONSTANTS else None
        held = None if attribute is None or attribute.type != ir.AttributeType.TENSOR else attribute.as_tensor()
        if held is not None and _hides(held) and not _bounds(node.outputs[0]):
            shape = held.numpy().shape
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.full(shape, hidden)))
            changed += 1
    return changed


def _hides(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == HALF and tensor.size == 1 and float(tensor.numpy().reshape(())) <= HIDES


def _bounds(value: ir.Value) -> bool:
    return any(use.node.op_type in BOUNDED for use in value.uses())


def widen(model: ir.Model, narrow: ir.DataType = HALF) -> None:
    """Compute in fp32 what is fp16: the same names, the weights cast where they are read, so that none is kept twice.

    Where a weight is only looked up or turned, what comes of it is cast: a tied embedding in fp32 would be held from
    the first node to the last. model: after `infer_types`; changed in place. narrow: fp16 or bf16.
    """
    writer = Writer(model, f"widened/{narrow.name}")
    moved: list[ir.Value] = []
    for value in model.graph.inputs:
        if value.dtype == narrow:
            value.type = ir.TensorType(WHOLE)
    for value in [value for value in model.graph.initializers.values() if value.dtype == narrow]:
        moves = [use.node for use in value.uses() if use.node.op_type in MOVES and use.idx == 0]
        moved += [node.outputs[0] for node in moves]
        if len(moves) < len(value.uses()):
            _cast(writer, value, WHOLE, kept=moves)
    for node in list(model.graph):
        _retype(node, narrow, WHOLE)
        for value in node.outputs:
            if value.dtype == narrow and value not in moved:
                value.type = ir.TensorType(WHOLE)
    for value in moved:
        name = value.name
        cast = _cast(writer, value, WHOLE)
        if cast.name != name:
            cast.name, value.name = name, cast.name
    model.graph.sort()


def add_largest(model: ir.Model, names: Iterable[str]) -> dict[str, str]:
    """Give the graph an output with the largest magnitude of each of these values; returns the outputs' names.

    model: after `widen`; changed in place. Each is worked out right after its value, which need not be held until the
    end when nodes run in the graph's order.
    """
    writer = Writer(model, "largest")
    made = {value.name: (node, value) for node in model.graph for value in node.outputs}
    found = {}
    for name in names:
        node, value = made[name]
        before = len(model.graph)
        highest = writer.one("ReduceMax", [value], {"keepdims": 0})
        lowest = writer.one("ReduceMin", [value], {"keepdims": 0})  # Abs would be as large as the value again
        magnitude = writer.one("Max", [highest, writer.one("Neg", [lowest])])
        new = list(model.graph)[before:]
        model.graph.remove(new)
        model.graph.insert_after(node, new)
        magnitude.type, magnitude.shape = ir.TensorType(WHOLE), ir.Shape([])
        model.graph.outputs.append(magnitude)
        found[name] = magnitude.name or ""
    return found


def half_values(model: ir.Model) -> Iterator[str]:
    """Names of what is computed in fp16; constants are not."""
    for node in model.graph:
        if node.op_type not in CONSTANTS:
            yield from (value.name or "" for value in node.outputs if value.dtype == HALF)


def keep_wide(model: ir.Model, largest: Mapping[str, float]) -> tuple[Kept, ...]:
    """Put every node into fp32 that makes or reads a value beyond the limit; returns those nodes.

    model: in fp16, after `infer_types`; changed in place. largest: magnitude by value. Raises NoMatch, with the model
    unchanged, when the cache or the logits are beyond the limit: their type is the engine's.
    """
    wide = {value for node in model.graph for value in node.outputs if largest.get(value.name or "", 0) > LIMIT}
    outputs = [value for value in model.graph.outputs if value in wide]
    if outputs:
        name = outputs[0].name or ""
        reaches = f"output '{name}' reaches {largest[name]:.3g}, beyond half of what fp16 holds ({LIMIT:.0f})"
        raise NoMatch(f"{reaches}: another text may reach further")
    nodes = [node for node in model.graph if wide & {*node.inputs, *node.outputs}]
    half = {value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None and _is_half(value)}
    writer = Writer(model, "fp32")
    read: dict[ir.Value, ir.Value] = {}  # fp16 value -> the same in fp32
    for node in nodes:
        for place, value in enumerate(node.inputs):
            if value is None or value not in half or value in wide:
                continue
            if value not in read:
                read[value] = writer.one("Cast", [value], {"to": WHOLE})
            node.replace_input_with(place, read[value])
    for node in nodes:
        _retype(node, HALF, WHOLE)
        for value in node.outputs:
            if value in half:
                value.type = ir.TensorType(WHOLE)
                if value not in wide:
                    _cast(writer, value, HALF)
    kept = tuple(_kept(node, largest) for node in nodes)
    model.graph.sort()
    return kept


def _kept(node: ir.Node, largest: Mapping[str, float]) -> Kept:
    touched = [value.name or "" for value in (*node.inputs, *node.outputs) if value is not None]
    return Kept(name=node.name or "", operator=node.op_type, largest=max(largest.get(name, 0.0) for name in touched))


def _is_half(value: ir.Value) -> bool:
    return value.dtype == HALF


def to_bf16(model: ir.Model) -> None:
    """Let everything that is fp16 be bf16.

    model: after `infer_types`; changed in place. Weights that were bf16 once become what they were: fp16 has more bits,
    and the range of all but the smallest. Raises NoMatch where a weight was beyond its range; of a large one, which is
    read when it is written, saving does.
    """
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        tensor = value.const_value
        if tensor is not None and tensor.dtype == HALF:
            convert = functools.partial(_in_bf16, tensor)
            large = tensor.nbytes > SMALL_BYTES
            value.const_value = (
                ir.LazyTensor(convert, BRAIN, ir.Shape(tensor.shape.numpy()), name=value.name) if large else convert()
            )
        if value.dtype == HALF:
            value.type = ir.TensorType(BRAIN)
    for node in model.graph:
        _retype(node, HALF, BRAIN)
        for value in node.outputs:
            if value.dtype == HALF:
                value.type = ir.TensorType(BRAIN)


def _in_bf16(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = tensor.numpy()
    if not np.isfinite(array).all():
        raise NoMatch(f"the export in fp16 has lost numbers of '{tensor.name}' that were beyond {LARGEST:.0f}")
    return ir.tensor(array.astype(BRAIN.numpy()), name=tensor.name)


def _retype(node: ir.Node, old: ir.DataType, new: ir.DataType) -> None:
    """Let a node whose attributes name one type name another."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == old:
        node.attributes["to"] = ir.AttrInt64("to", int(new))
    value = node.attributes.get("value") if node.op_type in CONSTANTS else None
    if value is not None and value.type == ir.AttributeType.TENSOR and value.as_tensor().dtype == old:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.as_tensor().numpy().astype(new.numpy())))


def _cast(writer: Writer, value: ir.Value, dtype: ir.DataType, kept: Sequence[ir.Node] = ()) -> ir.Value:
    """Let every reader of a value, the graph's outputs among them but not `kept`, read it in another type."""
    uses = [use for use in value.uses() if use.node not in kept]
    cast = writer.one("Cast", [value], {"to": dtype})
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    for use in uses:
        use.node.replace_input_with(use.idx, cast)
    if value.is_graph_output():
        outputs = writer.graph.outputs
        outputs[outputs.index(value)] = cast
        cast.name, value.name = value.name, cast.name
    return cast
