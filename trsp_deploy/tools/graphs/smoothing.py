"""Move features that are always large out of a normalisation's output and into the weights that read it.

One of them sets the scale that all activations are rounded with, and little is left of the others; in a weight it is
one row. Divided by a factor in the normalisation's own constants and multiplied by it in the weights' rows, the product
is what it was, and costs nothing: SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438, section 4, equation 4).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import Writer, constant, readers
from trsp_deploy.tools.graphs.products import Activations, weight_of

STRENGTH = 0.5  # alpha: how much of a feature's size moves into the weights; 0.7 and 0.85 do no better (docs/log.md)
# Inputs that scale a normalisation's output, by feature.
FACTORS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}


def smooth_norms(
    model: ir.Model, head: str, activations: Mapping[str, Activations], kept: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Activations]]:
    """Divide the output of every normalisation that only products read; the weights are to be multiplied by whoever
    rounds them.

    model: after `open_products`, which names the `head`; its normalisations are changed in place. activations: what
    each product reads, with its tokens. kept: products that stay as they are.
    Returns (features in,) factors of the weights' rows by product, and what each product reads by now.
    """
    writer = Writer(model, "smoothed")
    factors: dict[str, np.ndarray] = {}
    found = dict(activations)
    for node in list(model.graph):
        products = _products(node)
        names = [product.name or "" for product in products]
        if not names or {head, *kept} & {*names} or any(name not in found for name in names):
            continue
        read = found[names[0]]  # all of them read the same
        if not read.tokens.size:
            continue
        by = _factors(np.abs(read.bounds).max(axis=0), products)
        for index in FACTORS[node.op_type]:
            scale = constant(node.inputs[index]) if index < len(node.inputs) else None
            if scale is not None:
                node.replace_input_with(index, writer.constant((scale / by).astype(scale.dtype), "factors"))
        factors |= dict.fromkeys(names, by)
        found |= dict.fromkeys(names, read.divided(by))
    writer.finish()
    return factors, found


def _products(node: ir.Node) -> list[ir.Node]:
    """The products that read a normalisation with constant factors, where nothing else does; else none."""
    if node.op_type not in FACTORS or node.outputs[0].is_graph_output():
        return []
    given = [node.inputs[index] for index in FACTORS[node.op_type] if index < len(node.inputs)]
    if any(value is not None and constant(value) is None for value in given):
        return []
    found = readers(node.outputs[0])
    value = node.outputs[0]
    return found if all(weight_of(each) is not None and each.inputs[0] is value for each in found) else []


def _factors(largest: np.ndarray, products: Sequence[ir.Node]) -> np.ndarray:
    """(features,) float32: max |x|^a / max |w|^(1 - a) of each, around 1."""
    rows = np.zeros_like(largest)
    for node in products:
        weight = constant(node.inputs[1])  # in its file: one at a time
        assert weight is not None
        rows = np.maximum(rows, np.abs(weight).max(axis=1))
    sizes = [np.log(np.maximum(each, each.max() * 1e-4 + np.finfo(np.float32).tiny)) for each in (largest, rows)]
    logs = STRENGTH * sizes[0] - (1 - STRENGTH) * sizes[1]
    factors: np.ndarray = np.exp(logs - logs.mean()).astype(np.float32)
    return factors
