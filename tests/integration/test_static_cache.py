"""Graphs with a KV cache of fixed length: against PyTorch on ONNX Runtime, and through TensorRT-RTX's compiler."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.breadth import BREADTH, by_default
from tests.exported import DROPPED, LAYERS, Made, onnx_of
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import EngineSpec, Precision
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.graphs.attention import find_layers
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer
from trsp_deploy.tools.graphs.static_cache import fix_cache
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners.inspection import describe, inspect_engine
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.trt_log import Layer

PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
LENGTH = 32


def fixed(graph: Path, out: Path, length: int = LENGTH) -> Path:
    model = ir.load(graph)
    assert fix_cache(model, length) == LAYERS
    ir.save(model, out, external_data=f"{out.name}.data")
    return out


FP32 = ("llama", "mistral-sliding", "qwen2", "qwen3", "phi3", "opt", "opt-350m", "gpt2", "gpt-neox-parallel")


@pytest.mark.parametrize(
    ("name", "precision"),
    by_default(
        [("llama", "fp32"), ("mistral-sliding", "fp32"), ("opt", "fp16")],
        [*((name, "fp32") for name in FP32), *((name, "fp16") for name in ("llama", "opt"))],
    ),
)
def test_logits_are_pytorchs(name: str, precision: Precision, exported: Made, tmp_path: Path) -> None:
    source = exported(name, precision)
    graph = fixed(onnx_of(source, precision), tmp_path / "fixed.onnx")  # type: ignore[arg-type]
    reference = parity.make_reference(source / "model", PROMPTS)
    with OrtRunner(graph) as runner:
        found = parity.check_parity(reference, runner, name, "dense", precision)
        places = {value.data_ptr() for value in runner._cache.values()}
        runner.decode(np.array([[1], [2]]))
        assert places == {value.data_ptr() for value in runner._cache.values()}
    assert found.max_error < (1e-4 if precision == "fp32" else 0.05)


def test_a_text_longer_than_the_cache_is_refused(exported: Made, tmp_path: Path) -> None:
    graph = fixed(onnx_of(exported("llama")), tmp_path / "fixed.onnx", length=10)
    ids = np.array([PROMPTS[1]])
    with OrtRunner(graph) as runner:
        runner.prefill(ids, np.ones_like(ids))
        runner.decode(np.array([[1]]))
        with pytest.raises(EngineUnavailable, match="its cache holds 10 tokens, and the text is longer"):
            runner.decode(np.array([[1]]))
        with pytest.raises(EngineUnavailable, match="holds 10 tokens"):
            runner.prefill(np.repeat(ids, 2, axis=1), np.ones((1, 18), dtype=np.int64))


def test_rows_of_a_batch_may_stand_at_different_places(exported: Made, tmp_path: Path) -> None:
    """What continuous batching needs: no padding, each row written where its own text ends."""
    session = onnxruntime.InferenceSession(str(fixed(onnx_of(exported("llama")), tmp_path / "fixed.onnx")))
    names = [value.name for value in session.get_outputs()]

    def step(ids: list[list[int]], past: list[int], cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        new = np.array(ids)
        places = np.array(past)[:, None] + np.arange(new.shape[1])
        there = (np.arange(LENGTH) <= places[:, -1:]).astype(np.int64)
        feeds = {"input_ids": new, "attention_mask": there, "position_ids": places, "write_indices": np.array(past)}
        return dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))

    def empty(batch: int) -> dict[str, np.ndarray]:
        return {
            value.name: np.zeros((batch, *value.shape[1:]), dtype=np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def kept(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.replace("present.", "past_key_values."): found[name] for name in names if name != "logits"}

    caches, alone = [], []
    for prompt in PROMPTS:
        first = step([prompt], [0], empty(1))
        caches.append(kept(first))
        alone.append(step([[7]], [len(prompt)], kept(first))["logits"])
    together = {name: np.concatenate([cache[name] for cache in caches]) for name in caches[0]}
    found = step([[7], [7]], [len(prompt) for prompt in PROMPTS], together)["logits"]
    np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-5)
    wrong = step([[7], [7]], [len(PROMPTS[1])] * 2, together)["logits"]
    assert np.abs(wrong[0] - alone[0][0]).max() > 1e-3, "the place matters"


def test_masks_that_do_more_are_refused(exported: Made) -> None:
    with pytest.raises(NoMatch, match="between scores and softmax"):
        fix_cache(ir.load(onnx_of(exported("bloom"))), LENGTH)
    model = ir.load(onnx_of(exported("llama")))
    mask = find_layers(model)[0].mask
    assert mask is not None
    writer = Writer(model, "bias")
    biased = writer.one("Add", [mask, writer.constant(np.array(0.5, dtype=np.float32))])
    for node in [node for node in mask.consumers() if node.op_type == "Add" and node is not biased.producer()]:
        node.replace_input_with(list(node.inputs).index(mask), biased)
    writer.finish()
    with pytest.raises(NoMatch, match="does more than hide padding, later tokens and what is outside a window"):
        fix_cache(model, LENGTH)


def static_spec(precision: Precision = "fp16", **changes: object) -> EngineSpec:
    spec = load_engine_spec("tensorrt-rtx-fp16-static")
    profiles = [
        {"batch": {"min": 1, "opt": 1, "max": 4}, "sequence": {"min": 1, "opt": 1, "max": 8}},
        {"batch": {"min": 1, "opt": 1, "max": 4}, "sequence": {"min": 1, "opt": 64, "max": 128}},
    ]
    values = {**spec.model_dump(), "precision": precision, "block_size": 64, "cache_length": 256, "profiles": profiles}
    return EngineSpec.model_validate({**values, **changes})


def quantised_products(layers: list[Layer], precision: Precision) -> int:
    """How many products read weights of the precision."""
    wanted = {"fp16": "Half", "int8": "Int8", "int4": "Int4"}[precision]
    return sum(layer.kind in ("gemm", "runtime_fusion") and wanted in layer.precisions for layer in layers)


class TestTensorRtRtx:
    """The compiler needs no GPU, and its log says what it made of the graph."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")

    @pytest.mark.parametrize(
        ("precision", "name", "dropped"),
        by_default(
            [("fp16", "llama-wide", DROPPED)],
            itertools.product(("fp16", "int8", "int4"), ("llama-wide", "opt-wide"), ((), DROPPED)),
        ),
    )
    def test_attention_is_fused_and_the_cache_stays(
        self, name: str, precision: Precision, dropped: tuple[int, ...], exported: Made, tmp_path: Path
    ) -> None:
        source, layers = exported(name, "fp16", dropped), LAYERS - len(dropped)
        manifest = build_engine(onnx_of(source, "fp16"), static_spec(precision), tmp_path / "engine")
        assert [outcome.changed for outcome in manifest.passes] == [layers, 1]
        assert manifest.inputs["past_key_values.0.key"][1][2] == 256
        found = inspect_engine(tmp_path / "engine")
        build = found.build
        assert build is not None and build.weight_bytes and len(build.activation_bytes) == 2
        cache = {f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value")}
        for profile in (0, 1):
            assert build.attention_kernels(profile) == layers
            assert build.written_in_place(profile) == cache
            # What only reads the cache must not repeat it for the heads that share a key.
            readers = [layer for layer in build.of(profile) if cache & set(layer.reads) - set(layer.writes)]
            assert readers and not any("Repl" in layer.name for layer in readers)
        assert quantised_products(build.of(0), precision) >= 3 * layers
        # The graph that was compiled stays beside the engine; ONNX Runtime says what quantising it costs.
        reference = parity.make_reference(source / "model", PROMPTS)
        with OrtRunner(tmp_path / "engine" / "model.onnx") as runner:
            error = parity.check_parity(reference, runner, name, "dense", precision).max_error
        assert error < {"fp16": 0.05, "int8": 0.5, "int4": 2}[precision]
        script = (tmp_path / "engine" / "trtexec.sh").read_text()
        assert "tensorrt_rtx --onnx=model.onnx" in script and "--maxShapes=input_ids:4x8,attention_mask:4x256" in script
        text = describe(found)
        assert f"{layers} of them fused attention, {2 * layers} parts of the cache written in place" in text
        assert "MB of weights" in text and "write_indices" in text

    @pytest.mark.parametrize("precision", [pytest.param(each, marks=BREADTH) for each in ("fp16", "int8", "int4")])
    def test_a_cache_that_grows_builds_too(self, precision: Precision, exported: Made, tmp_path: Path) -> None:
        source = exported("llama-wide", "fp16", DROPPED)
        spec = load_engine_spec("tensorrt-rtx-fp16")
        spec = EngineSpec.model_validate({**spec.model_dump(), "precision": precision, "block_size": 64})
        build_engine(onnx_of(source, "fp16"), spec, tmp_path / "engine")
        build = inspect_engine(tmp_path / "engine").build
        assert build is not None and build.written_in_place() == set()
        assert quantised_products(build.of(0), precision) >= 3 * (LAYERS - len(DROPPED))

    def test_a_graph_that_does_not_fit_is_refused_with_the_reason(self, exported: Made, tmp_path: Path) -> None:
        graph = onnx_of(exported("bloom", "fp16"), "fp16")
        with pytest.raises(EngineUnavailable, match=r"no cache of fixed length: .*; a spec without `cache_length`"):
            build_engine(graph, static_spec(), tmp_path / "engine")

    @BREADTH
    def test_what_the_compiler_refuses_comes_with_advice(self, exported: Made, tmp_path: Path) -> None:
        with pytest.raises(EngineUnavailable, match=r"dedicated kernel.*take precision fp16, or leave `cache_length`"):
            build_engine(onnx_of(exported("llama-wide")), static_spec("fp32"), tmp_path / "engine")
        int4 = static_spec("int4", compute_capabilities=("sm75",))
        graph = onnx_of(exported("llama-wide", "fp16"), "fp16")
        with pytest.raises(EngineUnavailable, match="leave those capabilities out of `compute_capabilities`"):
            build_engine(graph, int4, tmp_path / "engine")

    def test_operators_of_onnx_runtime_come_with_advice(self, exported: Made, tmp_path: Path) -> None:
        from trsp_deploy.tools.graphs.attention import fuse_attention

        model = ir.load(onnx_of(exported("llama-wide", "fp16"), "fp16"))
        fuse_attention(model)
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        with pytest.raises(EngineUnavailable, match="ONNX Runtime's own: export the model without fused operators"):
            build_engine(tmp_path / "model.onnx", load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "engine")
