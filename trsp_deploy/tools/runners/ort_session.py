"""ONNX Runtime's sessions: made on the wanted provider or not at all, and its errors in one line."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.errors import EngineUnavailable, one_line
from trsp_deploy.recipe import Backend, EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners import denormals
from trsp_deploy.tools.runners.requirements import PACKAGES, cuda_devices, load_package

PROVIDERS: dict[Backend, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
PROVIDER_OPTIONS: dict[Backend, dict[str, str]] = {
    "onnxruntime-cpu": {},
    # TF32 would round fp32 products to 10 bits: an fp32 engine could then not agree with PyTorch.
    "onnxruntime-cuda": {"use_tf32": "0"},
}
NUMPY_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def check_cpu(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless CPU engines can be built and run here."""
    load_package(spec.backend)


def check_cuda(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless CUDA engines can be built and run here."""
    _check_cuda()


def _check_cuda() -> None:
    ort = load_package("onnxruntime-cuda")
    provider = PROVIDERS["onnxruntime-cuda"]
    # Tells only what was compiled in; whether it runs shows after a session has been made.
    if provider not in ort.get_available_providers():
        raise EngineUnavailable(
            f"onnxruntime-gpu is not installed, and onnxruntime {ort.__version__} has no {provider}: "
            f"{PACKAGES['onnxruntime-cuda'].install}"
        )
    cuda_devices()


def create_session(
    model: Path,
    backend: Backend,
    threads: int | None = None,
    *,
    optimised: bool = False,
    lean: bool = False,
    save_to: Path | None = None,
) -> Any:
    """An InferenceSession that really runs on the wanted provider.

    threads: intra-op threads; None takes every core that this process may use, in a container as many as its limit is.
    optimised: the file was saved after optimisation, so none is done again.
    lean: hold as little as can be, at the price of time: nothing is folded (on the CPU fp16 weights stay fp16 until
        they are multiplied, and only one at a time is fp32), nodes run in the order of the file, so that its writer
        decides what has to be held at a time, and what is freed goes back to the system.
    save_to: write the optimised graph there, with its weights beside it in `<name>.data`.
    Raises EngineUnavailable when the file is refused, or when ONNX Runtime falls back to the CPU.
    """
    ort = load_package(backend)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.add_session_config_entry(denormals.OPTION, "1")
    if lean:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
    # Errors come as exceptions; only a provider that does not load is explained in the log alone.
    options.log_severity_level = 3 if backend == "onnxruntime-cuda" else 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if optimised or lean else levels.ORT_ENABLE_ALL
    if save_to is not None:
        # EXTENDED is the highest level whose result other machines may run, and above it there are only layouts for
        # convolutions. Measured on 8-layer Llama and OPT: the saved graph opened without optimisation gives the live
        # session's logits bit for bit at its speed (no optimisation: 27% slower), and opens in less than half the time.
        # Constant folding writes a tied LM head as a matrix of its own, as it does in memory in any live session.
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(save_to)
        # A protobuf file ends at 2 GB; one form for every size means that the form of large models is always tested.
        entry = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{entry}_file_name", f"{save_to.name}.data")
        options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
    trouble = _prepare_cuda(ort) if backend == "onnxruntime-cuda" else ""
    provider = PROVIDERS[backend]
    quiet, kept = warnings.catch_warnings(), denormals.kept_from_a_session()
    with one_line_errors(f"ONNX Runtime cannot load {model}"), quiet, kept:
        warnings.simplefilter("ignore")  # it warns about a missing provider; below that is an error
        session = ort.InferenceSession(
            str(model),
            options,
            providers=[provider],
            provider_options=[PROVIDER_OPTIONS[backend]],
            enable_fallback=False,  # where a GPU is full it would print, and run on the CPU
        )
    if session.get_providers()[0] != provider:
        raise EngineUnavailable(
            f"ONNX Runtime fell back to {session.get_providers()[0]}, because {provider} did not load"
            f" ({trouble or 'its log above has the reason'}); repair: {PACKAGES[backend].install}"
        )
    return session


def _prepare_cuda(ort: ModuleType) -> str:
    """Load CUDA and cuDNN out of the nvidia-* wheels; returns what ONNX Runtime says about those it cannot find."""
    _check_cuda()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints
        ort.preload_dlls()
    return said.getvalue().partition("\n")[0]


FOREIGN = (RuntimeError, UnicodeDecodeError)  # the second where its message names something that is not UTF-8


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no base class, into EngineUnavailable; bugs go on as they are."""
    try:
        yield
    except Exception as problem:
        if not (type(problem).__module__.startswith("onnxruntime") or isinstance(problem, FOREIGN)):
            raise
        detail = one_line(problem).removeprefix("[ONNXRuntimeError] : ")
        raise EngineUnavailable(f"{what}: {detail}") from problem


def bindings_of(nodes: list[Any]) -> decoder_io.Bindings:
    return {
        node.name: (
            NUMPY_DTYPES.get(node.type, node.type),
            tuple(length if isinstance(length, int) else str(length) for length in node.shape),
        )
        for node in nodes
    }
