"""Compute the attention mask in a few nodes where it only hides padding and what comes later.

The fused node lets no token see later ones by itself, so what has to be added to the scores is the padding alone.
Exporters spend some thirty nodes on the whole mask, at every step. Which masks are of this plain kind shows when they
are computed for a few texts; a sliding window, ALiBi and the like are not, and stay what they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import MICROSOFT, NoMatch, Part, Writer

MASK = 10  # input of GroupQueryAttention
LENGTHS = ((9, 9), (9, 300), (1, 9), (1, 300))  # new and all tokens; 300 is beyond the windows of tiny test models
PADDING = 3
HIDDEN = -1e4  # a score that hides: fp16 graphs use -65504


def simplify_masks(model: ir.Model) -> int:
    """Replace the plain masks of fused attention nodes and return how many different ones there were.

    model: a decoder after `fuse_attention`; changed in place. Raises NoMatch, with the model unchanged, when no mask is
    plain.
    """
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]
    masks = dict.fromkeys(node.inputs[MASK] for node in nodes if len(node.inputs) > MASK)
    plain = [mask for mask in masks if mask is not None and is_plain(model, mask)]
    if not plain:
        raise NoMatch("no mask hides padding alone")
    writer = Writer(model, "mask")
    padding = _padding(writer, plain[0])
    for node in nodes:
        if len(node.inputs) > MASK and node.inputs[MASK] in plain:
            node.replace_input_with(MASK, padding)
    writer.finish()
    return len(plain)


def is_plain(model: ir.Model, mask: ir.Value) -> bool:
    """Whether a mask adds 0 where a token is there and not later, and hides the rest."""
    try:
        part = Part(model, mask, ["input_ids", "attention_mask", "position_ids"])
    except NoMatch:  # it depends on something else
        return False
    for new, total in LENGTHS:
        there = np.ones((2, total), dtype=np.int64)
        there[0, :PADDING] = 0
        positions = np.maximum(there.cumsum(axis=1) - 1, 0)[:, -new:]
        ids = np.zeros((2, new), dtype=np.int64)
        found = part({"input_ids": ids, "attention_mask": there, "position_ids": positions})
        if found.ndim != 4 or found.shape[1] != 1 or found.shape[2:] != (new, total):
            return False
        earlier = np.tril(np.ones((new, total), dtype=bool), total - new)
        seen = there[:, None, None, :].astype(bool) & earlier  # (2, 1, new, total)
        asked = there[:, None, -new:, None].astype(bool)  # what stands on padding may see anything
        values = np.broadcast_to(found, seen.shape)
        if (values[seen & asked] != 0).any() or (values[~seen & asked] > HIDDEN).any():
            return False
    return True


def _padding(writer: Writer, mask: ir.Value) -> ir.Value:
    """(B, 1, S, T): 0 where the attention mask is 1 and the lowest number elsewhere."""
    inputs = {value.name: value for value in writer.graph.inputs}
    dtype = mask.dtype or ir.DataType.FLOAT
    lowest = np.array(np.finfo(dtype.numpy()).max, dtype=dtype.numpy())
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
