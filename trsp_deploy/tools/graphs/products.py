"""The products with constant weights, which are what quantisation touches, and what a text shows of their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.forms import MATRIX, PRODUCTS, floats_of, fold_weights, never_changes, widened
from trsp_deploy.tools.graphs.logits import lm_head
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer, constant, made_by
from trsp_deploy.tools.graphs.rounding import parts

SIGNAL = 21.0  # decibels of the median token; below it a product is not quantised with one scale a tensor
TOKENS = 128  # of a text, that are kept of what products read


def _none() -> np.ndarray:
    return np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Activations:
    """What one product reads, over one or more calibration texts."""

    lowest: float
    highest: float
    decibels: float  # signal over noise of the median token when all of it has one 8-bit scale
    moments: tuple[np.ndarray, ...]  # of each of rounding.parts: (part, part), summed over tokens of one size
    bounds: np.ndarray = field(default_factory=_none)  # (2, features) lowest and highest of each
    tokens: np.ndarray = field(
        default_factory=_none
    )  # (at most TOKENS, features) some of them, evenly; none where none were asked for

    @classmethod
    def of(cls, found: np.ndarray, *, symmetric: bool, keep: bool = False) -> Activations:
        """Activations from values (..., features).

        symmetric: the 8-bit scale has no zero point. keep: some of the tokens.
        """
        tokens = found.reshape(-1, found.shape[-1]).astype(np.float32)
        decibels = signal_to_noise(found, symmetric=symmetric)
        bounds = np.stack([tokens.min(axis=0), tokens.max(axis=0)])
        some = tokens[:: -(-len(tokens) // TOKENS)].copy() if keep else _none()
        # A massive token weighs as much as any other: its own product is as large, and errors are seen beside that.
        tokens /= np.sqrt(np.square(tokens).mean(axis=1, keepdims=True)) + np.finfo(np.float32).tiny
        moments = tuple(tokens[:, part].T @ tokens[:, part] for part in parts(tokens.shape[1]))
        return cls(float(found.min()), float(found.max()), decibels, moments, bounds, some)

    @property
    def quantisable(self) -> bool:
        """Whether rounding the product's input to 8 bits leaves enough of it."""
        return self.decibels >= SIGNAL

    def joined(self, other: Activations) -> Activations:
        """The activations of both texts: a product is quantisable where it is in every text."""
        return Activations(
            float(np.minimum(self.lowest, other.lowest)),  # of nan and a number nan
            float(np.maximum(self.highest, other.highest)),
            min(self.decibels, other.decibels),
            tuple(one + two for one, two in zip(self.moments, other.moments, strict=True)),
            np.stack([np.minimum(self.bounds[0], other.bounds[0]), np.maximum(self.bounds[1], other.bounds[1])]),
            np.concatenate([self.tokens, other.tokens]),
        )

    def divided(self, by: np.ndarray) -> Activations:
        """The activations with each feature divided by its factor (features,); `moments` stay what they were."""
        bounds = self.bounds / by
        extremes = float(bounds.min()), float(bounds.max())
        decibels = signal_to_noise(self.tokens / by, extremes=extremes)
        return dataclasses.replace(
            self, lowest=extremes[0], highest=extremes[1], decibels=decibels, bounds=bounds, tokens=self.tokens / by
        )

    @property
    def power(self) -> np.ndarray:
        """(features,) sum of squares of each: by how much an error of its weights counts."""
        return np.concatenate([np.diag(part) for part in self.moments])


def open_products(model: ir.Model) -> str:
    """Give every product with a constant weight the form MatMul(x, weight); returns the LM head's name.

    model: changed in place. Gemm becomes MatMul and Add (GPT-2, OPT), and a product that transposes its weight, as an
    LM head does the embedding, gets one of its own; products without a name, which ONNX allows, get one after what they
    make: the same in every graph that passes make of one. Raises NoMatch when no LM head is found, or no product has a
    weight.
    """
    fold_weights(model)
    for node in model.graph:
        if node.op_type in PRODUCTS:
            node.name = node.name or f"product/{node.outputs[0].name}"
    writer = Writer(model, "products")
    for node in [node for node in model.graph if node.op_type == "Gemm"]:
        _split(writer, node)
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        transposed = made_by(node.inputs[1], "Transpose")
        weight = None if transposed is None else constant(transposed.inputs[0])
        if weight is not None and weight.ndim == 2:
            node.replace_input_with(1, writer.constant(np.ascontiguousarray(weight.T), "turned"))
    head = lm_head(model)
    writer.finish()
    if not any(weight_of(node) for node in model.graph):
        raise NoMatch("no product has a constant weight")
    return head.name or ""


def in_floats(model: ir.Model) -> list[str]:
    """Names of the products that no integers are made for though their weights never change, such as experts' stacks.

    model: after `open_products`. What turns positions into angles is no weight, and what is in fp32 for its range was
    meant to be (fp16_range.py).
    """
    known: dict[ir.Value, bool] = {}
    floats = floats_of(model)
    return [
        node.name or ""
        for node in model.graph
        if node.op_type in PRODUCTS and weight_of(node) is None and not _turns(node)
        if not widened(node.inputs[1], floats)
        if any(value is not None and never_changes(value, known) and _large(value) for value in node.inputs[:2])
    ]


