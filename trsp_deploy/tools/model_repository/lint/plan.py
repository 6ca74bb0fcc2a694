"""A TensorRT plan beside the config that serves it. Only TensorRT on a GPU can read one; elsewhere that is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.model_repository.lint.finding import Finding, Say, dims_with_batch, type_name
from trsp_deploy.tools.runners.requirements import cuda_devices, load_package
from trsp_deploy.tools.runners.trt_log import deserialized, logger, made

# TensorRT's names
TYPES = {
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "BF16": "TYPE_BF16",
    "INT8": "TYPE_INT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8",
    "BOOL": "TYPE_BOOL",
}


def against_plan(config: Any, path: Path, error: Say, warning: Say) -> Iterator[Finding]:
    """Names, types and dimensions of the config beside the plan's, and max_batch_size beside its profiles."""
    place = f"{path.parent.name}/{path.name}"
    try:
        trt: Any = load_package("tensorrt")
        cuda_devices()  # before anything of TensorRT: a Runtime made without a usable driver can crash the process
    except EngineUnavailable as problem:
        yield warning(f"{place} was not looked into: that takes TensorRT and a GPU ({problem})")
        return
    log = logger(trt)
    log.errors.clear()
    try:
        failure = f"{place} does not load with TensorRT {trt.__version__} here"
        runtime = made(log, failure, lambda: trt.Runtime(log))
        engine = deserialized(log, failure, runtime, path)
    except EngineUnavailable as problem:
        yield error(str(problem))
        return
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    for title, wanted, there in (
        ("input", config.input, inputs),
        ("output", config.output, set(names) - inputs),
    ):
        for each in wanted:
            if each.name not in there:
                yield error(f"{title} '{each.name}': the plan has {', '.join(sorted(there)) or 'none'}")
            else:
                yield from _against_tensor(config, each, f"{title} '{each.name}'", engine, error)
    most = _largest_batch(engine, inputs)
    if config.max_batch_size and most is not None and config.max_batch_size > most:
        yield error(f"max_batch_size {config.max_batch_size}, and the plan's profiles end at a batch of {most}")


def _against_tensor(config: Any, each: Any, title: str, engine: Any, error: Say) -> Iterator[Finding]:
    dtype = type_name(each)
    there = TYPES.get(engine.get_tensor_dtype(each.name).name)
    if dtype != there:
        yield error(f"{title}: {dtype} in the config, {there} in the plan")
    if each.is_shape_tensor or getattr(each, "allow_ragged_batch", False):
        return
    dims = dims_with_batch(config, each)
    shape = list(engine.get_tensor_shape(each.name))
    if len(dims) + 1 == len(shape) and not config.max_batch_size:
        dims = [-1, *dims]  # by which the backend knows that it has to find the batch size itself
    fits = len(dims) == len(shape) and all(-1 in pair or pair[0] == pair[1] for pair in zip(dims, shape, strict=True))
    if not fits:
        yield error(f"{title}: dims {dims} with the batch, {shape} in the plan")


def _largest_batch(engine: Any, inputs: set[str]) -> int | None:
    """What stands first in every input's shape, at most over all profiles; None where no input has a shape."""
    shaped = [name for name in inputs if len(engine.get_tensor_shape(name)) and not engine.is_shape_inference_io(name)]
    if not shaped:
        return None
    profiles = range(engine.num_optimization_profiles)
    # A profile's shapes are its smallest, its best and its largest.
    return max(min(int(engine.get_tensor_profile_shape(name, one)[2][0]) for name in shaped) for one in profiles)
