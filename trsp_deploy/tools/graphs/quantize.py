"""Weights in integers, by ONNX Runtime's own tools; which products run in which form is decided here.

int4: the layers' weights in 4 bits, blocks of them sharing a scale (MatMulNBits). The LM head keeps 8 bits, as errors
there go straight into the logits. The embedding is looked up and not multiplied; it gets 4 bits, the only width that
the lookup has.

int8: products of 8-bit weights and activations with one scale a tensor (MatMulInteger) are the quickest for prompts,
and wrong where a few massive activations set that scale: in SmolLM2-135M's layers 1, 2, 9, 11 and 28 less is left of
the other tokens before `down_proj` than noise, or hardly more, and perplexity rises by 68%. So a calibration text
decides: a product whose input keeps less than SIGNAL decibels, and the LM head, get 8-bit weights in blocks and
activations scaled in blocks too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.logits import lm_head
from trsp_deploy.tools.graphs.nodes import Writer, constant, made_by
from trsp_deploy.tools.quiet import quiet_libraries

HEAD_BITS, HEAD_BLOCK = 8, 64
LOOKUP_BITS, LOOKUP_BLOCK = 4, 32
ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8 too, so that products run in integers
SIGNAL = 21.0  # decibels of the median token; below it a product is not quantised with one scale a tensor


def quantize_int4(model: ir.Model, block_size: int) -> ir.Model:
    """Return the model with 4-bit weights, `block_size` along the inputs sharing a scale and a zero point.

    model: an exported decoder, before or after the other passes. Raises NoMatch when no LM head is found.
    """
    head = _own_head(model)
    proto = _in_blocks(ir.to_proto(model), "MatMul", 4, block_size, exclude=[head])
    proto = _in_blocks(proto, "MatMul", HEAD_BITS, HEAD_BLOCK)
    return ir.from_proto(_in_blocks(proto, "Gather", LOOKUP_BITS, LOOKUP_BLOCK))


def quantize_int8(model: ir.Model, block_size: int, signal: dict[str, float], scratch: Path) -> ir.Model:
    """Return the model with 8-bit weights.

    signal: decibels of what each product reads (`measure_signal`). scratch: a folder for the graph in between.
    Raises NoMatch when no LM head is found.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    head = _own_head(model)
    kept = [name for name, decibels in signal.items() if decibels < SIGNAL]
    path = scratch / "int8.onnx"
    with quiet_libraries():
        quantize_dynamic(
            ir.to_proto(model),
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*kept, head],
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # its shape inference ends at fused nodes
        )
    whole = ir.load(path)
    ir.external_data.load_to_model(whole)
    return ir.from_proto(_in_blocks(ir.to_proto(whole), "MatMul", 8, block_size))


def measure_signal(model: ir.Model, past: dict[str, np.ndarray], ids: np.ndarray, scratch: Path) -> dict[str, float]:
    """Signal over noise, in decibels, of every weight product's input when it has one 8-bit scale a tensor.

    past: an empty cache by input name. ids: (batch, sequence) int64 tokens of real text. scratch: a folder.
    The median over tokens, not the mean: the few massive ones are all signal, and what they leave of the rest counts.
    """
    import onnxruntime

    products = {node.name or "": node.inputs[0] for node in model.graph if _weight(node) is not None}
    inputs = [value for value in dict.fromkeys(products.values()) if value is not None]
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(inputs)
    path = scratch / "probe.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    del model.graph.outputs[len(outputs) :]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    mask = np.ones_like(ids)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(axis=1) - 1, **past}
    wanted = {value.name for value in session.get_inputs()}
    feeds |= {name: np.array(1) for name in wanted - feeds.keys()}  # logits_to_keep
    found = session.run([value.name for value in inputs], {name: feeds[name] for name in wanted})
    decibels = {value.name: signal_to_noise(array) for value, array in zip(inputs, found, strict=True)}
    return {name: decibels[value.name] for name, value in products.items() if value is not None}


def signal_to_noise(activations: np.ndarray) -> float:
    """Decibels that the median token keeps when all of (..., features) are rounded to 256 steps of one size."""
    tokens = activations.reshape(-1, activations.shape[-1]).astype(np.float64)
    step = max(tokens.max(), 0.0) - min(tokens.min(), 0.0)
    step = step / 255 or 1.0
    noise = np.square(np.round(tokens / step) * step - tokens).sum(axis=1)
    signal = np.square(tokens).sum(axis=1)
    return float(np.median(10 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30))))


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


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant weight of a product; None for other nodes."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight if weight is not None and weight.const_value is not None else None


def _own_head(model: ir.Model) -> str:
    """Load all weights, give the LM head one of its own where the graph transposes the embedding; returns its name."""
    ir.external_data.load_to_model(model)
    node = lm_head(model)
    transposed = made_by(node.inputs[1], "Transpose")
    embedding = None if transposed is None else constant(transposed.inputs[0])
    if embedding is not None:
        writer = Writer(model, "quantize")
        node.replace_input_with(1, writer.constant(np.ascontiguousarray(embedding.T), "lm_head"))
        writer.finish()
    return node.name or ""
