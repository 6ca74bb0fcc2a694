"""Engines of the graph passes against PyTorch: left-padded prompts, decoding in place, every precision."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tests.breadth import BREADTH, by_default
from tests.exported import HEADS, LAYERS, Made, onnx_of
from tests.families import FAMILIES
from tests.tiny import VOCABULARY, tiny_model
from trsp_deploy.decoder import decoder_layers, load_model
from trsp_deploy.errors import EngineSpecError, EngineUnavailable
from trsp_deploy.recipe import EngineSpec, ExportSettings
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.graphs import costs, nodes, products
from trsp_deploy.tools.graphs.attention import fuse_attention
from trsp_deploy.tools.graphs.norms import fuse_norms
from trsp_deploy.tools.graphs.products import Activations
from trsp_deploy.tools.graphs.quantize import quantize_int8
from trsp_deploy.tools.graphs.rotary import fuse_rotary
from trsp_deploy.tools.graphs.static_cache import fix_cache
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import manifest, open_engine, ort, ort_build, read_manifest
from trsp_deploy.tools.runners.inspection import describe, inspect_engine
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.requirements import adds_int8_exactly

PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
# Model -> which passes find nothing to do.
CASES: dict[str, set[str]] = {
    "llama": set(),
    "mistral-sliding": {"simplify-masks"},
    "mistral-wide-window": {"simplify-masks"},
    "qwen2": set(),
    "qwen3": {"pack-projections"},  # queries and keys are normalised before they are rotated
    "phi3": {"simplify-masks", "pack-projections"},  # a window, and one projection already
    "opt": {"fuse-rotary"},
    "opt-350m": {"fuse-rotary"},
    "gpt2": {"fuse-rotary", "pack-projections"},
    "gpt-neox-parallel": {"fuse-rotary", "pack-projections"},  # a quarter of so small a head is below the node's 16
}


def built(source: Path, out: Path, spec: str = "ort-cpu-fp32", **changes: object) -> Path:
    values = {**load_engine_spec(spec).model_dump(), **changes}
    build_engine(source / "onnx" / "model.onnx", EngineSpec.model_validate(values), out)
    return out


def operators(engine: Path) -> list[str]:
    return [node.op_type for node in onnx.load(engine / "model.onnx", load_external_data=False).graph.node]


def bits(engine: Path) -> Counter[int]:
    nodes = onnx.load(engine / "model.onnx", load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    return Counter(each.i for node in products for each in node.attribute if each.name == "bits")


def agreement(source: Path, engine: Path, precision: str = "fp32") -> float:
    """How far the engine's logits are from PyTorch's, in their standard deviations."""
    reference = parity.make_reference(source / "model", PROMPTS)
    with open_engine(engine) as runner:
        return parity.check_parity(reference, runner, engine.name, "dense", precision).max_error  # type: ignore[arg-type]


@pytest.mark.parametrize("family", by_default(["llama", "mistral-wide-window", "opt"], CASES))
def test_passes_keep_the_logits(family: str, exported: Made, tmp_path: Path) -> None:
    engine = built(exported(family), tmp_path / "engine")
    passes = {outcome.name: outcome for outcome in read_manifest(engine).passes}
    assert {name for name, outcome in passes.items() if outcome.changed == 0} == CASES[family], passes
    assert all(outcome.reason for outcome in passes.values() if outcome.changed == 0)
    assert operators(engine).count("GroupQueryAttention") == LAYERS and "Softmax" not in operators(engine)
    assert agreement(exported(family), engine) < 1e-4


def test_norms_are_fused_while_matrices_stay_in_their_files(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SMALL_BYTES", 2000)
    model = nodes.load(exported("llama") / "onnx" / "model.onnx")
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    assert fuse_norms(model)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    matrices = {name for name, array in before.items() if array.nbytes > 2000}
    assert matrices and all(isinstance(held[name], ir.ExternalTensor) for name in matrices & set(held))
    assert all(np.array_equal(tensor.numpy(), before[name]) for name, tensor in held.items() if name in before)
    kept = nodes.put_down(model, tmp_path / "model.onnx")
    assert all(value.const_value is None for value in model.graph.initializers.values())
    assert all(np.array_equal(kept.graph.initializers[name].const_value.numpy(), before[name]) for name in matrices)


def test_tables_of_angles_have_their_names_in_one_order(exported: Made) -> None:
    """So that an engine that is built again is the same, byte for byte."""
    for _ in range(6):
        model = ir.load(exported("llama") / "onnx" / "model.onnx")
        fuse_attention(model)
        fuse_rotary(model, 64)
        fused = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        assert {tuple(value.name for value in node.inputs[7:9] if value is not None) for node in fused} == {
            ("rotary/cache", "rotary/cache_2")
        }


def test_a_window_wider_than_short_texts_still_hides(exported: Made, tmp_path: Path) -> None:
    """400 tokens: no difference in the texts that passes are proven with, wrong logits behind them if it went lost."""
    source = exported("mistral-wide-window")
    ids = np.random.default_rng(0).integers(3, 380, size=(1, 600))
    with torch.no_grad():
        expected = load_model(source / "model")(input_ids=torch.from_numpy(ids)).logits.numpy()
    with open_engine(built(source, tmp_path / "engine")) as runner:
        np.testing.assert_allclose(runner.prefill(ids, np.ones_like(ids)), expected, atol=1e-3)
    model = ir.load(source / "onnx" / "model.onnx")
    fix_cache(model, 640)
    ir.save(model, tmp_path / "fixed.onnx", external_data="fixed.onnx.data")
    with OrtRunner(tmp_path / "fixed.onnx") as runner:
        np.testing.assert_allclose(runner.prefill(ids, np.ones_like(ids)), expected, atol=1e-3)


def test_cache_stays_where_it_is_and_grows(exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "CHUNK", 4)
    source = exported("llama")
    engine = built(source, tmp_path / "engine")
    assert agreement(source, engine) < 1e-4, "12 new tokens, room for 4"
    with open_engine(engine) as runner:
        assert isinstance(runner, OrtRunner)
        ids = np.array([PROMPTS[1]])
        runner.prefill(ids, np.ones_like(ids))
        places = []
        for token in range(6):
            runner.decode(np.array([[token]]))
            places.append({value.data_ptr() for value in runner._cache.values()})
    assert places[0] == places[1] == places[2] == places[3] != places[4] == places[5]


def test_prompt_can_ask_for_its_last_logits_only(exported: Made, tmp_path: Path) -> None:
    engine = built(exported("llama"), tmp_path / "engine")
    ids = np.array([PROMPTS[1]])
    with open_engine(engine) as runner:
        whole = runner.prefill(ids, np.ones_like(ids))
        last = runner.prefill(ids, np.ones_like(ids), last_only=True)
    assert whole.shape == (1, 9, VOCABULARY) and last.shape == (1, 1, VOCABULARY)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)


def test_the_last_position_alone_is_kept_of_a_prompt(exported: Made, tmp_path: Path) -> None:
    with open_engine(built(exported("llama"), tmp_path / "engine", fuse=False)) as runner:
        ids = torch.randint(VOCABULARY, (1, 9)).numpy()
        last = runner.prefill(ids, np.ones_like(ids), last_only=True)
        assert last.shape == (1, 1, VOCABULARY) and last.base is None, "no view of all positions"
        np.testing.assert_array_equal(last, runner.prefill(ids, np.ones_like(ids))[:, -1:])


def test_cuda_is_asked_for_the_passes_that_it_has_kernels_for(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(graph: Path, passes: dict[str, object], *_: object) -> tuple[Path, tuple[()]]:
        asked.extend(passes)
        return graph, ()

    monkeypatch.setattr(ort_build, "run_passes", run)
    graph = exported("llama") / "onnx" / "model.onnx"
    ort_build.prepare(graph, load_engine_spec("ort-cuda-fp16"), tmp_path)
    assert asked == ["fuse-norms", "cut-logits"]


def test_int4_engine(exported: Made, tmp_path: Path) -> None:
    source = exported("llama")
    engine = built(source, tmp_path / "int4", "ort-cpu-int4")
    found = operators(engine)
    assert found.count("MatMulNBits") == LAYERS * 4 + 1, "qkv, o, gate and up, down of each layer, and the LM head"
    assert "MatMul" not in found and "GatherBlockQuantized" in found
    assert 1e-3 < agreement(source, engine, "int4") < 2
    assert read_manifest(engine).size_bytes < read_manifest(built(source, tmp_path / "fp32")).size_bytes / 3
    careful = built(source, tmp_path / "accurate", "ort-cpu-int4-accurate")
    assert operators(careful) == found
    assert (bits(engine), bits(careful)) == ({4: 4 * LAYERS + 1}, {4: 4 * LAYERS, 8: 1}), "the LM head"
    assert 1e-3 < agreement(source, careful, "int4") < 2
    assert read_manifest(careful).size_bytes > read_manifest(engine).size_bytes


def test_int8_engine_keeps_what_one_scale_would_spoil(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("llama")
    engine = built(source, tmp_path / "int8", "ort-cpu-int8")
    assert operators(engine).count("MatMulNBits") == 1, "the LM head"
    assert operators(engine).count("DynamicQuantizeMatMul") == LAYERS * 4, "random weights have no massive activations"
    assert 1e-3 < agreement(source, engine, "int8") < 0.5
    monkeypatch.setattr(products, "SIGNAL", 1e9)
    careful = built(source, tmp_path / "tokens", "ort-cpu-int8")
    assert operators(careful).count("MatMulIntegerToFloat") == LAYERS * 4
    assert agreement(source, careful, "int8") < agreement(source, engine, "int8")


@pytest.mark.parametrize("reduced", [False, True])
def test_int8_weights_are_those_of_onnxruntimes_own_tool(reduced: bool, exported: Made, tmp_path: Path) -> None:
    """Which holds the model three times over, and so is not what makes them."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = ir.load(exported("llama") / "onnx" / "model.onnx")
    head = products.open_products(model)
    model = nodes.put_down(model, tmp_path / "opened.onnx")
    names = [node.name or "" for node in model.graph if products.weight_of(node) is not None]
    fine = products.Activations(-1.0, 1.0, 100.0, ())
    with quiet_libraries():
        quantize_dynamic(
            tmp_path / "opened.onnx",
            tmp_path / "theirs.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=reduced,
            nodes_to_exclude=[head],
        )
    ours = quantize_int8(model, 32, head, dict.fromkeys(names, fine), reduced=reduced, head_bits=32)
    theirs = ir.load(tmp_path / "theirs.onnx")

    def constants(found: ir.Model) -> Counter[bytes]:
        read = [node for node in found.graph if node.op_type == "MatMulInteger"]
        scales = [node for node in found.graph if node.op_type == "Mul" and node.inputs[1].const_value is not None]
        values = [node.inputs[1] for node in read] + [node.inputs[1] for node in scales]
        return Counter(value.const_value.numpy().tobytes() for value in values)

    assert len([node for node in ours.graph if node.op_type == "MatMulInteger"]) == len(names) - 1
    operators = [Counter(node.op_type for node in found.graph) for found in (ours, theirs)]
    assert operators[0] == operators[1] and constants(ours) == constants(theirs)


