"""What the linter finds in repositories that are wrong in one way each."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.tools.model_repository.config import SCHEMA
from trsp_deploy.tools.model_repository.lint import config_alone, lint, plan
from trsp_deploy.tools.sources.packaged import find_asset

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
        ("max_batch_size: 4", "max_batch_size: -1", "max_batch_size -1: the server takes none below 0"),
        ("max_batch_size: 4", "max_batch_size: 4\nversion_policy { latest { } }", "version_policy latest serves no"),
        (
            "max_batch_size: 4",
            "max_batch_size: 4\nversion_policy { specific { } }",
            "version_policy specific serves no",
        ),
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
        ('backend: "onnxruntime"', 'backend: "onnxrutime"', "libtriton_onnxrutime.so; did you mean 'onnxruntime'?"),
        ('backend: "onnxruntime"', 'platform: "onnxruntime"', "did you mean 'onnxruntime_onnx'?"),
        ('backend: "onnxruntime"', 'backend: "pytorch"', "1/model.pt is missing"),
        ('backend: "onnxruntime"', 'platform: "torch_aoti"', "1/model.pt2 is missing"),
        # The server takes the backend from the file that is there.
        ('backend: "onnxruntime"\nmax_batch_size: 4', "", "dims [3] with the batch, [-1, 3] in the graph"),
        (
            'backend: "onnxruntime"',
            'default_model_filename: "my.onnx"',
            "has neither backend nor platform, and no file that tells",
        ),
        (
            '"x" data_type: TYPE_FP32 dims: [ 3 ]',
            '"x" data_type: TYPE_FP32 dims: [ 3 ] optional: true',
            "optional input 'x': the onnxruntime backend takes none where max_batch_size is set",
        ),
        ("TYPE_FP32 dims: [ 3 ] } ]\noutput", "TYPE_BF16 dims: [ 3 ] } ]\noutput", "from before March 2026"),
        (
            'backend: "onnxruntime"',
            'platform: "ensemble" ensemble_scheduling { step [ { model_name: "nowhere" } ] }',
            "a step of the ensemble is model 'nowhere', which is not here",
        ),
        (
            'backend: "onnxruntime"',
            'platform: "ensemble" ensemble_scheduling { step [ { model_name: "m" model_version: 3 } ] }',
            "a step of the ensemble is version 3 of 'm', which is not here",
        ),
        ('name: "y" ', 'name: "y" label_filename: "classes.txt" ', "output 'y': classes.txt, which has its labels, is"),
    ],
)
def test_each_fault_is_found(model: Path, old: str, new: str, line: str) -> None:
    assert old in GOOD
    (model / "config.pbtxt").write_text(GOOD.replace(old, new))
    assert line in said(model)


@pytest.mark.parametrize(
    ("backend", "file"), [("mine", "libtriton_mine.so"), ("pytorch", "model.pt"), ("vllm", "model.json")]
)
def test_other_backends_are_fine(backend: str, file: str, model: Path) -> None:
    (model / "config.pbtxt").write_text(GOOD.replace('"onnxruntime"', f'"{backend}"'))
    (model / "1" / file).touch()
    assert said(model) == ""


def add_ensemble(model: Path, name: str, batch: int, *steps: str) -> None:
    folder = model.parent / name
    (folder / "1").mkdir(parents=True)
    text = GOOD.replace('"m"', f'"{name}"').replace('backend: "onnxruntime"', 'platform: "ensemble"')
    text = text.replace("max_batch_size: 4", f"max_batch_size: {batch}")
    named = ", ".join(f'{{ model_name: "{step}" }}' for step in steps)
    (folder / "config.pbtxt").write_text(text + f"ensemble_scheduling {{ step [ {named} ] }}")


def test_ensembles_that_hold_one_another_are_found(model: Path) -> None:
    add_ensemble(model, "a", 4, "b")
    add_ensemble(model, "b", 4, "m", "a")
    add_ensemble(model, "c", 4, "a")
    found = said(model)
    assert "a: the ensemble is a step of its own" in found and "b: the ensemble is a step of its own" in found
    assert "c:" not in found and "m:" not in found


def test_an_ensemble_of_larger_batches_than_its_step_takes_is_found(model: Path) -> None:
    add_ensemble(model, "e", 8, "m")
    assert "max_batch_size 8, and step 'm' takes 4" in said(model)


@pytest.mark.parametrize("policy", ["", "version_policy { all { } }"])
def test_a_step_of_a_version_that_is_not_loaded_is_found(policy: str, model: Path) -> None:
    """As where a newer one was put beside it: the server loads the latest alone where the config does not say."""
    add_ensemble(model, "e", 4, "m")
    config = model.parent / "e" / "config.pbtxt"
    config.write_text(config.read_text().replace('model_name: "m"', 'model_name: "m" model_version: 1'))
    shutil.copytree(model / "1", model / "2")
    (model / "config.pbtxt").write_text(GOOD + policy)
    line = "error: e: a step of the ensemble is version 1 of 'm', whose version_policy loads 2"
    assert said(model) == ("" if policy else line)


def test_a_step_whose_config_cannot_be_read_is_that_model_s_error_alone(model: Path) -> None:
    add_ensemble(model, "e", 4, "m")
    (model / "config.pbtxt").write_text("nonsense")
    found = said(model)
    assert "m: config.pbtxt: 1:1" in found and "e:" not in found


def test_an_ensemble_of_models_that_are_here_is_fine(model: Path) -> None:
    ensemble = model.parent / "e"
    (ensemble / "1").mkdir(parents=True)
    steps = (
        'ensemble_scheduling { step [ { model_name: "m" model_version: -1 }, { model_name: "m" model_version: 1 } ] }'
    )
    text = GOOD.replace('"m"', '"e"').replace('backend: "onnxruntime"', 'platform: "ensemble"')
    (ensemble / "config.pbtxt").write_text(text + steps)
    assert said(model) == ""


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


@pytest.mark.parametrize(
    ("dims", "begins", "fits"),
    [
        ("2", "2", True),
        ("-1", "1", True),
        ("4, -1", "4, 1", True),
        ("2", "3", False),
        ("-1", "-1", False),
        ("2", "2, 1", False),
    ],
)
def test_a_state_begins_in_dims_that_it_may_have(dims: str, begins: str, fits: bool, model: Path) -> None:
    initial = f'initial_state: {{ data_type: TYPE_FP32 dims: [ {begins} ] zero_data: true name: "i" }}'
    one = state(("a", "b"), initial).replace("dims: [ 2 ] initial", f"dims: [ {dims} ] initial")
    (model / "config.pbtxt").write_text(f"{GOOD}sequence_batching {{ state [ {one} ] }}")
    assert ("its initial_state is of another type or other dims" not in said(model)) is fits
    assert "begins" not in said(model)


def test_the_file_that_a_state_begins_with_has_to_be_there(model: Path) -> None:
    one = state(("a", "b"), 'initial_state: { data_type: TYPE_FP32 dims: [ 2 ] data_file: "zeros" name: "i" }')
    (model / "config.pbtxt").write_text(f"{GOOD}sequence_batching {{ state [ {one} ] }}")
    line = "error: m: state 'a': initial_state/zeros, which a sequence begins with, is missing"
    assert line in said(model).splitlines()
    (model / "initial_state").mkdir()
    (model / "initial_state" / "zeros").touch()
    assert line not in said(model).splitlines()


class Plan:
    """TensorRT's module, runtime and engine as far as reading a plan takes: x (1 to 8, 3) in, y the same out."""

    __version__ = "10.15"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    num_io_tensors, num_optimization_profiles = 2, 2

    def __init__(self, log: object = None) -> None:
        pass

    Runtime = property(lambda self: Plan)

    def deserialize_cuda_engine(self, data: mmap.mmap) -> Plan | None:
        return self if data[:] == b"a plan" else None

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> object:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (1, 3), (1 if profile == 0 else 8, 3)]


