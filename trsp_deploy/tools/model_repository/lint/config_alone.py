"""What is wrong with a config whatever the files that it serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.model_repository.lint.finding import Finding, Say, type_name, value_name
from trsp_deploy.tools.runners.requirements import cuda_devices

TOKENIZER_DIR = "tokenizer_dir"  # the parameter of models that make text into tokens for another (TensorRT-LLM's)
TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def batching(config: Any, completed: bool, error: Say, warning: Say) -> Iterator[Finding]:
    """Whether requests will be batched as the config wants it.

    completed: whether the server may find a max_batch_size itself, where the config says none.
    """
    if config.max_batch_size < 0:
        yield error(f"max_batch_size {config.max_batch_size}: the server takes none below 0")
    if config.HasField("dynamic_batching") and config.max_batch_size == 0 and not completed:
        yield error("dynamic_batching with max_batch_size 0 loads, and never batches")
    for size in config.dynamic_batching.preferred_batch_size:
        if size > config.max_batch_size:
            yield error(f"preferred_batch_size {size} is above max_batch_size {config.max_batch_size}")
    if config.model_transaction_policy.decoupled and config.HasField("dynamic_batching"):
        yield warning("dynamic batching of a decoupled model: requests are handed over together, answers are not")


def states(config: Any, folder: Path, error: Say, warning: Say) -> Iterator[Finding]:
    """Implicit state of sequences: what the server takes for another, and how it begins; folder: the model's."""
    states = config.sequence_batching.state
    pairs = [(state.input_name, state.output_name) for state in states]
    by_input = [output for _, output in sorted(pairs)]
    if by_input != sorted(by_input):
        yield error("states: sorted by input name, their outputs are out of order; pad numbers with zeros (kv_in_00)")
    for title, names in (("input_name", [one for one, _ in pairs]), ("output_name", [other for _, other in pairs])):
        for name, count in Counter(names).items():
            if count > 1:
                yield error(f"{count} states have the {title} '{name}'; the server takes the first alone")
    for state in states:
        for initial in state.initial_state:
            if not _fits(initial, state):
                yield error(f"state '{state.input_name}': its initial_state is of another type or other dims")
            if initial.data_file and not (folder / "initial_state" / initial.data_file).is_file():
                file = f"initial_state/{initial.data_file}"
                yield error(f"state '{state.input_name}': {file}, which a sequence begins with, is missing")
        if not state.initial_state and -1 in state.dims:
            yield warning(
                f"state '{state.input_name}': a dimension of -1 begins as 1 and holds what was there; fix its length"
            )
        elif not state.initial_state:
            yield warning(f"state '{state.input_name}': has no initial_state, so a sequence begins with what was there")


def _fits(initial: Any, state: Any) -> bool:
    """Whether an initial_state is of its state, and fixes what that leaves open (GenerateInitialStateData in core)."""
    return (
        initial.data_type == state.data_type
        and len(initial.dims) == len(state.dims)
        and all(one != -1 and other in (-1, one) for one, other in zip(initial.dims, state.dims, strict=True))
    )


def onnxruntime(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    """What the onnxruntime backend does not take, whatever the graph."""
    for each in (*config.input, *config.output):
        if type_name(each) == "TYPE_BF16":
            yield warning(
                f"'{each.name}': TYPE_BF16 is refused by onnxruntime backends from before March 2026 (their pull "
                "request 335)"
            )
    for each in config.input:
        if each.optional and config.max_batch_size:
            yield error(f"optional input '{each.name}': the onnxruntime backend takes none where max_batch_size is set")


def instances(config: Any, on_cpu: bool, warning: Say) -> Iterator[Finding]:
    """Findings about instance groups. on_cpu: whether there is another config for a machine without a GPU."""
    kinds = {value_name(group, "kind") for group in config.instance_group}
    if "KIND_GPU" in kinds:
        try:
            cuda_devices()
        except EngineUnavailable as problem:
            other = "; `--model-config-name=cpu` takes configs/cpu.pbtxt" if on_cpu else ""
            yield warning(f"KIND_GPU does not load here ({problem}){other}")


def warmup(config: Any, folder: Path, error: Say, warning: Say) -> Iterator[Finding]:
    """What the server would run before its first request; folder: the model's."""
    for sample in config.model_warmup:
        if sample.batch_size == 0:
            yield warning(
                f"warm-up '{sample.name}': is skipped, its batch_size is 0; 1 also where requests are not batched"
            )
        for name, value in sample.inputs.items():
            if value.input_data_file and not (folder / "warmup" / value.input_data_file).is_file():
                yield error(f"warm-up '{sample.name}': warmup/{value.input_data_file} of input '{name}' is missing")


def labels(config: Any, folder: Path, error: Say) -> Iterator[Finding]:
    """The files that name an output's classes; folder: the model's."""
    for each in config.output:
        if each.label_filename and not (folder / each.label_filename).is_file():
            yield error(f"output '{each.name}': {each.label_filename}, which has its labels, is missing")


def tokenizer(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    """Where a model looks for its tokenizer; a path that is relative may be a name on the hub, or the server's own."""
    if TOKENIZER_DIR not in config.parameters:
        return
    named = config.parameters[TOKENIZER_DIR].string_value
    folder = Path(named)
    if "${" in named or not named:
        yield error(f"parameter {TOKENIZER_DIR} is '{named}': the place of a tokenizer was never filled in")
    elif folder.is_dir():
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_PATTERNS):
            yield error(f"parameter {TOKENIZER_DIR}: {named} holds no tokenizer (such as tokenizer.json)")
    elif folder.is_absolute():
        yield warning(f"parameter {TOKENIZER_DIR}: there is no folder {named} here; the server needs it")
