"""Tables of learned positions in a graph: where they are read, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs import masks
from trsp_deploy.tools.graphs.decoder_io import PAST, POSITIONS
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
        offset = offset_of(model, node, INPUTS, by_place=True)
        if offset is not None:
            ends.append(int(table.const_value.shape.numpy()[0]) - offset)
    return min(ends, default=None)


def offset_of(model: ir.Model, node: ir.Node, inputs: Sequence[str], *, by_place: bool = False) -> int | None:
    """By how much a Gather's indices are above the tokens' positions; None where they are not positions.

    inputs: of the graph, by which the indices may be computed. by_place: positions may count padding too, as those do
    that come of how long mask or cache are.
    """
    table, indices = node.inputs
    if table is None or table.const_value is None or indices is None:
        return None
    if indices.producer() is None:
        return 0 if indices.name == POSITIONS and POSITIONS in inputs else None
    caches = _measured_caches(indices) if by_place else []
    counted, placed = set[int](), set[int]()
    try:
        part = Part(model, indices, (*inputs, *(value.name or "" for value in caches)))
        if not part.needs & {"attention_mask", POSITIONS, *(value.name for value in caches)}:
            return None
        for new, total in masks.LENGTHS:
            there, feeds = masks.example(new, total)
            found, positions = part(feeds | _empty(caches, total - new)), feeds[POSITIONS]  # (2, new)
            if found.shape not in (positions.shape, (1, new), (new,)):
                return None
            counted.update((found - positions)[there[:, -new:] == 1].tolist())
            placed.update(np.ravel(found - np.arange(total - new, total)).tolist())
    except NoMatch:
        return None
    offsets = placed if by_place and len(counted) > 1 else counted
    return offsets.pop() if len(offsets) == 1 else None


def _measured_caches(value: ir.Value) -> list[ir.Value]:
    """The caches of which a value needs the shape; none where it needs what they hold, as all behind attention does."""
    waiting, seen, found = [value], {value}, dict[ir.Value, None]()
    while waiting:
        current = waiting.pop()
        node = current.producer()
        if node is None:
            if _is_cache(current):
                return []
            continue
        for each in node.inputs:
            if node.op_type == "Shape" and _is_cache(each):
                found[each] = None
            elif each is not None and each not in seen:
                seen.add(each)
                waiting.append(each)
    return list(found)


def _is_cache(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.is_graph_input() and (value.name or "").startswith(PAST)


def _empty(caches: Sequence[ir.Value], past: int) -> dict[str, np.ndarray]:
    """Caches (2, heads, past, head size) of zeros."""
    found = {}
    for value in caches:
        _, heads, _, size = [each if isinstance(each, int) else 1 for each in value.shape or (1, 1, 1, 1)]
        found[value.name or ""] = np.zeros((2, heads, past, size), dtype=np.float32)
    return found
