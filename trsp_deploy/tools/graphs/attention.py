"""Fuse attention: what lies between the KV cache's Concat and the output projection becomes one node per layer.

The node is ONNX Runtime's GroupQueryAttention (com.microsoft): it appends to the cache in place where `present` is
bound to `past`'s own memory, repeats no key or value, and reads the live part of the cache only. Keys and values enter
it after the rotary embedding (`rotary.py` takes that in afterwards), the mask as the graph makes it, so that left
padding, sliding windows and ALiBi stay what they were.

The pattern, the same for every family that transformers runs through scaled_dot_product_attention:

    past_key -- Concat -- [Unsqueeze, Expand, Reshape] -- Transpose -- [Mul] -- MatMul -- [Mul] -- Add(mask) -- Softmax
                                                        query -- [Mul] --/                                      |
    past_value -- Concat -- [Unsqueeze, Expand, Reshape] ---------------------------------------------------- MatMul
                                                                            Transpose -- Reshape -- output ----/
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from trsp_deploy.tools.graphs.decoder_io import IN_PLACE, PAST, PRESENT
from trsp_deploy.tools.graphs.fused import OPERATOR, Input
from trsp_deploy.tools.graphs.nodes import MICROSOFT, NoMatch, Writer, made_by, only_reader, permutes, readers, scalar

ON_THE_WAY = ("Unsqueeze", "Expand", "Reshape", "Transpose", "Mul", "Div", "Cast")  # from the cache to its MatMul
BEFORE_THE_PROJECTION = ("Reshape", "Cast")  # the second where an fp16 graph keeps it in fp32, for its range
SHAPE_ONLY = ("Shape",)
Dimensioned = tuple[tuple[ir.Value, tuple[str, ...]], ...]  # values, each with what its dimensions are


@dataclass(frozen=True)
class Attention:
    """One layer's attention in the graph. Sizes: B batch, S new tokens, T all tokens, H heads, D head size."""

    past_key: ir.Value  # (B, H_kv, T - S, D)
    past_value: ir.Value
    joined_key: ir.Value  # (B, H_kv, T, D): present.N.key
    joined_value: ir.Value
    query: ir.Value  # (B, H, S, D), not scaled
    key: ir.Value  # (B, H_kv, S, D): the new tokens'
    value: ir.Value
    mask: ir.Value | None  # added to the scores; broadcasts to (B, H, S, T)
    scale: float
    num_heads: int
    kv_num_heads: int
    head_size: int
    output: ir.Value  # (B, S, H * D)
    on_the_way: Dimensioned  # what was made of the cache


def fuse_attention(model: ir.Model) -> int:
    """Fuse every layer's attention and return how many there are.

    model: an exported decoder; changed in place. Raises NoMatch when a layer does not fit; the model is then of no use.
    """
    found = find_layers(model)
    writer = Writer(model, "attention")
    lengths = Lengths(writer)
    for attention in found:
        cut_shapes(writer, lengths, attention)
        _replace(writer, lengths, attention)
    writer.finish()
    for value in model.graph.outputs:
        if (value.name or "").startswith(PRESENT) and value.consumers():
            raise NoMatch(f"{value.name} is also read by '{value.consumers()[0].name}'")
    model.metadata_props[IN_PLACE] = "1"
    return len(found)


def find_layers(model: ir.Model) -> list[Attention]:
    """The attention of every layer; raises NoMatch when one does not fit."""
    # What nodes make of weights (stored in fp16 and cast, or in integers) has a shape that few exporters write down.
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    names = [value.name or "" for value in model.graph.inputs]
    layers = [name.removeprefix(PAST).removesuffix(".key") for name in names if name.endswith(".key")]
    return [find_attention(model.graph, layer) for layer in layers]


