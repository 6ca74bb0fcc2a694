"""Take the rotary embedding of queries and keys into the fused attention node, as a table of cosines and sines.

    rotated = x * cos + concat(-x[half:], x[:half]) * sin

The table is what the graph itself computes for positions 0, 1, 2, ..., so that every scaling of frequencies (linear,
YaRN, Llama 3's) is in it. Frequencies that depend on anything but the position (dynamic NTK) make no table: NoMatch.

The node counts positions by place in the cache, so a left-padded text begins at its padding's length instead of 0.
Scores depend on the difference of two positions only, so nothing changes but the last bits. (ONNX Runtime 1.32's node
has an input for positions and heeds it for prompts alone: a padded text was then wrong from the second token on.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.attention import tokens_first
from trsp_deploy.tools.graphs.decoder_io import LONGEST, POSITIONS
from trsp_deploy.tools.graphs.fused import Input, fused_attention
from trsp_deploy.tools.graphs.nodes import NoMatch, Part, Writer, constant, made_by, permutes


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding in the graph."""

    source: ir.Value  # what is rotated, (B, H, S, D)
    cos: ir.Value  # (B, 1, S, rotated features)
    sin: ir.Value


def fuse_rotary(model: ir.Model, positions: int) -> int:
    """Take the rotary embedding into the fused attention nodes that have one and return how many these are.

    model: a decoder after `fuse_attention`; changed in place. positions: rows of the table: the
    longest text.
    Raises NoMatch, with the model unchanged, when no layer's queries and keys are rotated in this form.
    """
    nodes = fused_attention(model.graph)
    position_ids = next((value for value in model.graph.inputs if value.name == POSITIONS), None)
    if not nodes:
        raise NoMatch("no attention is fused")
    if position_ids is None:
        raise NoMatch(f"the graph has no input {POSITIONS}")
    found = [(node, query, key) for node in nodes for query, key in [_rotations(node)] if query and key]
    if not found:
        find_rotation(nodes[0].inputs[Input.QUERY])  # says why
        raise NoMatch(f"'{nodes[0].name}': queries and keys are not rotated alike")
    values = dict.fromkeys(value for _, query, _ in found for value in (query.cos, query.sin))
    tables = {value: table(model, value, positions) for value in values}
    writer = Writer(model, "rotary")
    caches = {value: writer.constant(array, "cache") for value, array in tables.items()}
    for node, query, key in found:
        node.replace_input_with(Input.QUERY, tokens_first(writer, query.source))
        node.replace_input_with(Input.KEY, tokens_first(writer, key.source))
        node.replace_input_with(Input.COS, caches[query.cos])
        node.replace_input_with(Input.SIN, caches[query.sin])
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    writer.finish()
    model.metadata_props[LONGEST] = str(min(positions, int(model.metadata_props.get(LONGEST, positions))))
    if not position_ids.consumers():  # one thing less to feed at every step
        model.graph.inputs.remove(position_ids)
    return len(found)


def _rotations(node: ir.Node) -> tuple[Rotation, Rotation] | tuple[None, None]:
    """The rotations of a node's queries and keys; some models have layers without (SmolLM3)."""
    try:
        query, key = find_rotation(node.inputs[Input.QUERY]), find_rotation(node.inputs[Input.KEY])
    except NoMatch:
        return None, None
    return (query, key) if query.cos is key.cos and query.sin is key.sin else (None, None)


def find_rotation(value: ir.Value | None) -> Rotation:
    """The rotary embedding that makes (B, S, H * D); raises NoMatch."""
    rotated = _heads_first(value)
    whole = rotated
    joined = made_by(rotated, "Concat")
    if joined is not None:  # only the first features of each head are rotated
        rotated = joined.inputs[0]
    total = made_by(rotated, "Add")
    if total is None or rotated is None:
        raise NoMatch(f"'{'' if value is None else value.name}' is not rotated")
    products = [made_by(part, "Mul") for part in total.inputs]
    for straight, crossed in (products, reversed(products)):
        if straight is None or crossed is None:
            break
        for side in (0, 1):
            source, cos = straight.inputs[side], straight.inputs[1 - side]
            sin = _crossed_with(crossed, source)
            if sin is not None and source is not None and cos is not None:
                return Rotation(source if joined is None else _whole(source, joined), cos, sin)
    raise NoMatch(f"'{'' if whole is None else whole.name}' is not rotated by halves")


def table(model: ir.Model, value: ir.Value, positions: int) -> np.ndarray:
    """Cosines or sines (positions, half of the rotated features) as the graph computes them; raises NoMatch."""
    part = Part(model, value, [POSITIONS, "input_ids"])  # of the tokens the number alone
    numbers = np.arange(positions, dtype=np.int64)[None]
    whole = part({POSITIONS: numbers, "input_ids": np.zeros_like(numbers)})
    rows = whole.reshape(positions, -1)  # (1, 1, positions, features) or (1, positions, features)
    half = rows.shape[1] // 2
    if not np.array_equal(rows[:, :half], rows[:, half:]):
        raise NoMatch(f"the halves of '{value.name}' differ")
    return np.ascontiguousarray(rows[:, :half])


def _heads_first(value: ir.Value | None) -> ir.Value | None:
    """(B, H, S, D) before `fuse_attention` put the tokens first."""
    reshape = made_by(value, "Reshape")
    swapped = None if reshape is None or reshape.inputs[0] is None else reshape.inputs[0].producer()
    if not permutes(swapped, 0, 2, 1, 3) or swapped is None:
        raise NoMatch(f"'{'' if value is None else value.name}' is not rotated")
    return swapped.inputs[0]


def _crossed_with(product: ir.Node, source: ir.Value | None) -> ir.Value | None:
    """The sines, when a product is concat(-source[half:], source[:half]) * sines."""
    for side in (0, 1):
        joined = made_by(product.inputs[side], "Concat")
        if joined is None or len(joined.inputs) != 2:
            continue
        negated = made_by(joined.inputs[0], "Neg")
        if negated is not None and _is_half(negated.inputs[0], source, 1) and _is_half(joined.inputs[1], source, 0):
            return product.inputs[1 - side]
    return None


def _is_half(value: ir.Value | None, source: ir.Value | None, which: int) -> bool:
    """Whether a value is the first (0) or second (1) half of the source's features."""
    split = made_by(value, "Split")
    if split is not None and value is not None:
        return split.inputs[0] is source and len(split.outputs) == 2 and value.index() == which
    piece = made_by(value, "Slice")
    if piece is None or piece.inputs[0] is not source or len(piece.inputs) < 4:
        return False
    starts, axes = constant(piece.inputs[1]), constant(piece.inputs[3])
    # Where the middle is computed from a shape it is no constant; the check of the logits proves that it is the middle.
    first = starts is not None and int(starts[0]) == 0
    return axes is not None and int(axes[0]) in (3, -1) and first == (which == 0)


def _whole(source: ir.Value, joined: ir.Node) -> ir.Value:
    """Of features that are rotated in part, all of them: source and rest are slices of one value."""
    first, rest = made_by(source, "Slice"), made_by(joined.inputs[1], "Slice")
    whole = None if first is None else first.inputs[0]
    if whole is None or rest is None or whole is not rest.inputs[0] or len(joined.inputs) != 2:
        raise NoMatch(f"'{joined.name}' joins what are not two parts of one value")
    return whole
