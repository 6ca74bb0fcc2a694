"""One decoder in the forms that ONNX has for the same: other exporters' graphs give the same engines, or one line."""

from __future__ import annotations

import dataclasses
import importlib
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.breadth import BREADTH
from tests.tiny import tiny_model
from trsp_deploy.artifacts import storage
from trsp_deploy.errors import EngineUnavailable, ParityError, StorageError, TextError
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages import build as build_stage
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.graphs.norms import fuse_norms
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import BACKENDS, EngineManifest, building, open_engine, ort_build, passes, trt_build
from trsp_deploy.tools.runners.agreement import Reference, agreement
from trsp_deploy.tools.runners.half_range import within_range
from trsp_deploy.tools.runners.ort import OrtRunner

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    for precision in ("fp32", "fp16"):
        (folder / precision).mkdir()
        export_onnx(folder / "model", precision, ExportSettings(), folder / precision)
    return folder


def changed(graph: Path, change: Change, out: Path) -> Path:
    """The graph in another form, its weights within it, and without the config that tells passes more."""
    model = onnx.load(graph)
    change(model)
    out.mkdir(parents=True)
    onnx.save(model, out / FILE)
    return out / FILE


def without_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""


def weights_in_nodes(model: onnx.ModelProto) -> None:
    made = [helper.make_node("Constant", [], [each.name], value=each) for each in model.graph.initializer]
    nodes = [*made, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)


def weights_as_inputs(model: onnx.ModelProto) -> None:
    for each in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(each.name, each.data_type, each.dims))


def domain_by_its_other_name(model: onnx.ModelProto) -> None:
    for opset in model.opset_import:
        opset.domain = opset.domain or "ai.onnx"


def in_functions(model: onnx.ModelProto, opset: int = 18) -> None:
    """Every product a call of one function, as exporters that keep a library's functions write them."""
    weights = {each.name for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            node.op_type, node.domain = "Linear", "own"
    inner = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    opsets = [helper.make_opsetid("", opset)]
    model.functions.append(helper.make_function("own", "Linear", ["x", "w"], ["y"], inner, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))


def behind_identities(model: onnx.ModelProto) -> None:
    """As some exporters name what goes in and out."""
    before, after = [], []
    for value in (*model.graph.input, *model.graph.output):
        own, made = f"{value.name}_own", value in model.graph.output
        for node in model.graph.node:
            node.input[:] = [own if name == value.name else name for name in node.input]
            node.output[:] = [own if name == value.name else name for name in node.output]
        names = ([own], [value.name]) if made else ([value.name], [own])
        (after if made else before).append(helper.make_node("Identity", *names))
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def as_it_is(_: onnx.ModelProto) -> None:
    return


def operators(engine: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(engine / "model.onnx", load_external_data=False).graph.node)


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-int4", "ort-cpu-int8"])
@pytest.mark.parametrize(
    "change",
    [without_names, weights_in_nodes, weights_as_inputs, domain_by_its_other_name, in_functions, behind_identities],
)
def test_integer_engines_of_every_form_are_alike(graphs: Path, tmp_path: Path, change: Change, engine: str) -> None:
    spec, found = load_engine_spec(engine), {}
    ids = np.arange(3, 19)[None]
    for name, each in (("plain", as_it_is), ("other", change)):
        graph = changed(graphs / "fp32" / FILE, each, tmp_path / name)
        build_engine(graph, spec, tmp_path / f"{name}-engine")
        with open_engine(tmp_path / f"{name}-engine") as runner:
            found[name] = operators(tmp_path / f"{name}-engine"), runner.prefill(ids, np.ones_like(ids))
    assert found["plain"][0] == found["other"][0] and found["plain"][0]["MatMulNBits"]
    np.testing.assert_allclose(found["plain"][1], found["other"][1], atol=1e-5)


@BREADTH
def test_an_output_that_is_given_twice_keeps_its_name(graphs: Path, tmp_path: Path) -> None:
    def twice(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Identity", ["logits"], ["again"]))
        model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["batch", "tokens", 384]))

    graph = changed(graphs / "fp32" / FILE, twice, tmp_path / "twice")
    build_engine(graph, load_engine_spec("ort-cpu-int4"), tmp_path / "engine")
    assert operators(tmp_path / "engine")["GroupQueryAttention"]


