"""Weights in integers as ONNX Runtime reads them; which products run in which form is decided here.

int4: the layers' weights in 4 bits, blocks of them sharing a scale (MatMulNBits), rounded by what a calibration text
shows (rounding.py). The LM head keeps 8 bits unless the spec says otherwise, as errors there go straight into the
logits. The tokens' embedding is looked up and not multiplied; it gets 4 bits unless the spec says otherwise. Other
tables that are looked up (learned positions, a foreign graph's constants) are small, and stay as they are.

int8: products of 8-bit weights and activations with one scale a tensor (DynamicQuantizeMatMul) are the quickest for
prompts, and wrong where a few massive activations set that scale: in SmolLM2-135M's layers 1, 2, 9, 11 and 28 less is
left of the other tokens before `down_proj` than noise, or hardly more, and perplexity rises by 68%. So a calibration
text decides: what reads a normalisation is smoothed first (smoothing.py), and a product of whose input too little is
left all the same gets a scale for each token. The LM head has 8-bit weights in blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import MICROSOFT, Writer, constant
from trsp_deploy.tools.graphs.products import Activations, weight_of
from trsp_deploy.tools.graphs.rounding import round_weight
from trsp_deploy.tools.graphs.stored import HEAD_BITS, HEAD_BLOCK, LOOKUP_BITS, LOOKUP_BLOCK
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.quiet import quiet_libraries

MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # leave indices what they are
AXES_ARE_INPUTS = 18  # the first opset whose ReduceMax has its axes as an input
ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8 too, so that products run in integers


def quantize_int4(
    model: ir.Model,
    block_size: int,
    head: str,
    activations: Mapping[str, Activations],
    kept: Collection[str] = (),
    *,
    head_bits: int = HEAD_BITS,
    embedding_bits: int = LOOKUP_BITS,
    zero_points: bool = True,
) -> ir.Model:
    """Return the model with 4-bit weights, `block_size` along the inputs sharing a scale and, or not, a zero point.

    model: after `open_products` (products.py), which names the `head`; changed in place. activations: what each product
    reads. kept: products that get 8 bits. head_bits, embedding_bits: 4, 8, or 32, which leaves these weights be.
    """
    writer = Writer(model, "int4")
    wide = [*kept, head] if head_bits > LOOKUP_BITS else kept
    products = [node for node in model.graph if weight_of(node) is not None and node.name not in wide]
    with Meter("rounding to 4 bits", len(products)) as meter:
        for node in products:
            found = activations.get(node.name or "")
            writer.replace_output(node.outputs[0], _product(writer, node, found, block_size, zero_points))
            meter.advance(node.name or "")
    embeddings = _token_tables(model)
    if embedding_bits == HEAD_BITS:
        for node in embeddings:
            writer.replace_output(node.outputs[0], _lookup(writer, node))
    writer.finish()
    ir.external_data.load_to_model(model)  # what is left in floats: the head, tables and vectors
    proto = _in_blocks(
        ir.to_proto(model), "MatMul", HEAD_BITS, HEAD_BLOCK, exclude=[head] if head_bits > HEAD_BITS else []
    )
    if embedding_bits == LOOKUP_BITS:
        wanted = {node.name for node in embeddings}
        others = [node.name or "" for node in model.graph if node.op_type == "Gather" and node.name not in wanted]
        proto = _in_blocks(proto, "Gather", LOOKUP_BITS, LOOKUP_BLOCK, exclude=others)
    return ir.from_proto(proto)


def _token_tables(model: ir.Model) -> list[ir.Node]:
    """The Gathers, each with a name, that look tokens up in a table of floats: by `input_ids`, moved at the most."""
    found = []
    for number, node in enumerate(node for node in model.graph if node.op_type == "Gather"):
        node.name = node.name or f"gather_{number}"
        table, index = node.inputs
        while index is not None and (producer := index.producer()) is not None and producer.op_type in MOVES:
            index = producer.inputs[0]
        tensor = None if table is None else ir.convenience.get_const_tensor(table)
        if index is None or index.name != "input_ids" or tensor is None:
            continue
        if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and len(tensor.shape) == 2:
            found.append(node)
    return found


def _lookup(writer: Writer, node: ir.Node) -> ir.Value:
    """A Gather of a table (tokens, features) in 8 bits, LOOKUP_BLOCK features of a token sharing a scale."""
    table = constant(node.inputs[0])
    assert table is not None
    rows, features = table.shape
    blocks = np.pad(table, ((0, 0), (0, -features % LOOKUP_BLOCK))).reshape(rows, -1, LOOKUP_BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=-1) / 127, np.finfo(np.float32).tiny).astype(table.dtype)
    codes = np.rint(blocks / scales[..., None]).clip(-127, 127) + 128  # without a zero point it is 128
    whole = codes.reshape(rows, -1)[:, :features].astype(np.uint8)
    values = [writer.constant(whole, "table"), node.inputs[1], writer.constant(scales, "scale")]
    sizes = {"bits": HEAD_BITS, "block_size": LOOKUP_BLOCK, "gather_axis": 0, "quantize_axis": 1}
    return writer.one("GatherBlockQuantized", values, sizes, domain=MICROSOFT, name=f"{node.name}_Q8")


def _product(writer: Writer, node: ir.Node, found: Activations | None, block_size: int, zero_points: bool) -> ir.Value:
    """The product of a node with its weight, rounded, as MatMulNBits, which has outputs in rows and two numbers a byte.

    found: what it reads. Without zero points the operator takes 8 everywhere, and so does a symmetric rounding.
    """
    weight = constant(node.inputs[1])  # in its file: whoever holds it keeps that from being closed
    assert weight is not None
    rounded = round_weight(weight, block_size, None if found is None else found.moments, symmetric=not zero_points)
    inputs, outputs = rounded.codes.shape
    codes = np.pad(rounded.codes, ((0, -inputs % block_size), (0, 0))).T.reshape(outputs, -1, block_size)
    zeros = np.pad(rounded.zeros, ((0, len(rounded.zeros) % 2), (0, 0))).T
    constants = [_pairs(codes), np.ascontiguousarray(rounded.scales.T).reshape(-1)]
    constants += [_pairs(zeros).reshape(-1)] if zero_points else []
    sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": block_size, "accuracy_level": ACCURACY_LEVEL}
    values = [writer.constant(array, "weight") for array in constants]
    return writer.one("MatMulNBits", [node.inputs[0], *values], sizes, domain=MICROSOFT, name=f"{node.name}_Q4")


def _pairs(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits (..., 2 n) in bytes (..., n), the first in the lower half."""
    paired: np.ndarray = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    return paired


