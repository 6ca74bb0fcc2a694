"""What rounding the weights of each product costs on a calibration text, and so which of them to leave more bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trsp_deploy.errors import EngineSpecError, nearest
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import qdq
from trsp_deploy.tools.graphs.nodes import constant
from trsp_deploy.tools.graphs.products import Activations, weight_of


def chosen(model: ir.Model, head: str, activations: Mapping[str, Activations], spec: EngineSpec) -> dict[str, float]:
    """The products that `keep_high_precision` means, and what rounding each would have cost, the costliest first.

    model: after `open_products`, which names the `head`. A product that a name means and that has more bits anyway is
    none of them. Raises EngineSpecError for a name that is no product's.
    """
    wanted = spec.keep_high_precision
    if not wanted:
        return {}
    costs = rounding_costs(model, head, activations, spec)
    if isinstance(wanted, int):
        return dict(list(costs.items())[:wanted])
    names = list(dict.fromkeys([*costs, *(node.name or "" for node in _products(model, head, activations))]))
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        raise EngineSpecError(
            f"engine {spec.name}: `keep_high_precision`: no product '{unknown}' in the graph{nearest(unknown, names)}; "
            f"valid: a number, or names such as {', '.join(names[:3])}"
        )
    return {name: cost for name, cost in costs.items() if name in wanted}


def rounding_costs(
    model: ir.Model, head: str, activations: Mapping[str, Activations], spec: EngineSpec
) -> dict[str, float]:
    """Share of each product's output that is lost to rounding its weight, by the product's name, largest first.

    model: after `open_products`, which names the `head`; that one is left out, and so is what the engine has in more
    bits anyway. The share is of the mean square, each input counting by its power on the text. Of int4 a block of
    inputs shares a scale, of int8 all inputs of an output do.
    """
    costs = {}
    for node in _products(model, head, activations):
        weight = constant(node.inputs[1])
        assert weight is not None
        block, bits = _block(len(weight), spec), 4 if spec.precision == "int4" else 8
        if block is not None:
            costs[node.name or ""] = _lost(weight.astype(np.float32), activations[node.name or ""].power, bits, block)
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def _products(model: ir.Model, head: str, activations: Mapping[str, Activations]) -> list[ir.Node]:
    return [
        node for node in model.graph if weight_of(node) is not None and node.name != head and node.name in activations
    ]


def _block(inputs: int, spec: EngineSpec) -> int | None:
    """Inputs that share a scale as the engine is built; None where it leaves that many more than 4 bits."""
    if spec.precision == "int8":
        return inputs
    return qdq.block_of(inputs, spec.block_size) if spec.on_tensorrt else spec.block_size


def _lost(weight: np.ndarray, power: np.ndarray, bits: int, block: int) -> float:
    steps, missing = 2 ** (bits - 1) - 1, -len(weight) % block  # the last block is filled up with zeros
    blocks = np.pad(weight, ((0, missing), (0, 0))).reshape(-1, block, weight.shape[-1])  # (blocks, block, out)
    counts = np.pad(power, (0, missing)).reshape(-1, block, 1)
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / steps, np.finfo(np.float32).tiny)
    noise = (counts * np.square(np.rint(blocks / scale) * scale - blocks)).sum()
    return float(noise / max((counts * np.square(blocks)).sum(), np.finfo(np.float32).tiny))