def weights_behind_nodes(model: onnx.ModelProto) -> None:
    """As torch writes them without folding: each weight as the module has it, transposed by a node, and shared ones
    behind an Identity."""
    weights, before = {each.name: each for each in model.graph.initializer}, []
    for number, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            turned = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weights.pop(name)).T), name)
            model.graph.initializer.remove(next(each for each in model.graph.initializer if each.name == name))
            model.graph.initializer.append(turned)
            node.input[1] = f"{name}_turned"
            before.append(helper.make_node("Identity", [name], [f"{name}_same"], f"same_{number}"))
            before.append(
                helper.make_node("Transpose", [f"{name}_same"], [node.input[1]], f"turn_{number}", perm=[1, 0])
            )
    nodes = [*before, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-int4", "ort-cpu-int8"])
def test_weights_behind_nodes_are_quantised(graphs: Path, tmp_path: Path, engine: str) -> None:
    spec, found = load_engine_spec(engine).model_copy(update={"fuse": False}), {}
    for name, change in (("plain", as_it_is), ("other", weights_behind_nodes)):
        graph = changed(graphs / "fp32" / FILE, change, tmp_path / name)
        build_engine(graph, spec, tmp_path / f"{name}-engine")
        found[name] = operators(tmp_path / f"{name}-engine")
    assert found["plain"] == found["other"]


def weights_in_fp16(model: onnx.ModelProto) -> None:
    """Matrices at half their size, each behind a Cast, and nothing said of what nodes make."""
    before = []
    for each in model.graph.initializer:
        if len(each.dims) == 2:
            name = each.name
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each).astype(np.float16), f"{name}_half"))
            before.append(helper.make_node("Cast", [each.name], [name], to=TensorProto.FLOAT))
    nodes = [*before, *model.graph.node]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cpu-int4", "ort-cpu-int8"])
def test_weights_in_fp16_get_the_passes_of_others(graphs: Path, tmp_path: Path, engine: str) -> None:
    found, ids = {}, np.arange(3, 19)[None]
    for name, change in (("plain", as_it_is), ("other", weights_in_fp16)):
        graph = changed(graphs / "fp32" / FILE, change, tmp_path / name)
        shutil.copy(graphs / "fp32" / "config.json", graph.parent)
        build_engine(graph, load_engine_spec(engine), tmp_path / f"{name}-engine")
        found[name] = operators(tmp_path / f"{name}-engine")
    for operator in ("GroupQueryAttention", "MatMulNBits", "DynamicQuantizeMatMul", "GatherBlockQuantized"):
        assert found["plain"][operator] == found["other"][operator]
    assert found["other"]["GroupQueryAttention"]
    with open_engine(tmp_path / "other-engine") as runner, OrtRunner(graph) as plain:
        one, other = (each.prefill(ids, np.ones_like(ids)) for each in (runner, plain))
    assert np.abs(one - other).mean() < (1e-4 if engine == "ort-cpu-fp32" else 0.5) * other.std()


@BREADTH
def test_functions_of_another_opset_are_one_line_or_stay(graphs: Path, tmp_path: Path) -> None:
    graph = changed(graphs / "fp32" / FILE, lambda model: in_functions(model, 17), tmp_path / "graph")
    said = "its functions cannot be written out: Opset mismatch"
    with pytest.raises(EngineUnavailable, match=f"graph/model.onnx: cannot be quantised: {said}"):
        build_engine(graph, load_engine_spec("ort-cpu-int4"), tmp_path / "engine")
    outcomes = build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine").passes
    assert all(said in (outcome.reason or "") for outcome in outcomes)


@BREADTH
def test_products_without_names_are_the_same_in_the_graph_that_passes_made(graphs: Path, tmp_path: Path) -> None:
    """A cache of fixed length takes products out, and what the others read was measured before."""
    spec, found = load_engine_spec("tensorrt-rtx-int4"), []
    ids = np.arange(3, 19)[None]
    for name, change in (("plain", as_it_is), ("other", without_names)):
        graph = changed(graphs / "fp16" / FILE, change, tmp_path / name)
        (tmp_path / f"{name}-passes").mkdir()
        prepared, _ = trt_build.prepare(graph, spec, tmp_path / f"{name}-passes", None)
        with OrtRunner(prepared, lean=True) as runner:
            found.append(runner.prefill(ids, np.ones_like(ids)))
    np.testing.assert_array_equal(*found)


def stacked(model: onnx.ModelProto) -> None:
    """The last layer's last product with a stack of one matrix, as of experts."""
    node = [node for node in model.graph.node if "down_proj" in node.name][-1]
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    weight.dims[:] = [1, *weight.dims]


@pytest.mark.parametrize(
    ("engine", "kept"), [("ort-cpu-int8", 0), ("ort-cpu-int4", 2), ("tensorrt-rtx-int8", 2), ("tensorrt-rtx-int4", 0)]
)
def test_a_stack_of_matrices_is_beside_quantised_ones(graphs: Path, tmp_path: Path, engine: str, kept: int) -> None:
    spec = load_engine_spec(engine).model_copy(update={"keep_high_precision": kept})
    graph = changed(graphs / spec.graph_precision / FILE, stacked, tmp_path / "stacked")
    prepare = trt_build.prepare if "rtx" in engine else ort_build.prepare
    quantised, _ = prepare(graph, spec, tmp_path, None)
    ids = np.arange(3, 19)[None]
    with OrtRunner(quantised, lean=True) as runner, OrtRunner(graph, lean=True) as plain:
        one, other = (each.prefill(ids, np.ones_like(ids)) for each in (runner, plain))
    assert np.abs(one - other).mean() < 0.5 * other.std()