@BREADTH
@pytest.mark.parametrize("exact", [True, False])
def test_an_int8_engine_is_made_for_what_the_processor_can_add(
    exact: bool, exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = adds_int8_exactly()
    for module in (ort_build, manifest):
        monkeypatch.setattr(module, "adds_int8_exactly", lambda: exact)
    source = exported("llama")
    engine = built(source, tmp_path / "int8", "ort-cpu-int8")
    whole = onnx.load(engine / "model.onnx")
    weights = [numpy_helper.to_array(each) for each in whole.graph.initializer if each.data_type == TensorProto.INT8]
    assert weights and max(np.abs(each).max() for each in weights) == (127 if exact else 64)
    assert read_manifest(engine).bound.exact_int8 is exact
    if exact and not here:
        monkeypatch.undo()
        with pytest.raises(EngineUnavailable, match="its int8 products would overflow; build it again"):
            open_engine(engine)
    else:
        assert 1e-3 < agreement(source, engine, "int8") < 0.5


# Gemm in the graph, with and without a transposed weight.
@BREADTH
@pytest.mark.parametrize(
    ("precision", "family"),
    by_default([("int4", "opt")], itertools.product(("int8", "int4"), ("opt", "gpt2"))),
)
def test_every_weight_is_quantised(family: str, precision: str, exported: Made, tmp_path: Path) -> None:
    source = exported(family)
    engine = built(source, tmp_path / precision, f"ort-cpu-{precision}")
    assert not {"MatMul", "Gemm"} & set(operators(engine))
    assert 1e-3 < agreement(source, engine, precision) < 2
    assert read_manifest(engine).size_bytes < read_manifest(built(source, tmp_path / "fp32")).size_bytes / 2


def hidden_weights(
    source: Path, out: Path, hide: Callable[[onnx.GraphProto, onnx.NodeProto, np.ndarray], None]
) -> Path:
    """A copy of an export, whose products with a constant matrix read it from what `hide` puts in its place."""
    model = onnx.load(source / "onnx" / "model.onnx")
    weights = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "MatMul" and weights.get(node.input[1], np.empty(0)).ndim == 2:
            hide(model.graph, node, weights[node.input[1]])
    (out / "onnx").mkdir(parents=True)
    shutil.copytree(source / "model", out / "model")
    onnx.save(model, out / "onnx" / "model.onnx")
    return out


def behind_a_cast(graph: onnx.GraphProto, node: onnx.NodeProto, weight: np.ndarray) -> None:
    name = f"{node.name}/half"
    graph.initializer.append(numpy_helper.from_array(weight.astype(np.float16), name))
    graph.node.insert(0, onnx.helper.make_node("Cast", [name], [f"{name}/cast"], to=TensorProto.FLOAT))
    node.input[1] = f"{name}/cast"


def behind_scales(graph: onnx.GraphProto, node: onnx.NodeProto, weight: np.ndarray) -> None:
    name, scale = f"{node.name}/codes", (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), name))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}/scale"))
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [name, f"{name}/scale"], [f"{name}/out"], axis=1))
    node.input[1] = f"{name}/out"


