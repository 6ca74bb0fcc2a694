"""Compute the attention mask in a few nodes where it only hides padding and what comes later.

The fused node lets no token see later ones by itself, so what has to be added to the scores is the padding alone.
Exporters spend some thirty nodes on the whole mask, at every step. Which masks are of this plain kind shows when they
are computed for a few texts; a sliding window, ALiBi and the like are not, and stay what they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.fused import Input, fused_attention
from trsp_deploy.tools.graphs.nodes import NoMatch, Part, Writer

LENGTHS = ((9, 9), (9, 300), (1, 9), (1, 300))  # new and all tokens, beside the longest text
LAST = 9  # tokens of that: of one alone a chunk, which begins at one place for all of them, looks like a window
PADDING = 3
HIDDEN = -1e4  # a score that hides: fp16 graphs use -65504
MOST_BYTES = 2**30  # of a mask for every pair of tokens, which takes 16 GiB of 131,072 of them even in single bytes


def simplify_masks(model: ir.Model, longest: int) -> int:
    """Replace the plain masks of fused attention nodes and return how many different ones there were.

    model: a decoder after `fuse_attention`; changed in place. longest: tokens of its longest text, for a window shows
    behind its own length alone. Raises NoMatch, with the model unchanged, when no mask is plain.
    """
    nodes = fused_attention(model.graph)
    masks = dict.fromkeys(node.inputs[Input.MASK] for node in nodes if len(node.inputs) > Input.MASK)
    plain = [mask for mask in masks if mask is not None and is_plain(model, mask, longest)]
    if not plain:
        raise NoMatch("no mask hides padding alone")
    writer = Writer(model, "mask")
    padding = _padding(writer, plain[0])
    for node in nodes:
        if len(node.inputs) > Input.MASK and node.inputs[Input.MASK] in plain:
            node.replace_input_with(Input.MASK, padding)
    writer.finish()
    return len(plain)


def is_plain(model: ir.Model, mask: ir.Value, longest: int) -> bool:
    """Whether a mask adds 0 where a token is there and not later, and hides the rest, in texts up to `longest`."""
    try:
        return window(model, mask, longest) is None
    except NoMatch:
        return False


def window(model: ir.Model, mask: ir.Value, longest: int) -> int | None:
    """How many tokens, itself among them, each token sees at most; None where it sees all that came before.

    longest: tokens of the longest text; a window that is wider hides nothing.
    Raises NoMatch when the mask does anything but add 0 to the scores of those and hide padding and the rest, or
    when it takes too much memory to see.
    """
    part = Part(model, mask, ["input_ids", "attention_mask", "position_ids"])
    lengths = dict.fromkeys((*LENGTHS, (LAST, max(longest, LENGTHS[-1][1]))))
    new, total = list(lengths)[-1]
    short = LENGTHS[-1][1]
    needed = part.bytes_of_pairs(total, short, example(LAST, short)[1])
    if needed > MOST_BYTES:
        raise NoMatch(f"'{mask.name}' would take {needed / 2**30:.0f} GiB for a text of {total} tokens to be looked at")
    seen = int((_added(part, new, total)[-1, -1] > HIDDEN).sum())
    size = None if seen == total else seen
    for new, total in lengths:
        there, _ = example(new, total)
        own, place = np.arange(total - new, total)[:, None], np.arange(total)[None, :]
        visible = (place <= own) & ((place > own - size) if size else True)  # (new, total)
        visible = there[:, None, :].astype(bool) & visible  # (2, new, total)
        asked = there[:, -new:, None].astype(bool)  # what stands on padding may see anything
        values = _added(part, new, total)
        if (values[visible & asked] != 0).any() or (values[~visible & asked] > HIDDEN).any():
            raise NoMatch(f"'{mask.name}' does more than hide padding, later tokens and what is outside a window")
    return size


def example(new: int, total: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Attention mask (2, total) of two texts, the first of them padded, and everything that masks may depend on."""
    there = np.ones((2, total), dtype=np.int64)
    there[0, :PADDING] = 0
    positions = np.maximum(there.cumsum(axis=1) - 1, 0)[:, -new:]
    ids = np.zeros((2, new), dtype=np.int64)
    return there, {"input_ids": ids, "attention_mask": there, "position_ids": positions}


def _added(part: Part, new: int, total: int) -> np.ndarray:
    """What a mask adds to the scores of the example, (2, new, total); raises NoMatch where heads differ."""
    found = part(example(new, total)[1])
    if found.ndim != 4 or found.shape[1] != 1 or found.shape[2:] != (new, total):
        raise NoMatch(f"a mask has the shape {found.shape} where {new} of {total} tokens are new")
    return np.broadcast_to(found[:, 0], (2, new, total))


def _padding(writer: Writer, mask: ir.Value) -> ir.Value:
    """(B, 1, S, T): 0 where the attention mask is 1, elsewhere the lowest number, in fp16 one with room for scores."""
    inputs = {value.name: value for value in writer.graph.inputs}
    dtype = mask.dtype or ir.DataType.FLOAT
    lowest = np.array(-HIDDEN if dtype == ir.DataType.FLOAT16 else np.finfo(np.float32).max, dtype=dtype.numpy())
    tokens = writer.one("Shape", [inputs["input_ids"]], name="tokens_shape")  # (2,): B, S
    total = writer.one("Shape", [inputs["attention_mask"]], name="mask_shape")  # (2,): B, T
    batch, new, last = (
        writer.one("Gather", [shape, writer.integers(index)], {"axis": 0}, name="length")
        for shape, index in ((tokens, 0), (tokens, 1), (total, 1))
    )
    shape = writer.one("Concat", [batch, writer.integers(1), new, last], {"axis": 0}, name="shape")
    there = writer.one("Cast", [inputs["attention_mask"]], {"to": dtype}, name="there")
    less = writer.one("Sub", [there, writer.constant(np.array(1, dtype=dtype.numpy()))], name="less")
    hidden = writer.one("Mul", [less, writer.constant(lowest)], name="hidden")
    wide = writer.one("Unsqueeze", [hidden, writer.integers(1, 2)], name="wide")
    return writer.one("Expand", [wide, shape], name="padding")