def test_a_graph_of_another_precision_or_no_decoder_is_one_line_before_anything_is_built(
    graphs: Path, tmp_path: Path
) -> None:
    for name in ("tensorrt-rtx-fp16", "ort-cuda-fp16"):
        spec = load_engine_spec(name).model_copy(update={"backend": "onnxruntime-cpu"})
        with pytest.raises(EngineUnavailable, match="the spec asks for fp16, but the ONNX graph's cache is float32"):
            build_engine(graphs / "fp32" / FILE, spec, tmp_path / "engine")
    with pytest.raises(EngineUnavailable, match="the spec asks for fp32, but the ONNX graph's cache is float16"):
        build_engine(graphs / "fp16" / FILE, load_engine_spec("ort-cpu-int8"), tmp_path / "engine")

    def without_logits(model: onnx.ModelProto) -> None:
        del model.graph.output[0]

    graph = changed(graphs / "fp32" / FILE, without_logits, tmp_path / "none")
    for name in ("ort-cpu-int4", "ort-cpu-int8", "ort-cpu-fp32"):
        with pytest.raises(EngineUnavailable, match=r"not a decoder with past key values \(no logits\)"):
            build_engine(graph, load_engine_spec(name), tmp_path / "engine")


@BREADTH
def test_a_graph_with_other_integers_reads_a_text(graphs: Path, tmp_path: Path) -> None:
    def narrow(model: onnx.ModelProto) -> None:
        first = []
        for value in model.graph.input:
            if value.type.tensor_type.elem_type == TensorProto.INT64:
                wide = f"{value.name}_int64"
                for node in model.graph.node:
                    node.input[:] = [wide if name == value.name else name for name in node.input]
                first.append(helper.make_node("Cast", [value.name], [wide], to=TensorProto.INT64))
                value.type.tensor_type.elem_type = TensorProto.INT32
        nodes = [*first, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    graph = changed(graphs / "fp32" / FILE, narrow, tmp_path / "int32")
    assert build_engine(graph, load_engine_spec("ort-cpu-int8"), tmp_path / "engine").inputs["input_ids"][0] == "int32"


def with_cast(model: onnx.ModelProto, name: str, outside: int, inside: int) -> None:
    """Let an input or output of the graph be of another type than its nodes read or make."""
    made, own = name in {value.name for value in model.graph.output}, f"{name}_inside"
    for node in model.graph.node:
        names = node.output if made else node.input
        names[:] = [own if each == name else each for each in names]
    cast = helper.make_node("Cast", [own if made else name], [name if made else own])
    cast.attribute.append(helper.make_attribute("to", outside if made else inside))
    nodes = [*model.graph.node, cast] if made else [cast, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    value = next(each for each in (*model.graph.input, *model.graph.output) if each.name == name)
    value.type.tensor_type.elem_type = outside


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_inputs_and_logits_of_other_types(graphs: Path, tmp_path: Path, engine: str) -> None:
    def other_types(model: onnx.ModelProto) -> None:
        with_cast(model, "attention_mask", TensorProto.BOOL, TensorProto.INT64)
        with_cast(model, "position_ids", TensorProto.FLOAT, TensorProto.INT64)
        with_cast(model, "logits", TensorProto.DOUBLE, TensorProto.FLOAT)

    found, ids, mask = [], np.arange(3, 19).reshape(2, 8), np.ones((2, 8), dtype=np.int64)
    mask[0, :3] = 0
    for name, change in (("plain", as_it_is), ("other", other_types)):
        graph = changed(graphs / "fp32" / FILE, change, tmp_path / name)
        build_engine(graph, load_engine_spec(engine), tmp_path / f"{name}-engine")
        with open_engine(tmp_path / f"{name}-engine") as runner:
            found.append(runner.prefill(ids, mask)[mask == 1])
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_type_that_nobody_feeds_or_reads_is_one_line(graphs: Path, tmp_path: Path) -> None:
    for name, kind, said in (
        ("attention_mask", TensorProto.INT8, "int8"),
        ("logits", TensorProto.BFLOAT16, "bfloat16"),
    ):
        graph = changed(
            graphs / "fp32" / FILE,
            lambda model, name=name, kind=kind: with_cast(model, name, kind, TensorProto.INT64),  # type: ignore[misc]
            tmp_path / name,
        )
        with pytest.raises(EngineUnavailable, match=rf"the graph's {name} is .*{said}.*; understood are int64, "):
            build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")


def open_logits(model: onnx.ModelProto) -> None:
    """The vocabulary by a name alone, behind a Reshape whose sizes nobody infers."""
    shape = helper.make_node("Shape", ["logits_inside"], ["logits_shape"])
    reshape = helper.make_node("Reshape", ["logits_inside", "logits_shape"], ["logits"])
    next(node for node in model.graph.node if "logits" in node.output).output[:] = ["logits_inside"]
    model.graph.node.extend([shape, reshape])
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[-1].dim_param = "vocabulary"


def last_logits(model: onnx.ModelProto) -> None:
    """Of each text's last token, without a dimension for tokens."""
    next(node for node in model.graph.node if "logits" in node.output).output[:] = ["logits_inside"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1), "last"))
    model.graph.node.append(helper.make_node("Gather", ["logits_inside", "last"], ["logits"], axis=1))
    del next(value for value in model.graph.output if value.name == "logits").type.tensor_type.shape.dim[1]


