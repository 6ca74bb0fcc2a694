"""Tables of learned positions in a graph: where they are read, and where they end."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from trsp_deploy.tools.graphs import masks
from trsp_deploy.tools.graphs.decoder_io import POSITIONS
from trsp_deploy.tools.graphs.nodes import NoMatch, Part

INPUTS = ("input_ids", "attention_mask", POSITIONS)


def table_end(model: ir.Model) -> int | None:
    """Tokens for which every table of positions (GPT-2, OPT) has a row; None where the graph has no such table.

    What a longer text reads is another memory's on a GPU, and an error on a CPU.
    """
    ends = []
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or len(table.const_value.shape) != 2:
            continue
        offset = offset_of(model, node, INPUTS)
        if offset is not None:
            ends.append(int(table.const_value.shape.numpy()[0]) - offset)
    return min(ends, default=None)


def offset_of(model: ir.Model, node: ir.Node, inputs: Sequence[str]) -> int | None:
    """By how much a Gather's indices are above the tokens' positions; None where they are not positions.

    inputs: of the graph, by which the indices may be computed.
    """
    table, indices = node.inputs
    if table is None or table.const_value is None or indices is None:
        return None
    if indices.producer() is None:
        return 0 if indices.name == POSITIONS and POSITIONS in inputs else None
    offsets: set[int] = set()
    try:
        part = Part(model, indices, inputs)
        if not part.needs & {"attention_mask", POSITIONS}:
            return None
        for new, total in masks.LENGTHS:
            there, feeds = masks.example(new, total)
            found, positions = part(feeds), feeds[POSITIONS]
            if found.shape != positions.shape:
                return None
            offsets.update((found - positions)[there[:, -new:] == 1].tolist())
    except NoMatch:
        return None
    return offsets.pop() if len(offsets) == 1 else None
