"""fp16 graphs of models whose numbers leave its range, and bf16 made of fp16 graphs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from tests.breadth import BREADTH, by_default
from tests.exported import LAYERS, Made, onnx_of
from tests.tiny import english, save_tiny
from trsp_deploy.cli import run
from trsp_deploy.decoder import decoder_layers, load_model
from trsp_deploy.errors import EngineUnavailable, ParityError
from trsp_deploy.recipe import EngineSpec, ExportSettings, Precision
from trsp_deploy.results import Parity
from trsp_deploy.stages import export, parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.graphs import check, half
from trsp_deploy.tools.graphs.fp16_range import LARGEST
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import half_range, open_engine, passes, trt_build
from trsp_deploy.tools.runners.graph_files import check_source
from trsp_deploy.tools.runners.half_range import within_range
from trsp_deploy.tools.runners.inspection import describe, inspect_engine
from trsp_deploy.tools.runners.ort import OrtRunner

CHANGED_LAYERS = 3
PRODUCTS = ("gemm", "runtime_fusion")
PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}


def beyond_in_the_mlp(model: nn.Module) -> None:
    """Gate times up passes 65,504 in one layer, and down_proj brings it back: a massive activation."""
    mlp = decoder_layers(model)[1].mlp
    mlp.up_proj.weight.mul_(1000)
    mlp.gate_proj.weight.mul_(1000)
    mlp.down_proj.weight.div_(5000)


def beyond_in_the_residual_stream(model: nn.Module) -> None:
    """What comes out of one layer stays beyond 65,504 until the last normalisation."""
    mlp = decoder_layers(model)[1].mlp
    mlp.up_proj.weight.mul_(300)
    mlp.gate_proj.weight.mul_(300)
    mlp.down_proj.weight.mul_(10)


def beyond_in_the_cache(model: nn.Module) -> None:
    attention = decoder_layers(model)[1].self_attn
    attention.v_proj.weight.mul_(1e5)
    attention.o_proj.weight.div_(1e5)


def scores_below_minus_16(model: nn.Module) -> None:
    """Every score is shifted by the same, which softmax does not see."""
    for layer in decoder_layers(model):
        layer.self_attn.q_proj.bias.fill_(8.0)
        layer.self_attn.k_proj.bias.fill_(-8.0)


def changed(folder: Path, family: str, change: object, **config: int) -> Path:
    """The folder of a tiny model of three layers after a change."""
    model = load_model(save_tiny(family, folder, num_hidden_layers=CHANGED_LAYERS, **config))
    with torch.no_grad():
        change(model)  # type: ignore[operator]
    model.save_pretrained(folder)
    return folder


def exported_as_it_is(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an exporter writes by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(export, "_guard", lambda *arguments: None)
        export.export_onnx(model, "fp16", ExportSettings(), out)
    return out / export.FILE


def strict_error(model: Path, graph: Path) -> float:
    """Of the prompts' logits, in standard deviations, where every fp16 value is rounded to fp16.

    ONNX Runtime's CPU provider computes chains of fp16 nodes in fp32 and so hides what a GPU would not.
    """
    reference = parity.make_reference(model, PROMPTS)
    with OrtRunner(graph) as runner:
        feeds = runner.feeds(reference.input_ids, reference.attention_mask)
    with np.errstate(all="ignore"):
        (logits,) = ReferenceEvaluator(str(graph)).run(["logits"], feeds)
    assert logits.dtype == np.float16
    seen = reference.attention_mask == 1
    return check.difference(reference.logits[:, : logits.shape[1]][seen], logits.astype(np.float32)[seen])


def agreement(model: Path, graph: Path) -> Parity:
    with OrtRunner(graph) as runner:
        return parity.check_parity(parity.make_reference(model, PROMPTS), runner, "onnx", "dense", "fp16")


def cpu_spec(**changes: object) -> EngineSpec:
    return EngineSpec.model_validate({**load_engine_spec("ort-cpu-fp32").model_dump(), "precision": "fp16", **changes})


def rtx_spec(precision: Precision, static: bool = True) -> EngineSpec:
    spec = load_engine_spec("tensorrt-rtx-fp16-static" if static else "tensorrt-rtx-fp16")
    past = {} if static else {"past": {"min": 0, "opt": 16, "max": 64}}
    profile = {"batch": {"min": 1, "opt": 1, "max": 4}, "sequence": {"min": 1, "opt": 1, "max": 8}, **past}
    values = {**spec.model_dump(), "precision": precision, "block_size": 64, "profiles": [profile]}
    return EngineSpec.model_validate({**values, "cache_length": 128 if static else None})


@pytest.mark.parametrize("change", by_default([beyond_in_the_mlp], [beyond_in_the_mlp, beyond_in_the_residual_stream]))
def test_what_would_overflow_stays_in_fp32(change: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = changed(tmp_path / "model", "llama", change)
    plain = exported_as_it_is(model, tmp_path / "plain", monkeypatch)
    assert strict_error(model, plain) == np.inf
    export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
    assert strict_error(model, tmp_path / "onnx" / "model.onnx") < 0.05
    assert agreement(model, tmp_path / "onnx" / "model.onnx").max_error < 0.1
    assert sorted(path.name for path in (tmp_path / "onnx").glob("*.onnx*")) == ["model.onnx", "model.onnx_data"]
    # An engine of anybody's graph is guarded as the export is, and one of the export tells what the export found.
    for name, graph in (("foreign", plain), ("own", tmp_path / "onnx" / "model.onnx")):
        manifest = build_engine(graph, cpu_spec(), tmp_path / name)
        found = manifest.half_range
        assert found is not None and found.reason is None and found.largest > LARGEST
        assert found.error is not None and found.error < 0.1
        names = {kept.name for kept in found.kept}
        assert {name for name in names if "layers.1/mlp/down_proj" in name}, names
        assert not any("layers.0/" in name for name in names)
        reference = parity.make_reference(model, PROMPTS)
        with open_engine(tmp_path / name) as runner:
            assert parity.check_parity(reference, runner, name, "dense", "fp16").max_error < 0.1
        text = describe(inspect_engine(tmp_path / name))
        assert f"{len(names)} nodes in fp32, whose values pass 32752 on 192 tokens: /model/layers.1/" in text


def test_one_graph_lies_beside_the_exported_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/memory.md has it, by which a job is let in: an fp16 export takes the disk of two graphs."""
    model, sizes = changed(tmp_path / "model", "llama", beyond_in_the_mlp), list[int]()

    def counted(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Any:
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "onnx").rglob("*_data")))
            return make(*arguments, **options)

        return made

    for name in ("create_session", "OrtRunner"):
        monkeypatch.setattr(half_range, name, counted(getattr(half_range, name)))
    export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
    assert len(sizes) == 3
    assert max(sizes) < 2.1 * (tmp_path / "onnx" / "model.onnx_data").stat().st_size


