"""Weight-only quantisation by ONNX Runtime's own tool: blocks of weights share a scale, products run in integers.

Layers get the precision asked for. The LM head keeps 8 bits: errors there go straight into the logits. The embedding is
looked up and not multiplied, so it costs memory and no time; ONNX Runtime's lookup knows 4 bits only, and gets them in
an int4 engine. What each choice costs in perplexity: docs/log.md.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import NoMatch, Writer, constant, made_by
from trsp_deploy.tools.quiet import quiet_libraries

HEAD_BITS = 8
ACCURACY_LEVEL = 4  # activations in int8 too: products in integers instead of weights unpacked to floats


def quantize(model: ir.Model, bits: int, block_size: int) -> ir.Model:
    """Return the model with weights in `bits` (4 or 8), symmetric, `block_size` along the inputs sharing a scale.

    model: an exported decoder, before or after the other passes. Raises NoMatch when it has no LM head to be found.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    ir.external_data.load_to_model(model)
    head = _own_head(model)
    proto = ir.to_proto(model)
    shared = {"block_size": block_size, "is_symmetric": True, "accuracy_level": ACCURACY_LEVEL}
    operators = ("MatMul", "Gather") if bits == 4 else ("MatMul",)
    layers = tool.DefaultWeightOnlyQuantConfig(bits=bits, op_types_to_quantize=operators, **shared)
    last = tool.DefaultWeightOnlyQuantConfig(bits=HEAD_BITS, op_types_to_quantize=("MatMul",), **shared)
    with quiet_libraries():
        first = tool.MatMulNBitsQuantizer(proto, nodes_to_exclude=[head], algo_config=layers)
        first.process()
        second = tool.MatMulNBitsQuantizer(first.model.model, nodes_to_include=[head], algo_config=last)
        second.process()
        quantised = ir.from_proto(second.model.model)
    return quantised


def _own_head(model: ir.Model) -> str:
    """Give the LM head a weight of its own where it is the embedding's, transposed in the graph; returns its name."""
    output = next(value for value in model.graph.outputs if value.name == "logits")
    node = output.producer()
    while node is not None and node.op_type != "MatMul":
        node = next((value.producer() for value in node.inputs if value is not None and value.producer()), None)
    if node is None or node.name is None:
        raise NoMatch("no product with the LM head makes the logits")
    transposed = made_by(node.inputs[1], "Transpose")
    embedding = None if transposed is None else constant(transposed.inputs[0])
    if embedding is not None:
        writer = Writer(model, "quantize")
        node.replace_input_with(1, writer.constant(np.ascontiguousarray(embedding.T), "lm_head"))
        writer.finish()
    return node.name
