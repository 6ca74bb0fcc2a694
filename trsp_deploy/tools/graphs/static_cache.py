r"""Give a decoder a KV cache of fixed length, written in place, in standard ONNX operators.

For each layer the Concat that makes a longer cache at every step becomes a TensorScatter into one that is as long as
the longest text, and what follows it one Attention node (both of opset 24; TensorRT has layers of its own for them):

    past_key   -- TensorScatter(write_indices) -- present_key ----\
    past_value -- TensorScatter(write_indices) -- present_value -- Attention -- output
    query -------------------------------------------------------/
    mask (batch, 1, new tokens, length), boolean ---------------/

Shapes then stand still while a text grows, and present and past may be one memory.
The graph gains the input `write_indices` (batch,) int64, the place of each row's first new token, and `attention_mask`
says of every place of the cache whether there is a token to be seen: (batch, length).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs import masks
from trsp_deploy.tools.graphs.attention import Attention, Lengths, cut_shapes, find_layers
from trsp_deploy.tools.graphs.decoder_io import IN_PLACE, POSITIONS, WRITE_INDICES
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer, check_opset
from trsp_deploy.tools.graphs.positions import offset_of

OPSET = 24  # the first with TensorScatter, and with Attention whose mask may be boolean


def fix_cache(model: ir.Model, length: int) -> int:
    """Rewrite every layer's attention for a cache of `length` tokens and return how many layers there are.

    model: an exported decoder; changed in place. Raises NoMatch when a layer does not fit, or when its mask hides
    something else than padding, later tokens and what is outside a sliding window; the model is then of no use.
    """
    from onnxscript import version_converter

    check_opset(model)
    version_converter.convert_version(model, OPSET)
    writer = Writer(model, "cache")
    lengths = Lengths(writer)
    for attention in find_layers(model):
        cut_shapes(writer, lengths, attention)
    writer.finish()
    found = find_layers(model)  # again: equal masks are one now
    windows = {attention.mask: _window(model, attention, length) for attention in found}
    _use_positions(model, writer)
    indices = ir.Value(name=WRITE_INDICES, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(indices)
    _resize(model.graph, length)
    visible = Visible(writer, indices, length)
    for attention in found:
        groups = attention.num_heads // attention.kv_num_heads
        _replace(writer, attention, indices, visible(groups, windows[attention.mask]))
    writer.drop_unread()
    _check_no_lengths(model, visible)  # before equal nodes are one
    writer.finish()
    model.metadata_props[IN_PLACE] = "1"
    return len(found)


def _window(model: ir.Model, attention: Attention, length: int) -> int | None:
    """Tokens that a layer's window holds; None where it sees all."""
    if attention.mask is None:
        raise NoMatch(f"{attention.past_key.name}: no mask is added to the scores")
    return masks.window(model, attention.mask, length)