@BREADTH
def test_left_padding_is_no_nan_where_scores_are_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's lowest number plus such a score is -inf: a row of padding, all of it hidden, would be 0 / 0."""
    model = changed(tmp_path / "model", "opt", scores_below_minus_16)
    plain = exported_as_it_is(model, tmp_path / "plain", monkeypatch)
    assert strict_error(model, plain) == np.inf
    export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
    assert strict_error(model, tmp_path / "onnx" / "model.onnx") < 0.1
    assert agreement(model, tmp_path / "onnx" / "model.onnx").max_error < 0.1


def test_an_ordinary_model_keeps_nothing(exported: Made, tmp_path: Path) -> None:
    manifest = build_engine(onnx_of(exported("llama", "fp16"), "fp16"), cpu_spec(), tmp_path / "engine")
    found = manifest.half_range
    assert found is not None and found.reason is None and found.kept == () and 0 < found.largest < found.limit
    assert [outcome.name for outcome in manifest.passes if outcome.changed] == [
        *("fuse-attention", "fuse-rotary", "simplify-masks", "pack-projections", "cut-logits")
    ]
    assert "no value of 48 tokens is beyond" in describe(inspect_engine(tmp_path / "engine"))


def test_a_refusal_names_the_limit_that_was_passed(exported: Made) -> None:
    """It said of 40,000 that fp16 ends at 65,504."""
    model = ir.load(onnx_of(exported("llama", "fp16"), "fp16"))
    with pytest.raises(half.NoMatch, match=r"'logits' reaches 4e\+04, beyond half of what fp16 holds \(32752\)"):
        half.keep_wide(model, {"logits": 4e4})