def in_a_stack(graph: onnx.GraphProto, node: onnx.NodeProto, weight: np.ndarray) -> None:
    if "down_proj" in node.name:
        graph.initializer.append(numpy_helper.from_array(weight[None], f"{node.name}/stack"))
        node.input[1] = f"{node.name}/stack"


@BREADTH
@pytest.mark.parametrize("hide", [behind_a_cast, behind_scales])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_that_are_computed_of_constants_are_quantised_too(
    precision: str, hide: Callable[..., None], exported: Made, tmp_path: Path
) -> None:
    source = hidden_weights(exported("llama"), tmp_path / "hidden", hide)
    engine = built(source, tmp_path / precision, f"ort-cpu-{precision}")
    floats = [node.name for node in onnx.load(engine / "model.onnx").graph.node if node.op_type in ("MatMul", "Gemm")]
    assert not [name for name in floats if "_proj" in name or "lm_head" in name]
    assert 1e-3 < agreement(source, engine, precision) < 2 and read_manifest(engine).in_floats is None


@BREADTH
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_without_a_form_in_integers_are_told(precision: str, exported: Made, tmp_path: Path) -> None:
    source = hidden_weights(exported("llama"), tmp_path / "hidden", in_a_stack)
    engine = built(source, tmp_path / precision, f"ort-cpu-{precision}")
    said = read_manifest(engine).in_floats or ""
    assert f"{LAYERS} products" in said and "down_proj" in said and said in describe(inspect_engine(engine))