class Visible:
    """Masks (B, 1, G * S, length) bool: which places of the cache each new token sees.

    G query heads that share one key are one head with the queries of all of them behind each other, so that nothing
    has to repeat the keys: TensorRT would write the whole cache G times at every step.
    """

    def __init__(self, writer: Writer, indices: ir.Value, length: int) -> None:
        self._writer = writer
        self._indices = indices
        self._slots = writer.constant(np.arange(length).reshape(1, 1, 1, length), "slots")
        inputs = {value.name: value for value in writer.graph.inputs}
        new = writer.one("Shape", [inputs["input_ids"]], {"start": 1, "end": 2}, name="new_tokens")
        count = writer.one("Squeeze", [new], name="new_count")
        zero, one = (writer.constant(np.array(number)) for number in (0, 1))
        self._steps = writer.one("Range", [zero, count, one], name="steps")  # (S,)
        there = writer.one("Cast", [inputs["attention_mask"]], {"to": ir.DataType.BOOL}, name="there")
        self.reader = there.producer()
        self._there = writer.one("Unsqueeze", [there, writer.integers(1, 2)], name="there_for_all")  # (B, 1, 1, length)
        self._made: dict[tuple[int, int | None], ir.Value] = {}

    def __call__(self, groups: int, window: int | None) -> ir.Value:
        """The mask of layers with this many query heads per key, and this window."""
        if (groups, window) not in self._made:
            self._made[groups, window] = self._make(groups, window)
        return self._made[groups, window]

    def _make(self, groups: int, window: int | None) -> ir.Value:
        one, integers = self._writer.one, self._writer.integers
        steps = (
            one("Concat", [self._steps] * groups, {"axis": 0}, name="steps_of_groups") if groups > 1 else self._steps
        )
        first = one("Unsqueeze", [self._indices, integers(1)], name="first")
        places = one("Add", [first, steps], name="places")  # (B, G * S): where each new token stands
        own = one("Unsqueeze", [places, integers(1, 3)], name="own_place")
        earlier = one("LessOrEqual", [self._slots, own], name="earlier")
        if window is not None:
            oldest = one("Sub", [own, self._writer.constant(np.array(window))], name="before_window")
            earlier = one("And", [earlier, one("Greater", [self._slots, oldest], name="inside")], name="in_window")
        # Padding sees itself: a row in which nothing is seen would be NaN, and go into the cache.
        itself = one("Equal", [self._slots, own], name="itself")
        return one("Or", [one("And", [earlier, self._there], name="earlier_there"), itself], name="visible")


def _replace(writer: Writer, attention: Attention, indices: ir.Value, visible: ir.Value) -> None:
    one, integers = writer.one, writer.integers
    key, value = (
        one("TensorScatter", [past, new, indices], {"axis": 2, "mode": "linear"}, name="TensorScatter")
        for past, new in ((attention.past_key, attention.key), (attention.past_value, attention.value))
    )
    grouped, size = attention.kv_num_heads < attention.num_heads, attention.head_size
    query = attention.query
    if grouped:  # (B, H_kv, G * S, D)
        query = one("Reshape", [query, integers(0, attention.kv_num_heads, -1, size)], name="grouped")
    mixed = one("Attention", [query, key, value, visible], {"scale": attention.scale}, name="Attention")
    if grouped:
        mixed = one("Reshape", [mixed, integers(0, attention.num_heads, -1, size)], name="ungrouped")
    swapped = one("Transpose", [mixed], {"perm": [0, 2, 1, 3]}, name="tokens_first")
    output = one("Reshape", [swapped, integers(0, 0, -1)], name="features")
    writer.replace_output(attention.output, output)
    for past, old, new in (
        (attention.past_key, attention.joined_key, key),
        (attention.past_value, attention.joined_value, value),
    ):
        writer.replace_output(old, new)
        new.shape = past.shape


def _use_positions(model: ir.Model, writer: Writer) -> None:
    """Read learned positions by `position_ids`, where the graph counts them out of the mask (OPT)."""
    for node in [node for node in model.graph if node.op_type == "Gather"]:
        offset = offset_of(model, node, ("input_ids", "attention_mask"))
        if offset is None:
            continue
        positions = next((value for value in model.graph.inputs if value.name == POSITIONS), None)
        if positions is None:
            ids = next(value for value in model.graph.inputs if value.name == "input_ids")
            positions = ir.Value(name=POSITIONS, shape=ids.shape, type=ids.type)
            model.graph.inputs.append(positions)
        index = writer.one("Add", [positions, writer.constant(np.array(offset))], name="position")
        node.replace_input_with(1, index)


def _resize(graph: ir.Graph, length: int) -> None:
    """Say in the inputs' shapes how long cache and mask are."""
    for value in graph.inputs:
        name = value.name or ""
        if name == "attention_mask":
            value.shape = ir.Shape(["batch", length])
        elif value.shape is not None and len(value.shape) == 4:
            batch, heads, _, size = value.shape
            value.shape = ir.Shape([batch, heads, length, size])


def _check_no_lengths(model: ir.Model, visible: Visible) -> None:
    """Raise NoMatch where something still takes the text's length from the mask: that is as long as the cache now."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    others = [node for node in mask.consumers() if node is not visible.reader]
    if others:
        raise NoMatch(f"attention_mask is also read by '{others[0].name}'")