def quantize_int8(
    model: ir.Model,
    block_size: int,
    head: str,
    activations: Mapping[str, Activations],
    kept: Collection[str] = (),
    *,
    factors: Mapping[str, np.ndarray] = MappingProxyType({}),
    reduced: bool = False,
    head_bits: int = HEAD_BITS,
) -> ir.Model:
    """Return the model with 8-bit weights.

    model: after `open_products` (products.py), which names the `head`; changed in place. activations: what each product
    reads. kept: products that stay in floats. factors: of weights' rows (in,), by product (smoothing.py). reduced:
    weights of 7 bits, whose products with 8-bit activations can be added in pairs within 16 bits. head_bits: 8, or 32,
    which leaves it be.

    The numbers and the form are those of ONNX Runtime's `quantize_dynamic`, which holds the model three times over.
    """
    writer = Writer(model, "int8")
    floats = {*kept, head} if head_bits > HEAD_BITS else {*kept}
    wanted = {*activations} - {*kept, head}
    products = [node for node in model.graph if weight_of(node) is not None and node.name in wanted]
    inputs: dict[tuple[ir.Value | None, bool], list[ir.Value]] = {}  # products that read the same share its rounding
    with Meter("rounding to 8 bits", len(products)) as meter:
        for node in products:
            name, value = node.name or "", node.inputs[0]
            whole = activations[name].quantisable
            if (value, whole) not in inputs:
                inputs[value, whole] = _by_tensor(writer, value) if whole else _by_token(writer, value)
            weight = _weight_in_8_bits(node, factors.get(name), reduced)
            product = _integers if whole else _integers_by_token
            writer.replace_output(node.outputs[0], product(writer, name, inputs[value, whole], *weight))
            meter.advance(name)
    writer.finish()
    ir.external_data.load_to_model(model)  # what is left in floats
    return ir.from_proto(_in_blocks(ir.to_proto(model), "MatMul", HEAD_BITS, block_size, exclude=[*floats]))


