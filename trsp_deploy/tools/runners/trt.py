"""Run engines of TensorRT 10, TensorRT 11 and TensorRT for RTX, through the calls that all three have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from trsp_deploy.errors import GPU_FULL, EngineUnavailable, ShapeUnavailable, first_line, one_line
from trsp_deploy.recipe import EngineSpec, ShapeProfile
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.manifest import EngineManifest
from trsp_deploy.tools.runners.requirements import CudaDevice, cuda_devices, load_package
from trsp_deploy.tools.runners.trt_log import deserialized, logger, made

if TYPE_CHECKING:
    import torch

CUDA_ERROR = "CUDA error: "  # how torch's lines about failed calls of CUDA begin


def check_run(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless engines of this backend can run here."""
    trt: Any = load_package(spec.backend)
    _check_machine(trt, spec, cuda_devices()[0])


def _check_machine(trt: Any, spec: EngineSpec, gpu: CudaDevice) -> None:
    """Raise EngineUnavailable unless the backend and the torch that are here run an engine of this spec on the GPU."""
    if spec.backend == "tensorrt-rtx":
        _check_capability(spec, gpu, list(trt.ComputeCapability.__members__))
    _check_torch()


def _check_capability(spec: EngineSpec, gpu: CudaDevice, known: Sequence[str]) -> None:
    """Raise EngineUnavailable for a GPU that an RTX engine is not compiled for; known: names such as SM89."""
    here = gpu.compute_capability.upper()
    wanted = [name.upper() for name in spec.compute_capabilities] or [name for name in known if name != "SM75"]
    if here not in known:
        cards = ", ".join(name for name in known if name.startswith("SM"))
        raise EngineUnavailable(f"TensorRT-RTX does not run on {gpu.name} ({here}), on {cards} alone; TensorRT does")
    if here not in wanted:
        wish = f"compute_capabilities: [{here.lower()}]"
        raise EngineUnavailable(f"{spec.name} is not compiled for {gpu.name} ({here}); its spec wants {wish}")


def _check_torch() -> None:
    import torch

    # Buffers are torch tensors; a CPU build of torch cannot make them, GPU or not.
    if not torch.cuda.is_available():
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        raise EngineUnavailable(
            f"torch {torch.__version__} is {build} and cannot use this GPU; pytorch.org/get-started has one that can"
        )


def open_engine(folder: Path, manifest: EngineManifest) -> TrtRunner:
    """A runner for a built engine."""
    return TrtRunner(
        folder / manifest.file,
        manifest.spec,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        longest=manifest.longest_text,
        padding=manifest.padding,
    )


