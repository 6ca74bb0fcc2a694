"""Models whose graphs are not as most are: engines of them are right, or refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.breadth import BREADTH, by_default
from tests.families import family_model
from tests.tiny import POSITIONS, random_model, tiny_model
from trsp_deploy.decoder import max_positions
from trsp_deploy.errors import EngineUnavailable, ModelError
from trsp_deploy.pipeline.engines import Engines
from trsp_deploy.recipe import EngineSpec, ExportSettings
from trsp_deploy.recipe.engine_spec import ShapeProfile
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, check_exportable, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import open_engine, read_manifest, trt_build
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.runners.half_range import within_range
from trsp_deploy.tools.runners.inspection import describe, inspect_engine
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.passes import run_passes

ORIGINAL = 32  # tokens before LongRoPE turns keys by its other frequencies
PHI = {
    "hidden_size": 64,
    "sliding_window": None,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": ORIGINAL,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


def exported(model: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder / "model")
    (folder / "onnx").mkdir(parents=True)
    export_onnx(folder / "model", "fp32", ExportSettings(**settings), folder / "onnx")
    return folder / "onnx" / FILE


@BREADTH
def test_longrope_holds_to_the_length_that_was_traced(tmp_path: Path) -> None:
    model = family_model("phi3", **PHI).eval()
    graph = exported(model, tmp_path)
    build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    ids = np.random.default_rng(0).integers(3, 380, size=(1, ORIGINAL))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    with open_engine(tmp_path / "engine") as runner:
        np.testing.assert_allclose(runner.prefill(ids, np.ones_like(ids)), expected, atol=1e-4)
        with pytest.raises(EngineUnavailable, match="holds for texts of up to 32 tokens, and this one has 33"):
            runner.decode(ids[:, :1])  # which would give other logits than the model's
    assert max_positions(tmp_path / "model") == ORIGINAL
    static = load_engine_spec("tensorrt-rtx-fp16-static").model_copy(update={"cache_length": ORIGINAL + 1})
    with pytest.raises(
        EngineUnavailable, match=r"up to 32 tokens \(LongRoPE, dynamic NTK\), and tensorrt-rtx-fp16-static is for 33"
    ):
        trt_build._check_length(graph, static)
    trt_build._check_length(graph, static.model_copy(update={"cache_length": ORIGINAL}))
    one = {"min": 1, "opt": 1, "max": 1}
    prompts = ShapeProfile.model_validate({"batch": one, "sequence": {**one, "max": ORIGINAL + 1}, "past": one})
    with pytest.raises(EngineUnavailable, match="is for 33"):
        trt_build._check_length(graph, static.model_copy(update={"cache_length": None, "profiles": (prompts,)}))


DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": ORIGINAL}
PARTLY = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}


@BREADTH
@pytest.mark.parametrize(
    ("family", "changes", "fuse"),
    [
        ("phi3", PHI, False),
        ("phi3", {**PHI, "rope_scaling": {"type": "longrope", **PARTLY}, "partial_rotary_factor": 0.75}, True),
        ("llama", {"hidden_size": 64, **DYNAMIC}, False),
    ],
    ids=["longrope, not fused", "longrope of a part", "dynamic"],
)
def test_no_graph_computes_a_text_that_it_does_not_hold_for(
    family: str, changes: dict[str, Any], fuse: bool, tmp_path: Path
) -> None:
    """Without a table that ends, such a graph would go on with the angles that were traced, and say nothing."""
    model = family_model(family, **changes).eval()
    graph = exported(model, tmp_path)
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": fuse})
    manifest = build_engine(graph, spec, tmp_path / "engine")
    assert not any(outcome.changed for outcome in manifest.passes if outcome.name == "fuse-rotary")
    ids = np.random.default_rng(0).integers(3, 380, size=(1, ORIGINAL + 1))
    for runner in (OrtRunner(graph), open_engine(tmp_path / "engine")):
        with runner, pytest.raises(EngineUnavailable, match="holds for texts of up to 32 tokens, and this one has 33"):
            runner.prefill(ids, np.ones_like(ids))
    text = open_engine(tmp_path / "engine")
    with text as runner, torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids[:, :ORIGINAL]), use_cache=False).logits.numpy()
        found = runner.prefill(ids[:, :ORIGINAL], np.ones((1, ORIGINAL), dtype=np.int64))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@BREADTH
def test_an_export_of_before_is_told_by_its_config_alone(tmp_path: Path) -> None:
    graph = exported(family_model("phi3", **PHI).eval(), tmp_path)
    model = onnx.load(graph, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, graph)
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    build_engine(graph, spec, tmp_path / "engine")
    with open_engine(tmp_path / "engine") as runner, pytest.raises(EngineUnavailable, match="of up to 32 tokens"):
        runner.prefill(np.full((1, ORIGINAL + 1), 5), np.ones((1, ORIGINAL + 1), dtype=np.int64))


@pytest.mark.parametrize("exporter", by_default(["optimum"], ["optimum", "dynamo"]))
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_table_of_positions_ends_the_texts(family: str, exporter: str, tmp_path: Path) -> None:
    """On a GPU nobody else looks: what lies behind the table is read as if it were a row of it."""
    graph = exported(tiny_model(family, num_hidden_layers=2), tmp_path, exporter=exporter)
    ids = np.random.default_rng(0).integers(3, 380, size=(1, POSITIONS + 1))
    with OrtRunner(graph) as runner, pytest.raises(EngineUnavailable, match="holds for texts of up to 256 tokens"):
        runner.prefill(ids, np.ones_like(ids))
    # A foreign graph: no metadata, no config beside it.
    model = onnx.load(graph, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, graph)
    graph.with_name("config.json").unlink()
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    assert build_engine(graph, spec, tmp_path / "engine").longest_text == POSITIONS
    with open_engine(tmp_path / "engine") as runner:
        assert runner.longest_text == POSITIONS
        runner.prefill(ids[:, :POSITIONS], np.ones_like(ids[:, :POSITIONS]))
        with pytest.raises(EngineUnavailable, match="holds for texts of up to 256 tokens, and this one has 257"):
            runner.decode(ids[:, :1])


def by_place(model: onnx.ModelProto, source: str) -> None:
    """Positions that count the padding too, from how long the cache or the mask is, of one row or of every text's."""
    node, numbers = onnx.helper.make_node, {"p/two": [2], "p/row": [0]}
    del model.graph.input[[value.name for value in model.graph.input].index("position_ids")]
    for reader in model.graph.node:
        reader.input[:] = ["p/positions" if name == "position_ids" else name for name in reader.input]
    before = [node("Shape", ["input_ids"], ["p/new"], start=1)]
    if source == "cache":
        before += [
            node("Shape", ["past_key_values.0.key"], ["p/cache"]),
            node("Gather", ["p/cache", "p/two"], ["p/past"]),
            node("Add", ["p/past", "p/new"], ["p/total"]),
        ]
    else:
        before += [
            node("Shape", ["attention_mask"], ["p/total"], start=1),
            node("Sub", ["p/total", "p/new"], ["p/past"]),
        ]
    before += [
        *(node("Squeeze", [f"p/{name}"], [f"p/{name}_number"]) for name in ("past", "total")),
        node("Range", ["p/past_number", "p/total_number", "p/one"], ["p/places"]),
        node("Unsqueeze", ["p/places", "p/row"], ["p/positions" if source == "mask" else "p/places_row"]),
    ]
    if source != "mask":
        before += [
            node("Shape", ["input_ids"], ["p/tokens"]),
            node("Expand", ["p/places_row", "p/tokens"], ["p/positions"]),
        ]
    nodes = [*before, *model.graph.node]
    del model.graph.node[:], model.metadata_props[:]
    model.graph.node.extend(nodes)
    constants = {**{name: np.array(value) for name, value in numbers.items()}, "p/one": np.array(1)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())


