"""TrtRunner's own work, without a GPU: which memory it gives TensorRT, when, and in what shape.

A stand-in for TensorRT's engine reads and writes raw addresses, as TensorRT does, and computes with ONNX Runtime; the
stand-in for CUDA is the CPU's memory. What is checked against PyTorch are the logits that come out.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.exported import Made, onnx_of
from trsp_deploy.errors import EngineUnavailable, ShapeUnavailable
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.stages import parity
from trsp_deploy.tools.graphs.logits import cut_logits
from trsp_deploy.tools.graphs.static_cache import fix_cache
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import trt
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.runners.ort_session import bindings_of
from trsp_deploy.tools.runners.requirements import CudaDevice, release_torch_memory
from trsp_deploy.tools.runners.trt_build import profile_shape

RTX_CARDS = ["NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120"]
PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
Shape = tuple[int, ...]


class Context:
    """An execution context over raw addresses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.launches: list[dict[str, int]] = []  # addresses of each
        self.recorded: list[Any] | None = None  # while a CUDA graph is captured
        self.launched = False  # since shapes and addresses were set

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.active_optimization_profile = index

    def set_input_shape(self, name: str, shape: Shape) -> None:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), (name, shape)
        self.shapes[name] = shape
        self.launched = False

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address
        self.addresses[name] = address
        self.launched = False

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        batch, new = self.shapes["input_ids"]
        if name == "logits":
            return (batch, *self.shapes.get("logits_positions", (new,)), self.engine.outputs["logits"][1][-1])
        past = self.shapes[name.replace("present.", "past_key_values.")]
        return past if self.engine.fixed else (*past[:2], past[2] + new, past[3])

    def execute_async_v3(self, stream: int) -> bool:
        launch = (
            dict(self.addresses),
            dict(self.shapes),
            {name: self.get_tensor_shape(name) for name in self.engine.outputs},
        )
        if self.recorded is None:
            self.run(*launch)
            self.launched = True
        else:
            assert self.launched, "TensorRT's guide: call enqueueV3() once after an input shape change, then capture"
            self.recorded.append(launch)
        return True

    def run(self, addresses: dict[str, int], shapes: dict[str, Shape], outputs: dict[str, Shape]) -> None:
        self.launches.append(addresses)
        feeds = {
            name: view(addresses[name], shapes[name], dtype).copy() for name, (dtype, _) in self.engine.inputs.items()
        }
        found = self.engine.session.run(list(outputs), feeds)
        for (name, shape), value in zip(outputs.items(), found, strict=True):
            assert value.shape == shape
            view(addresses[name], shape, str(value.dtype))[...] = value


def view(address: int, shape: Shape, dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)


class Engine:
    """A deserialised engine."""

    def __init__(self, graph: Path, spec: EngineSpec) -> None:
        self.session = onnxruntime.InferenceSession(str(graph))
        self.inputs = bindings_of(self.session.get_inputs())
        self.outputs = bindings_of(self.session.get_outputs())
        self.fixed = spec.cache_length is not None
        self.spec = spec
        self.num_optimization_profiles = len(spec.profiles)
        self.contexts: list[Context] = []
        self.streamable_weights_size = 2**31
        self.refuses = False
        self._budget = self.streamable_weights_size

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if not self.refuses:  # it says so to C++ alone
            self._budget = min(budget, self.streamable_weights_size)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        wanted = self.spec.profiles[profile]
        return [profile_shape(name, self.inputs[name][1], wanted, end) for end in ("min", "opt", "max")]

    def create_execution_context(self, *_: object) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace()


class Graph:
    """A captured CUDA graph: the launches between its beginning and its end, again."""

    context: Context

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def replay(self) -> None:
        for launch in self.launches:
            self.context.run(*launch)


