"""TensorRT 10, TensorRT 11 and TensorRT for RTX, through the calls that all three have.

Networks are strongly typed: 11 and RTX know nothing else, and 10 then runs the same graph in the
same precision. So precision is that of the ONNX file, and no builder flag sets it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from trsp_deploy.errors import EngineSpecError, EngineUnavailable, nearest
from trsp_deploy.recipe import Backend, EngineSpec, ShapeProfile
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.manifest import BuiltEngine, EngineManifest
from trsp_deploy.tools.runners.requirements import cuda_devices, load_package, one_line

if TYPE_CHECKING:
    import torch

ENGINE = "model.engine"
BUILD_LOG = "build.log"
NUMPY_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32"}


def check_build(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless `build` can work here, EngineSpecError for an unknown compute capability.

    TensorRT compiles for the GPU in this machine; TensorRT-RTX compiles ahead of time and needs none.
    """
    trt = load_package(spec.backend)
    compute_capabilities(trt, spec)
    if spec.backend == "tensorrt":
        cuda_devices()


def check_run(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless engines of this backend can run here."""
    load_package(spec.backend)
    cuda_devices()
    _check_torch()


def _check_torch() -> None:
    import torch

    # Buffers are torch tensors; a CPU build of torch cannot make them, GPU or not.
    if not torch.cuda.is_available():
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        raise EngineUnavailable(
            f"torch {torch.__version__} is {build} and cannot use this GPU; pytorch.org/get-started has one that can"
        )


def compute_capabilities(trt: ModuleType, spec: EngineSpec) -> list[Any]:
    """The spec's build targets as TensorRT-RTX's enum; empty means every GPU that it supports."""
    wanted = spec.compute_capabilities
    if not wanted:
        return []
    if not hasattr(trt, "ComputeCapability"):
        raise EngineSpecError(
            f"engine {spec.name}: `compute_capabilities` is for tensorrt-rtx; {spec.backend} builds for this GPU only"
        )
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    for name in wanted:
        if name.lower() not in known:
            hint = nearest(name.lower(), known)
            raise EngineSpecError(
                f"engine {spec.name}: no compute capability '{name}'{hint}; valid: {', '.join(sorted(known))}"
            )
    return [known[name.lower()] for name in wanted]


def build(onnx: Path, spec: EngineSpec, folder: Path) -> BuiltEngine:
    """Parse the graph, compile it for every profile of the spec, and write model.engine and build.log into `folder`.

    Raises EngineUnavailable with the parser's or the builder's errors as one line.
    """
    trt = load_package(spec.backend)
    log = _logger(trt)
    with log.into(folder / BUILD_LOG):
        builder = _made(log, "no builder", lambda: trt.Builder(log))
        # Without it 10 would choose precisions itself. The flag is another bit in 10 than in 11.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(trt, network, log, onnx)
        inputs = _network_bindings([network.get_input(i) for i in range(network.num_inputs)])
        outputs = _network_bindings([network.get_output(i) for i in range(network.num_outputs)])
        decoder_io.check_decoder(inputs, outputs)
        decoder_io.check_precision(inputs, spec.graph_precision)
        config = _configure(trt, builder, spec)
        for profile in spec.profiles:
            config.add_optimization_profile(_optimisation_profile(builder, inputs, profile))
        engine = _made(log, f"cannot build {onnx}", lambda: builder.build_serialized_network(network, config))
        (folder / ENGINE).write_bytes(memoryview(engine))
    return BuiltEngine(ENGINE, (ENGINE,), inputs, outputs)


def open_engine(folder: Path, manifest: EngineManifest) -> TrtRunner:
    """A runner for a built engine."""
    return TrtRunner(
        folder / manifest.file, backend=manifest.spec.backend, inputs=manifest.inputs, outputs=manifest.outputs
    )


@functools.cache
def _logger(trt: ModuleType) -> Any:
    """The one logger of this process: TensorRT keeps the first that it is given and ignores later ones."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors in memory, and while a build runs everything in its file."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._file: Any = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if self._file is not None:
                print(f"[{severity.name}] {message}", file=self._file)

        @contextlib.contextmanager
        def into(self, path: Path) -> Iterator[None]:
            self.errors.clear()
            with path.open("w", encoding="utf-8") as self._file:
                try:
                    yield
                finally:
                    self._file = None

        def complaint(self, otherwise: str = "no reason was logged") -> str:
            """The errors since the last call, once each, as one line."""
            lines = list(dict.fromkeys(one_line(error) for error in self.errors))
            self.errors.clear()
            return "; ".join(lines) or otherwise

    return Log()


def _made(log: Any, failure: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; TensorRT reports a failure as None or as a null factory, with the reason in its log."""
    try:
        made = make()
    except (TypeError, RuntimeError) as problem:
        raise EngineUnavailable(f"TensorRT: {failure}: {log.complaint(one_line(problem))}") from problem
    if made is None:
        raise EngineUnavailable(f"TensorRT: {failure}: {log.complaint()}")
    return made


def _parse(trt: ModuleType, network: Any, log: Any, onnx: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    raise EngineUnavailable(f"TensorRT cannot read {onnx}: {'; '.join(dict.fromkeys(errors)) or log.complaint()}")


def _parser_error(error: Any) -> str:
    where = f" in node '{error.node_name()}' ({error.node_operator()})" if error.node_operator() else ""
    return f"{one_line(error.desc())}{where}"


def _network_bindings(tensors: list[Any]) -> decoder_io.Bindings:
    bindings: decoder_io.Bindings = {}
    for tensor in tensors:
        shape = tuple(
            length if length >= 0 else tensor.get_dimension_name(axis) or f"dimension {axis}"
            for axis, length in enumerate(tensor.shape)
        )
        bindings[tensor.name] = (NUMPY_DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), shape)
    return bindings


def _configure(trt: ModuleType, builder: Any, spec: EngineSpec) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers and kernels in the log and the engine
    if spec.precision == "fp32":
        # On by default, it would round fp32 products to 10 bits: the engine could not agree with PyTorch.
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(spec.workspace_gib * 2**30))
    targets = compute_capabilities(trt, spec)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    return config


def _optimisation_profile(builder: Any, inputs: decoder_io.Bindings, profile: ShapeProfile) -> Any:
    result = builder.create_optimization_profile()
    for name, (_, shape) in inputs.items():
        limits = [
            decoder_io.input_shape(
                name,
                shape,
                batch=getattr(profile.batch, end),
                sequence=getattr(profile.sequence, end),
                past=getattr(profile.past, end),
            )
            for end in ("min", "opt", "max")
        ]
        result.set_shape(name, *limits)
    return result


class TrtRunner(Runner):
    """Generates with a built TensorRT or TensorRT-RTX engine on the first GPU of this process.

    engine: the serialised engine. backend: "tensorrt" or "tensorrt-rtx".
    inputs, outputs: the graph's, as the engine's manifest has them.
    """

    def __init__(
        self, engine: Path, *, backend: Backend, inputs: decoder_io.Bindings, outputs: decoder_io.Bindings
    ) -> None:
        self.engine = engine
        self.backend = backend
        self._inputs = inputs
        self._outputs = outputs
        self._trt: Any = None
        self._runtime: Any = None  # has to outlive the engine
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._profiles: list[dict[str, list[tuple[int, ...]]]] = []  # input name -> min, opt, max shape
        self._attention_mask: np.ndarray | None = None  # (batch, past)
        # Two buffers for each part of the cache, read and written in turn: a step never writes what it reads.
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._reads = 0

    def __enter__(self) -> Self:
        import torch

        self._trt = load_package(self.backend)
        # Before anything of TensorRT: a Runtime made without a usable driver can crash the process.
        devices = cuda_devices()
        _check_torch()
        cuda: Any = torch.cuda
        cuda.init()
        log = _logger(self._trt)
        log.errors.clear()
        gpu = f"{devices[0].name} ({devices[0].compute_capability}, {devices[0].memory_bytes / 2**30:.0f} GiB)"
        failure = f"cannot load {self.engine} on {gpu}"
        self._runtime = _made(log, failure, lambda: self._trt.Runtime(log))
        self._engine = _made(log, failure, lambda: self._runtime.deserialize_cuda_engine(self.engine.read_bytes()))
        self._context = _made(log, failure, self._engine.create_execution_context)
        # A stream of its own: on the default one TensorRT synchronises the device around every call.
        self._stream = cuda.Stream()
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._attention_mask = None
        self._buffers = {}
        self._context = self._engine = self._runtime = self._stream = None
        # TensorRT allocates beside torch, so torch's idle memory is out of reach for the next engine.
        torch.cuda.empty_cache()

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        logits = self._step(input_ids, attention_mask)
        return logits[:, -1:] if last_only else logits

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        if self._attention_mask is None:
            raise RuntimeError("decode comes after prefill")
        return self._step(input_ids, decoder_io.extended(self._attention_mask, input_ids))

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        import torch

        batch, sequence = input_ids.shape
        past = attention_mask.shape[1] - sequence
        shapes = {
            name: decoder_io.input_shape(name, shape, batch=batch, sequence=sequence, past=past)
            for name, (_, shape) in self._inputs.items()
        }
        try:
            with torch.cuda.stream(self._stream):
                self._select_profile(shapes)
                tokens = self._bind_inputs(input_ids, attention_mask, shapes)
                logits = self._bind_outputs()
                if not self._context.execute_async_v3(self._stream.cuda_stream):
                    raise EngineUnavailable(f"TensorRT: stopped in {self.engine}: {_logger(self._trt).complaint()}")
                result: np.ndarray = logits.float().cpu().numpy()  # waits for the stream; (batch, sequence, vocabulary)
        except torch.cuda.OutOfMemoryError as problem:
            raise EngineUnavailable(
                f"{self.backend}: the GPU's memory is full at batch {batch} with {attention_mask.shape[1]} tokens"
            ) from problem
        del tokens  # TensorRT reads them until the stream is done
        self._reads = 1 - self._reads
        self._attention_mask = attention_mask
        return result

    def _select_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Choose, among the profiles that cover these shapes, the one tuned for the nearest number of new tokens."""
        covering = [index for index, profile in enumerate(self._profiles) if _covers(profile, shapes)]
        if not covering:
            wanted = ", ".join(f"{name} {shapes[name]}" for name in ("input_ids", "attention_mask"))
            limits = [f"{p['input_ids'][0]} to {p['input_ids'][2]}" for p in self._profiles]
            raise EngineUnavailable(
                f"{self.engine}: no profile covers {wanted}; input_ids may be {' or '.join(limits)}, "
                f"attention_mask up to {max(p['attention_mask'][2] for p in self._profiles)}"
            )
        sequence = shapes["input_ids"][1]
        best = min(covering, key=lambda index: abs(self._profiles[index]["input_ids"][1][1] - sequence))
        if best != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(best, self._stream.cuda_stream)

    def _bind_inputs(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, shapes: dict[str, tuple[int, ...]]
    ) -> list[torch.Tensor]:
        import torch

        for name in decoder_io.cache_inputs(self._inputs):
            self._bind_input(name, shapes[name], self._buffer(self._reads, name, shapes[name]))
        tokens = []
        for name, value in decoder_io.token_inputs(self._inputs, input_ids, attention_mask).items():
            tokens.append(torch.from_numpy(value).cuda())
            self._bind_input(name, shapes[name], tokens[-1])
        missing = self._context.infer_shapes()
        if missing:
            raise EngineUnavailable(f"{self.engine}: inputs that no decoder should have: {', '.join(missing)}")
        return tokens

    def _bind_input(self, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
        self._context.set_input_shape(name, shape)
        self._context.set_tensor_address(name, tensor.data_ptr())

    def _bind_outputs(self) -> torch.Tensor:
        import torch

        for name in decoder_io.cache_inputs(self._inputs):
            output = decoder_io.present(name)
            shape = tuple(self._context.get_tensor_shape(output))
            self._context.set_tensor_address(output, self._buffer(1 - self._reads, name, shape).data_ptr())
        dtype = getattr(torch, self._outputs["logits"][0])
        logits = torch.empty(tuple(self._context.get_tensor_shape("logits")), dtype=dtype, device="cuda")
        self._context.set_tensor_address("logits", logits.data_ptr())
        return logits

    def _buffer(self, side: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Device memory for one part of the cache; grown by a quarter more than needed, so that most steps reuse it."""
        import torch

        elements = max(math.prod(shape), 1)  # TensorRT wants an address even for an empty cache
        buffer = self._buffers.get((side, name))
        if buffer is None or buffer.numel() < elements:
            dtype = getattr(torch, self._inputs[name][0])
            buffer = torch.empty(elements + elements // 4, dtype=dtype, device="cuda")
            self._buffers[side, name] = buffer
        return buffer

    def _limits(self, profile: int) -> dict[str, list[tuple[int, ...]]]:
        limits = self._engine.get_tensor_profile_shape
        return {name: [tuple(shape) for shape in limits(name, profile)] for name in self._inputs}


def _covers(profile: dict[str, list[tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        low <= length <= high
        for name, (lowest, _, highest) in profile.items()
        for low, length, high in zip(lowest, shapes[name], highest, strict=True)
    )
