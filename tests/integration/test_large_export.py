"""A model above protobuf's 2 GB, whose ONNX needs external data. Minutes and 12 GB of disk: `make test-slow`."""

from __future__ import annotations

import pytest

from tests.tiny import save_tiny
from trsp_deploy.artifacts import size_bytes
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages import parity
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import open_engine


@pytest.mark.slow
def test_weights_above_2_gb_go_to_external_data(tmp_path):
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 9, "num_attention_heads": 16}
    folder = save_tiny("llama", tmp_path / "model", **shape, num_key_value_heads=4)
    assert size_bytes(folder) > 2 << 30
    external = export_onnx(folder, "fp32", ExportSettings(), tmp_path / "onnx")
    assert external and size_bytes(tmp_path / "onnx" / external[0]) > 2 << 30
    assert size_bytes(tmp_path / "onnx" / "model.onnx") < 100 << 20
    build_engine(tmp_path / "onnx" / "model.onnx", load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    reference = parity.make_reference(folder, [list(range(3, 12)), list(range(40, 45))])
    with open_engine(tmp_path / "engine") as runner:
        assert parity.check_parity(reference, runner, "ort-cpu-fp32", "dense", "fp32").passed
