"""What the linter finds in repositories that are wrong in one way each."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from trsp_deploy.errors import RunError
from trsp_deploy.tools.sources.packaged import find_asset
from trsp_deploy.tools.triton_server.config import SCHEMA
from trsp_deploy.tools.triton_server.lint import lint

pytestmark = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")

GOOD = """
name: "m"
backend: "onnxruntime"
max_batch_size: 4
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A repository with one good model."""
    folder = tmp_path / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(GOOD)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), folder / "1" / "model.onnx")
    return folder


def said(folder: Path) -> str:
    return "\n".join(map(str, lint(folder.parent)))


def test_a_good_model_has_nothing_wrong(model: Path) -> None:
    assert said(model) == ""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('name: "m"', 'name: "other"', "the config's name is 'other', and the folder's is 'm'"),
        ("backend:", "backendd:", "config.pbtxt: 3:1"),
        ('name: "x" ', 'name: "z" ', "input 'z': the graph has x"),
        ('name: "x" ', 'name: "z" ', "inputs of the graph that the config does not have: x"),
        (
            "TYPE_FP32 dims: [ 3 ] } ]\noutput",
            "TYPE_INT64 dims: [ 3 ] } ]\noutput",
            "TYPE_INT64 in the config, TYPE_FP32",
        ),
        ("max_batch_size: 4", "max_batch_size: 0", "dims [3] with the batch, [-1, 3] in the graph"),
        ("max_batch_size: 4", "max_batch_size: 0\ndynamic_batching { }", "loads, and never batches"),
        (
            "max_batch_size: 4",
            "max_batch_size: 4\ndynamic_batching { preferred_batch_size: [ 8 ] }",
            "above max_batch_size 4",
        ),
        ("max_batch_size: 4", "max_batch_size: 4\nversion_policy { specific { versions: [ 3 ] } }", "wants version 3"),
        ('"onnxruntime"', '"python"', "1/model.py is missing, and the server would wait for it for good"),
        ('backend: "onnxruntime"', 'platform: "tensorrt_plan"', "1/model.plan is missing"),
        (
            "max_batch_size: 4",
            'max_batch_size: 4\nmodel_warmup [ { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3 ] '
            'input_data_file: "f" } } } ]',
            "warm-up 'w': warmup/f of input 'x' is missing",
        ),
        ("max_batch_size: 4", 'max_batch_size: 4\nmodel_warmup [ { name: "w" } ]', "warm-up 'w': is skipped"),
        # What the graph fixes the config may not leave open.
        (
            '"x" data_type: TYPE_FP32 dims: [ 3 ]',
            '"x" data_type: TYPE_FP32 dims: [ -1 ]',
            "dims [-1, -1] with the batch",
        ),
    ],
)
def test_each_fault_is_found(model: Path, old: str, new: str, line: str) -> None:
    assert old in GOOD
    (model / "config.pbtxt").write_text(GOOD.replace(old, new))
    assert line in said(model)


def state(
    names: tuple[str, str], more: str = 'initial_state: { data_type: TYPE_FP32 dims: [ 2 ] zero_data: true name: "i" }'
) -> str:
    return f'{{ input_name: "{names[0]}" output_name: "{names[1]}" data_type: TYPE_FP32 dims: [ 2 ] {more} }}'


@pytest.mark.parametrize(
    ("states", "line"),
    [
        ([("kv_in_2", "kv_out_2"), ("kv_in_10", "kv_out_10")], ""),
        ([("in_1", "out_2"), ("in_2", "out_1")], "sorted by input name, their outputs are out of order"),
    ],
)
def test_states_have_to_sort_alike(model: Path, states: list[tuple[str, str]], line: str) -> None:
    text = f"sequence_batching {{ state [ {', '.join(map(state, states))} ] }}"
    (model / "config.pbtxt").write_text(GOOD + text)
    assert line in said(model) and (line or "order" not in said(model))


def test_a_state_begins_with_something(model: Path) -> None:
    loose = state(("a", "b"), "").replace("dims: [ 2 ]", "dims: [ -1 ]")
    (model / "config.pbtxt").write_text(f"{GOOD}sequence_batching {{ state [ {loose}, {state(('c', 'd'), '')} ] }}")
    assert "state 'a': a dimension of -1 begins as 1" in said(model) and "state 'c': has no initial_state" in said(
        model
    )


def test_missing_parts(model: Path, tmp_path: Path) -> None:
    (model / "1" / "model.onnx").write_bytes(b"no")
    assert "not an ONNX file" in said(model)
    (model / "1" / "model.onnx").unlink()
    assert "1/model.onnx is missing" in said(model)
    assert "config.pbtxt is missing" not in said(model)
    (model / "1").rmdir()
    assert "has no version" in said(model)
    (model / "config.pbtxt").unlink()
    assert "config.pbtxt is missing" in said(model)
    with pytest.raises(RunError, match="no such folder"):
        lint(tmp_path / "nowhere")


def test_a_graph_of_one_batch_size_cannot_batch(model: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), model / "1" / "model.onnx")
    assert said(model).count("dims [-1, 3] with the batch, [1, 3] in the graph") == 2
    (model / "config.pbtxt").write_text(GOOD.replace("max_batch_size: 4", "").replace("[ 3 ]", "[ 1, 3 ]"))
    assert said(model) == ""


@pytest.mark.parametrize("fixed", ["x", "y"])
def test_an_output_is_as_open_as_the_graphs(model: Path, fixed: str) -> None:
    """An input may be fixed where the graph leaves it open; an output may not."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), model / "1" / "model.onnx")
    text = GOOD.replace("[ 3 ]", "[ -1 ]").replace(
        f'"{fixed}" data_type: TYPE_FP32 dims: [ -1 ]', f'"{fixed}" data_type: TYPE_FP32 dims: [ 3 ]'
    )
    (model / "config.pbtxt").write_text(text)
    assert said(model) == (
        "" if fixed == "x" else "error: m: output 'y': dims [-1, 3] with the batch, [-1, -1] in the graph"
    )


def test_what_a_server_takes_is_no_fault(model: Path) -> None:
    """Control inputs, a reshape, a model of several files, and a config that the server makes up."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "START")]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "START"], ["y"])], "g", inputs, [out])
    onnx.save(helper.make_model(graph), model / "1" / "model.onnx")
    control = (
        "control_input [ { name: 'START' control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] } ]"
    )
    text = GOOD.replace(
        '"x" data_type: TYPE_FP32 dims: [ 3 ]', '"x" data_type: TYPE_FP32 dims: [ 1, 3 ] reshape { shape: [ 3 ] }'
    )
    (model / "config.pbtxt").write_text(f"{text}sequence_batching {{ {control} }}")
    assert said(model) == ""
    (model / "1" / "model.onnx").rename(model / "1" / "graph")
    (model / "1" / "model.onnx").mkdir()
    (model / "1" / "graph").rename(model / "1" / "model.onnx" / "model.onnx")
    assert said(model) == ""
    (model / "config.pbtxt").unlink()
    assert said(model) == "warning: m: config.pbtxt is missing: the server makes one up, unless it is told not to"