@BREADTH
def test_what_an_fp16_graph_multiplies_in_fp32_stays_as_it_is(exported: Made) -> None:
    """Its activations are beyond the range of fp16, or of an 8-bit scale (fp16_range.py)."""
    graph = onnx.load(onnx_of(exported("llama", "fp16"), "fp16"))
    node = next(node for node in graph.graph.node if node.op_type == "MatMul" and "down_proj" in node.name)
    where = list(graph.graph.node).index(node)
    (made,) = node.output
    casts = [onnx.helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT) for name in list(node.input)]
    node.input[:], node.output[:] = [f"{name}/wide" for name in node.input], [f"{made}/wide"]
    graph.graph.node.insert(where + 1, onnx.helper.make_node("Cast", [f"{made}/wide"], [made], to=TensorProto.FLOAT16))
    for cast in casts:
        graph.graph.node.insert(where, cast)
    model = ir.from_proto(graph)
    products.open_products(model)
    names = [each.name for each in model.graph if products.weight_of(each) is not None]
    assert len(names) == 7 * LAYERS and node.name not in names and products.in_floats(model) == []


def test_signal_to_noise_is_that_of_the_ordinary_token() -> None:
    random = np.random.default_rng(0).normal(size=(100, 64))
    assert products.signal_to_noise(random) == pytest.approx(10 * np.log10(12 * (255 / 8.5) ** 2), abs=2)
    massive = random.copy()
    massive[0, 3] = 1000.0
    assert products.signal_to_noise(massive) < 1 < 30 < products.signal_to_noise(massive[1:])
    assert products.signal_to_noise(np.zeros((4, 8))) == pytest.approx(0)


