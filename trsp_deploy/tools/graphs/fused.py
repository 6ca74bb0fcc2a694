"""ONNX Runtime's GroupQueryAttention, the node that `attention.py` makes of each layer, for whoever reads it after."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol, TypeVar

from trsp_deploy.tools.graphs.nodes import MICROSOFT

OPERATOR = "GroupQueryAttention"


class Input(IntEnum):
    """The places of its inputs."""

    QUERY = 0  # or all three of a layer in one (projections.py); key and value are then left out
    KEY = 1
    VALUE = 2
    PAST_KEY = 3
    PAST_VALUE = 4
    LAST_INDEX = 5  # (B,) int32: all tokens less one
    TOTAL = 6  # int32: all tokens
    COS = 7  # tables of a rotary embedding (rotary.py)
    SIN = 8
    POSITIONS = 9  # heeded for prompts alone, so never given
    MASK = 10  # added to the scores


class Node(Protocol):
    """What onnx_ir's and onnx's own nodes have in common."""

    @property
    def op_type(self) -> str: ...

    @property
    def domain(self) -> str: ...


Found = TypeVar("Found", bound=Node)


def fused_attention(graph: Iterable[Found]) -> list[Found]:
    """The fused attention of a graph, given as its nodes, in order: a node for each layer."""
    return [node for node in graph if node.op_type == OPERATOR and node.domain == MICROSOFT]