PLANNED = GOOD.replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"')


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("", "", ""),
        ("max_batch_size: 4", "max_batch_size: 512", "max_batch_size 512, and the plan's profiles end at a batch of 8"),
        ('name: "x" ', 'name: "z" ', "input 'z': the plan has x"),
        ('name: "y" data_type: TYPE_FP32', 'name: "y" data_type: TYPE_FP16', "TYPE_FP16 in the config, TYPE_FP32"),
        ("max_batch_size: 4", "", ""),  # the backend finds it where dims lack the batch
        ("dims: [ 3 ]", "dims: [ 4 ]", "dims [-1, 4] with the batch, [-1, 3] in the plan"),
    ],
)
def test_a_plan_is_held_against_its_config(
    old: str, new: str, line: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where TensorRT and a GPU are here."""
    monkeypatch.setattr(plan, "load_package", lambda backend: Plan())
    monkeypatch.setattr(plan, "cuda_devices", list)
    monkeypatch.setattr(plan, "logger", lambda trt: SimpleNamespace(errors=[], complaint=lambda: "bad magic"))
    (model / "1" / "model.plan").write_bytes(b"a plan")
    (model / "config.pbtxt").write_text(PLANNED.replace(old, new) if old else PLANNED)
    assert line in said(model) and bool(line) == bool(said(model))
    (model / "1" / "model.plan").write_bytes(b"no plan")
    assert "1/model.plan does not load with TensorRT 10.15 here: bad magic" in said(model)
    (model / "1" / "model.plan").write_bytes(b"")
    assert "1/model.plan does not load with TensorRT 10.15 here: the file is empty" in said(model)


def test_a_plan_that_cannot_be_read_here_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(backend: str) -> None:
        raise EngineUnavailable("tensorrt is not installed")

    monkeypatch.setattr(plan, "load_package", absent)
    (model / "1" / "model.plan").write_bytes(b"a plan")
    (model / "config.pbtxt").write_text(PLANNED)
    assert said(model) == (
        "warning: m: 1/model.plan was not looked into: that takes TensorRT and a GPU (tensorrt is not installed)"
    )


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_gpu_that_is_not_here_is_named(on_cpu: bool, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.pbtxt").write_text(GOOD + "instance_group [ { kind: KIND_GPU } ]")
    if on_cpu:
        (model / "configs").mkdir()
        (model / "configs" / "cpu.pbtxt").write_text(GOOD)
    monkeypatch.setattr(config_alone, "cuda_devices", list)  # as where there is one
    assert said(model) == ""

    def absent() -> None:
        raise EngineUnavailable("no CUDA device: none")

    monkeypatch.setattr(config_alone, "cuda_devices", absent)
    other = "; `--model-config-name=cpu` takes configs/cpu.pbtxt" if on_cpu else ""
    assert said(model) == f"warning: m: KIND_GPU does not load here (no CUDA device: none){other}"


def with_tokenizer(folder: str) -> str:
    return f'{GOOD}parameters {{ key: "tokenizer_dir" value {{ string_value: "{folder}" }} }}'


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        (
            "${tokenizer_dir}",
            "error: m: parameter tokenizer_dir is '${tokenizer_dir}': the place of a tokenizer was never",
        ),
        ("", "error: m: parameter tokenizer_dir is ''"),
        ("/no/where", "warning: m: parameter tokenizer_dir: there is no folder /no/where here"),
        ("HuggingFaceTB/SmolLM2-135M", ""),
    ],
)
def test_the_tokenizer_of_a_foreign_model_is_looked_for(folder: str, line: str, model: Path) -> None:
    (model / "config.pbtxt").write_text(with_tokenizer(folder))
    assert said(model).startswith(line) and bool(line) == bool(said(model))


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "spiece.model"])
def test_a_folder_without_a_tokenizer_is_named(file: str, model: Path) -> None:
    folder = model / "tokenizer"
    folder.mkdir()
    (folder / "config.json").touch()
    (model / "config.pbtxt").write_text(with_tokenizer(str(folder)))
    assert said(model) == f"error: m: parameter tokenizer_dir: {folder} holds no tokenizer (such as tokenizer.json)"
    (folder / file).touch()
    assert said(model) == ""


def test_batch_sizes_that_the_server_finds_itself_batch(model: Path) -> None:
    """The onnxruntime backend completes a config that lacks inputs or outputs, a Python model what it says it does."""
    (model / "config.pbtxt").write_text('backend: "onnxruntime"\ndynamic_batching { }')
    assert said(model) == ""
    (model / "config.pbtxt").write_text('backend: "python"\ndynamic_batching { }')
    (model / "1" / "model.py").write_text("class TritonPythonModel: pass")
    assert said(model) == "error: m: dynamic_batching with max_batch_size 0 loads, and never batches"
    (model / "1" / "model.py").write_text("class TritonPythonModel:\n    def auto_complete_config(c): return c")
    assert said(model) == ""


def test_a_file_for_each_kind_of_gpu_is_in_place_of_one_for_all(model: Path) -> None:
    by_gpu = 'cc_model_filenames [ { key: "7.5" value: "turing.onnx" }, { key: "8.9" value: "ada.onnx" } ]'
    (model / "config.pbtxt").write_text(GOOD + by_gpu)
    (model / "1" / "model.onnx").rename(model / "1" / "turing.onnx")
    assert said(model).splitlines() == [
        "error: m: 1/ada.onnx is missing, which is for GPUs of compute capability 8.9",
        "warning: m: 1/model.onnx is missing: only GPUs of compute capability 7.5, 8.9 have a file",
    ]


UNFINISHED = "`trsp-deploy triton` has not finished it, and no server starts beside it: run that command again"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (".m.partial", UNFINISHED),
        (".m.former", UNFINISHED),
        (".git", "config.pbtxt is missing, and the server takes hidden folders for models too: move it elsewhere"),
        ("lost+found", "config.pbtxt is missing"),
    ],
)
def test_a_folder_that_is_no_model_keeps_the_server_from_starting(name: str, line: str, model: Path) -> None:
    (model.parent / name).mkdir()
    (model.parent / ".writing.lock").touch()  # files do no harm
    assert said(model).startswith(f"error: {name}: {line}") and "\n" not in said(model)


@pytest.mark.parametrize("looked_at", ["config.pbtxt", "lost+found"])
def test_a_folder_that_nobody_but_root_may_read_is_no_model(
    looked_at: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pathlib refuses it before Python 3.14, and a listing in any. Root, which may run the tests, is refused
    nothing."""
    closed = model.parent / "lost+found"
    closed.mkdir()
    is_file, iterdir = Path.is_file, Path.iterdir

    def refuse(path: Path) -> None:
        if path.name == looked_at and closed in (path, path.parent):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", lambda path: (refuse(path), is_file(path))[1])
    monkeypatch.setattr(Path, "iterdir", lambda path: (refuse(path), iterdir(path))[1])
    line = "config.pbtxt is missing, or this user may not look (Permission denied)"
    assert said(model) == f"error: lost+found: {line}"


def test_a_config_that_cannot_be_read_is_a_finding(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is another user's alone. Root, which may run the tests, is refused nothing."""
    config, read = model / "config.pbtxt", Path.read_text

    def refused(path: Path, *rest: str, **more: str) -> str:
        if path == config:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)
        assert said(model) == "error: m: config.pbtxt cannot be read (Permission denied)"
    config.write_bytes(b'name: "caf\xe9"')
    assert said(model) == "error: m: config.pbtxt is not UTF-8 text"
    config.unlink()
    config.mkdir()
    assert said(model) == "error: m: config.pbtxt is a folder, expected a file"


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


@pytest.mark.parametrize("kind", ["UINT16", "UINT32", "UINT64"])
def test_every_number_that_a_graph_may_have_is_known(kind: str, model: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind), ["batch", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), model / "1" / "model.onnx")
    (model / "config.pbtxt").write_text(GOOD.replace("TYPE_FP32", f"TYPE_{kind}"))
    assert said(model) == ""


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        ("", []),
        ("latest { num_versions: 3 }", ["2"]),
        ("all { }", ["1", "2"]),
        ("specific { versions: [ 1, 3 ] }", ["1"]),
    ],
)
def test_only_versions_that_are_served_have_to_be_whole(policy: str, found: list[str], model: Path) -> None:
    """The latest one where the config does not say: 10, which comes after 3."""
    (model / "1").rename(model / "10")
    for version in ("1", "2"):
        (model / version).mkdir()
    shutil.copytree(model / "10", model / "3")
    (model / "config.pbtxt").write_text(GOOD + (f"version_policy {{ {policy} }}" if policy else ""))
    assert sorted(said(model).splitlines()) == [f"error: m: {version}/model.onnx is missing" for version in found]