def find_attention(graph: ir.Graph, layer: str) -> Attention:
    """The attention that reads `past_key_values.<layer>`; raises NoMatch."""
    by_name = {value.name: value for value in graph.inputs}
    past_key, past_value = by_name[f"{PAST}{layer}.key"], by_name[f"{PAST}{layer}.value"]
    joined_key, key = _joined(past_key, f"{PRESENT}{layer}.key")
    joined_value, value = _joined(past_value, f"{PRESENT}{layer}.value")
    keys, values = _to_matmul(joined_key), _to_matmul(joined_value)
    scores, mixed = keys.matmul, values.matmul
    query, query_factor = _unscaled(scores.inputs[0])
    mask, score_factor = _to_softmax(scores, mixed)
    output, rows = _output(mixed.outputs[0])
    shape = past_key.shape
    if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int) or values.factor != 1:
        raise NoMatch(f"layer {layer}: the cache's heads and head size are not fixed")
    kv_num_heads, head_size = shape[1], shape[3]
    if rows % head_size or (rows // head_size) % kv_num_heads:
        raise NoMatch(f"layer {layer}: {rows} features are not a number of heads of size {head_size}")
    return Attention(
        past_key=past_key,
        past_value=past_value,
        joined_key=joined_key,
        joined_value=joined_value,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=query_factor * keys.factor * score_factor,
        num_heads=rows // head_size,
        kv_num_heads=kv_num_heads,
        head_size=head_size,
        output=output,
        on_the_way=(
            (past_key, ("batch", "kv_heads", "past", "head_size")),
            (past_value, ("batch", "kv_heads", "past", "head_size")),
            *keys.values,
            *values.values,
            *_after(mixed),
        ),
    )


def _joined(past: ir.Value, present: str) -> tuple[ir.Value, ir.Value]:
    """The cache with the new tokens behind it, and those new tokens."""
    node = only_reader(past, without=SHAPE_ONLY)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or node.inputs[0] is not past:
        raise NoMatch(f"{past.name} is not joined with the new tokens by one Concat")
    if node.outputs[0].name != present or node.inputs[1] is None:
        raise NoMatch(f"{past.name} joined with the new tokens is not {present}")
    return node.outputs[0], node.inputs[1]


@dataclass(frozen=True)
class Way:
    """How keys or values go from the cache to the MatMul that reads them as its second factor."""

    matmul: ir.Node
    factor: float  # of constants on the way
    values: Dimensioned


def _to_matmul(value: ir.Value) -> Way:
    factor, start = 1.0, value
    dimensions: tuple[str, ...] = ("batch", "kv_heads", "total", "head_size")
    passed = [(value, dimensions)]
    while True:
        node = only_reader(value, without=SHAPE_ONLY)
        if node is not None and node.op_type == "MatMul" and node.inputs[1] is value:
            return Way(node, factor, tuple(passed))
        if node is None or node.op_type not in ON_THE_WAY or (value.is_graph_output() and value is not start):
            what = "several nodes" if node is None else f"{node.op_type} '{node.name}'"
            raise NoMatch(f"{start.name}: {what} between the cache and its product")
        if node.op_type in ("Mul", "Div"):
            factor *= _factor(node, value)
        dimensions = _dimensions(node, dimensions)
        value = node.outputs[0]
        passed.append((value, dimensions))


def _dimensions(node: ir.Node, before: tuple[str, ...]) -> tuple[str, ...]:
    """What the dimensions of a node's output are, on the way from the cache to the product."""
    if node.op_type == "Transpose":
        return tuple(before[axis] for axis in node.attributes.get_ints("perm", ()))
    if node.op_type == "Unsqueeze":  # keys and values are repeated for the query heads that share them
        return (*before[:2], "repeats", *before[2:])
    if node.op_type == "Reshape":
        return ("batch", "heads", "total", "head_size")
    return before


def _factor(node: ir.Node, value: ir.Value) -> float:
    """What a Mul or Div by a constant multiplies `value` by."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    number = scalar(other)
    if number is None or (node.op_type == "Div" and node.inputs[0] is not value):
        raise NoMatch(f"'{node.name}' does not multiply by a constant")
    return 1 / number if node.op_type == "Div" else number


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """The query before constant factors, and their product."""
    factor = 1.0
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in ("Mul", "Div"):
            return value, factor
        inner = node.inputs[0] if scalar(node.inputs[0]) is None else node.inputs[1]
        if inner is None or scalar(node.inputs[1] if inner is node.inputs[0] else node.inputs[0]) is None:
            return value, factor
        factor *= _factor(node, inner)
        value = inner
    raise NoMatch("a product of the scores has no query")


def _to_softmax(scores: ir.Node, mixed: ir.Node) -> tuple[ir.Value | None, float]:
    """From the scores to the product with the values: the mask that is added, and constant factors before it."""
    value, factor, mask, normalised = scores.outputs[0], 1.0, None, False
    while True:
        following = readers(value)
        if following == [mixed] and mixed.inputs[0] is value and normalised:
            return mask, factor
        node = _past_nan_guard(following) if normalised else following[0] if len(following) == 1 else None
        if node is None:
            raise NoMatch(f"the scores '{scores.name}' are read by several nodes")
        if node.op_type in ("Mul", "Div") and mask is None and not normalised:
            factor *= _factor(node, value)
        elif node.op_type == "Add" and mask is None and not normalised:
            mask = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        elif node.op_type == "Softmax" and node.attributes.get_int("axis", -1) in (-1, 3):
            normalised = True
        elif node.op_type != "Cast" and not normalised:
            raise NoMatch(f"{node.op_type} '{node.name}' between scores and softmax")
        value = node.outputs[0]


def _past_nan_guard(following: list[ir.Node]) -> ir.Node | None:
    """Where(IsNaN(p), 0, p): rows in which everything is masked; the fused node makes no NaN of them."""
    kinds = sorted(node.op_type for node in following)
    if kinds == ["IsNaN", "Where"]:
        return next(node for node in following if node.op_type == "Where")
    return following[0] if kinds == ["Cast"] else None


def _output(value: ir.Value) -> tuple[ir.Value, int]:
    """The attention's output (B, S, H * D), and H * D: the rows of the weight that reads it."""
    transpose = only_reader(value, without=SHAPE_ONLY)
    reshape = None if transpose is None else only_reader(transpose.outputs[0], without=SHAPE_ONLY)
    if not permutes(transpose, 0, 2, 1, 3) or reshape is None or reshape.op_type != "Reshape":
        raise NoMatch(f"'{value.name}' is not put back into (batch, tokens, features)")
    output = found = reshape.outputs[0]
    while True:
        node = only_reader(found, without=SHAPE_ONLY)
        if node is None or node.op_type not in (*BEFORE_THE_PROJECTION, "MatMul", "Gemm"):
            raise NoMatch(f"'{output.name}' is not read by one projection")
        if node.op_type not in BEFORE_THE_PROJECTION:
            weight = node.inputs[1]
            if weight is None or weight.shape is None or len(weight.shape) != 2 or not weight.shape.is_static():
                raise NoMatch(f"the projection '{node.name}' has no constant weight")
            return output, weight.shape.numpy()[node.attributes.get_int("transB", 0)]
        found = node.outputs[0]


def _after(mixed: ir.Node) -> Dimensioned:
    """What lies between the product with the values and the attention's output."""
    (value,) = mixed.outputs
    transpose = only_reader(value, without=SHAPE_ONLY)
    swapped = () if transpose is None else ((transpose.outputs[0], ("batch", "new", "heads", "head_size")),)
    return ((value, ("batch", "heads", "new", "head_size")), *swapped)


class Lengths:
    """B, S, T and T - S as values of the graph, from the shapes of what is fed and not of the cache: that may be longer
    than what it holds."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        inputs = {value.name: value for value in writer.graph.inputs}
        tokens = writer.one("Shape", [inputs["input_ids"]], name="tokens_shape")  # (2,): B, S
        mask = writer.one("Shape", [inputs["attention_mask"]], name="mask_shape")  # (2,): B, T
        self.batch, self.new = (self._entry(tokens, index) for index in (0, 1))  # (1,) int64 each
        self.total = self._entry(mask, 1)
        self.past = writer.one("Sub", [self.total, self.new], name="past_length")
        one = writer.integers(1)
        last = writer.one("Sub", [self.total, one], name="last_index")
        last = writer.one("Cast", [last], {"to": ir.DataType.INT32}, name="last_index_int32")
        self.last_index = writer.one("Expand", [last, self.batch], name="seqlens_k")  # (B,) int32: T - 1 in every row
        scalar_total = writer.one("Squeeze", [self.total], name="total_scalar")
        self.total_scalar = writer.one("Cast", [scalar_total], {"to": ir.DataType.INT32}, name="total_length")

    def _entry(self, shape: ir.Value, index: int) -> ir.Value:
        writer = self._writer
        return writer.one("Gather", [shape, writer.integers(index)], {"axis": 0}, name="length")

    def shape(self, attention: Attention, dimensions: tuple[str, ...]) -> ir.Value:
        """A tensor's shape (dimensions,) int64."""
        writer = self._writer
        lengths = {
            "batch": self.batch,
            "past": self.past,
            "new": self.new,
            "total": self.total,
            "kv_heads": writer.integers(attention.kv_num_heads),
            "heads": writer.integers(attention.num_heads),
            "repeats": writer.integers(attention.num_heads // attention.kv_num_heads),
            "head_size": writer.integers(attention.head_size),
        }
        return writer.one("Concat", [lengths[name] for name in dimensions], {"axis": 0}, name="cache_shape")


def _replace(writer: Writer, lengths: Lengths, attention: Attention) -> None:
    inputs = {
        Input.QUERY: tokens_first(writer, attention.query),
        Input.KEY: tokens_first(writer, attention.key),
        Input.VALUE: tokens_first(writer, attention.value),
        Input.PAST_KEY: attention.past_key,
        Input.PAST_VALUE: attention.past_value,
        Input.LAST_INDEX: lengths.last_index,
        Input.TOTAL: lengths.total_scalar,
        Input.MASK: attention.mask,
    }
    output, key, value = writer.emit(
        OPERATOR,
        [inputs.get(place) for place in Input],
        {
            "num_heads": attention.num_heads,
            "kv_num_heads": attention.kv_num_heads,
            "scale": attention.scale,
        },
        domain=MICROSOFT,
        outputs=3,
        name=OPERATOR,
    )
    writer.replace_output(attention.output, output)
    # Those that read the joined cache were the attention that is gone, and shapes, which `cut_shapes` sees to.
    writer.replace_output(attention.joined_key, key)
    writer.replace_output(attention.joined_value, value)


def tokens_first(writer: Writer, value: ir.Value) -> ir.Value:
    """(B, H, S, D) as (B, S, H * D): what the projection made, where nothing but a change of form came after it."""
    transpose = value.producer()
    if permutes(transpose, 0, 2, 1, 3) and transpose is not None:
        reshape = made_by(transpose.inputs[0], "Reshape")
        source = None if reshape is None else reshape.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 3:
            return source
    swapped = writer.one("Transpose", [value], {"perm": [0, 2, 1, 3]}, name="tokens_first")
    return writer.one("Reshape", [swapped, writer.integers(0, 0, -1)], name="features")


def cut_shapes(writer: Writer, lengths: Lengths, attention: Attention) -> None:
    """Answer every question for the shape of the cache, or of what is made of it, from what is fed.

    A cache written in place is longer than the text that it holds, and masks are made from these shapes.
    """
    for value, dimensions in attention.on_the_way:
        for node in readers(value):
            if node.op_type == "Shape":
                asked = dimensions[_asked(node)]
                writer.replace_output(node.outputs[0], lengths.shape(attention, asked))


def _asked(node: ir.Node) -> slice:
    """Which dimensions a Shape node asks for: all, unless it has a start or an end (opset 15)."""
    end = node.attributes.get_int("end", np.iinfo(np.int64).max)
    return slice(node.attributes.get_int("start", 0), end)