class Event:
    """A CUDA event that notes the host's time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda in the CPU's memory."""

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        graph.context.recorded = graph.launches
        yield
        graph.context.recorded = None

    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **options: zeros(*shape, **options))
    for way in ("cuda", "cpu"):  # both copy
        monkeypatch.setattr(torch.Tensor, way, lambda tensor: tensor.clone())
    for name, value in {
        "init": lambda: None,
        "is_available": lambda: True,
        "Stream": lambda: SimpleNamespace(cuda_stream=1),
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(trt, "cuda_devices", lambda: [CudaDevice("a card", "sm89", 2**34)])


def opened(graph: Path, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[trt.TrtRunner, Engine]:
    engine = Engine(graph, spec)
    module = SimpleNamespace(
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda blob: engine),
        ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(RTX_CARDS)),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", NONE="none"),
    )
    monkeypatch.setattr(trt, "load_package", lambda backend: module)
    log = SimpleNamespace(errors=[], complaint=lambda otherwise="": otherwise)
    monkeypatch.setattr(trt, "logger", lambda module: log)
    path.write_bytes(b"engine")
    return trt.TrtRunner(path, spec, inputs=engine.inputs, outputs=engine.outputs), engine


def spec_of(name: str, **changes: object) -> EngineSpec:
    return EngineSpec.model_validate({**load_engine_spec(name).model_dump(), "precision": "fp32", **changes})


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("graphs", "streamed"),
    [(True, None), (False, None), (True, 1.0), (True, 2.0)],
    ids=["graphs", "none", "weights streamed", "all weights within the budget"],
)
def test_a_cache_of_fixed_length_is_one_memory_and_decoding_is_replayed(
    backend: str,
    graphs: bool,
    streamed: float | None,
    exported: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = exported("llama")
    model = ir.load(onnx_of(source))
    fix_cache(model, 64)
    cut_logits(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    profiles = [
        {"batch": {"min": 1, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 1, "max": 8}},
        {"batch": {"min": 1, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 16, "max": 32}},
    ]
    changes = {"cache_length": 64, "cuda_graphs": graphs, "weight_streaming_gib": streamed}
    spec = spec_of(f"{backend}-fp16-static", profiles=profiles, **changes)
    runner, engine = opened(tmp_path / "model.onnx", spec, monkeypatch, tmp_path / "engine")
    reference = parity.make_reference(source / "model", PROMPTS)
    with runner:
        (context,) = engine.contexts
        Graph.context = context
        for _ in range(2):  # a second prompt begins anew, in the same memory
            assert parity.check_parity(reference, runner, "trt", "dense", "fp32").max_error < 1e-4
        replayed = runner._graph is not None
        assert replayed == (graphs and streamed != 1 and backend == "tensorrt")  # RTX captures by itself
        assert len(context.launches) == 2 * (1 + parity.NEW_TOKENS)
        for addresses in context.launches:
            for name, address in addresses.items():
                if name.startswith("past_key_values."):
                    assert address == addresses[name.replace("past_key_values.", "present.")] == context.addresses[name]
        assert context.active_optimization_profile == 0, "the profile of one new token"
        last = runner.prefill(reference.input_ids, reference.attention_mask, last_only=True)
        assert last.shape[1] == 1 and context.active_optimization_profile == 1
        np.testing.assert_allclose(last[:, 0], reference.logits[:, reference.input_ids.shape[1] - 1], atol=1e-4)
        (text,) = generate(runner, [PROMPTS[1]], Sampling(max_new_tokens=100))
        assert text.finish == "length" and len(text.tokens) == 64 - len(PROMPTS[1]) + 1
        with pytest.raises(ShapeUnavailable, match="its cache holds 64 tokens, and the text has 70"):
            runner.prefill(np.ones((1, 70), np.int64), np.ones((1, 70), np.int64))


def opened_with_fixed_cache(
    source: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tuple[trt.TrtRunner, Engine]:
    model = ir.load(onnx_of(source))
    fix_cache(model, 64)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    profile = {"batch": {"min": 1, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 1, "max": 32}}
    spec = spec_of("tensorrt-fp16-static", cache_length=64, fuse=False, profiles=[profile])
    return opened(folder / "model.onnx", spec, monkeypatch, folder / "engine")


@pytest.mark.usefixtures("cuda")
def test_a_text_that_overflowed_leaves_nothing_to_the_next(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("llama")
    runner, engine = opened_with_fixed_cache(source, monkeypatch, tmp_path)
    reference = parity.make_reference(source / "model", PROMPTS)
    with runner:
        Graph.context = engine.contexts[0]
        runner.prefill(reference.input_ids, reference.attention_mask)
        for memory in runner._cache.values():
            memory.fill_(np.nan)
        assert parity.check_parity(reference, runner, "trt", "dense", "fp32").max_error < 1e-4


@pytest.mark.usefixtures("cuda")
def test_after_a_step_that_failed_everything_is_bound_anew(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, engine = opened_with_fixed_cache(exported("llama"), monkeypatch, tmp_path)
    ids = np.array([[30, 31, 7, 8, 90, 12, 55, 60, 61]])
    with runner:
        Graph.context = context = engine.contexts[0]
        wanted = runner.prefill(ids, np.ones_like(ids))  # logits at each of the nine
        runner.prefill(ids[:, :3], np.ones_like(ids[:, :3]))
        for place in range(3, 6):
            found = runner.decode(ids[:, place : place + 1])
            np.testing.assert_allclose(found[:, 0], wanted[:, place], atol=1e-4)
        assert runner._graph is not None
        found = runner.decode(ids[:, 6:8])  # of another number of tokens than was captured
        np.testing.assert_allclose(found, wanted[:, 6:8], atol=1e-4)

        def refused(*_: object) -> NoReturn:
            raise RuntimeError("CUDA error: out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(runner, "_select_profile", refused)
            with pytest.raises(EngineUnavailable, match="the GPU's memory is full at batch 1 with 9 tokens"):
                runner.decode(ids[:, 8:])
        np.testing.assert_allclose(runner.decode(ids[:, 8:])[:, 0], wanted[:, 8], atol=1e-4)

        with monkeypatch.context() as patched:
            patched.setattr(context, "execute_async_v3", refused)
            with pytest.raises(EngineUnavailable, match="the GPU's memory is full at batch 1 with 10 tokens"):
                runner.decode(ids[:, :1])  # where it would be captured
        with pytest.raises(EngineUnavailable, match="its cache holds 64 tokens"):
            runner.prefill(np.ones((1, 70), np.int64), np.ones((1, 70), np.int64))
        with pytest.raises(RuntimeError, match="decode comes after prefill"):
            runner.decode(ids[:, :1])


@pytest.mark.usefixtures("cuda")
def test_a_prompt_that_the_gpu_has_no_room_for_leaves_it_to_fewer_texts(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of its cache was there already was kept, and too little was left even for one text."""
    runner, _ = opened(onnx_of(exported("opt")), spec_of("tensorrt-fp16"), monkeypatch, tmp_path / "engine")
    ids, held = np.ones((8, 16), np.int64), weakref.WeakSet[torch.Tensor]()
    room, zeros = 0, torch.zeros

    def allocated(*shape: int, **options: Any) -> torch.Tensor:
        made = zeros(*shape, **options)
        if room and sum(each.nbytes for each in held) + made.nbytes > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        held.add(made)
        return made

    monkeypatch.setattr(torch, "zeros", allocated)
    with runner:
        wanted = runner.prefill(ids[:1], ids[:1])
        room = 2 * sum(each.nbytes for each in held)
        with pytest.raises(EngineUnavailable, match="the GPU's memory is full at batch 8 with 16 tokens"):
            runner.prefill(ids, ids)
        np.testing.assert_allclose(runner.prefill(ids[:1], ids[:1]), wanted, atol=1e-4)
        np.testing.assert_allclose(runner.prefill(ids[:2, :8], ids[:2, :8])[1], wanted[0, :8], atol=1e-4)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("call", ["infer_shapes", "set_optimization_profile_async"])
def test_what_tensorrt_refuses_is_a_line_with_its_reason(
    call: str, exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bindings raise a RuntimeError that tells nothing; why is in the log."""
    runner, engine = opened_with_fixed_cache(exported("llama"), monkeypatch, tmp_path)
    log = SimpleNamespace(errors=[], complaint=lambda: "shapes that no kernel is for")

    def refused(*_: object) -> NoReturn:
        log.errors.append("shapes that no kernel is for")
        raise RuntimeError("infer_shapes error code: -1")

    with runner:
        context, ids = engine.contexts[0], np.ones((1, 3), np.int64)
        context.active_optimization_profile = 1  # another than the one that these shapes want
        monkeypatch.setattr(trt, "logger", lambda module: log)
        monkeypatch.setattr(context, call, refused)
        with pytest.raises(EngineUnavailable, match=r"TensorRT: stopped in .*engine: shapes that no kernel is for"):
            runner.prefill(ids, ids)
        monkeypatch.setattr(context, call, bug)
        log.errors.clear()
        with pytest.raises(RuntimeError, match="a bug"):
            runner.prefill(ids, ids)


@pytest.mark.usefixtures("cuda")
def test_an_error_of_cuda_is_a_line_and_stays_the_reason(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later call fails with it, too; the one that ends the runner took the reason's place."""
    runner, engine = opened(onnx_of(exported("opt")), spec_of("tensorrt-fp16"), monkeypatch, tmp_path / "engine")
    ids = np.ones((1, 3), np.int64)

    def broken(*_: object) -> NoReturn:
        words = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in"
        raise torch.AcceleratorError(words)

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "empty_cache", broken)
        words = r"tensorrt: the GPU stopped in .*engine: CUDA error: an illegal memory access was encountered$"
        with pytest.raises(EngineUnavailable, match=words), runner:
            patched.setattr(engine.contexts[0], "execute_async_v3", broken)
            runner.prefill(ids, ids)
        with pytest.raises(RuntimeError, match="CUDA error"), runner:
            pass  # where nothing else has failed it is said
        patched.setattr(torch.cuda, "is_initialized", lambda: True)
        release_torch_memory()  # for an engine that comes after, such as one for the CPU


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("spoiled", [True, False], ids=["torch's end fails", "torch ends it"])
def test_what_keeps_a_step_from_becoming_a_cuda_graph_comes_with_what_helps(
    spoiled: bool, exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of TensorRT's reason and `cuda_graphs: false` one was missing, by whether torch could end the capture."""

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        try:
            yield
        finally:
            if spoiled:
                raise RuntimeError("CUDA error: operation failed due to a previous error\nduring capture")

    runner, engine = opened_with_fixed_cache(exported("llama"), monkeypatch, tmp_path)
    ids = np.ones((1, 3), np.int64)
    with runner:
        context = engine.contexts[0]
        runner.prefill(ids, ids)
        runner.decode(ids[:, :1])
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(context, "execute_async_v3", lambda stream: False)
        monkeypatch.setattr(trt, "logger", lambda module: SimpleNamespace(errors=[], complaint=lambda: "no such node"))
        with pytest.raises(EngineUnavailable, match="cannot become a CUDA graph") as caught:
            runner.decode(ids[:, :1])
    assert str(caught.value) == (
        f"{runner.engine}: a decoding step cannot become a CUDA graph (TensorRT: stopped in {runner.engine}: no such "
        "node); build it again from a spec with `cuda_graphs: false`"
    )


def bug(*_: object) -> NoReturn:
    raise RuntimeError("a bug")


@pytest.mark.usefixtures("cuda")
def test_weights_stream_within_the_specs_budget(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx_of(exported("opt"))
    for changes, budget in (({}, 2**31), ({"weight_streaming_gib": 0.5}, 2**29), ({"weight_streaming_gib": 4}, 2**31)):
        runner, engine = opened(graph, spec_of("tensorrt-fp16", **changes), monkeypatch, tmp_path / "engine")
        with runner:
            assert engine.weight_streaming_budget_v2 == budget
    runner, engine = opened(graph, spec_of("tensorrt-fp16", weight_streaming_gib=0.5), monkeypatch, tmp_path / "engine")
    engine.refuses = True
    with pytest.raises(EngineUnavailable, match=r"TensorRT: does not stream the weights of .*engine"), runner:
        pass
    assert not engine.contexts


@pytest.mark.usefixtures("cuda")
def test_a_growing_cache_is_read_and_written_in_turn(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("opt")
    runner, engine = opened(onnx_of(source), spec_of("tensorrt-fp16"), monkeypatch, tmp_path / "engine")
    reference = parity.make_reference(source / "model", PROMPTS)
    with runner:
        (context,) = engine.contexts
        assert parity.check_parity(reference, runner, "trt", "dense", "fp32").max_error < 1e-4
        for addresses in context.launches:
            for name, address in addresses.items():
                if name.startswith("past_key_values."):
                    assert address != addresses[name.replace("past_key_values.", "present.")]
        assert runner.longest_text == 2049, "the profiles' longest past, and a token"
        short = trt.TrtRunner(runner.engine, runner.spec, inputs=engine.inputs, outputs=engine.outputs, longest=8)
        with short, pytest.raises(ShapeUnavailable, match="holds for texts of up to 8 tokens, and this one has 9"):
            assert short.longest_text == 8
            short.prefill(reference.input_ids, reference.attention_mask)
        mixed = trt.TrtRunner(runner.engine, runner.spec, inputs=engine.inputs, outputs=engine.outputs, padding=False)
        with mixed, pytest.raises(ShapeUnavailable, match="its graph gets padded texts wrong"):
            mixed.prefill(reference.input_ids, reference.attention_mask)
        with pytest.raises(ShapeUnavailable, match="no profile covers"):
            runner.prefill(np.ones((9, 4), np.int64), np.ones((9, 4), np.int64))


@pytest.mark.usefixtures("cuda")
def test_texts_end_where_the_profiles_of_so_many_texts_do(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was made of them until then is kept."""
    sequence = {"min": 1, "opt": 1, "max": 32}
    profiles = [
        {
            "batch": dict.fromkeys(("min", "opt", "max"), texts),
            "sequence": sequence,
            "past": {"min": 0, "opt": 8, "max": most},
        }
        for texts, most in ((1, 31), (2, 15))
    ]
    spec = spec_of("tensorrt-fp16", profiles=profiles)
    runner, _ = opened(onnx_of(exported("opt")), spec, monkeypatch, tmp_path / "engine")
    for prompts, longest in ((PROMPTS, 16), (PROMPTS[1:], 32)):
        with runner:
            found = generate(runner, prompts, Sampling(max_new_tokens=100))
        assert [len(text.tokens) for text in found] == [longest - len(PROMPTS[1]) + 1] * len(prompts)
        assert {text.finish for text in found} == {"length"} and runner.longest_text == longest


@pytest.mark.parametrize(
    ("capability", "compiled", "words"),
    [
        ("sm89", (), None),
        ("sm75", ("sm75",), None),
        ("sm90", (), "does not run on a card (SM90), on SM75, SM80, SM86, SM89, SM120 alone; TensorRT does"),
        ("sm75", (), "is not compiled for a card (SM75); its spec wants compute_capabilities: [sm75]"),
        ("sm89", ("sm86",), "is not compiled for a card (SM89)"),
    ],
)
def test_rtx_engines_run_on_what_they_are_compiled_for(
    capability: str, compiled: tuple[str, ...], words: str | None
) -> None:
    spec = load_engine_spec("tensorrt-rtx-fp16").model_copy(update={"compute_capabilities": compiled})
    gpu = CudaDevice(name="a card", compute_capability=capability, memory_bytes=1)
    if words is None:
        return trt._check_capability(spec, gpu, RTX_CARDS)
    with pytest.raises(EngineUnavailable, match=re.escape(words)):
        trt._check_capability(spec, gpu, RTX_CARDS)


@pytest.mark.usefixtures("cuda")
def test_an_rtx_engine_is_not_loaded_on_a_card_that_it_is_not_compiled_for(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server, a bench's process and `generate` open engines without asking `check_can_run` first."""
    spec = spec_of("tensorrt-rtx-fp16", compute_capabilities=("sm86",))
    runner, engine = opened(onnx_of(exported("opt")), spec, monkeypatch, tmp_path / "engine")
    with pytest.raises(EngineUnavailable, match=r"is not compiled for a card \(SM89\)"), runner:
        pass
    assert not engine.contexts
