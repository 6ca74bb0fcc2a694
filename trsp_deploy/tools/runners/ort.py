"""ONNX Runtime, on the CPU or through its CUDA provider.

The KV cache never leaves the device. A graph with fused attention (tools/graphs) writes it in place:
`past_key_values.*` and `present.*` are one memory, allocated once and longer than the text. From any other graph a
step's `present.*` are bound as the next step's `past_key_values.*`. This module imports no torch, so that a measuring
process stays small.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import Backend, EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.huge_pages import in_huge_pages
from trsp_deploy.tools.runners.manifest import EngineManifest
from trsp_deploy.tools.runners.requirements import PACKAGES, cuda_devices, load_package, one_line

PROVIDERS: dict[Backend, str] = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
}
PROVIDER_OPTIONS: dict[Backend, dict[str, str]] = {
    "onnxruntime-cpu": {},
    # TF32 would round fp32 products to 10 bits: an fp32 engine could then not agree with PyTorch.
    "onnxruntime-cuda": {"use_tf32": "0"},
}
DEVICES: dict[Backend, str] = {"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"}
NUMPY_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
CHUNK = 256  # tokens: room behind the prompt in a cache that is written in place


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


def open_engine(folder: Path, manifest: EngineManifest) -> OrtRunner:
    """A runner for a built engine."""
    spec = manifest.spec
    optimised = spec.backend == "onnxruntime-cpu"
    return OrtRunner(folder / manifest.file, backend=spec.backend, threads=spec.threads, optimised=optimised)


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

    threads: intra-op threads; None takes every core that this process may use.
    optimised: the file was saved after optimisation, so none is done again.
    lean: hold as little as can be, at the price of time: nothing is folded (on the CPU fp16 weights stay fp16 until
        they are multiplied, and only one at a time is fp32), nodes run in the order of the file, so that whoever wrote
        it decides what has to be held at a time, and what is freed goes back to the system.
    save_to: write the optimised graph there, with its weights beside it in `<name>.data`.
    Raises EngineUnavailable when the file is refused, or when ONNX Runtime falls back to the CPU.
    """
    ort = load_package(backend)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
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
    with one_line_errors(f"ONNX Runtime cannot load {model}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about a missing provider; below that is an error
        session = ort.InferenceSession(
            str(model), options, providers=[provider], provider_options=[PROVIDER_OPTIONS[backend]]
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


class OrtRunner(Runner):
    """Generates with ONNX Runtime from an engine or from any decoder's ONNX file.

    model: the ONNX file. backend: "onnxruntime-cpu" or "onnxruntime-cuda".
    threads: intra-op threads; None takes every core that this process may use.
    optimised: the file is a built CPU engine, whose graph needs no optimisation any more.
    lean: hold as little memory as can be, at the price of time.
    brief: a few tokens are run, too few to be worth moving the weights into huge pages.
    reserve: tokens that the cache has room for from the start, where the graph writes it in place; it grows as needed.
    """

    def __init__(
        self,
        model: Path,
        *,
        backend: Backend = "onnxruntime-cpu",
        threads: int | None = None,
        optimised: bool = False,
        lean: bool = False,
        brief: bool = False,
        reserve: int = 0,
    ) -> None:
        self.model = model
        self.backend = backend
        self.threads = threads
        self.optimised = optimised
        self.lean = lean
        self.brief = brief
        self.reserve = reserve
        self._session: Any = None
        self._inputs: decoder_io.Bindings = {}
        self._in_place = False
        self._fixed: int | None = None  # tokens in a cache of fixed length
        self._binding: Any = None  # an IOBinding; with the cache in place it is made once and holds the cache
        self._cache: dict[str, Any] = {}  # input name -> OrtValue (batch, heads, past or capacity, head_dim)
        self._capacity = 0  # tokens that the cache has room for, where it is written in place
        self._outputs: decoder_io.Bindings = {}
        self._logits: np.ndarray | None = None  # (batch, positions, vocabulary), bound
        self._tokens: dict[str, np.ndarray] = {}  # bound
        self._attention_mask: np.ndarray | None = None  # (batch, past)

    def __enter__(self) -> Self:
        worth_it = self.backend == "onnxruntime-cpu" and not self.lean and not self.brief
        with in_huge_pages() if worth_it else contextlib.nullcontext():
            self._session = create_session(
                self.model, self.backend, self.threads, optimised=self.optimised, lean=self.lean
            )
        self._inputs = bindings_of(self._session.get_inputs())
        self._in_place = decoder_io.IN_PLACE in self._session.get_modelmeta().custom_metadata_map
        self._outputs = bindings_of(self._session.get_outputs())
        decoder_io.check_decoder(self._inputs, self._outputs)
        self._fixed = decoder_io.cache_length(self._inputs)
        return self

    def twin(self) -> OrtRunner:
        """A second runner over this one's session, with a cache of its own; it ends with this one."""
        other = OrtRunner(self.model, backend=self.backend, threads=self.threads, optimised=self.optimised)
        other._session, other._inputs, other._outputs = self._session, self._inputs, self._outputs
        other._in_place, other._fixed = self._in_place, self._fixed
        return other

    @property
    def in_place(self) -> bool:
        """Whether the graph writes its cache in place, and the cache may be longer than the text."""
        return self._in_place and self._fixed is None

    @property
    def cache(self) -> dict[str, Any]:
        """The cache as OrtValues (batch, heads, capacity, head_dim), by input name."""
        return self._cache

    def allocate(self, batch: int, capacity: int) -> None:
        """A cache of so many rows and places, in place of the one there is; its contents are undefined."""
        self._capacity = capacity
        shapes = self._cache_shapes(batch, capacity)
        self._cache = {name: self._allocate(shape, dtype) for name, (dtype, shape) in shapes.items()}
        self._bind_cache()

    def step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Append one token to each row of a cache that the caller manages.

        input_ids: (batch, 1). attention_mask: (batch, length), the new token among it, at most the cache's capacity.
        Returns logits (batch, 1, vocabulary) float32.
        """
        return self._step(input_ids, attention_mask)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self._outputs["logits"][1][-1])

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = {}
        self._attention_mask = self._logits = None
        self._binding = self._session = None

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        batch, sequence = input_ids.shape
        self.allocate(batch, (self._fixed or max(self.reserve, sequence + CHUNK)) if self._in_place else 0)
        return self._step(input_ids, attention_mask, keep=1 if last_only else 0)

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        value, device = load_package(self.backend).OrtValue, DEVICES[self.backend]
        if self._fixed is not None:  # all of it is read: what is not written yet is masked, and has to be a number
            return value.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
        return value.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, device, 0)

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        """The cache of a text that has not begun, by input name: what a session is fed that is driven from outside."""
        return {name: np.zeros(shape, dtype) for name, (dtype, shape) in self._cache_shapes(batch, 0).items()}

    def _cache_shapes(self, batch: int, past: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        inputs = {name: self._inputs[name] for name in decoder_io.cache_inputs(self._inputs)}
        return {
            name: (dtype, decoder_io.input_shape(name, shape, batch=batch, sequence=0, past=past))
            for name, (dtype, shape) in inputs.items()
        }

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        if self._attention_mask is None:
            raise RuntimeError("decode comes after prefill")
        return self._step(input_ids, decoder_io.extended(self._attention_mask, input_ids))

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray, keep: int = 0) -> np.ndarray:
        if self._in_place and attention_mask.shape[1] > self._capacity:
            self._grow()
        tokens = decoder_io.token_inputs(self._inputs, input_ids, attention_mask, keep)
        for name, value in tokens.items():
            self._binding.bind_cpu_input(name, value)
        self._tokens = tokens  # bound in place: they must outlive the run
        kept = tokens.get(decoder_io.LOGITS_POSITIONS)
        logits = self._bind_logits(len(input_ids), input_ids.shape[1] if kept is None else len(kept))
        with one_line_errors(f"ONNX Runtime stopped in {self.model}"):
            self._session.run_with_iobinding(self._binding)
        if not self._in_place:
            present = self._binding.get_outputs()[:-1]
            self._cache = dict(zip(self._cache, present, strict=True))
            self._bind_cache()
        self._attention_mask = attention_mask
        result = logits.astype(np.float32)  # a copy: the buffer is written again by the next step
        return result[:, -keep:] if keep else result  # (batch, sequence or keep, vocabulary)

    def _bind_logits(self, batch: int, positions: int) -> np.ndarray:
        """The host memory that a run writes logits into, (batch, positions, vocabulary); kept from step to step."""
        shape = (batch, positions, self.vocabulary)
        if self._logits is None or self._logits.shape != shape:
            # By address: asking the binding for its outputs makes an object of every one of them, 0.1 ms a step.
            self._logits = np.empty(shape, dtype=self._outputs["logits"][0])
            address, dtype = self._logits.ctypes.data, self._logits.dtype.type
            self._binding.bind_output("logits", "cpu", 0, dtype, shape, address)
        return self._logits

    def _bind_cache(self) -> None:
        """Read `past_key_values.*` from the cache, and write `present.*` into it or into memory of its own."""
        self._binding, self._logits = self._session.io_binding(), None
        for name, value in self._cache.items():
            self._binding.bind_ortvalue_input(name, value)
            if self._in_place:
                self._binding.bind_ortvalue_output(decoder_io.present(name), value)
            else:
                self._binding.bind_output(decoder_io.present(name), DEVICES[self.backend])

    def _grow(self) -> None:
        """Move the cache into twice the room, so that a text of n tokens is moved log n times.

        Raises EngineUnavailable where the cache has a fixed length.
        """
        if self._fixed is not None:
            raise EngineUnavailable(f"{self.model}: its cache holds {self._fixed} tokens, and the text is longer")
        ort = load_package(self.backend)
        filled, self._capacity = self._capacity, max(2 * self._capacity, CHUNK)
        for name, value in self._cache.items():
            old = value.numpy()  # (batch, heads, filled, head_dim)
            new = np.zeros((*old.shape[:2], self._capacity, old.shape[3]), dtype=old.dtype)
            new[:, :, :filled] = old
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(new, DEVICES[self.backend], 0)
        self._bind_cache()
