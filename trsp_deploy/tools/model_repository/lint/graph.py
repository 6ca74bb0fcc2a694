"""An ONNX file beside the config that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from trsp_deploy.tools.model_repository.lint.finding import Finding, Say, dims_with_batch, type_name

ONNX_TYPES = {
    1: "TYPE_FP32",
    2: "TYPE_UINT8",
    3: "TYPE_INT8",
    4: "TYPE_UINT16",
    5: "TYPE_INT16",
    6: "TYPE_INT32",
    7: "TYPE_INT64",
    8: "TYPE_STRING",
    9: "TYPE_BOOL",
    10: "TYPE_FP16",
    11: "TYPE_FP64",
    12: "TYPE_UINT32",
    13: "TYPE_UINT64",
    16: "TYPE_BF16",
}


def against_graph(config: Any, path: Path, error: Say) -> Iterator[Finding]:
    """Names, types and dimensions of the config beside the graph's; the server itself does not look at states.

    The backend's own rules: ValidateInputs in triton-inference-server/onnxruntime_backend.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as problem:  # protobuf's own error, which is no OSError
        yield error(f"{path.parent.name}/{path.name}: not an ONNX file ({type(problem).__name__})")
        return
    graph = model.graph
    places = [entry.value for each in graph.initializer for entry in each.external_data if entry.key == "location"]
    # protobuf's form of no UTF-8
    if any(isinstance(text, bytes) for text in (*places, *(value.name for value in (*graph.input, *graph.output)))):
        yield error(f"{path.parent.name}/{path.name}: has a name that is not UTF-8")
        return
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = {node.name: node for node in graph.input if node.name not in initialisers}
    # A request may bring another value for these, where the config has them as optional inputs.
    optional = {node.name: node for node in graph.input if node.name in initialisers and model.ir_version >= 4}
    outputs = {node.name: node for node in graph.output}
    states = config.sequence_batching.state
    shaped_by_the_batch = {name for each in config.batch_output for name in each.target_name}
    for title, wanted, found, fits in (
        ("input", [(each.name, each) for each in config.input if not each.optional], inputs, _takes),
        ("optional input", [(each.name, each) for each in config.input if each.optional], optional, _takes),
        ("output", [(each.name, each) for each in config.output], outputs, _gives),
        ("state input", [(each.input_name, each) for each in states], inputs, _may_be),
        ("state output", [(each.output_name, each) for each in states], outputs, _may_be),
    ):
        for name, each in wanted:
            if name not in found:
                yield error(f"{title} '{name}': the graph has {', '.join(found) or 'none'}")
            elif name not in shaped_by_the_batch:
                tensor = found[name].type.tensor_type
                yield from _against_tensor(config, each, f"{title} '{name}'", tensor, fits, error)
    named = {each.name for each in config.input} | {state.input_name for state in states}
    named |= {control.name for control in config.sequence_batching.control_input}
    named |= {name for each in config.batch_input for name in each.target_name}
    missing = [name for name in inputs if name not in named]
    if config.input and missing:
        yield error(f"inputs of the graph that the config does not have: {', '.join(missing)}")
    for file in sorted(set(places)):
        if not (path.parent / file).is_file():
            yield error(f"{path.parent.name}/{file} is missing: it holds weights of {path.name}")


def _takes(wanted: int, graph: int) -> bool:
    """Whether the server lets an input through: what the graph leaves open may be anything."""
    return graph in (-1, wanted)


def _gives(wanted: int, graph: int) -> bool:
    """Whether an output is as the graph says."""
    return graph == wanted


def _may_be(wanted: int, graph: int) -> bool:
    """Whether a state, which the server does not check, agrees with the graph or is open."""
    return wanted == graph or -1 in (wanted, graph)


def _against_tensor(
    config: Any, each: Any, title: str, tensor: Any, fits: Callable[[int, int], bool], error: Say
) -> Iterator[Finding]:
    """Type and dimensions of an input, output or state beside the graph's.

    The backend's own rules: CompareDimsSupported in triton-inference-server/onnxruntime_backend.
    """
    dtype = type_name(each)
    if ONNX_TYPES.get(tensor.elem_type) != dtype:
        yield error(f"{title}: {dtype} in the config, {ONNX_TYPES.get(tensor.elem_type)} in the graph")
    graph_dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    dims = dims_with_batch(config, each)
    if not graph_dims and all(dim == 1 for dim in each.dims):
        return  # a scalar
    if getattr(each, "allow_ragged_batch", False):
        dims = [-1]  # texts of a batch after each other
    if len(dims) != len(graph_dims) or not all(fits(one, other) for one, other in zip(dims, graph_dims, strict=True)):
        yield error(f"{title}: dims {dims} with the batch, {graph_dims} in the graph")
