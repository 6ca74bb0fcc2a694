"""Forms of a decoder's graph that other exporters write and that no engine here could run."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs.decoder_io import CACHE_DTYPE, DYNAMIC_AXES, WRITE_INDICES, Bindings, cache_inputs


def check_ranks(inputs: Bindings) -> None:
    """Raise EngineUnavailable for tokens, mask or positions that are not of several texts with several tokens each."""
    for name, axes in DYNAMIC_AXES.items():
        if name in inputs and len(shape := inputs[name][1]) != len(axes):
            raise EngineUnavailable(
                f"the graph's {name} is [{', '.join(map(str, shape))}]; understood is [{', '.join(axes.values())}]"
            )


def check_cache(onnx: Path, spec: EngineSpec, inputs: Bindings) -> None:
    """Raise EngineUnavailable for a cache that cannot grow with the text, or that bf16 cannot be made of."""
    fixed = WRITE_INDICES in inputs  # a cache that is longer than the text, and says where
    for name in cache_inputs(inputs):
        dtype, shape = inputs[name]
        if len(shape) != 4 or (isinstance(shape[2], int) and not fixed):
            raise EngineUnavailable(
                f"{onnx}: its {name} is [{', '.join(map(str, shape))}]; understood is [batch, heads, past, head "
                "size], the past of any length"
            )
        if spec.precision == "bf16" and dtype == CACHE_DTYPE["fp32"]:
            raise EngineUnavailable(f"{onnx}: is of fp32, and {spec.name} is made of an fp16 graph, or of one of bf16")


def check_reads_prompts(inputs: Bindings, outputs: Bindings) -> None:
    """Raise EngineUnavailable for tokens or logits of a fixed number: such an engine would stop at its first prompt."""
    for name, shape in (("input_ids", inputs["input_ids"][1]), ("logits", outputs["logits"][1])):
        if isinstance(shape[1], int):
            raise EngineUnavailable(
                f"the graph's {name} are of {shape[1]} tokens a text, [{', '.join(map(str, shape))}]; understood is "
                "one that reads any number of them and gives logits of each"
            )