def _weight_in_8_bits(node: ir.Node, factors: np.ndarray | None, reduced: bool) -> tuple[np.ndarray, np.ndarray]:
    """A product's weight (in, out) in 8 bits, and the scale of each output (out,); factors: of its rows (in,)."""
    weight = constant(node.inputs[1])  # in its file: whoever holds it keeps that from being closed
    assert weight is not None
    if factors is not None:
        weight = weight * factors[:, None]
    steps = 64 if reduced else 127
    largest = np.abs(weight).max(axis=0).astype(np.float64)
    scale = (largest / steps).astype(np.float32)
    scale[largest / steps < np.finfo(np.float32).tiny] = 1
    return np.rint(weight / scale).astype(np.int8), scale


def _by_tensor(writer: Writer, value: ir.Value | None) -> list[ir.Value]:
    """Codes of 8 bits, their scale and their zero point."""
    return writer.emit("DynamicQuantizeLinear", [value], outputs=3)


def _integers(writer: Writer, name: str, rounded: Sequence[ir.Value], whole: np.ndarray, scale: np.ndarray) -> ir.Value:
    """A product as MatMulInteger, of what `_by_tensor` rounded."""
    codes, step, zero = rounded
    weights = [writer.constant(array, "weight") for array in (whole, np.zeros(whole.shape[1], dtype=np.int8), scale)]
    product = writer.one("MatMulInteger", [codes, weights[0], zero, weights[1]], name=f"{name}_quant")
    sums = writer.one("Cast", [product], {"to": ir.DataType.FLOAT})
    return writer.one("Mul", [sums, writer.one("Mul", [step, weights[2]])], name=f"{name}_Q8")


def _by_token(writer: Writer, value: ir.Value | None) -> list[ir.Value]:
    """Codes of 8 bits of a value (..., features), each token's of its own largest number, and that number (..., 1).

    A token of zeros is divided by 0: whatever its codes are, its products are multiplied by 0 in the end.
    """
    sizes = writer.one("Abs", [value])
    if writer.graph.opset_imports.get("", 0) < AXES_ARE_INPUTS:
        largest = writer.one("ReduceMax", [sizes], {"axes": [-1], "keepdims": 1})
    else:
        largest = writer.one("ReduceMax", [sizes, writer.integers(-1)], {"keepdims": 1})
    of_token = writer.one("Div", [value, largest])
    return [writer.one("QuantizeLinear", [of_token, *_unit(writer)]), largest]


def _unit(writer: Writer) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of numbers from -1 to 1."""
    return writer.constant(np.array(1 / 127, np.float32), "unit"), writer.constant(np.array(128, np.uint8), "zero")


def _integers_by_token(
    writer: Writer, name: str, rounded: Sequence[ir.Value], whole: np.ndarray, scale: np.ndarray
) -> ir.Value:
    """A product as MatMulIntegerToFloat, of what `_by_token` rounded."""
    codes, largest = rounded
    unit, zero = _unit(writer)
    weights = [writer.constant(array, "weight") for array in (whole, scale)]
    inputs = [codes, weights[0], unit, weights[1], zero]
    product = writer.one("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=f"{name}_quant")
    return writer.one("Mul", [product, largest], name=f"{name}_Q8")


def _in_blocks(proto: object, operator: str, bits: int, block_size: int, exclude: list[str] | None = None) -> object:
    """Quantise every MatMul, or every Gather, with a constant weight in floats."""
    # It sets up the root logger, by which other libraries would tell of their work from then on.
    with quiet_libraries():
        from onnxruntime.quantization import matmul_nbits_quantizer as tool

    settings = tool.DefaultWeightOnlyQuantConfig(
        bits=bits,
        block_size=block_size,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=(operator,),
    )
    with quiet_libraries():
        work = tool.MatMulNBitsQuantizer(proto, nodes_to_exclude=exclude, algo_config=settings)
        work.process()
    return work.model.model
