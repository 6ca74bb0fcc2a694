"""What rounding the weights of each product costs on a calibration text, and so which of them to leave more bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trsp_deploy.errors import EngineSpecError, nearest
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs.nodes import constant
from trsp_deploy.tools.graphs.products import Activations, weight_of


def chosen(model: ir.Model, head: str, activations: Mapping[str, Activations], spec: EngineSpec) -> dict[str, float]:
    """The products that `keep_high_precision` means, and what rounding each would have cost, the costliest first.

    model: after `open_products`, which names the `head`. Raises EngineSpecError for a name that is no product's.
    """
    wanted = spec.keep_high_precision
    if not wanted:
        return {}
    costs = rounding_costs(model, head, activations, 4 if spec.precision == "int4" else 8, spec.block_size)
    if isinstance(wanted, int):
        return dict(list(costs.items())[:wanted])
    unknown = next((name for name in wanted if name not in costs), None)
    if unknown is not None:
        raise EngineSpecError(
            f"engine {spec.name}: `keep_high_precision`: no product '{unknown}' in the graph{nearest(unknown, costs)}; "
            f"valid: a number, or names such as {', '.join(list(costs)[:3])}"
        )
    return {name: cost for name, cost in costs.items() if name in wanted}


def rounding_costs(
    model: ir.Model, head: str, activations: Mapping[str, Activations], bits: int, block_size: int
) -> dict[str, float]:
    """Share of each product's output that is lost to rounding its weight, by the product's name, largest first.

    model: after `open_products`, which names the `head`; that one is left out. The share is of the mean square, each
    input counting by its power on the text. bits: 4, with a scale for each block of `block_size` inputs, or 8, with one
    for each output.
    """
    costs = {}
    for node in model.graph:
        name = node.name or ""
        if weight_of(node) is None or name == head or name not in activations:
            continue
        weight = constant(node.inputs[1])
        assert weight is not None
        size = block_size if bits == 4 and len(weight) % block_size == 0 else len(weight)
        costs[name] = _lost(weight.astype(np.float32), activations[name].power, bits, size)
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def _lost(weight: np.ndarray, power: np.ndarray, bits: int, block: int) -> float:
    steps = 2 ** (bits - 1) - 1
    blocks = weight.reshape(-1, block, weight.shape[-1])  # (blocks, block, out)
    counts = power.reshape(-1, block, 1)
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / steps, np.finfo(np.float32).tiny)
    noise = (counts * np.square(np.rint(blocks / scale) * scale - blocks)).sum()
    return float(noise / max((counts * np.square(blocks)).sum(), np.finfo(np.float32).tiny))
