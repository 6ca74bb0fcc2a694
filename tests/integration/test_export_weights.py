"""Weights that go from a checkpoint into a graph one at a time, without the model ever being loaded: the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.breadth import BREADTH
from tests.tiny import tiny_model
from trsp_deploy.decoder import load_model
from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.stages import parity
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.runners.ort import OrtRunner

pytest.importorskip("optimum.exporters.onnx", reason="Optimum is not installed: pip install 'trsp_deploy[optimum]'")

DTYPES: dict[Float, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]


def exported(model: Path, precision: Float, out: Path, slim: bool = True) -> ir.Graph:
    assert export_onnx(model, precision, ExportSettings(slim=slim), out) == ("model.onnx_data",)
    return ir.load(out / "model.onnx").graph


def agrees(model: Path, graph: Path) -> bool:
    reference = parity.make_reference(model, PROMPTS)
    with OrtRunner(graph) as runner:
        return parity.check_parity(reference, runner, "onnx", "dense", "fp32").max_error < 1e-4


@BREADTH
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_matrix_has_the_bits_that_loading_gives(family: str, precision: Float, tmp_path: Path) -> None:
    made = tiny_model(family).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert (
        len(set(json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"].values())) > 2
    )
    graph = exported(tmp_path / "model", precision, tmp_path / "onnx")
    loaded = dict(load_model(tmp_path / "model", dtype=DTYPES[precision]).named_parameters())  # a tied one once
    matrices = {name: weight for name, weight in loaded.items() if weight.ndim == 2}
    assert matrices.keys() == {
        name for name, value in graph.initializers.items() if name in loaded and value.shape.rank() == 2
    }
    for name, weight in matrices.items():
        stored = torch.from_numpy(graph.initializers[name].const_value.numpy().copy())
        assert torch.equal(stored, weight) or torch.equal(stored, weight.t()), name


def test_a_weight_of_another_shape_is_one_line(tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.decoder.layers.2.fc1.weight"] = weights["model.decoder.layers.2.fc1.weight"][:-1].clone()
    save_file(weights, path, {"format": "pt"})
    shapes = r"fc1\.weight is \(95, 48\) and by the config would be \(96, 48\)$"
    with pytest.raises(ModelError, match=shapes):
        exported(tmp_path / "model", "fp32", tmp_path / "onnx")


def test_without_simplification(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    exported(tmp_path / "model", "fp32", tmp_path / "onnx", slim=False)
    assert agrees(tmp_path / "model", tmp_path / "onnx" / "model.onnx")


def test_a_checkpoint_without_the_models_prefix(tmp_path: Path) -> None:
    """As facebook's own: `decoder.layers.0`, where the model with a head has `model.decoder.layers.0`."""
    model = tiny_model("opt")
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({key.removeprefix("model."): weight for key, weight in load_file(path).items()}, path, {"format": "pt"})
    exported(tmp_path / "model", "fp32", tmp_path / "onnx")
    assert agrees(tmp_path / "model", tmp_path / "onnx" / "model.onnx")


def test_what_the_folder_does_not_name_is_not_made_up(tmp_path: Path) -> None:
    model = tiny_model("opt")
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.decoder.layers.2.fc1.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack model.decoder.layers.2.fc1.bias"):
        exported(tmp_path / "model", "fp32", tmp_path / "onnx")


def test_what_onnxslim_cannot_simplify_is_exported_as_it_was_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After hours of training it was a traceback."""

    def fails(model: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("onnxslim.slim", fails)
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    said: list[str] = []
    export_onnx(tmp_path / "model", "fp32", ExportSettings(), tmp_path / "onnx", say=said.append)
    assert agrees(tmp_path / "model", tmp_path / "onnx" / "model.onnx")
    assert said == [
        "export: onnxslim cannot simplify the graph (IndexError: list index out of range): it stays as it was traced, "
        "and is slower"
    ]


def test_a_graph_that_is_not_valid_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.node[0].op_type = "Nothing"
        return model

    monkeypatch.setattr("onnxslim.slim", spoilt)
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"is no valid ONNX \(.*Nothing.*\); `--set export\.slim=false` leaves"
    ) as found:
        export_onnx(tmp_path / "model", "fp32", ExportSettings(), tmp_path / "onnx")
    assert "\n" not in str(found.value)
