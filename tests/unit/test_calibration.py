"""How much of a text a graph is given to read before its weights become integers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from trsp_deploy.tools.graphs.nodes import NoMatch
from trsp_deploy.tools.runners.calibration import TOKENS, exported_positions, fitting, text_length


def exported(folder: Path, config: dict[str, object]) -> Path:
    """A graph that ends no text, with the config of its model beside it."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    made = helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "graph", [ids], [made])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.onnx"


@pytest.mark.parametrize("config", [{"max_position_embeddings": -1}, {"n_positions": 0}, {"n_ctx": None}, {}])
def test_a_model_of_any_length_reads_the_text_to_its_end(config: dict[str, object], tmp_path: Path) -> None:
    """XLNet's config says -1, and a text that is cut there lacks its last token."""
    graph, text = exported(tmp_path, config), np.arange(20)[None]
    assert text_length(graph) == TOKENS and fitting(text, graph).shape == (1, 20)
    with pytest.raises(NoMatch, match="says how long a text may be"):
        exported_positions(graph)


def test_what_a_config_says_under_its_familys_name_ends_the_text(tmp_path: Path) -> None:
    graph = exported(tmp_path, {"max_position_embeddings": -1, "seq_length": 12})
    assert exported_positions(graph) == text_length(graph) == 12
    assert fitting(np.arange(20)[None], graph).shape == (1, 12)