def with_weight(folder: Path, ir_version: int = 8) -> None:
    """A model whose `w` has a value that a request may replace."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xw"]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 1.0, 1.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", inputs, [y], [weight])
    onnx.save(helper.make_model(graph, ir_version=ir_version), folder / "1" / "model.onnx")


@pytest.mark.parametrize(
    ("ir_version", "line", "message"),
    [
        (8, '{ name: "w" data_type: TYPE_FP32 dims: [ 3 ] optional: true }', ""),
        (8, '{ name: "w" data_type: TYPE_FP32 dims: [ 3 ] }', "input 'w': the graph has x"),
        (8, '{ name: "w" data_type: TYPE_INT8 dims: [ 3 ] optional: true }', "TYPE_INT8 in the config, TYPE_FP32"),
        # Before version 4 of the format initial values are constants.
        (3, '{ name: "w" data_type: TYPE_FP32 dims: [ 3 ] optional: true }', "optional input 'w': the graph has none"),
    ],
)
def test_an_input_with_a_value_of_its_own_may_be_left_out(
    ir_version: int, line: str, message: str, model: Path
) -> None:
    with_weight(model, ir_version)
    text = GOOD.replace("max_batch_size: 4", "").replace("dims: [ 3 ] } ]\noutput", f"dims: [ 3 ] }}, {line} ]\noutput")
    (model / "config.pbtxt").write_text(text)
    assert message in said(model) and bool(message) == bool(said(model))


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


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("01", "warning: m: folder 01 is no version to the server: its name begins with 0"),
        ("2_old", "error: m: the server takes folder 2_old for version 2: give it another name"),
        ("configs", ""),
    ],
)
def test_folders_that_only_look_like_versions(model: Path, name: str, finding: str) -> None:
    (model / name).mkdir()
    assert said(model) == finding


def test_an_openvino_model_completes_its_config_itself(tmp_path: Path) -> None:
    file = tmp_path / "m" / "1" / "model.xml"
    file.parent.mkdir(parents=True)
    file.touch()
    assert said(tmp_path / "m").startswith("warning: m: config.pbtxt is missing: the server makes one up")


def test_a_version_with_leading_zeros_is_none(model: Path) -> None:
    (model / "1").rename(model / "01")
    assert "error: m: has no version" in said(model)


def test_a_python_model_may_complete_its_config_itself(tmp_path: Path) -> None:
    file = tmp_path / "m" / "1" / "model.py"
    file.parent.mkdir(parents=True)
    file.write_text("class TritonPythonModel: pass")
    assert said(tmp_path / "m") == "error: m: config.pbtxt is missing"
    file.write_text("class TritonPythonModel:\n    @staticmethod\n    def auto_complete_config(c): return c")
    assert said(tmp_path / "m").startswith("warning: m: config.pbtxt is missing: the server makes one up")


def test_numbers_that_no_name_is_known_of_are_no_traceback(model: Path) -> None:
    (model / "config.pbtxt").write_text(f"{GOOD.replace('TYPE_FP32', '99')}instance_group [ {{ kind: 7 }} ]")
    assert "99" in said(model)


def test_names_that_are_not_utf_8_are_no_traceback(model: Path) -> None:
    for folder in (b"caf\xe9", b"m/2\xe9"):
        (model.parent / os.fsdecode(folder)).mkdir()
    assert said(model).splitlines() == [
        r"error: caf\udce9: config.pbtxt is missing",
        r"error: m: the server takes folder 2\udce9 for version 2: give it another name",
    ]


def test_a_place_of_weights_that_is_not_utf_8_is_no_traceback(model: Path) -> None:
    path = model / "1" / "model.onnx"
    graph = onnx.load(path)
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="elsewhere")
    graph.graph.initializer.append(weight)
    path.write_bytes(graph.SerializeToString().replace(b"elsewhere", b"\xff" * 9))
    assert "m: 1/model.onnx: has a name that is not UTF-8" in said(model)
