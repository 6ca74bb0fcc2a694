"""Random changes to valid files, for the readers of ONNX graphs and of Triton's `config.pbtxt`.

A few by default, thousands by `make faults`. The readers say what is wrong in a line or accept it, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from trsp_deploy.errors import TrspError
from trsp_deploy.tools.measuring.subjects import find_subject
from trsp_deploy.tools.model_repository.config import SCHEMA
from trsp_deploy.tools.sources.packaged import find_asset

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "faults"
TRIES = 1500 if MANY else 60
BUILDS = 150  # each with a session of ONNX Runtime
needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")

CONFIG = """
name: "m"
backend: "onnxruntime"
max_batch_size: 4
version_policy { specific { versions: [ 1 ] } }
input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "logits" data_type: TYPE_FP32 dims: [ -1, 8 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { preferred_batch_size: [ 4 ] }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
model_warmup [ { name: "w" batch_size: 0 inputs { key: "input_ids" value: {
  data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "ids" } } } ]
"""
STATES = """sequence_batching { oldest { max_candidate_sequences: 4 } state [ { input_name: "a" output_name: "b"
  data_type: TYPE_FP32 dims: [ -1 ] initial_state { name: "i" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true } } ] }
"""
WORDS = (
    "-1",
    "0",
    "99",
    "9" * 30,
    "1e9",
    '""',
    '"\\x00"',
    '"../../x"',
    "TYPE_BF16",
    "TYPE_INVALID",
    "KIND_GPU",
    "[ ]",
    "{ }",
    "#",
)


@pytest.fixture
def tally(record_property) -> Iterator[dict[str, float]]:
    found = {"tried": 0, "refused": 0, "longest_s": 0.0}
    yield found
    record_property("fault", "garbled files")
    for name, value in found.items():
        record_property(name, round(value, 2))


def held(read: Callable[[], object], tally: dict[str, float], what: object) -> None:
    """One try: a value or an error of ours, soon."""
    tally["tried"] += 1
    began = time.perf_counter()
    try:
        read()
    except TrspError as problem:
        tally["refused"] += 1
        assert len(str(problem)) < 20_000
    except BaseException as problem:
        raise AssertionError(f"{type(problem).__name__}: {problem}\n{what!r}") from problem
    tally["longest_s"] = max(tally["longest_s"], time.perf_counter() - began)
    assert tally["longest_s"] < 20


def changed(data: bytes, chance: random.Random) -> bytes:
    """Some bytes flipped, taken out, doubled, or the end cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(len(found))
        match chance.randrange(5):
            case 0 | 1:
                found[place] = chance.randrange(256)
            case 2:
                del found[place : place + chance.randint(1, 9)]
            case 3:
                found[place:place] = found[place : place + chance.randint(1, 30)]
            case 4 if chance.random() < 0.3:
                del found[place:]
        if not found:
            return b""
    return bytes(found)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A repository with a small ONNX model whose weights lie beside the graph."""
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    (folder / "warmup" / "ids").write_bytes(bytes(8))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 8])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [16, 8], [0.5] * 128)
    node = helper.make_node("Gather", ["w", "input_ids"], ["logits"])
    made = helper.make_model(helper.make_graph([node], "g", [ids], [logits], [weight]))
    path = folder / "1" / "model.onnx"
    save(made, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (folder / "config.pbtxt").write_text(CONFIG)
    return folder


def test_subjects(model, tmp_path, tally):
    """`compare FILE.onnx` and its like."""
    chance = random.Random(3)
    whole = (model / "1" / "model.onnx").read_bytes()
    path = tmp_path / "garbled.onnx"
    for _ in range(TRIES):
        path.write_bytes(changed(whole, chance))
        held(lambda: find_subject(path, "dense", None), tally, path.read_bytes())


@needs_schema
def test_lint_of_graphs(model, tally):
    from trsp_deploy.tools.model_repository.lint import lint

    chance = random.Random(4)
    path = model / "1" / "model.onnx"
    whole = path.read_bytes()
    for _ in range(TRIES):
        path.write_bytes(changed(whole, chance))
        held(lambda: lint(model.parent), tally, path.read_bytes())


@needs_schema
def test_lint_of_configs(model, tally):
    """Bytes changed, and words of the language in wrong places."""
    from trsp_deploy.tools.model_repository.lint import lint

    chance = random.Random(5)
    path = model / "config.pbtxt"
    texts = (CONFIG, CONFIG.replace("dynamic_batching { preferred_batch_size: [ 4 ] }", STATES))
    for _ in range(TRIES):
        text = chance.choice(texts)
        if chance.random() < 0.3:
            path.write_bytes(changed(text.encode(), chance))
        else:
            words = re.findall(r"\S+|\n", text)
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(len(words))
                words[place] = chance.choice([*WORDS, *words])
            path.write_text(" ".join(words))
        held(lambda: lint(model.parent), tally, path.read_bytes())


@needs_schema
def test_lint_of_served_engines(model, tally):
    """What `trsp-deploy triton` writes beside an engine."""
    from trsp_deploy.tools.model_repository.lint import lint

    chance = random.Random(6)
    (model / "1" / "tokenizer.json").write_text("{}")
    (model / "1" / "engine").mkdir()
    manifest = model / "1" / "engine" / "manifest.json"
    for _ in range(TRIES // 3):
        (model / "1" / "serving.json").write_bytes(
            changed(b'{"max_batch": 8, "max_length": 64, "end_tokens": [0]}', chance)
        )
        manifest.write_bytes(changed(b'{"name": "x", "file": "model.onnx", "files": {}}', chance))
        held(lambda: lint(model.parent), tally, (model / "1" / "serving.json").read_bytes())


@pytest.mark.faults
@pytest.mark.parametrize("part", ["graph", "weights"])
def test_builds(workspace, undisturbed, tmp_path, tally, part):
    """`build --onnx FILE`, each in a process of its own: ONNX Runtime is not made for files that want to hurt it."""
    from tests.faults.harness import run_in

    chance = random.Random(7 if part == "graph" else 8)
    source = tmp_path / "onnx"
    shutil.copytree(undisturbed[0].run / "onnx" / "pruned-fp32", source)
    path = source / "model.onnx"
    whole = path.read_bytes()
    # A decoder's file is weights for the most part, so that changes anywhere rarely meet the graph.
    graph_at = whole.find(b"input_ids")
    crashed = []
    for number in range(BUILDS):
        if part == "graph":
            start = chance.choice([0, max(0, graph_at - 2000), len(whole) - 4000])
            path.write_bytes(whole[:start] + changed(whole[start : start + 4000], chance) + whole[start + 4000 :])
        else:
            path.write_bytes(changed(whole, chance))
        out = tmp_path / "engine"
        done = run_in(tmp_path, ["build", "--onnx", str(path), "--engine", "ort-cpu-fp32", "--out", str(out)])
        tally["tried"] += 1
        tally["refused"] += done.code == 1
        tally["longest_s"] = max(tally["longest_s"], done.elapsed_s)
        if done.code < 0:
            crashed.append((number, done.code))
            continue
        assert done.code == 0 or (done.code == 1 and done.is_one_line), done.stderr[-3000:]
        assert (done.code == 0) == out.exists()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)
    tally["crashed"] = len(crashed)
    assert not crashed
