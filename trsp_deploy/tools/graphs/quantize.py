"""Weights in integers, by ONNX Runtime's own tools; which products run in which form is decided here.

int4: the layers' weights in 4 bits, blocks of them sharing a scale (MatMulNBits). The LM head keeps 8 bits, as errors
there go straight into the logits. The embedding is looked up and not multiplied; it gets 4 bits, the only width that
the lookup has.

int8: products of 8-bit weights and activations with one scale a tensor (MatMulInteger) are the quickest for prompts,
and wrong where a few massive activations set that scale: in SmolLM2-135M's layers 1, 2, 9, 11 and 28 less is left of
the other tokens before `down_proj` than noise, or hardly more, and perplexity rises by 68%. So a calibration text
decides: a product of whose input too little is left, and the LM head, get 8-bit weights in blocks and
activations scaled in blocks too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx_ir as ir

from trsp_deploy.tools.graphs.products import Activations
from trsp_deploy.tools.quiet import quiet_libraries

HEAD_BITS, HEAD_BLOCK = 8, 64
LOOKUP_BITS, LOOKUP_BLOCK = 4, 32
ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8 too, so that products run in integers


def quantize_int4(model: ir.Model, block_size: int, head: str, kept: Collection[str] = ()) -> ir.Model:
    """Return the model with 4-bit weights, `block_size` along the inputs sharing a scale and a zero point.

    model: after `open_products` (products.py), which names the `head`. kept: products that get 8 bits as the head does.
    """
    proto = _in_blocks(ir.to_proto(model), "MatMul", 4, block_size, exclude=[head, *kept])
    proto = _in_blocks(proto, "MatMul", HEAD_BITS, HEAD_BLOCK)
    return ir.from_proto(_in_blocks(proto, "Gather", LOOKUP_BITS, LOOKUP_BLOCK))


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

    blocks = [name for name, found in activations.items() if not found.quantisable]
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
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    settings = tool.DefaultWeightOnlyQuantConfig(
        bits=bits,
        block_size=block_size,
        # A zero point costs 4 bits a block and no time: perplexity 33.6 instead of 35.3 in blocks of 64 (docs/log.md).
        is_symmetric=bits == 8 or operator == "Gather",
        accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=(operator,),
    )
    with quiet_libraries():
        work = tool.MatMulNBitsQuantizer(proto, nodes_to_exclude=exclude, algo_config=settings)
        work.process()
    return work.model.model