class TrtRunner(Runner):
    """Generates with a built TensorRT or TensorRT-RTX engine on the first GPU of this process.

    engine: the serialised engine. spec: what it was built from.
    inputs, outputs: the graph's, as the engine's manifest has them. longest: tokens that the graph holds for, whatever
        its shapes allow: behind a table of positions lies other memory. None is any number.
    padding: whether the graph hides padding; batches that have some are refused where it does not.

    A cache of fixed length is one memory for `past` and `present`, and decoding, whose shapes then stand still, is
    replayed as a CUDA graph. A cache that grows has two, read and written in turn.
    """

    def __init__(
        self,
        engine: Path,
        spec: EngineSpec,
        *,
        inputs: decoder_io.Bindings,
        outputs: decoder_io.Bindings,
        longest: int | None = None,
        padding: bool = True,
    ) -> None:
        self.engine = engine
        self.spec = spec
        self._longest = longest
        self._padding = padding
        self._inputs = inputs
        self._outputs = outputs
        self._fixed = decoder_io.cache_length(inputs)
        self._trt: Any = None
        self._runtime: Any = None  # has to outlive the engine
        self._engine: Any = None
        self._runtime_config: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._streams = False  # weights, from the host's memory: all of them fit where the budget is that large
        self._profiles: list[dict[str, list[tuple[int, ...]]]] = []  # input name -> min, opt, max shape
        self._attention_mask: np.ndarray | None = None  # (batch, past)
        self._texts: int | None = None  # of the last prompt
        self._cache: dict[tuple[int, str], torch.Tensor] = {}
        self._reads = 0  # which of the two parts of a growing cache the next step reads
        self._tensors: dict[str, torch.Tensor] = {}  # inputs and logits of the last step
        self._graph: Any = None  # a captured decoding step
        self._began: Any = None  # CUDA events around the last call
        self._ended: Any = None

    def __enter__(self) -> Self:
        import torch

        self._trt = load_package(self.spec.backend)
        # Before anything of TensorRT: a Runtime made without a usable driver can crash the process.
        devices = cuda_devices()
        _check_machine(self._trt, self.spec, devices[0])
        cuda: Any = torch.cuda
        cuda.init()
        log = logger(self._trt)
        log.errors.clear()
        gpu = f"{devices[0].name} ({devices[0].compute_capability}, {devices[0].memory_bytes / 2**30:.0f} GiB)"
        failure = f"cannot load {self.engine} on {gpu}"
        self._runtime = made(log, failure, lambda: self._trt.Runtime(log))
        self._engine = deserialized(log, failure, self._runtime, self.engine)
        if self.spec.weight_streaming_gib is not None:
            self._stream_weights(int(self.spec.weight_streaming_gib * 2**30))
        self._context = made(log, failure, self._make_context)
        # A stream of its own: on the default one TensorRT synchronises the device around every call.
        self._stream = cuda.Stream()
        self._began, self._ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        return self

    def _stream_weights(self, budget: int) -> None:
        """Keep no more than `budget` bytes of weights on the GPU."""
        self._engine.weight_streaming_budget_v2 = budget
        most = self._engine.streamable_weights_size
        # The bindings keep to themselves whether it was taken; if not, all weights stay there, as without streaming.
        if self._engine.weight_streaming_budget_v2 > min(budget, most):
            raise EngineUnavailable(
                f"TensorRT: does not stream the weights of {self.engine}: {logger(self._trt).complaint()}"
            )
        self._streams = budget < most

    def _make_context(self) -> Any:
        if self.spec.backend != "tensorrt-rtx":
            return self._engine.create_execution_context()
        # Kept: the binding ties the engine to a context, and not what configures it.
        self._runtime_config = self._engine.create_runtime_config()
        if self._captures:
            self._runtime_config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE  # by itself
        # Left to itself it compiles kernels for each shape in the background, in the middle of what is timed. Those of
        # a growing cache never come again.
        self._runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._fixed is not None
            else self._trt.DynamicShapesKernelSpecializationStrategy.NONE
        )
        return self._engine.create_execution_context(self._runtime_config)

    @property
    def longest_text(self) -> int | None:
        """Of a cache that grows it depends on how many texts the last prompt had: profiles may differ by that."""
        pasts = [each.past.max + 1 for each in self.spec.profiles if each.past is not None and self._takes(each)]
        limits = [self._fixed, max(pasts, default=None), self._longest]
        return min((limit for limit in limits if limit is not None), default=None)

    def _takes(self, profile: ShapeProfile) -> bool:
        """Whether a profile is for as many texts as the last prompt had; before any, for some number of them."""
        return self._texts is None or profile.batch.min <= self._texts <= profile.batch.max

    @property
    def _captures(self) -> bool:
        """Whether decoding may become a CUDA graph; streamed weights keep it from that (NvInferRuntime.h)."""
        return self.spec.cuda_graphs and self._fixed is not None and not self._streams

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._attention_mask = self._graph = None
        self._cache, self._tensors = {}, {}
        self._context = self._runtime_config = self._engine = self._runtime = None
        self._stream = self._began = self._ended = None
        # TensorRT allocates beside torch, so torch's idle memory is out of reach for the next engine. After an error of
        # CUDA there is nothing to be had any more, and the error on its way is the one that tells why.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        self._tensors, self._attention_mask = {}, None  # so everything is bound anew, and nothing goes on if it fails
        self._texts = len(input_ids)
        self._clear_cache()
        logits = self._step(input_ids, attention_mask, keep=1 if last_only else 0)
        return logits[:, -1:] if last_only else logits

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        if self._attention_mask is None:
            raise RuntimeError("decode comes after prefill")
        return self._step(input_ids, decoder_io.extended(self._attention_mask, input_ids))

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray, keep: int = 0) -> np.ndarray:
        import torch

        batch, length = attention_mask.shape
        decoder_io.check_longest(self.engine, self._longest, length)
        decoder_io.check_padding(self.engine, self._padding, attention_mask)
        if self._fixed is not None and length > self._fixed:
            raise ShapeUnavailable(f"{self.engine}: its cache holds {self._fixed} tokens, and the text has {length}")
        values = decoder_io.token_inputs(self._inputs, input_ids, attention_mask, keep)
        try:
            with torch.cuda.stream(self._stream):
                if self._feed(values) or self._fixed is None:
                    self._graph = None
                    self._bind(values, batch, past=length - input_ids.shape[1])
                    self._launch()
                else:
                    self._replay()
                logits = self._tensors["logits"].float()  # (batch, positions, vocabulary)
                self._ended.record()
                result: np.ndarray = logits.cpu().numpy()  # waits for the stream
        except BaseException as problem:
            self._tensors = {}  # what moved may not have been bound
            if isinstance(problem, RuntimeError) and GPU_FULL.search(str(problem)):
                if self._attention_mask is None:  # of a prompt: no text is lost, and fewer texts find all the room
                    self._cache = {}
                    torch.cuda.empty_cache()
                raise EngineUnavailable(
                    f"{self.spec.backend}: the GPU's memory is full at batch {batch} with {length} tokens"
                ) from problem
            if isinstance(problem, RuntimeError) and logger(self._trt).errors:  # where TensorRT tells why it refused
                complaint = logger(self._trt).complaint()
                raise EngineUnavailable(f"TensorRT: stopped in {self.engine}: {complaint}") from problem
            if isinstance(problem, RuntimeError) and CUDA_ERROR in str(problem):  # asynchronous: TensorRT said nothing
                raise EngineUnavailable(
                    f"{self.spec.backend}: the GPU stopped in {self.engine}: {first_line(problem)}"
                ) from problem
            raise
        self.device_s = self._began.elapsed_time(self._ended) / 1e3
        self._reads = 1 - self._reads
        self._attention_mask = attention_mask
        return result

    def _clear_cache(self) -> None:
        """What a text leaves behind its successor's end is masked, and a masked NaN is a NaN: 0 times it."""
        import torch

        if self._fixed is not None and self._cache:
            with torch.cuda.stream(self._stream):
                torch._foreach_zero_(list(self._cache.values()))

    def _feed(self, values: dict[str, np.ndarray]) -> bool:
        """Copy a step's inputs to the GPU, over the last step's where the shapes are the same; whether one moved."""
        import torch

        moved = False
        for name, value in values.items():
            there, here = self._tensors.get(name), torch.from_numpy(value)
            if there is None or there.shape != here.shape:
                self._tensors[name], moved = here.cuda(), True
            else:
                there.copy_(here)
        return moved

    def _bind(self, values: dict[str, np.ndarray], batch: int, past: int) -> None:
        """Choose a profile and tell the context every shape and address."""
        import torch

        caches = decoder_io.cache_inputs(self._inputs)
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        for name in caches:
            shapes[name] = decoder_io.input_shape(name, self._inputs[name][1], batch=batch, sequence=0, past=past)
        self._select_profile(shapes)
        for name, shape in shapes.items():
            tensor = self._tensors[name] if name in values else self._part(self._reads, name, shape)
            self._context.set_input_shape(name, shape)
            self._context.set_tensor_address(name, tensor.data_ptr())
        missing = self._context.infer_shapes()
        if missing:
            raise EngineUnavailable(f"{self.engine}: inputs that no decoder should have: {', '.join(missing)}")
        for name in caches:
            output = decoder_io.present(name)
            shape = tuple(self._context.get_tensor_shape(output))
            self._context.set_tensor_address(output, self._part(1 - self._reads, name, shape).data_ptr())
        shape, logits = tuple(self._context.get_tensor_shape("logits")), self._tensors.get("logits")
        if logits is None or logits.shape != shape:
            self._tensors["logits"] = torch.empty(
                shape, dtype=getattr(torch, self._outputs["logits"][0]), device="cuda"
            )
        self._context.set_tensor_address("logits", self._tensors["logits"].data_ptr())

    def _launch(self) -> None:
        self._began.record()  # here, and not before: until now the host has prepared, and the GPU waited
        self._enqueue()

    def _replay(self) -> None:
        """Run a step where nothing has moved since the last one: as a CUDA graph, captured at the first of them.

        Not at the one before, which everything was set for: a capture wants a launch after that (TensorRT's guide,
        "CUDA Graphs").
        """
        import torch

        if not self._captures or self.spec.backend == "tensorrt-rtx":
            self._launch()
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._enqueue()
            except (RuntimeError, EngineUnavailable) as problem:
                if GPU_FULL.search(str(problem)):
                    raise
                # What TensorRT refuses spoils the capture, and torch, which ends that on the way out, says so instead.
                before = problem.__context__
                reason = before if isinstance(before, EngineUnavailable) else problem
                raise EngineUnavailable(
                    f"{self.engine}: a decoding step cannot become a CUDA graph ({one_line(reason)}); "
                    "build it again from a spec with `cuda_graphs: false`"
                ) from problem
            self._graph = graph
        self._began.record()
        self._graph.replay()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineUnavailable(f"TensorRT: stopped in {self.engine}: {logger(self._trt).complaint()}")

    def _select_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Choose, among the profiles that cover these shapes, the one tuned for the nearest number of new tokens."""
        covering = [index for index, profile in enumerate(self._profiles) if _covers(profile, shapes)]
        if not covering:
            wanted = ", ".join(f"{name} {shapes[name]}" for name in ("input_ids", "attention_mask"))
            limits = [f"{p['input_ids'][0]} to {p['input_ids'][2]}" for p in self._profiles]
            raise ShapeUnavailable(
                f"{self.engine}: no profile covers {wanted}; input_ids may be {' or '.join(limits)}, "
                f"attention_mask up to {max(p['attention_mask'][2] for p in self._profiles)}"
            )
        sequence = shapes["input_ids"][1]
        best = min(covering, key=lambda index: abs(self._profiles[index]["input_ids"][1][1] - sequence))
        if best != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(best, self._stream.cuda_stream)

    def _part(self, side: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Device memory for one part of the cache; one that grows gets a quarter more, so that most steps reuse it."""
        import torch

        side = 0 if self._fixed is not None else side  # written where it is read
        elements = max(math.prod(shape), 1)  # TensorRT wants an address even for an empty cache
        memory = self._cache.get((side, name))
        if memory is None or memory.numel() < elements:
            dtype = getattr(torch, self._inputs[name][0])
            spare = 0 if self._fixed is not None else elements // 4
            memory = torch.zeros(elements + spare, dtype=dtype, device="cuda")
            self._cache[side, name] = memory
        return memory

    def _limits(self, profile: int) -> dict[str, list[tuple[int, ...]]]:
        return {
            name: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile)]
            for name in self._inputs
        }


def _covers(profile: dict[str, list[tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(
        low <= length <= high
        for name, (lowest, _, highest) in profile.items()
        for low, length, high in zip(lowest, shapes[name], highest, strict=True)
    )
