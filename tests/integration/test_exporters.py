"""torch's own exporter: the same inputs, outputs and checks as Optimum's, with either major version of transformers.

`make test-transformers5` runs all of this file, and the tests of pruning, where Optimum cannot be installed.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.exported import MODELS
from tests.families import FAMILIES
from tests.tiny import LAYERS, random_model, save_tiny
from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import chosen, export_onnx
from trsp_deploy.tools.exporters import optimum
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.ort import OrtRunner

PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
DYNAMO = ExportSettings(exporter="dynamo")


def exported(name: str, precision: Float, folder: Path) -> Path:
    import transformers

    family, changes = MODELS[name]
    model = random_model(getattr(transformers, FAMILIES[family].config)(**{**FAMILIES[family].values, **changes}))
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
    import onnx_ir as ir

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


def test_what_torch_cannot_trace_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    with pytest.raises(ModelError, match=r"export\.opset: 18, and this exporter begins at 20"):
        export_onnx(folder, "fp32", ExportSettings(exporter="dynamo", opset=18), tmp_path / "onnx")

    import torch

    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.onnx.OnnxExporterError("no way\nto trace")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match=r"torch cannot export it to ONNX \(no way to trace\)"):
        export_onnx(folder, "fp32", DYNAMO, tmp_path / "onnx")
