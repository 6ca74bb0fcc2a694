"""Weights in integers as ONNX Runtime reads them; which products run in which form is decided here.

int4: the layers' weights in 4 bits, blocks of them sharing a scale (MatMulNBits), rounded by what a calibration text
shows (rounding.py). The LM head keeps 8 bits unless the spec says otherwise, as errors there go straight into the
logits. The embedding is looked up and not multiplied; it gets 4 bits, the only width that ONNX Runtime's tool has.

int8: products of 8-bit weights and activations with one scale a tensor (MatMulInteger) are the quickest for prompts,
and wrong where a few massive activations set that scale: in SmolLM2-135M's layers 1, 2, 9, 11 and 28 less is left of
the other tokens before `down_proj` than noise, or hardly more, and perplexity rises by 68%. So a calibration text
decides: a product of whose input too little is left, and the LM head, get 8-bit weights in blocks and
activations scaled in blocks too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import MICROSOFT, Writer, constant
from trsp_deploy.tools.graphs.products import Activations, weight_of
from trsp_deploy.tools.graphs.rounding import Rounded, round_weight
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.quiet import quiet_libraries

HEAD_BITS, HEAD_BLOCK = 8, 64
LOOKUP_BITS, LOOKUP_BLOCK = 4, 32
ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8 too, so that products run in integers


def quantize_int4(
    model: ir.Model,
    block_size: int,
    head: str,
    activations: Mapping[str, Activations],
    kept: Collection[str] = (),
    *,
    head_bits: int = HEAD_BITS,
    zero_points: bool = True,
) -> ir.Model:
    """Return the model with 4-bit weights, `block_size` along the inputs sharing a scale and, or not, a zero point.

    model: after `open_products` (products.py), which names the `head`; changed in place. activations: what each product
    reads. kept: products that get 8 bits.
    """
    writer = Writer(model, "int4")
    wide = [*kept, head] if head_bits == HEAD_BITS else kept
    products = [node for node in model.graph if weight_of(node) is not None and node.name not in wide]
    with Meter("rounding to 4 bits", len(products)) as meter:
        for node in products:
            weight, found = constant(node.inputs[1]), activations.get(node.name or "")
            if weight is not None and weight.ndim == 2:
                moments = None if found is None else found.moments
                rounded = round_weight(weight, block_size, moments, symmetric=not zero_points)
                writer.replace_output(node.outputs[0], _product(writer, node, rounded, block_size, zero_points))
            meter.advance(node.name or "")
    writer.finish()
    proto = _in_blocks(ir.to_proto(model), "MatMul", HEAD_BITS, HEAD_BLOCK)
    return ir.from_proto(_in_blocks(proto, "Gather", LOOKUP_BITS, LOOKUP_BLOCK))


def _product(writer: Writer, node: ir.Node, rounded: Rounded, block_size: int, zero_points: bool) -> ir.Value:
    """The product of a node with a rounded weight as MatMulNBits, which has outputs in rows and two numbers a byte.

    Without zero points the operator takes 8 everywhere, and so does a symmetric rounding.
    """
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
    scratch: Path,
    kept: Collection[str] = (),
    reduced: bool = False,
) -> ir.Model:
    """Return the model with 8-bit weights.

    model: after `open_products` (products.py), which names the `head`. activations: what each product reads.
    scratch: a folder for the graph in between. kept: products that stay in floats. reduced: weights of 7 bits, whose
    products with 8-bit activations can be added in pairs within 16 bits.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = [node.name or "" for node in model.graph if weight_of(node) is not None]
    blocks = [name for name in names if name not in activations or not activations[name].quantisable]
    path = scratch / "int8.onnx"
    with quiet_libraries():
        quantize_dynamic(
            ir.to_proto(model),
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=reduced,
            nodes_to_exclude=[*blocks, *kept, head],
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # its shape inference ends at fused nodes
        )
    whole = ir.load(path)
    ir.external_data.load_to_model(whole)
    return ir.from_proto(_in_blocks(ir.to_proto(whole), "MatMul", 8, block_size, exclude=[*kept]))


def _in_blocks(proto: object, operator: str, bits: int, block_size: int, exclude: list[str] | None = None) -> object:
    """Quantise every MatMul, or every Gather, with a constant weight in floats."""
    with (
        quiet_libraries()
    ):  # it sets up the root logger, by which other libraries would tell of their work from then on
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