@BREADTH
def test_a_pass_that_changes_the_logits_is_left_out(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ir.Model) -> int:
        weights = [value for value in model.graph.initializers.values() if value.shape and len(value.shape) == 2]
        for value in weights:
            array = value.const_value.numpy()  # type: ignore[union-attr]
            value.const_value = ir.tensor(array * np.float32(1.1), name=value.name)
        return len(weights)

    monkeypatch.setattr(ort_build, "fusions", lambda onnx: {"spoil": spoil})
    engine = built(exported("llama"), tmp_path / "engine")
    (outcome,) = read_manifest(engine).passes
    assert outcome.changed == 0 and "would differ by" in (outcome.reason or "")
    assert agreement(exported("llama"), engine) < 1e-4


@BREADTH
def test_graphs_of_others_are_fused_as_far_as_they_fit(exported: Made, tmp_path: Path) -> None:
    (tmp_path / "other" / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx_data"):  # and no config
        shutil.copy(exported("llama") / "onnx" / name, tmp_path / "other" / "onnx")
    engine = built(tmp_path / "other", tmp_path / "engine")
    reasons = {outcome.name: outcome.reason for outcome in read_manifest(engine).passes}
    assert (
        "config.json" in (reasons["fuse-rotary"] or "") and reasons["fuse-attention"] is reasons["cut-logits"] is None
    )
    assert agreement(exported("llama"), engine) < 1e-4


def test_an_engine_without_passes_is_the_graph_as_exported(exported: Made, tmp_path: Path) -> None:
    engine = built(exported("llama"), tmp_path / "engine", fuse=False)
    assert read_manifest(engine).passes == ()
    assert "Softmax" in operators(engine) and "GroupQueryAttention" not in operators(engine)
    assert agreement(exported("llama"), engine) < 1e-4


def test_positions_beyond_the_rotary_table_are_an_error(exported: Made, tmp_path: Path) -> None:
    from trsp_deploy.errors import EngineUnavailable

    engine = built(exported("llama"), tmp_path / "engine")
    limit = FAMILIES["llama"].values["max_position_embeddings"]
    ids = torch.randint(VOCABULARY, (1, limit + 1)).numpy()
    wanted = f"holds for texts of up to {limit} tokens, and this one has {limit + 1}$"
    with open_engine(engine) as runner, pytest.raises(EngineUnavailable, match=wanted):
        runner.prefill(ids, np.ones_like(ids))


def lookups(engine: Path) -> Counter[tuple[str, int]]:
    """Bits of every table in blocks, and 32 of those in floats, with the operator that reads it."""
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    floats = {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
    found: Counter[tuple[str, int]] = Counter()
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in floats:
            found[node.op_type, 32] += 1
        elif node.op_type == "GatherBlockQuantized":
            found[node.op_type, next((each.i for each in node.attribute if each.name == "bits"), 4)] += 1
    return found


@BREADTH
@pytest.mark.parametrize("width", [4, 8, 32])
def test_the_tokens_table_alone_is_rounded(width: int, exported: Made, tmp_path: Path) -> None:
    source = exported("opt")
    engine = built(source, tmp_path / "engine", "ort-cpu-int4", embedding_bits=width, head_bits=32)
    positions = Counter({("Gather", 32): 1})
    tokens = Counter({("Gather" if width == 32 else "GatherBlockQuantized", width): 1})
    assert lookups(engine) == positions + tokens
    assert lookups(built(source, tmp_path / "default", "ort-cpu-int4")) == positions + Counter(
        {("GatherBlockQuantized", 4): 1}
    )
    assert set(bits(engine)) == {4} and operators(engine).count("MatMul") == 1, "the head is in floats"
    assert agreement(source, engine, "int4") < 2


def test_every_token_of_the_text_says_how_to_round_the_head(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines compute the logits of the last token alone, and of it nothing is learned about the others."""
    tokens: dict[str, float] = {}

    def chosen(
        model: ir.Model, head: str, activations: Mapping[str, Activations], spec: EngineSpec
    ) -> dict[str, float]:
        tokens.update({name: float(found.power.mean()) for name, found in activations.items()})
        assert head in tokens
        return {}

    monkeypatch.setattr(costs, "chosen", chosen)
    text = np.random.default_rng(0).integers(3, 380, size=(3, 16))
    build_engine(onnx_of(exported("llama")), load_engine_spec("ort-cpu-int4"), tmp_path / "engine", text)
    assert list(tokens.values()) == pytest.approx([text.size] * len(tokens), rel=0.01)


@BREADTH
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_costliest_products_keep_more_bits(precision: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **HEADS)
    with torch.no_grad():  # one weight a block far above the others leaves those nothing but 0
        decoder_layers(model)[2].mlp.down_proj.weight[:, ::16] *= 30
    model.save_pretrained(tmp_path / "model")
    with quiet_libraries():
        export_onnx(tmp_path / "model", "fp32", ExportSettings(), tmp_path / "onnx")
    spec, blocks = f"ort-cpu-{precision}", {"block_size": 32} if precision == "int4" else {}
    plain = built(tmp_path, tmp_path / "plain", spec, **blocks, keep_high_precision=0)
    careful = built(tmp_path, tmp_path / "careful", spec, **blocks, keep_high_precision=1)
    (outcome,) = [found for found in read_manifest(careful).passes if found.kept]
    ((name, cost),) = outcome.kept.items()
    assert "layers.2/mlp/down_proj" in name and cost > 0
    assert outcome.name not in {found.name for found in read_manifest(plain).passes}
    assert f"{name} ({cost:.1%})" in describe(inspect_engine(careful))
    assert agreement(tmp_path, careful, precision) < agreement(tmp_path, plain, precision)
    named = built(tmp_path, tmp_path / "named", spec, **blocks, keep_high_precision=[name])
    assert [found.kept for found in read_manifest(named).passes if found.kept] == [outcome.kept]
    with pytest.raises(EngineSpecError, match=r"no product '.*downproj.*' in the graph; did you mean '.*down_proj"):
        built(tmp_path, tmp_path / "wrong", spec, **blocks, keep_high_precision=[name.replace("_", "")])
