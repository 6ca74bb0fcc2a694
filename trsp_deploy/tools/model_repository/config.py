"""`config.pbtxt`: written as text, read and checked through Triton's own protobuf schema.

The schema is a file of the package tritonclient, which cannot be installed beside onnx (it holds protobuf below 7);
`trsp-deploy fetch triton-schema` keeps that one file.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trsp_deploy.errors import RunError
from trsp_deploy.tools.serving.requests import GenerationRequest
from trsp_deploy.tools.sources.packaged import find_asset

if TYPE_CHECKING:
    from trsp_deploy.tools.graphs.step import State

SCHEMA = "triton-schema"

# Of a `GenerationRequest`, which says what may be left out: name -> (type, dims).
INPUTS: dict[str, tuple[str, int]] = {
    "text_input": ("TYPE_STRING", 1),
    "add_special_tokens": ("TYPE_BOOL", 1),
    "max_tokens": ("TYPE_INT32", 1),
    "min_length": ("TYPE_INT32", 1),
    "stream": ("TYPE_BOOL", 1),
    "exclude_input_in_output": ("TYPE_BOOL", 1),
    "temperature": ("TYPE_FP32", 1),
    "top_k": ("TYPE_INT32", 1),
    "top_p": ("TYPE_FP32", 1),
    "repetition_penalty": ("TYPE_FP32", 1),
    "seed": ("TYPE_INT64", 1),
    "ignore_eos": ("TYPE_BOOL", 1),
    "stop": ("TYPE_STRING", -1),
}
OUTPUTS = {"text_output": "TYPE_STRING", "output_tokens": "TYPE_INT32", "finish_reason": "TYPE_STRING"}
# The warm-up's inputs, files below <name>/warmup: a string as Triton reads it from a file, its length (four bytes,
# little-endian) before its UTF-8, and few new tokens.
WARMUP_TEXT, WARMUP_TOKENS = "Hello", 2
WARMUP = {
    "text_input": len(WARMUP_TEXT).to_bytes(4, "little") + WARMUP_TEXT.encode(),
    "max_tokens": WARMUP_TOKENS.to_bytes(4, "little"),
}
DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}  # by numpy's names
IDLE_S = 60  # of a sequence; the server's default of one second is shorter than a thoughtful caller's step
# A line that the config of a step model has had since there are any: what is without it is none of ours.
STEPS = "# Sequences take turns: rows of one batch would have to be of one length."


def generation_config(name: str, kind: str, waiting: int) -> str:
    """The text of the generating model's config. kind: "KIND_CPU" or "KIND_GPU". waiting: requests that may."""
    inputs = ",\n".join(
        f'  {{ name: "{input_name}" data_type: {dtype} dims: [ {dims} ]{_optional(input_name)} }}'
        for input_name, (dtype, dims) in INPUTS.items()
    )
    outputs = ",\n".join(
        f'  {{ name: "{output}" data_type: {dtype} dims: [ 1 ] }}' for output, dtype in OUTPUTS.items()
    )
    warmup = "\n".join(
        f'    inputs {{ key: "{file}" value {{ data_type: {INPUTS[file][0]} dims: [ 1 ] input_data_file: "{file}" }} }}'
        for file in WARMUP
    )
    return f"""name: "{name}"
backend: "python"
# Requests are batched by the model itself, token by token; Triton hands them over as they come.
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
# Requests that may wait beside those that are answered; further ones get UNAVAILABLE at once.
parameters {{ key: "max_waiting" value {{ string_value: "{waiting}" }} }}
version_policy {{ specific {{ versions: [ 1 ] }} }}
input [
{inputs}
]
output [
{outputs}
]
{_instances(kind)}
model_warmup [
  {{
    name: "one short text"
    batch_size: 1
{warmup}
  }}
]
"""


def _optional(input_name: str) -> str:
    return "" if GenerationRequest.model_fields[input_name].is_required() else " optional: true"


def step_config(
    name: str, kind: str, logits: tuple[str, int], states: Sequence[State], sequences: int, threads: int | None
) -> str:
    """The text of the step model's config.

    kind: "KIND_CPU" or "KIND_GPU". logits: their dtype, and how many. states: of the graph. sequences: that the server
    keeps at once. threads: of an operator; None leaves it to ONNX Runtime.
    """
    states_text = ",\n".join(_state(state) for state in states)
    parameter = f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{threads}" }} }}\n'
    return f"""name: "{name}"
backend: "onnxruntime"
{STEPS}
max_batch_size: 1
version_policy {{ specific {{ versions: [ 1 ] }} }}
input [ {{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] }} ]
output [ {{ name: "logits" data_type: {DATA_TYPES[logits[0]]} dims: [ {logits[1]} ] }} ]
{_instances(kind)}
{"" if threads is None else parameter}sequence_batching {{
  # A sequence that is not heard of for so long ends.
  max_sequence_idle_microseconds: {IDLE_S * 1_000_000}
  oldest {{ max_candidate_sequences: {sequences} }}
  state [
{states_text}
  ]
}}
"""


def _instances(kind: str) -> str:
    """One instance: with several GPUs Triton would make one for each, and an engine runs on the first it sees."""
    gpus = " gpus: [ 0 ]" if kind == "KIND_GPU" else ""
    return f"instance_group [ {{ count: 1 kind: {kind}{gpus} }} ]"


def _state(state: State) -> str:
    form = f"data_type: {DATA_TYPES[state.dtype]} dims: [ {', '.join(map(str, state.dims))} ]"
    return f"""    {{
      input_name: "{state.input_name}"
      output_name: "{state.output_name}"
      {form}
      use_same_buffer_for_input_output: true
      initial_state {{ name: "empty" {form} zero_data: true }}
    }}"""


def parse_config(text: str, where: str) -> Any:
    """A config as `inference.ModelConfig`; raises RunError with line and column, or without the schema."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, schema().ModelConfig())
    except text_format.ParseError as problem:
        raise RunError(f"{where}: {problem}") from problem


@functools.cache
def schema() -> Any:
    """Triton's `model_config_pb2`; raises RunError when it is not here."""
    path = find_asset(SCHEMA)
    if path is None:
        raise RunError(
            f"Triton's configuration schema is not on this machine; run `trsp-deploy fetch {SCHEMA}` (0.1 MB)"
        )
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # its SHA-256 is pinned in tools/sources/assets.py
    return module