def _large(value: ir.Value) -> bool:
    """Whether a constant is larger than what is no weight; what nobody could compute counts as large."""
    return value.const_value is None or value.const_value.size > MATRIX


def _split(writer: Writer, node: ir.Node) -> None:
    """Gemm without factors as MatMul and Add; others stay."""
    weight = constant(node.inputs[1])
    factors = {node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")}
    swapped, transposed = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    if weight is None or factors != {1.0} or swapped:
        return
    if transposed:
        weight = weight.T
    name = node.name or "Gemm"
    product = writer.one("MatMul", [node.inputs[0], writer.constant(np.ascontiguousarray(weight), "weight")], name=name)
    product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    whole = product if bias is None else writer.one("Add", [product, bias], name=f"{name}_bias")
    writer.replace_output(node.outputs[0], whole)


def pack_products(model: ir.Model, head: str) -> int:
    """Join products that read the same value, such as query, key and value, into one; returns how many are gone.

    model: after `open_products`, which names the `head`; changed in place. What is joined keeps the first one's name.
    A compiler joins them by itself in floats, and not where each has scales of its own.
    """
    writer = Writer(model, "packed")
    together: dict[ir.Value | None, list[ir.Node]] = {}
    for node in model.graph:
        if weight_of(node) is not None and node.name != head:
            together.setdefault(node.inputs[0], []).append(node)
    gone = 0
    for value, nodes in together.items():
        weights = [constant(node.inputs[1]) for node in nodes]
        if len(nodes) == 1:
            continue
        joined = writer.constant(np.concatenate([weight for weight in weights if weight is not None], axis=1), "weight")
        whole = writer.one("MatMul", [value, joined])
        sizes = writer.integers(*(weight.shape[1] for weight in weights if weight is not None))
        parts = writer.emit("Split", [whole, sizes], {"axis": -1}, outputs=len(nodes), name="parts")
        for node, part in zip(nodes, parts, strict=True):
            writer.replace_output(node.outputs[0], part)
        product = whole.producer()
        assert product is not None
        product.name = nodes[0].name
        gone += len(nodes) - 1
    writer.finish()
    return gone


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant weight (features in, features out) of a product; None for other nodes.

    What multiplies each number of its input by itself is none: so some graphs turn positions into angles. Nor is a
    stack of matrices, as of experts, which has no form in integers here.
    """
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or weight.const_value is None or _turns(node):
        return None
    return weight if len(weight.const_value.shape) == 2 else None


def _turns(node: ir.Node) -> bool:
    """Whether a product multiplies every number of its input by one and the same row."""
    weight = node.inputs[1]
    tensor = None if weight is None else weight.const_value
    return tensor is not None and len(tensor.shape) >= 2 and tensor.shape[-2] == 1


def measure_activations(
    model: ir.Model,
    texts: Iterable[Mapping[str, np.ndarray]],
    scratch: Path,
    *,
    symmetric: bool = False,
    keep: bool = False,
) -> dict[str, Activations]:
    """What every product with a weight reads while ONNX Runtime's CPU provider reads texts; by the product's name.

    A product that read nothing, such as an expert's that no token of the text was sent to, is left out.

    model: as it lies in a file (nodes.py: put_down). texts: every input of the graph for each of them, read one after
    the other: what their products read would else be in memory at once. scratch: the folder of that file. symmetric:
    the 8-bit scale has no zero point. keep: some of the tokens too.
    """
    import onnxruntime

    products = {node.name or "": node.inputs[0] for node in model.graph if weight_of(node) is not None}
    inputs = [value for value in dict.fromkeys(products.values()) if value is not None]
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in inputs if value not in outputs)
    path = scratch / "probe.onnx"
    ir.save(model, path)  # the weights stay in their file
    while len(model.graph.outputs) > len(outputs):  # a slice that is deleted stays an output by its own account
        model.graph.outputs.pop()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    measured: dict[str | None, Activations] = {}
    for text in texts:
        found = session.run([value.name for value in inputs], dict(text))
        for value, array in zip(inputs, found, strict=True):
            if not array.size:
                continue
            of_text = Activations.of(array, symmetric=symmetric, keep=keep)
            measured[value.name] = measured[value.name].joined(of_text) if value.name in measured else of_text
    return {
        name: measured[value.name] for name, value in products.items() if value is not None and value.name in measured
    }


def signal_to_noise(
    activations: np.ndarray, *, symmetric: bool = False, extremes: tuple[float, float] | None = None
) -> float:
    """Decibels that the median token keeps when all of (..., features) are rounded to 8-bit steps of one size.

    The median over tokens, not the mean: the few massive ones are all signal, and what they leave of the rest counts.
    extremes: lowest and highest of more tokens than these, which set the steps.
    """
    tokens = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    lowest, highest = extremes or (np.min(tokens), np.max(tokens))
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = max(-lowest, highest) / 127 if symmetric else (highest - lowest) / 255
    step = step or 1.0
    noise = np.square(np.round(tokens / step) * step - tokens).sum(axis=1)
    signal = np.square(tokens).sum(axis=1)
    return float(np.median(10 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30))))


def check_finite(activations: dict[str, Activations], precision: str) -> None:
    """Raise NoMatch where a product reads what is no number: the precision's range is too small for the model."""
    for name, found in activations.items():
        if not np.isfinite([found.lowest, found.highest]).all():
            raise NoMatch(f"'{name}' reads numbers beyond the range of {precision}")