@BREADTH
@pytest.mark.parametrize(("change", "said"), [(open_logits, ", vocabulary"), (last_logits, ", 384")])
def test_logits_of_another_form_are_one_line(graphs: Path, tmp_path: Path, change: Change, said: str) -> None:
    plain = changed(graphs / "fp32" / FILE, change, tmp_path / "plain")
    with pytest.raises(EngineUnavailable, match=rf"the graph's logits are \[.*{said}\]; understood is \[batch, "):
        build_engine(plain, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    half = changed(graphs / "fp16" / FILE, change, tmp_path / "half")
    spec = load_engine_spec("ort-cuda-fp16").model_copy(update={"backend": "onnxruntime-cpu"})
    with pytest.raises(EngineUnavailable, match="the graph's logits are "):
        build_engine(half, spec, tmp_path / "engine")


def one_token(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.input if value.name == "input_ids").type.tensor_type.shape.dim[1].dim_value = 1


def last_logits_alone(model: onnx.ModelProto) -> None:
    """Of each text's last token, as (batch, 1, vocabulary): the hidden states are cut before the LM head."""
    head = next(node for node in model.graph.node if "logits" in node.output)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    cut = helper.make_node("Gather", [head.input[0], "last"], ["last_hidden"], axis=1)
    model.graph.node.insert(list(model.graph.node).index(head), cut)
    head.input[0] = "last_hidden"
    next(value for value in model.graph.output if value.name == "logits").type.tensor_type.shape.dim[1].dim_value = 1


@BREADTH
@pytest.mark.parametrize(
    ("change", "engine", "said"),
    [
        (one_token, "ort-cpu-fp32", r"input_ids are of 1 .*\[.*, 1\]"),
        (last_logits_alone, "ort-cpu-fp32", r"logits are of 1 .*, 384\]"),
        (last_logits_alone, "ort-cpu-int4", r"logits are of 1 .*, 384\]"),
    ],
)
def test_a_graph_that_reads_no_prompt_is_one_line(
    graphs: Path, tmp_path: Path, change: Change, engine: str, said: str
) -> None:
    graph = changed(graphs / "fp32" / FILE, change, tmp_path / "graph")
    with pytest.raises(EngineUnavailable, match=f"the graph's {said}; understood is one that reads any number"):
        build_engine(graph, load_engine_spec(engine), tmp_path / "engine")


@pytest.mark.parametrize("dims", [0, 1])
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_tokens_of_another_rank_are_one_line_before_anything_is_built(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dims: int
) -> None:
    """It was a traceback after the whole build, or an engine that failed at every prompt."""

    def flat(model: onnx.ModelProto) -> None:
        del next(value for value in model.graph.input if value.name == name).type.tensor_type.shape.dim[dims:]

    monkeypatch.setattr(building, "within_range", lambda *_: pytest.fail("it is being built"))
    graph = changed(graphs / "fp32" / FILE, flat, tmp_path / "graph")
    with pytest.raises(EngineUnavailable, match=rf"the graph's {name} is \[\w*\]; understood is \[batch, "):
        build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")


def one_text(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


@BREADTH
def test_a_graph_for_one_text_at_a_time_gets_every_pass(graphs: Path, tmp_path: Path) -> None:
    found, ids, mask = {}, np.arange(3, 19)[None], np.ones((1, 16), dtype=np.int64)
    mask[0, :3] = 0
    for name, change in (("plain", as_it_is), ("other", one_text)):
        graph = changed(graphs / "fp32" / FILE, change, tmp_path / name)
        shutil.copy(graphs / "fp32" / "config.json", graph.parent)
        build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / f"{name}-engine")
        with open_engine(tmp_path / f"{name}-engine") as runner:
            found[name] = operators(tmp_path / f"{name}-engine"), runner.prefill(ids, mask)[mask == 1]
    assert found["plain"][0] == found["other"][0] and found["other"][0]["GroupQueryAttention"]
    np.testing.assert_allclose(found["plain"][1], found["other"][1], atol=1e-5)


def two_texts(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def held(graph: Path, out: Path, **more: Any) -> EngineManifest:
    return build_engine(graph, load_engine_spec("ort-cpu-fp32"), out, hold=True, **more)


@BREADTH
def test_an_engine_for_one_text_is_held_too(graphs: Path, tmp_path: Path) -> None:
    """It was fed two, and ONNX Runtime's refusal, which named a folder that was gone, stood for a comparison."""
    one = held(changed(graphs / "fp32" / FILE, one_text, tmp_path / "one"), tmp_path / "engine")
    assert one.not_held is None and one.agreement is not None and one.agreement.passed
    assert one.agreement.tokens_compared == 12 + 6 + 2 * 4
    two = held(changed(graphs / "fp32" / FILE, two_texts, tmp_path / "two"), tmp_path / "other")
    assert two.not_held is not None and f"ONNX Runtime stopped in {tmp_path / 'two' / FILE}" in two.not_held


def test_why_an_engine_was_not_held_names_no_folder_that_is_gone(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(folder: Path, manifest: EngineManifest) -> Any:
        raise EngineUnavailable(f"ONNX Runtime stopped in {folder / manifest.file}")

    backend = BACKENDS["onnxruntime-cpu"]
    monkeypatch.setitem(BACKENDS, "onnxruntime-cpu", dataclasses.replace(backend, open=stops))
    assert held(graphs / "fp32" / FILE, tmp_path / "engine").not_held == f"ONNX Runtime stopped in {FILE}"


def masked(value: float) -> Change:
    """The last tokens of the vocabulary as no text has them, each of one logit."""

    def change(model: onnx.ModelProto) -> None:
        with_cast(model, "logits", TensorProto.FLOAT, TensorProto.FLOAT)
        mask = np.zeros(384, np.float32)
        mask[300:] = value
        model.graph.initializer.append(numpy_helper.from_array(mask, "unused"))
        last = model.graph.node[-1]
        last.op_type, last.input[:] = "Add", [last.input[0], "unused"]
        del last.attribute[:]

    return change


@BREADTH
def test_an_unused_vocabulary_that_is_ruled_out_makes_an_engine(graphs: Path, tmp_path: Path) -> None:
    graph = changed(graphs / "fp32" / FILE, masked(-np.inf), tmp_path / "masked")
    shutil.copy(graphs / "fp32" / "config.json", graph.parent)
    manifest = held(graph, tmp_path / "engine")
    assert manifest.not_held is None and manifest.agreement is not None and manifest.agreement.passed
    assert math.isfinite(manifest.agreement.ppl_ratio) and manifest.agreement.max_error < 1e-4
    plain = held(graphs / "fp32" / FILE, tmp_path / "plain")
    assert [each.changed for each in manifest.passes] == [each.changed for each in plain.passes] and manifest.padding
    graph = changed(graphs / "fp32" / FILE, masked(np.inf), tmp_path / "infinite")
    with pytest.raises(ParityError, match="gives logits that are no numbers, and so does"):
        held(graph, tmp_path / "none")


@BREADTH
def test_what_an_engine_alone_rules_out_is_no_number(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_stage.logits_of

    def cut(*arguments: Any, **options: Any) -> np.ndarray:
        found = whole(*arguments, **options)
        found[..., -1] = -np.inf
        return found

    monkeypatch.setattr(build_stage, "logits_of", cut)
    with pytest.raises(ParityError, match="gives logits that are no numbers; nothing is kept of it"):
        held(graphs / "fp32" / FILE, tmp_path / "engine")


@BREADTH
def test_perplexity_is_judged_of_a_text_alone(graphs: Path, tmp_path: Path) -> None:
    """That of a few random tokens says little: right bf16 engines were beyond their tolerance."""
    text = np.arange(3, 67).reshape(1, 64)
    for calibration, tolerance in ((None, None), (text, 0.005)):
        found = held(graphs / "fp32" / FILE, tmp_path / "engine", calibration=calibration).agreement
        assert found is not None and found.passed and found.ppl_tolerance == tolerance


def test_rounding_that_moves_random_tokens_alone_is_no_error() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, 6, 50)).astype(np.float32)
    ids = np.array([[1, 2, 3, 4]])
    reference = Reference(ids, np.ones_like(ids), logits[:, 3:5].argmax(-1), logits)
    off = logits.copy()
    off[0, np.arange(3), ids[0, 1:]] -= 0.2  # all one way, and within what bf16 may be off
    assert not agreement(reference, off, "bf16").passed
    assert agreement(reference, off, "bf16", of_text=False).passed


@pytest.mark.parametrize("engine", ["tensorrt-fp16", "tensorrt-rtx-fp16", "ort-cpu-fp32"])
def test_prompts_are_as_long_as_a_profile_lets_them(engine: str) -> None:
    """The first profile is mostly of decoding, a few tokens long."""
    assert [len(each) for each in build_stage._prompts(load_engine_spec(engine), 100, None)] == [12, 6]


def adapted_head(model: onnx.ModelProto) -> None:
    """An LM head with a LoRA that was not merged: both of its products read the hidden states."""
    head, random = next(node for node in model.graph.node if "logits" in node.output), np.random.default_rng(0)
    head.output[:] = ["head"]
    for name, shape in (("lora_A", (64, 4)), ("lora_B", (4, 384))):
        weight = random.normal(scale=0.1, size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    model.graph.node.extend(
        [
            helper.make_node("MatMul", [head.input[0], "lora_A"], ["narrow"], "narrow"),
            helper.make_node("MatMul", ["narrow", "lora_B"], ["adapted"], "adapted"),
            helper.make_node("Add", ["head", "adapted"], ["logits"], "joined"),
        ]
    )


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_logits_that_are_cut_in_part_alone_are_not_cut(graphs: Path, tmp_path: Path, engine: str) -> None:
    """The pass was kept, for its proof asked for all logits alone, and every longer prompt failed."""
    graph = changed(graphs / "fp32" / FILE, adapted_head, tmp_path / "graph")
    manifest = build_engine(graph, load_engine_spec(engine), tmp_path / "engine")
    outcome = next(outcome for outcome in manifest.passes if outcome.name == "cut-logits")
    assert not outcome.changed and outcome.reason
    with open_engine(tmp_path / "engine") as runner:
        ids = np.arange(3, 19)[None]
        whole = runner.prefill(ids, np.ones_like(ids))
        np.testing.assert_array_equal(runner.prefill(ids, np.ones_like(ids), last_only=True), whole[:, -1:])


def beyond(model: onnx.ModelProto, part: str, factor: float) -> None:
    """Let a product of every layer leave the range of fp16."""
    del model.metadata_props[:]  # by which an export of ours says that it has been through this
    for node in model.graph.node:
        if part in node.name and node.op_type == "MatMul":
            weight = next(each for each in model.graph.initializer if each.name == node.input[1])
            values = numpy_helper.to_array(weight).astype(np.float32) * factor
            weight.CopyFrom(numpy_helper.from_array(values.clip(-6e4, 6e4).astype(np.float16), weight.name))


def test_a_graph_for_one_text_at_a_time_is_kept_within_fp16(graphs: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        beyond(model, "up_proj", 2**15)
        one_text(model)

    graph = changed(graphs / "fp16" / FILE, change, tmp_path / "beyond")
    spec = load_engine_spec("ort-cuda-fp16").model_copy(update={"backend": "onnxruntime-cpu"})
    _, found = within_range(graph, spec, tmp_path, None)
    assert found is not None and found.kept and found.error is not None and found.error < 0.1


@BREADTH
def test_a_projection_that_is_kept_in_fp32_does_not_hide_its_attention(graphs: Path, tmp_path: Path) -> None:
    graph = changed(graphs / "fp16" / FILE, lambda model: beyond(model, "o_proj", 2**17), tmp_path / "beyond")
    spec = load_engine_spec("tensorrt-rtx-fp16-static")
    source, found = within_range(graph, spec, tmp_path, None)
    assert found is not None and any("o_proj" in kept.name and kept.operator == "MatMul" for kept in found.kept)
    _, outcomes = trt_build.prepare(source, spec, tmp_path, None)
    assert next(outcome.changed for outcome in outcomes if outcome.name == "fix-cache")


def test_norms_are_fused_without_a_word(
    graphs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's tools print where shapes are unknown to them, as Attention's of opset 23 are, and Gemma 3's."""
    importlib.import_module("onnxruntime.transformers.onnx_model")  # which imports the next as a module of no package
    monkeypatch.setattr("shape_infer_helper.SymbolicShapeInferenceHelper.infer", lambda *_, **__: 1 / 0)
    fuse_norms(ir.load(graphs / "fp32" / FILE))
    assert capfd.readouterr() == ("", "")


@BREADTH
def test_a_text_of_another_models_tokens_is_one_line(graphs: Path, tmp_path: Path) -> None:
    text = np.full((1, 16), 10_000)
    with pytest.raises(TextError, match="the calibration text has token 10000"):
        build_engine(graphs / "fp32" / FILE, load_engine_spec("ort-cpu-int4"), tmp_path / "engine", text)
    # Of fp16 the range was not looked at, without a word, and the engine claimed the text.
    graph = changed(graphs / "fp16" / FILE, lambda model: model.ClearField("metadata_props"), tmp_path / "graph")
    with pytest.raises(TextError, match="the calibration text has token 10000"):
        within_range(graph, load_engine_spec("tensorrt-rtx-fp16"), tmp_path, text)


def test_bf16_is_not_made_of_fp32(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_stage, "check_can_build", lambda spec: None)
    with pytest.raises(EngineUnavailable, match="is of fp32, and tensorrt-rtx-bf16 is made of an fp16 graph"):
        build_engine(graphs / "fp32" / FILE, load_engine_spec("tensorrt-rtx-bf16"), tmp_path / "engine")


@pytest.mark.parametrize("past", [8, 64, None])
def test_a_past_that_cannot_grow_is_one_line(graphs: Path, tmp_path: Path, past: int | None) -> None:
    """It was a traceback of NumPy's, or an engine that failed at every prompt."""

    def fixed(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name.startswith("past_key_values.") and past is None:
                value.type.tensor_type.ClearField("shape")
            elif value.name.startswith("past_key_values."):
                value.type.tensor_type.shape.dim[2].dim_value = past

    graph = changed(graphs / "fp32" / FILE, fixed, tmp_path / "graph")
    with pytest.raises(
        EngineUnavailable, match=r"past_key_values\.0\.key is \[.*\]; understood is \[batch, heads, past"
    ):
        build_engine(graph, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")


@pytest.mark.parametrize("first", [True, False])
def test_a_machine_that_is_full_is_no_reason_of_a_pass(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """The engine was finished without its passes, and kept for good."""
    answers = iter([] if first else [np.zeros((1, 1))])

    def full(*_: object) -> np.ndarray:
        if (found := next(answers, None)) is not None:
            return found
        raise EngineUnavailable("ONNX Runtime stopped in g: Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(passes, "_logits", full)
    spec = load_engine_spec("ort-cpu-fp32")
    with pytest.raises(EngineUnavailable, match="Failed to allocate memory"):
        passes.run_passes(graphs / "fp32" / FILE, {"nothing": lambda model: 1}, spec, tmp_path)


def test_a_disk_that_is_full_while_onnx_runtime_writes_is_called_so(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise EngineUnavailable("ONNX Runtime cannot load model.onnx: Failed to write : model.onnx.data")

    monkeypatch.setattr(ort_build, "create_session", fails)
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    monkeypatch.setattr(building, "holds_padding", lambda *_: True)
    with pytest.raises(EngineUnavailable, match="Failed to write"):
        build_engine(graphs / "fp32" / FILE, spec, tmp_path / "engine")
    for module in (storage, ort_build):
        monkeypatch.setattr(module, "free_bytes", lambda path: 0)
    with pytest.raises(StorageError, match="the disk is full"):
        build_engine(graphs / "fp32" / FILE, spec, tmp_path / "engine")


def behind_the_head(model: onnx.ModelProto) -> None:
    """A vocabulary that was filled up for its weights alone, bounds, and a token that is never wanted."""
    next(node for node in model.graph.node if "logits" in node.output).output[:] = ["padded"]
    unwanted = np.arange(380) == 7
    constants = {
        **{name: np.array([value]) for name, value in (("first", 0), ("vocabulary", 380), ("last_axis", -1))},
        **{"low": np.array(-1e4, np.float32), "high": np.array(1e4, np.float32)},
        **{"never": np.array(-1e4, np.float32), "unwanted": unwanted, "less": np.array(0.5, np.float32)},
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Slice", ["padded", "first", "vocabulary", "last_axis"], ["own"], "slice"),
            helper.make_node("Clip", ["own", "low", "high"], ["bounded"], "bound"),
            helper.make_node("Where", ["unwanted", "never", "bounded"], ["wanted"], "where"),
            helper.make_node("Sub", ["wanted", "less"], ["logits"], "less"),
        ]
    )
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[-1].dim_value = 380


@BREADTH
@pytest.mark.parametrize("engine", ["ort-cpu-int4-accurate", "ort-cpu-int8"])
def test_an_lm_head_is_found_behind_what_its_logits_go_through(graphs: Path, tmp_path: Path, engine: str) -> None:
    """No integers were made of such a graph at all."""
    graph = changed(graphs / "fp32" / FILE, behind_the_head, tmp_path / "graph")
    manifest = build_engine(graph, load_engine_spec(engine), tmp_path / "engine")
    assert next(outcome.changed for outcome in manifest.passes if outcome.name == "cut-logits")
    nodes = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False).graph.node
    products = [{each.name: each.i for each in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    assert [each["bits"] for each in products if each["N"] == 384] == [8], "the LM head"
    ids = np.arange(3, 19)[None]
    with open_engine(tmp_path / "engine") as runner, OrtRunner(graph) as plain:
        one, other = (each.prefill(ids, np.ones_like(ids)) for each in (runner, plain))
        np.testing.assert_allclose(runner.prefill(ids, np.ones_like(ids), last_only=True), one[:, -1:], atol=1e-5)
    assert one.shape == (1, 16, 380) and one[..., 7].max() < -9e3
    seen = np.arange(380) != 7
    assert np.abs(one - other)[..., seen].mean() < 0.5 * other[..., seen].std()


def hidden_states(model: onnx.ModelProto) -> None:
    """One output more, as exports for feature extraction have it."""
    head = next(node for node in model.graph.node if "logits" in node.output)
    model.graph.node.append(helper.make_node("Identity", [head.input[0]], ["hidden_states"]))
    model.graph.output.append(helper.make_empty_tensor_value_info("hidden_states"))


@BREADTH
def test_tensorrt_keeps_no_output_that_nothing_reads(graphs: Path, tmp_path: Path) -> None:
    """Each needs memory when the engine runs, and there was none for it."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'trsp_deploy[rtx]'")
    graph = changed(graphs / "fp16" / FILE, hidden_states, tmp_path / "graph")
    manifest = build_engine(graph, load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "engine")
    assert "hidden_states" not in manifest.outputs and "logits" in manifest.outputs


def one_label(model: onnx.ModelProto) -> None:
    """As graphs are labelled whose exporter had no cache in mind."""
    for value in model.graph.input:
        if value.name in ("input_ids", "attention_mask"):
            value.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


@BREADTH
def test_one_label_for_two_lengths_comes_with_advice(graphs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'trsp_deploy[rtx]'")
    graph = changed(graphs / "fp16" / FILE, one_label, tmp_path / "graph")
    with pytest.raises(
        EngineUnavailable, match=r"Dimensions with name .*; TensorRT takes dimensions of one label to be equal"
    ):
        build_engine(graph, load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "engine")


def test_tensorrt_refuses_logits_without_tokens(graphs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'trsp_deploy[rtx]'")
    half = changed(graphs / "fp16" / FILE, last_logits, tmp_path / "half")
    with pytest.raises(EngineUnavailable, match="the graph's logits are "):
        build_engine(half, load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "engine")


@BREADTH
def test_an_engine_of_a_graph_behind_a_link_notices_its_change(graphs: Path, tmp_path: Path) -> None:
    first = changed(graphs / "fp32" / FILE, as_it_is, tmp_path / "first")
    second = changed(graphs / "fp32" / FILE, other_weights, tmp_path / "second")
    link = tmp_path / "link" / FILE
    link.parent.mkdir()
    link.symlink_to(first)
    build_engine(link, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    open_engine(tmp_path / "engine")
    link.unlink()
    link.symlink_to(second)
    with pytest.raises(EngineUnavailable, match="has SHA-256"):
        open_engine(tmp_path / "engine")
    link.unlink()
    shutil.copy(first, link)
    open_engine(tmp_path / "engine")


def other_weights(model: onnx.ModelProto) -> None:
    weight = next(each for each in model.graph.initializer if len(each.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))


@BREADTH
def test_a_bound_of_numbers_is_no_hidden_score(graphs: Path, tmp_path: Path) -> None:
    """In fp16 what hides scores is lowered; the lower end of a Clip would cut values off."""

    def clip(model: onnx.ModelProto) -> None:
        del model.metadata_props[:]  # by which an export of ours says that it has been through this
        for name, value in (("low", -65504.0), ("high", 65504.0)):
            model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float16), name))
        node = next(node for node in model.graph.node if "logits" in node.output)
        index = list(model.graph.node).index(node)
        clipped = helper.make_node("Clip", [node.input[0], "low", "high"], ["clipped"], name="clip")
        node.input[0] = "clipped"
        model.graph.node.insert(index, clipped)

    graph = changed(graphs / "fp16" / FILE, clip, tmp_path / "clipped")
    spec = load_engine_spec("ort-cuda-fp16").model_copy(update={"backend": "onnxruntime-cpu"})
    source, found = within_range(graph, spec, tmp_path, None)
    assert source != graph and found is not None and not found.reason
    low = next(each for each in onnx.load(source).graph.initializer if each.name == "low")
    assert float(numpy_helper.to_array(low)) == -65504


@pytest.mark.parametrize("kept", [None, 1000])
def test_weights_that_are_not_whole_are_one_line(graphs: Path, tmp_path: Path, kept: int | None) -> None:
    shutil.copytree(graphs / "fp32", tmp_path / "graph")
    weights = tmp_path / "graph" / f"{FILE}_data"
    weights.unlink() if kept is None else weights.write_bytes(weights.read_bytes()[:kept])
    for name in ("ort-cpu-fp32", "ort-cpu-int4"):
        with pytest.raises(EngineUnavailable, match=r"its weights are not whole: .*_data is missing, or cut off"):
            build_engine(tmp_path / "graph" / FILE, load_engine_spec(name), tmp_path / "engine")