@BREADTH
@pytest.mark.parametrize("source", ["cache", "mask", "mask of each"])
def test_a_table_ends_the_texts_whose_positions_are_places(source: str, tmp_path: Path) -> None:
    """On a GPU such a graph read on behind its table, and nobody said so."""
    model = onnx.load(exported(tiny_model("gpt2", num_hidden_layers=2), tmp_path))
    by_place(model, source)
    onnx.save(model, tmp_path / FILE)
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    assert build_engine(tmp_path / FILE, spec, tmp_path / "engine").longest_text == POSITIONS
    ids = np.random.default_rng(0).integers(3, 380, size=(1, POSITIONS))
    with open_engine(tmp_path / "engine") as runner, OrtRunner(tmp_path / "onnx" / FILE) as plain:
        np.testing.assert_allclose(*(each.prefill(ids, np.ones_like(ids)) for each in (runner, plain)), atol=1e-4)
        with pytest.raises(EngineUnavailable, match="holds for texts of up to 256 tokens, and this one has 257"):
            runner.decode(ids[:, :1])


@BREADTH
@pytest.mark.parametrize(
    ("operator", "domain", "longest"), [("Same", "own", POSITIONS), ("QuickGelu", "com.microsoft", None)]
)
def test_what_computes_positions_may_be_no_operator_of_onnx(
    operator: str, domain: str, longest: int | None, tmp_path: Path
) -> None:
    """A function of the graph's own, or an operator of ONNX Runtime's, of which no table's end is known."""
    graph = exported(tiny_model("gpt2", num_hidden_layers=2), tmp_path)
    model, node = onnx.load(graph), onnx.helper.make_node
    del model.metadata_props[:]
    for reader in model.graph.node:
        reader.input[:] = ["positions" if name == "position_ids" else name for name in reader.input]
    before = [
        node("Cast", ["position_ids"], ["real"], to=onnx.TensorProto.FLOAT),
        node(operator, ["real"], ["same"], domain=domain, **({"alpha": 1e6} if longest is None else {})),
        node("Cast", ["same"], ["positions"], to=onnx.TensorProto.INT64),
    ]
    nodes = [*before, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    opset = onnx.helper.make_opsetid("", 18)
    model.functions.append(
        onnx.helper.make_function("own", "Same", ["x"], ["y"], [node("Identity", ["x"], ["y"])], [opset])
    )
    model.opset_import.extend(onnx.helper.make_opsetid(name, 1) for name in ("own", "com.microsoft"))
    onnx.save(model, tmp_path / FILE)
    build_engine(tmp_path / FILE, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    ids = np.arange(3, 19)[None]
    with open_engine(tmp_path / "engine") as runner, OrtRunner(graph) as plain:
        assert runner.longest_text == longest
        np.testing.assert_allclose(*(each.prefill(ids, np.ones_like(ids)) for each in (runner, plain)), atol=1e-4)


@BREADTH
def test_a_pass_that_fails_is_left_out_with_its_reason(tmp_path: Path) -> None:
    def fails(model: Any) -> int:
        raise IndexError("list index out of range")

    graph = exported(tiny_model("llama", num_hidden_layers=2), tmp_path)
    out, (outcome,) = run_passes(graph, {"fuse-norms": fails}, load_engine_spec("ort-cpu-fp32"), tmp_path)
    assert out == graph and outcome.changed == 0
    assert outcome.reason == "it failed (IndexError: list index out of range)"


@pytest.mark.slow
def test_experts_that_no_token_was_sent_to_are_missed_before_parity(tmp_path: Path) -> None:
    parts = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 24}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    config = transformers.DeepseekV3Config(**sizes, **heads, **parts, **experts, topk_group=1, first_k_dense_replace=1)
    random_model(config).save_pretrained(tmp_path / "model")
    lack = r"Optimum's trace left out \d+ weights of its layers, such as .*experts"
    with pytest.raises(ModelError, match=lack):
        check_exportable(tmp_path / "model", ExportSettings(), pytest.fail)
    with pytest.raises(ModelError, match=lack):
        exported(random_model(config), tmp_path)


@BREADTH
def test_norms_fuse_where_attention_does_not(tmp_path: Path) -> None:
    model = family_model("falcon-7b").eval()
    build_engine(exported(model, tmp_path), load_engine_spec("ort-cpu-int8"), tmp_path / "engine")
    ids = np.random.default_rng(0).integers(3, 380, size=(1, 12))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    with open_engine(tmp_path / "engine") as runner:
        found = runner.prefill(ids, np.ones_like(ids))
    assert np.abs(found - expected).max() < 0.5 * expected.std()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of more experts than the calibration text has tokens for."""
    small = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    mixture = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(**small, **heads, **mixture)
    return exported(random_model(config), tmp_path_factory.mktemp("experts"))


@BREADTH
@pytest.mark.parametrize("name", ["ort-cpu-int4", "ort-cpu-int8"])
def test_an_expert_that_read_nothing_is_rounded_without_a_text(experts: Path, tmp_path: Path, name: str) -> None:
    text = np.full((1, 3), 7)
    spec = EngineSpec.model_validate({**load_engine_spec(name).model_dump(), "threads": 1})
    build_engine(experts, spec, tmp_path / "engine", text)
    with open_engine(tmp_path / "engine") as runner:
        assert np.isfinite(runner.prefill(np.array([[5, 9, 200]]), np.ones((1, 3), dtype=np.int64))).all()


@BREADTH
def test_an_expert_that_read_nothing_is_within_fp16(experts: Path, tmp_path: Path) -> None:
    text = np.full((1, 3), 7)
    export_onnx(experts.parents[1] / "model", "fp16", ExportSettings(), tmp_path, text)
    _, found = within_range(tmp_path / FILE, load_engine_spec("tensorrt-fp16"), tmp_path, text)
    assert found is not None and not found.kept


def test_what_optimum_cannot_trace_is_one_line(tmp_path: Path) -> None:
    model = family_model("falcon-40b", num_attention_heads=4, num_kv_heads=2)
    with pytest.raises(ModelError, match=r"Optimum cannot export it to ONNX \(.*export.exporter=dynamo"):
        exported(model, tmp_path)
    with pytest.raises(
        ModelError, match=r"Optimum cannot export it .*; `trsp-deploy prune` makes the checkpoint alone"
    ):
        check_exportable(tmp_path / "model", ExportSettings(), pytest.fail)


@pytest.mark.parametrize("name", ["ort-cpu-int4", "tensorrt-rtx-fp16-static"])
def test_a_graph_that_is_too_old_for_a_higher_opset_says_so(name: str, tmp_path: Path) -> None:
    graph = exported(tiny_model("llama", hidden_size=64, num_hidden_layers=2), tmp_path, opset=17)
    spec = load_engine_spec(name)
    with pytest.raises(EngineUnavailable, match=r"opset 17, and 18 is the lowest that can be: export.opset=18"):
        if name.startswith("ort"):
            build_engine(graph, spec, tmp_path / "engine")
        else:
            trt_build.prepare(graph, spec, tmp_path, None)


def test_other_windows_of_one_text_are_another_calibration() -> None:
    def engines(first: int) -> Any:
        windows = torch.arange(first, first + 64).reshape(2, 32)
        made: Any = Engines.__new__(Engines)
        made.inputs = SimpleNamespace(texts=SimpleNamespace(calibration_windows=lambda: (windows, None)))
        return made

    assert engines(0)._calibration_sha256() == engines(0)._calibration_sha256() != engines(5)._calibration_sha256()


def foreign_graph(path: Path, extra: Sequence[onnx.ValueInfoProto] = ()) -> Path:
    """A decoder of one layer as onnxruntime-genai's builder exports them: GroupQueryAttention that counts the mask.

    extra: inputs that change nothing.
    """
    heads, head_dim, vocabulary = 2, 16, 50
    width = heads * head_dim
    random = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    node, whole, real = onnx.helper.make_node, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    parts = ("key", "value")
    cache = ("batch", heads, "past", head_dim)
    nodes = [
        node("Gather", ["table", "input_ids"], ["embedded"]),
        *(node("MatMul", ["embedded", f"w_{part}"], [part]) for part in ("query", *parts)),
        node("ReduceSum", ["attention_mask", "last_axis"], ["tokens"], keepdims=0),
        node("Sub", ["tokens", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens_k"], to=onnx.TensorProto.INT32),
        node("Shape", ["attention_mask"], ["total"], start=1),
        node("Squeeze", ["total"], ["length"]),
        node("Cast", ["length"], ["total_sequence_length"], to=onnx.TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["query", *parts, *(f"past_key_values.0.{part}" for part in parts), "seqlens_k", "total_sequence_length"],
            ["mixed", *(f"present.0.{part}" for part in parts)],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=heads,
        ),
        node("MatMul", ["mixed", "head"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "foreign",
        [
            value("input_ids", whole, "batch", "sequence"),
            value("attention_mask", whole, "batch", "total"),
            *(value(f"past_key_values.0.{part}", real, *cache) for part in parts),
            *extra,
        ],
        [
            value("logits", real, "batch", "sequence", vocabulary),
            *(value(f"present.0.{part}", real, "batch", heads, "total", head_dim) for part in parts),
        ],
        [
            weights("table", vocabulary, width),
            *(weights(f"w_{part}", width, width) for part in ("query", *parts)),
            weights("head", width, vocabulary),
            onnx.numpy_helper.from_array(np.array([1]), "last_axis"),
            onnx.numpy_helper.from_array(np.array(1), "one"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cpu-int8"])
@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [("use_cache_branch", onnx.TensorProto.BOOL, [1]), ("num_logits_to_keep", onnx.TensorProto.INT64, [])],
)
def test_an_input_that_nobody_feeds_is_refused_at_build(
    name: str, kind: int, shape: list[int], engine: str, tmp_path: Path
) -> None:
    graph = foreign_graph(tmp_path / "model.onnx", [onnx.helper.make_tensor_value_info(name, kind, shape)])
    with pytest.raises(EngineUnavailable, match=rf"wants {name}, which nothing here feeds: .*understood are input_ids"):
        build_engine(graph, load_engine_spec(engine), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_graph_that_gets_padding_wrong_says_so_and_refuses_it(tmp_path: Path) -> None:
    build_engine(foreign_graph(tmp_path / "model.onnx"), load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    assert not read_manifest(tmp_path / "engine").padding
    assert "padding    is not hidden by the graph" in describe(inspect_engine(tmp_path / "engine"))
    prompts, sampling = [[5, 9, 7], [30, 31, 8]], Sampling(max_new_tokens=4)
    with open_engine(tmp_path / "engine") as runner:
        assert generate(runner, prompts, sampling) == [generate(runner, [one], sampling)[0] for one in prompts]
        for padded in (runner, runner.twin()):  # type: ignore[attr-defined]
            with pytest.raises(EngineUnavailable, match=r"engine/model\.onnx: its graph gets padded texts wrong"):
                generate(padded, [*prompts, [1]], sampling)
