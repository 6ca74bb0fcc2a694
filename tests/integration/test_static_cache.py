"""Graphs with a KV cache of fixed length: against PyTorch on ONNX Runtime, and through TensorRT-RTX's compiler."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.breadth import BREADTH, by_default
from tests.exported import DROPPED, LAYERS, Made, onnx_of
from tests.families import FAMILIES
from trsp_deploy.errors import EngineUnavailable, ShapeUnavailable
from trsp_deploy.recipe import EngineSpec, Precision
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.graphs import masks
from trsp_deploy.tools.graphs.attention import find_layers
from trsp_deploy.tools.graphs.nodes import NoMatch, Writer
from trsp_deploy.tools.graphs.static_cache import fix_cache
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners.inspection import describe, inspect_engine
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.trt_log import Layer, logger

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
        with pytest.raises(ShapeUnavailable, match="its cache holds 10 tokens, and the text is longer"):
            runner.decode(np.array([[1]]))
        with pytest.raises(ShapeUnavailable, match="holds 10 tokens"):
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


def chunked(chunk: int) -> ir.Model:
    """A graph of nothing but a mask: each token sees those before it in its own chunk of the text."""
    node = onnx.helper.make_node
    numbers = {"zero": 0, "one": 1, "chunk": chunk, "rows": [1], "heads": [1, 2]}
    nodes = [
        node("Shape", ["attention_mask"], ["mask_shape"], start=1),
        node("Squeeze", ["mask_shape"], ["total"]),
        node("Shape", ["input_ids"], ["tokens_shape"], start=1),
        node("Squeeze", ["tokens_shape"], ["new"]),
        node("Sub", ["total", "new"], ["past"]),
        node("Range", ["zero", "total", "one"], ["places"]),
        node("Range", ["past", "total", "one"], ["new_places"]),
        node("Unsqueeze", ["new_places", "rows"], ["own"]),
        *(node("Div", [name, "chunk"], [f"{name}_chunk"]) for name in ("places", "own")),
        node("Equal", ["places_chunk", "own_chunk"], ["together"]),
        node("LessOrEqual", ["places", "own"], ["earlier"]),
        node("And", ["together", "earlier"], ["near"]),
        node("Cast", ["attention_mask"], ["there"], to=onnx.TensorProto.BOOL),
        node("Unsqueeze", ["there", "heads"], ["there_for_all"]),
        node("And", ["near", "there_for_all"], ["visible"]),
        node("Where", ["visible", "nothing", "lowest"], ["mask"]),
    ]
    floats = {"nothing": np.array(0, np.float32), "lowest": np.array(-3e38, np.float32)}
    constants = {**{name: np.array(value) for name, value in numbers.items()}, **floats}
    whole, info = onnx.TensorProto.INT64, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "mask",
        [info("input_ids", whole, ["batch", "new"]), info("attention_mask", whole, ["batch", "total"])],
        [info("mask", onnx.TensorProto.FLOAT, ["batch", 1, "new", "total"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


@pytest.mark.parametrize(("chunk", "longest"), [(512, 1024), (512, 1500)])
def test_attention_in_chunks_is_no_window(chunk: int, longest: int) -> None:
    """To the last token of a text of whole chunks its chunk is what a window of that size would be."""
    model = chunked(chunk)
    with pytest.raises(NoMatch, match="does more than hide padding"):
        masks.window(model, model.graph.outputs[0], longest)
    assert masks.window(model, model.graph.outputs[0], chunk) is None, "of one chunk it is the whole text"


def square() -> ir.Model:
    """A graph of nothing but a mask, whose rows are cut out of one for every pair of tokens."""
    node, whole, info = onnx.helper.make_node, onnx.TensorProto.INT64, onnx.helper.make_tensor_value_info
    numbers = {"zero": 0, "one": 1, "ends": [2**62], "rows": [0], "columns": [1], "heads": [1, 2], "above": [0, 1]}
    nodes = [
        node("Shape", ["attention_mask"], ["total"], start=1),
        node("Shape", ["input_ids"], ["new"], start=1),
        node("Sub", ["total", "new"], ["past"]),
        node("Squeeze", ["total"], ["count"]),
        node("Range", ["zero", "count", "one"], ["places"]),
        node("Unsqueeze", ["places", "columns"], ["own"]),
        node("LessOrEqual", ["places", "own"], ["every_pair"]),
        node("Slice", ["every_pair", "past", "ends", "rows"], ["earlier"]),
        node("Unsqueeze", ["earlier", "above"], ["earlier_for_all"]),
        node("Cast", ["attention_mask"], ["there"], to=onnx.TensorProto.BOOL),
        node("Unsqueeze", ["there", "heads"], ["there_for_all"]),
        node("And", ["earlier_for_all", "there_for_all"], ["visible"]),
        node("Where", ["visible", "nothing", "lowest"], ["mask"]),
    ]
    floats = {"nothing": np.array(0, np.float32), "lowest": np.array(-3e38, np.float32)}
    constants = {**{name: np.array(value) for name, value in numbers.items()}, **floats}
    graph = onnx.helper.make_graph(
        nodes,
        "mask",
        [info("input_ids", whole, ["batch", "new"]), info("attention_mask", whole, ["batch", "total"])],
        [info("mask", onnx.TensorProto.FLOAT, ["batch", 1, "new", "total"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))


def test_a_mask_for_every_pair_of_tokens_is_left_as_it_is() -> None:
    """Of a text of 200,000 tokens it is 37 GiB, for want of which the whole engine was refused."""
    model = square()
    (mask,) = model.graph.outputs
    with pytest.raises(NoMatch, match="'mask' would take 37 GiB for a text of 200000 tokens to be looked at"):
        masks.window(model, mask, 200_000)
    assert not masks.is_plain(model, mask, 200_000) and masks.is_plain(model, mask, 1000)


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


def attention_read_by_rtx(more: Sequence[str], outputs: int = 1) -> tuple[set[str] | None, str]:
    """What TensorRT-RTX's parser makes of one Attention node: the tensors that its layers read, and what it says.

    more: names of the node's inputs behind query, key and value. None for a graph that it refuses.
    """
    import onnx
    import tensorrt_rtx as trt

    def tensor(name: str) -> onnx.ValueInfoProto:
        if name == "lengths":
            return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch"])
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["batch", 4, f"{name}_length", 64])

    inputs, results = ["query", "key", "value", *more], ["output", "present_key", "present_value"][:outputs]
    node = onnx.helper.make_node("Attention", inputs, results)
    graph = onnx.helper.make_graph([node], "g", [tensor(name) for name in inputs if name], list(map(tensor, results)))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        return None, " ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.get_input(index).name for layer in layers for index in range(layer.num_inputs)}, ""


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

    @pytest.mark.parametrize(
        ("precision", "name", "dropped"),
        by_default([], itertools.product(("fp16", "int8", "int4"), ("llama-wide", "opt-wide"), ((), DROPPED))),
    )
    def test_a_cache_that_grows_builds_too(
        self, name: str, precision: Precision, dropped: tuple[int, ...], exported: Made, tmp_path: Path
    ) -> None:
        source, layers = exported(name, "fp16", dropped), LAYERS - len(dropped)
        spec = load_engine_spec("tensorrt-rtx-fp16")
        spec = EngineSpec.model_validate({**spec.model_dump(), "precision": precision, "block_size": 64})
        build_engine(onnx_of(source, "fp16"), spec, tmp_path / "engine")
        found = inspect_engine(tmp_path / "engine")
        build = found.build
        assert build is not None and build.written_in_place() == set()
        for profile in range(len(spec.profiles)):
            assert build.attention_kernels(profile) == layers
        assert f"{layers} of them fused attention, a new cache at every step" in describe(found)
        assert quantised_products(build.of(0), precision) >= 3 * layers

    def test_attention_with_a_cache_of_its_own_is_refused(self) -> None:
        """So the scatter stands outside of it."""
        parsed, errors = attention_read_by_rtx(["", "past_key", "past_value"], outputs=3)
        assert parsed is None and "only supports Attention nodes with one output" in errors

    def test_lengths_of_texts_are_dropped_without_a_word(self) -> None:
        """So padding is hidden by a mask: an engine would let the text see it."""
        parsed, errors = attention_read_by_rtx(["", "", "", "lengths"])
        assert parsed is not None and not errors and "lengths" not in parsed

    def test_a_cache_is_attended_under_a_mask_alone(self, exported: Made, tmp_path: Path) -> None:
        """`is_causal` counts from the first key, which is right for prompts alone, and what the parser refuses or drops
        is not asked of it."""
        graph = ir.load(fixed(onnx_of(exported("llama")), tmp_path / "model.onnx")).graph
        nodes = [node for node in graph if node.op_type == "Attention"]
        assert len(nodes) == LAYERS
        for node in nodes:
            assert len(node.inputs) == 4 and None not in node.inputs, "query, key, value, mask"
            assert len(node.outputs) == 1 and not node.attributes.get_int("is_causal", 0)

    @BREADTH
    @pytest.mark.parametrize("static", by_default([True], [True, False]))
    def test_a_profile_of_one_token_alone_builds(self, static: bool, exported: Made, tmp_path: Path) -> None:
        """It did not from opsets 23 and 24 of torch's exporter, in whose place these graphs have 18 or 20."""
        past = {} if static else {"past": {"min": 0, "opt": 16, "max": 64}}
        one = {"batch": {"min": 1, "opt": 1, "max": 2}, "sequence": {"min": 1, "opt": 1, "max": 1}, **past}
        spec = static_spec(cache_length=256 if static else None, profiles=[one])
        assert build_engine(onnx_of(exported("llama-wide", "fp16"), "fp16"), spec, tmp_path / "engine").size_bytes

    @BREADTH
    def test_a_graph_that_does_not_fit_is_refused_with_the_reason(self, exported: Made, tmp_path: Path) -> None:
        graph = onnx_of(exported("bloom", "fp16"), "fp16")
        with pytest.raises(EngineUnavailable, match=r"no cache of fixed length: .*; a spec without `cache_length`"):
            build_engine(graph, static_spec(), tmp_path / "engine")

    @BREADTH
    def test_trtexec_reads_the_graph_that_was_compiled_and_leaves_the_engine_alone(
        self, exported: Made, tmp_path: Path
    ) -> None:
        graph = onnx_of(exported("opt-wide"))  # fp32 and no passes: no graph lies in the engine's folder
        spec = load_engine_spec("tensorrt-rtx-fp16").model_copy(update={"precision": "fp32", "fuse": False})
        engine = tmp_path / "engine"
        manifest = build_engine(graph, spec, engine)
        assert manifest.longest_text == FAMILIES["opt"].values["max_position_embeddings"], "less than its profiles"
        programs = tmp_path / "programs"
        programs.mkdir()
        stand_in = programs / "tensorrt_rtx"
        # Reads and writes as the program does.
        stand_in.write_text("#!/bin/sh\ncat ${1#--onnx=} > ${2#--saveEngine=}\n")
        stand_in.chmod(0o755)
        path = {"PATH": f"{programs}:{os.environ['PATH']}"}
        subprocess.run(["sh", str(engine / "trtexec.sh")], env=path, cwd="/", check=True)
        assert (tmp_path / "engine-trtexec.engine").read_bytes() == graph.read_bytes()
        assert verify(engine).whole
        assert f"--onnx={os.path.relpath(graph, engine)}" in str(inspect_engine(engine).trtexec)
        assert "layers     not known" not in describe(inspect_engine(engine))
        (engine / "build.log").write_text("a log of another form")
        assert "layers     not known: build.log has none in a form" in describe(inspect_engine(engine))

    @BREADTH
    def test_what_the_compiler_refuses_comes_with_advice(self, exported: Made, tmp_path: Path) -> None:
        with pytest.raises(
            EngineUnavailable, match=r"dedicated kernel.*take precision fp16, or leave `cache_length` out, or"
        ):
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
