"""Fuse normalisations with the residual sum before them, by the fusions of ONNX Runtime's transformers tools.

ONNX Runtime's optimiser fuses the normalisations themselves when it loads a graph, but not the sum into them on a CPU.
"""

from __future__ import annotations

import contextlib
import io

import onnx_ir as ir

from trsp_deploy.tools.graphs.nodes import MICROSOFT, leave_in_files
from trsp_deploy.tools.quiet import quiet_libraries

FUSED = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def fuse_norms(model: ir.Model) -> int:
    """Fuse what the tools can and return how many sums went into a normalisation.

    model: an exported decoder; its graph is replaced.
    """
    from onnxruntime.transformers.fusion_layernorm import FusionLayerNormalization
    from onnxruntime.transformers.fusion_simplified_layernorm import (
        FusionSimplifiedLayerNormalization,
        FusionSkipSimplifiedLayerNormalization,
    )
    from onnxruntime.transformers.fusion_skiplayernorm import FusionSkipLayerNormalization
    from onnxruntime.transformers.onnx_model import OnnxModel

    in_files = leave_in_files(model)
    wrapped = OnnxModel(ir.to_proto(model))
    # They print where shapes are unknown to them, and fuse without.
    with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
        FusionSimplifiedLayerNormalization(wrapped).apply()
        FusionLayerNormalization(wrapped).apply()
        FusionSkipSimplifiedLayerNormalization(wrapped).apply()
        FusionSkipLayerNormalization(wrapped).apply()
        wrapped.prune_graph(allow_remove_graph_inputs=False)
        model.graph = ir.from_proto(wrapped.model).graph
        for name, value in model.graph.initializers.items():
            if name in in_files:  # the tools know a matrix by where it lies in its file, and not in which folder
                value.const_value = in_files[name]
        model.graph.opset_imports.setdefault(MICROSOFT, 1)  # the tools leave it out, and onnx's shape inference asks
    return sum(node.op_type in FUSED for node in model.graph)