def test_a_cache_beyond_the_range_is_refused(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", "llama", beyond_in_the_cache)
    export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
    with pytest.raises(EngineUnavailable, match=r"output 'present\.1\.value' reaches .*; take precision fp32, or bf16"):
        build_engine(tmp_path / "onnx" / "model.onnx", cpu_spec(), tmp_path / "engine")


@BREADTH
@pytest.mark.parametrize("name", ["tensorrt-bf16", "tensorrt-rtx-bf16"])
def test_what_fp16_cannot_hold_becomes_bf16(name: str, tmp_path: Path) -> None:
    """Up to what the compiler reads, which needs no package of TensorRT's."""
    model = changed(tmp_path / "model", "llama", beyond_in_the_cache, **WIDE)
    export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
    graph = tmp_path / "onnx" / "model.onnx"
    spec = load_engine_spec(name)
    for folder in ("range", "passes"):
        (tmp_path / folder).mkdir()
    source, found = within_range(graph, spec, tmp_path / "range", None)
    assert source == graph and found is None
    out, outcomes = trt_build.prepare(source, spec, tmp_path / "passes", None)
    assert {outcome.name: outcome.changed for outcome in outcomes} == {"fix-cache": CHANGED_LAYERS, "cut-logits": 1}
    ready = ir.load(out)
    half.infer_types(ready)
    half.widen(ready, ir.DataType.BFLOAT16)
    ir.save(ready, tmp_path / "wide.onnx", external_data="wide.onnx_data")
    with OrtRunner(tmp_path / "wide.onnx") as runner:
        assert parity.check_parity(parity.make_reference(model, PROMPTS), runner, "bf16", "dense", "bf16").passed
    assert sorted(path.name for path in (tmp_path / "passes").iterdir()) == ["bf16", "cut-logits"], "nothing is left"


def test_a_graph_that_is_bf16_already_is_proven_in_fp32(exported: Made, tmp_path: Path) -> None:
    """No pass was, so that a spec with `cache_length` refused every such graph."""
    source = onnx_of(exported("llama", "fp16"), "fp16")
    model = ir.load(source)
    half.infer_types(model)
    half.to_bf16(model)
    for folder in ("graph", "padding", "passes"):
        (tmp_path / folder).mkdir()
    graph, spec = tmp_path / "graph" / "model.onnx", load_engine_spec("tensorrt-rtx-bf16")
    ir.save(model, graph, external_data=f"{graph.name}_data")
    check_source(graph, spec)
    found = check.difference(
        half_range_logits(graph, tmp_path / "padding"), half_range_logits(source, tmp_path / "padding")
    )
    assert 1e-4 < found < 0.5, "its weights are rounded to 8 bits"
    assert passes.holds_padding(graph, spec, tmp_path / "padding")
    _, outcomes = trt_build.prepare(graph, spec, tmp_path / "passes", None)
    assert {outcome.name: outcome.changed for outcome in outcomes} == {"fix-cache": LAYERS, "cut-logits": 1}


def half_range_logits(graph: Path, scratch: Path) -> np.ndarray:
    """Of a graph in 16 bits, computed in fp32."""
    half_range.write_widened(graph, scratch / "wide.onnx")
    with OrtRunner(scratch / "wide.onnx") as runner:
        return check.sample_logits(runner, runner.vocabulary)


@BREADTH
@pytest.mark.parametrize("width", [8, 16])
def test_the_head_of_a_tensorrt_engine_may_stay_in_floats(width: int, exported: Made, tmp_path: Path) -> None:
    spec = EngineSpec.model_validate({**rtx_spec("int4").model_dump(), "head_bits": width})
    out, _ = trt_build.prepare(onnx_of(exported("opt-wide", "fp16"), "fp16"), spec, tmp_path, None)
    (head,) = [node for node in ir.load(out).graph if node.op_type == "MatMul" and node.outputs[0].name == "logits"]
    assert (head.inputs[1].producer() is None) == (width == 16)


@BREADTH
def test_a_run_of_bf16_engines_alone_does_not_ask_its_graphs_for_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    monkeypatch.chdir(tmp_path)
    changed(tmp_path / "model", "llama", beyond_in_the_cache, **WIDE)
    (tmp_path / "text.txt").write_text(english()[:40_000])
    settings = [
        *("calibration.context_length=32", "calibration.max_windows=8", "calibration.validation_windows=2"),
        *("evaluate.context_length=32", "evaluate.max_tokens=64", "transfer.steps=1"),
    ]
    command = ["prune-and-build", "--model", "model", "--drop", "1", "--method", "shortgpt", "--then", "none"]
    command += ["--calibration", "text.txt", "--eval", "own=text.txt", "--out", "run"]
    command += [part for each in settings for part in ("--set", each)]
    assert run([*command, "--engine", "tensorrt-rtx-bf16"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [engine["status"] for engine in report["engines"]] == ["built"]
    assert {(each["subject"], each["role"]) for each in report["parity"]} == {("onnx", "dense"), ("onnx", "pruned")}
    assert not list((tmp_path / "run").glob("fp32-*"))
    # An fp16 engine beside it is made of the same graphs, and would overflow.
    assert run([*command, "--engine", "tensorrt-rtx-bf16", "--engine", "tensorrt-rtx-fp16"]) == ParityError.exit_code


def test_a_text_longer_than_the_model_has_positions_is_cut(exported: Made, tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(5, 300, size=(1, 500))
    manifest = build_engine(onnx_of(exported("opt", "fp16"), "fp16"), cpu_spec(), tmp_path / "engine", text)
    assert manifest.half_range is not None and manifest.half_range.reason is None and manifest.half_range.tokens == 48


class TestTensorRtRtx:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")

    @pytest.mark.parametrize("precision", by_default([], ["fp16", "int8"]))
    def test_compiles_what_stays_in_fp32(self, precision: Precision, tmp_path: Path) -> None:
        model = changed(tmp_path / "model", "llama", beyond_in_the_mlp, **WIDE)
        export.export_onnx(model, "fp16", ExportSettings(), tmp_path / "onnx")
        manifest = build_engine(tmp_path / "onnx" / "model.onnx", rtx_spec(precision), tmp_path / "engine")
        assert manifest.half_range is not None and manifest.half_range.kept
        build = inspect_engine(tmp_path / "engine").build
        assert build is not None and build.attention_kernels() == CHANGED_LAYERS
        whole = [layer for layer in build.of(0) if layer.kind in PRODUCTS and layer.weight_bytes == 256 * 256 * 4]
        assert len(whole) == 1 and any("layers.1/mlp/Mul" in name for name in whole[0].reads), "down_proj of one layer"
        with OrtRunner(tmp_path / "engine" / "model.onnx") as runner:
            reference = parity.make_reference(model, PROMPTS)
            assert parity.check_parity(reference, runner, "compiled", "dense", precision).max_error < 0.5

    @pytest.mark.parametrize(
        ("name", "static"),
        by_default([("opt-wide", False)], itertools.product(("llama-wide", "opt-wide"), (True, False))),
    )
    def test_compiles_bf16(self, name: str, static: bool, exported: Made, tmp_path: Path) -> None:
        source = exported(name, "fp16")
        manifest = build_engine(onnx_of(source, "fp16"), rtx_spec("bf16", static), tmp_path / "engine")
        assert manifest.inputs["past_key_values.0.key"][0] == manifest.outputs["logits"][0] == "bfloat16"
        build = inspect_engine(tmp_path / "engine").build
        assert build is not None
        assert build.attention_kernels() == LAYERS
        products = [layer for layer in build.of(0) if layer.kind in PRODUCTS and "BFloat16" in layer.precisions]
        assert len(products) >= 3 * LAYERS
        assert not any("Half" in layer.precisions for layer in build.of(0))
        # ONNX Runtime's CPU provider multiplies no bf16: with the rounded weights in fp32 it proves the graph.
        graph = ir.load(tmp_path / "engine" / "model.onnx")
        half.infer_types(graph)
        half.widen(graph, half.BRAIN)
        ir.save(graph, tmp_path / "wide.onnx", external_data="wide.onnx.data")
        with OrtRunner(tmp_path / "wide.onnx") as runner:
            reference = parity.make_reference(source / "model", PROMPTS)
            assert 1e-3 < parity.check_parity(reference, runner, name, "dense", "bf16").max_error < 0.2


def test_weights_that_fp16_lost_are_not_made_up_in_bf16(
    exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "SMALL_BYTES", 0)  # so that they are read when they are written, as large ones are
    model = ir.load(onnx_of(exported("llama", "fp16"), "fp16"))
    ir.external_data.load_to_model(model)
    value = next(value for value in model.graph.initializers.values() if value.shape and len(value.shape) == 2)
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full(value.const_value.numpy().shape, np.inf, np.float16), name=value.name)
    half.infer_types(model)
    half.to_bf16(model)
    with pytest.raises(half.NoMatch, match="has lost numbers of"):
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
