"""torch's own exporter: the same inputs, outputs and checks as Optimum's, with either major version of transformers.

`make test-transformers5` runs all of this file, and the tests of pruning, where Optimum cannot be installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import transformers

from tests.breadth import BREADTH, by_default
from tests.exported import MODELS
from tests.families import FAMILIES, family_config
from tests.made_run import SPEC
from tests.tiny import random_model, save_tiny
from trsp_deploy.artifacts.steps import export
from trsp_deploy.errors import ModelError
from trsp_deploy.pipeline import check_before_work
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import check_exportable, chosen, export_onnx
from trsp_deploy.tools.exporters import dynamo, optimum, weights
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.ort import OrtRunner

PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
DYNAMO = ExportSettings(exporter="dynamo")
LAYERS = 2  # of what torch exports here: seconds a layer
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def exported(name: str, precision: Float, folder: Path) -> Path:
    family, changes = MODELS[name]
    values = {**FAMILIES[family].values, **changes, "num_hidden_layers": LAYERS}
    model = random_model(getattr(transformers, FAMILIES[family].config)(**values))
    model.save_pretrained(folder / "model")
    export_onnx(folder / "model", precision, DYNAMO, folder / "onnx")
    return folder


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("opt-350m", "fp32", marks=pytest.mark.slow),
        pytest.param("llama", "fp32", marks=pytest.mark.slow),
        pytest.param("llama", "fp16", marks=pytest.mark.slow),
        pytest.param("mistral-sliding", "fp32", marks=pytest.mark.slow),
    ],
)
def test_parity_and_passes(name: str, precision: Float, tmp_path: Path) -> None:
    """Left-padded prompts, the cache, and every pass that fits a graph of Optimum's."""
    folder = exported(name, precision, tmp_path)
    graph = folder / "onnx" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    names = [value.name for value in model.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and len(names) == 3 + 2 * LAYERS
    assert [value.name for value in model.graph.output][:2] == ["logits", "present.0.key"]
    assert str(Path.cwd()).encode() not in graph.read_bytes(), "nothing of the machine is in the graph"
    reference = parity.make_reference(folder / "model", PROMPTS)
    limit = 1e-4 if precision == "fp32" else 0.05
    with OrtRunner(graph) as runner:
        assert parity.check_parity(reference, runner, name, "dense", precision).max_error < limit
    if precision == "fp16":
        return
    manifest = build_engine(graph, load_engine_spec("ort-cpu-fp32"), folder / "engine")
    done = {outcome.name: outcome.changed for outcome in manifest.passes}
    assert done["fuse-attention"] == LAYERS and done["cut-logits"] == 1
    assert done["fuse-rotary"] == (0 if name == "opt-350m" else LAYERS)
    with open_engine(folder / "engine") as runner:
        assert parity.check_parity(reference, runner, name, "dense", "fp32").max_error < limit


@pytest.mark.slow
def test_a_cache_of_fixed_length_fits_too(tmp_path: Path) -> None:
    from trsp_deploy.tools.graphs.static_cache import fix_cache

    folder = exported("opt-350m", "fp32", tmp_path)
    model = ir.load(folder / "onnx" / "model.onnx")
    assert fix_cache(model, 32) == LAYERS
    ir.save(model, tmp_path / "fixed.onnx", external_data="fixed.onnx.data")
    reference = parity.make_reference(folder / "model", PROMPTS)
    with OrtRunner(tmp_path / "fixed.onnx") as runner:
        assert parity.check_parity(reference, runner, "opt", "dense", "fp32").max_error < 1e-4


def test_auto_is_optimum_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ExportSettings()
    assert chosen(auto) == ("optimum" if optimum.installed() else "dynamo")
    monkeypatch.setattr(optimum, "installed", lambda: False)
    assert chosen(auto) == "dynamo"
    with pytest.raises(ModelError, match=r"optimum is not installed here: pip install 'trsp_deploy\[optimum\]'"):
        chosen(ExportSettings(exporter="optimum"))


def test_what_simplifies_optimums_graph_is_asked_for_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported when the graph is there, which is after the training."""
    monkeypatch.setattr(optimum, "installed", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"onnxslim is not installed here: pip install 'trsp_deploy\[optimum\]', or"):
        chosen(ExportSettings())
    assert chosen(ExportSettings(slim=False)) == "optimum"
    assert chosen(ExportSettings(exporter="dynamo")) == "dynamo"


@BREADTH
def test_torchs_own_never_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come from the checkpoint one by one, a tied one too."""
    config = family_config("opt")
    config.num_hidden_layers = 1
    folder, out = saved(config, tmp_path / "model"), tmp_path / "model.onnx"
    monkeypatch.setattr(weights, "load_model", lambda *_, **__: pytest.fail("loaded whole"))

    def save(graph: ir.Model, out: Path) -> None:
        held = [
            value for value in graph.graph.initializers.values() if not isinstance(value.const_value, ir.LazyTensor)
        ]
        assert all(value.const_value.size < config.hidden_size**2 for value in held), "read to be transposed, and kept"
        weights.save(graph, out)

    monkeypatch.setattr(dynamo, "save", save)
    dynamo.export(folder, "fp32", dynamo.OPSET, out)
    reference = parity.make_reference(folder, PROMPTS)
    with OrtRunner(out) as runner:
        assert parity.check_parity(reference, runner, "opt", "dense", "fp32").max_error < 1e-4


@pytest.mark.skipif(not optimum.installed(), reason="Optimum is not installed")
def test_what_python_3_14_would_bind_in_optimums_classes_is_not_bound_meanwhile() -> None:
    from optimum.exporters.onnx import model_configs

    config = vars(model_configs.GPT2OnnxConfig)
    before = config["NORMALIZED_CONFIG_CLASS"]
    with optimum._never_bound(model_configs):
        assert isinstance(config["NORMALIZED_CONFIG_CLASS"], staticmethod)
        assert model_configs.GPT2OnnxConfig.NORMALIZED_CONFIG_CLASS is before
    assert config["NORMALIZED_CONFIG_CLASS"] is before


@pytest.mark.skipif(not optimum.installed(), reason="Optimum is not installed")
def test_auto_is_torchs_own_for_a_type_that_optimum_does_not_know(tmp_path: Path) -> None:
    for name, exporter in (("LlamaConfig", "optimum"), ("Olmo3Config", "dynamo"), ("BertConfig", "dynamo")):
        getattr(transformers, name)(**SMALL).save_pretrained(tmp_path / name)
        assert chosen(ExportSettings(), tmp_path / name) == exporter
        assert chosen(ExportSettings(exporter="optimum"), tmp_path / name) == "optimum"


def saved(config: transformers.PretrainedConfig, folder: Path) -> Path:
    random_model(config).save_pretrained(folder)
    return folder


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNTRACEABLE = {  # on transformers 4
    "experts by the data": (
        transformers.Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=16),
        r"torch cannot export it to ONNX \([^\x1b]*data-dependent[^\x1b]*\)$",
    ),
    "a cache of convolutions": (
        transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
        r"torch cannot export it to ONNX \(its cache is \w+, not the keys and values of every layer\)$",
    ),
}


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has other code for these")
@pytest.mark.parametrize("name", by_default(["a cache of convolutions"], UNTRACEABLE))
def test_what_no_exporter_can_export_is_told_in_one_line_before_and_after_training(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, message = UNTRACEABLE[name]
    folder = saved(config, tmp_path / "model")
    for refuse in (
        lambda: dynamo.check_traceable(folder),
        lambda: export_onnx(folder, "fp32", DYNAMO, tmp_path / "onnx"),
    ):
        with quiet_libraries(), pytest.raises(ModelError, match=message) as refusal:
            refuse()
        assert "\n" not in str(refusal.value)
    assert sum(map(len, capfd.readouterr())) < 200, "nothing of the graph is on the terminal"


@BREADTH
def test_a_model_is_tried_without_its_weights(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    dynamo.check_traceable(folder)
    if optimum.installed():
        check_exportable(folder, ExportSettings(), pytest.fail)


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has other code for these")
def test_a_run_refuses_before_it_trains_what_cannot_be_exported(tmp_path: Path) -> None:
    config, _ = UNTRACEABLE["a cache of convolutions"]
    said: list[str] = []
    texts = SimpleNamespace(tasks=tuple)
    for each in ("calibration", "find_evaluation", "calibration_windows", "read_evaluation"):
        setattr(texts, each, lambda: None)
    model = SimpleNamespace(readable=lambda: saved(config, tmp_path / "dense"))
    inputs = SimpleNamespace(model=model, texts=texts, check_lengths=lambda: None, say=said.append)
    run = SimpleNamespace(main=True, from_main=lambda value: value)
    recipe = SimpleNamespace(export=ExportSettings())
    engines = SimpleNamespace(buildable=lambda: [SPEC])
    # What is there of another model or other settings is made again, so that it says nothing.
    job: Any = SimpleNamespace(inputs=inputs, run=run, recipe=recipe, engines=engines, finished=frozenset)
    with pytest.raises(ModelError, match=r"not the keys and values .*; `trsp-deploy prune` makes the checkpoint alone"):
        check_before_work(job)
    known = ["export: Optimum does not know this type of model, so torch's own exporter is taken (dynamo)"]
    assert said == (known if optimum.installed() else [])
    job.finished = lambda: frozenset({export("dense", "fp32")})
    check_before_work(job)
    job.finished = frozenset
    engines.buildable = list  # nothing is exported
    check_before_work(job)


def test_what_torch_cannot_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for opset in (18, 99):
        settings = ExportSettings(exporter="dynamo", opset=opset)
        with pytest.raises(ModelError, match=rf"export\.opset: {opset}, and this exporter writes 20 to \d\d$"):
            export_onnx(folder, "fp32", settings, tmp_path / "onnx")
        with pytest.raises(ModelError, match=rf"export\.opset: {opset}, and this exporter writes 20 to "):
            check_exportable(folder, settings, pytest.fail)

    import torch

    def refuse(*args: object, **kwargs: object) -> None:
        advice = torch.onnx.OnnxExporterError("This is \x1b[96mstep 1/3\x1b[0m\nof exporting")
        raise advice from ValueError("\x1b[96mno way\x1b[0m to trace\nand the whole graph")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match=r"torch cannot export it to ONNX \(no way to trace\)"):
        export_onnx(folder, "fp32", DYNAMO, tmp_path / "onnx")


@BREADTH
def test_what_torch_cannot_optimise_is_exported_as_it_was_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fails(program: torch.onnx.ONNXProgram) -> None:
        del program.model.graph.outputs[0]  # in place, up to where it stops
        raise IndexError("list index out of range")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fails)
    folder, said = saved(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1}), tmp_path / "model"), list[str]()
    export_onnx(folder, "fp32", DYNAMO, tmp_path / "onnx", say=said.append)
    with OrtRunner(tmp_path / "onnx" / "model.onnx") as runner:
        reference = parity.make_reference(folder, PROMPTS)
        assert parity.check_parity(reference, runner, "llama", "dense", "fp32").max_error < 1e-4
    assert said == [
        "export: torch cannot optimise the graph (IndexError: list index out of range): it stays as it was traced, and "
        "is slower"
    ]
