"""The words of errors that no other test meets on its way; the last test looks for one whose words nobody checks."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.made_run import made_run
from tests.tiny import save_tiny
from trsp_deploy import checks, cli, errors
from trsp_deploy.artifacts import storage_errors
from trsp_deploy.pipeline.runs import default_folder
from trsp_deploy.recipe import BenchSettings, TransferSettings, parse_drops
from trsp_deploy.stages import zeroshot
from trsp_deploy.stages.bench import compare_engines
from trsp_deploy.stages.serve_bench import Load
from trsp_deploy.tools.delivery.verification import manifest_of
from trsp_deploy.tools.graphs.fp16_range import METADATA
from trsp_deploy.tools.graphs.nodes import MICROSOFT
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring.subjects import find_subject
from trsp_deploy.tools.model_repository import config, generating_model
from trsp_deploy.tools.model_repository.generating_model import write_generating_model
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.runners import ort_build, trt, trt_build
from trsp_deploy.tools.runners.engine_folder import check_engine_folder
from trsp_deploy.tools.runners.generation import generate
from trsp_deploy.tools.runners.half_range import guard_range
from trsp_deploy.tools.runners.inspection import tokenizer_folder
from trsp_deploy.tools.runners.manifest import check_files, read_manifest
from trsp_deploy.tools.runners.requirements import load_package
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import OneText, RunningBatch
from trsp_deploy.tools.sources.model_folders import check_decoder_only
from trsp_deploy.tools.sources.safe_copy import convert
from trsp_deploy.tools.sources.texts import load_texts
from trsp_deploy.tools.training.forms import check_weights_are_whole
from trsp_deploy.tools.triton_server import process
from trsp_deploy.tools.triton_server.load import prompts_of

ROOT = Path(__file__).parents[2]
ANYTHING: Any = None


def says(words: str, call: Callable[[], object], kind: type[errors.TrspError] = errors.TrspError) -> None:
    """Assert that a call ends in an error with these words."""
    with pytest.raises(kind, match=re.escape(words)):
        call()


def silent(_: str) -> None:
    """Progress that nobody reads."""


# -- recipes and the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drops", "words"),
    [
        ("2..4:0", "a step of 0 leads nowhere"),
        ("0.001%..50%:0.001%", "is 50000 points, at most 1000 can be asked for"),
        ("1000000..1000002", "--drop '1000000'"),
    ],
)
def test_a_range_that_is_none(drops: str, words: str) -> None:
    says(words, lambda: parse_drops(drops, 10), errors.RecipeError)


@pytest.mark.parametrize(("drops", "what"), [("0%", "no layer"), ("0..3", "no layer"), ("100%", "every layer")])
def test_a_range_that_no_model_has(drops: str, what: str) -> None:
    says(f" drops {what}: at least 1 must go and at least 1 must stay", lambda: parse_drops(drops), errors.RecipeError)


def test_an_engine_outside_a_run_has_no_tokenizer() -> None:
    says("/engine: is in no run's engines", lambda: tokenizer_folder(Path("/engine")), errors.ModelError)


def test_a_repository_is_not_judged_without_tritons_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a fault of every model in it, and the exit code that of a repository that is wrong."""
    for model in ("one", "two"):
        (tmp_path / model / "1").mkdir(parents=True)
        (tmp_path / model / "config.pbtxt").write_text('backend: "python"')
    monkeypatch.setattr(config, "find_asset", lambda name: None)
    config.schema.cache_clear()
    assert cli.run(["triton-lint", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("Triton's configuration schema is not on this machine") == 1


@pytest.mark.parametrize("command", ["export --set plan.stpes=2", "bench --set bench.replicates=0"])
def test_a_wrong_option_is_not_blamed_on_the_runs_recipe_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run")
    name, *options = command.split()
    assert cli.run([name, str(run), *options]) == 1
    assert f"{run}/recipe.yaml with the options given: " in capsys.readouterr().err
    (run / "recipe.yaml").write_text("model: tiny\nseed: -1\n")
    assert cli.run([name, str(run)]) == 1
    assert f"{run}/recipe.yaml: " in capsys.readouterr().err


def test_two_ways_to_limit_quality(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", "run", "--quality-budget", "99%", "--max-ppl-ratio", "1.1"]) == 1
    assert "sets the limits of perplexity and accuracy; give it or your own" in capsys.readouterr().err


def test_limits_that_need_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**limits: float) -> object:
        return checks.check_run(ANYTHING, checks.Tolerances(**limits), None, None, BenchSettings())

    says("need --against BASELINE.json", lambda: check(max_speedup_loss=0.03), errors.RecipeError)
    monkeypatch.setattr(checks, "engine_to_check", lambda job, engine: SimpleNamespace(name="e"))
    proof = SimpleNamespace(
        check_engines=tuple, engine_quality=lambda spec: {}, engine_choices=lambda spec: None, failed={}
    )
    recipe = SimpleNamespace(evaluation={}, evaluate=SimpleNamespace(tasks=()))
    job: Any = SimpleNamespace(proof=proof, recipe=recipe)
    limits = checks.Tolerances(min_accuracy_retained=0.9)
    says("needs tasks; give some with --task", lambda: checks.check_run(job, limits, None, None, BenchSettings()))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    def write() -> None:
        with storage_errors(tmp_path):
            raise RuntimeError("unexpected pos 64 vs 128")  # torch's words under `ulimit -f`

    says("a file may not be that large here (`ulimit -f`)", write, errors.StorageError)


def test_texts_without_text(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n\n")
    says("holds no text", lambda: load_texts(str(tmp_path / "blank.txt"), "calibration"), errors.TextError)


def test_a_config_that_describes_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    says("has no model_type, so it does not describe", lambda: check_decoder_only(tmp_path), errors.ModelError)


def test_weights_that_cannot_be_converted(tmp_path: Path) -> None:
    model = save_tiny("opt", tmp_path / "model")
    says("has no pytorch_model.bin to convert", lambda: convert(str(model), tmp_path / "a", silent), errors.ModelError)
    (model / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], model / "pytorch_model.bin")
    says("is no mapping of names to tensors", lambda: convert(str(model), tmp_path / "b", silent), errors.ModelError)
    assert not (tmp_path / "b").exists()
    (model / "pytorch_model.bin").unlink()
    torch.save({"x": torch.zeros(1)}, model / "pytorch_model-00001-of-00002.bin")
    index = model / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"x": "pytorch_model-00001-of-00002.bin", "y": "2.bin", "z": "2.bin"}}')
    half = f"lacks y and 1 more tensors, which {index.name} names in 2.bin"
    says(half, lambda: convert(str(model), tmp_path / "c", silent), errors.ModelError)
    index.write_text('{"weight_map": []}')
    says("its weight_map is no mapping", lambda: convert(str(model), tmp_path / "c", silent), errors.ModelError)
    assert not (tmp_path / "c").exists()


def test_an_engine_whose_files_are_elsewhere(tmp_path: Path) -> None:
    engine = made_run(tmp_path / "run") / "engines/ort-cpu-fp32/dense"
    manifest = read_manifest(engine)
    weights = engine / "model.onnx.data"
    weights.rename(tmp_path / "weights")
    says("model.onnx.data is missing; ", lambda: check_files(engine, manifest), errors.EngineUnavailable)
    weights.symlink_to(tmp_path / "weights")
    says("is a link out of its folder", lambda: check_files(engine, manifest), errors.EngineUnavailable)


def test_an_engine_whose_files_are_others(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    engine = run / "engines/ort-cpu-fp32/pruned"
    manifest = read_manifest(engine)
    (engine / "model.onnx.data").write_text("other")
    says("…, its manifest says ", lambda: check_files(engine, manifest), errors.EngineUnavailable)
    shutil.rmtree(run / "engines")
    says("no engine that runs here (none was built)", lambda: find_subject(run, "pruned", None), errors.RunError)


def test_a_run_without_a_manifest(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", finished=False)
    says("` finishes the run and writes it", lambda: manifest_of(run), errors.RunError)


def test_a_folder_that_no_engine_may_replace(tmp_path: Path) -> None:
    says("is the folder that this runs in", lambda: check_engine_folder(Path.cwd()), errors.RecipeError)
    (tmp_path / "notes.md").write_text("mine")
    says("holds other things than an engine", lambda: check_engine_folder(tmp_path), errors.RecipeError)


def test_a_spec_of_another_name_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: yours\nbackend: onnxruntime-cpu\nprecision: fp32\n")
    says("but the file is called 'mine.yaml'", lambda: load_engine_spec(str(path)), errors.EngineSpecError)


def test_a_conversion_without_the_hub() -> None:
    says("; give a folder that holds it", lambda: convert("owner/nowhere", None, silent), errors.ModelError)


def test_processes_that_were_not_told_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    says("--out is missing: several processes", lambda: default_folder(ANYTHING, None, silent), errors.RunError)


# -- graphs ------------------------------------------------------------------------------------------------------------


def graph_of(nodes: list[Any], tensors: dict[str, np.ndarray], output: str, path: Path, opset: int = 18) -> Path:
    """A graph of these nodes and weights, which computes nothing."""
    made = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def test_an_onnx_file_that_is_no_decoder(tmp_path: Path) -> None:
    path = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, "y", tmp_path / "model.onnx")
    says("has no output `logits`, so it is no decoder", lambda: find_subject(path, "dense", None), errors.RunError)


def test_an_onnx_file_that_does_not_say_its_vocabulary(tmp_path: Path) -> None:
    path = graph_of([helper.make_node("Relu", ["x"], ["logits"])], {}, "logits", tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = "vocabulary"
    onnx.save(model, path)
    says("`logits` does not say how many tokens there are", lambda: find_subject(path, "dense", None), errors.RunError)


def test_a_graph_too_old_for_4_bits(tmp_path: Path) -> None:
    path = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, "y", tmp_path / "model.onnx", opset=11)
    spec = load_engine_spec("ort-cpu-int4")
    out = tmp_path / "out/model.onnx"
    says("cannot be quantised: ", lambda: ort_build._quantise(path, path, spec, out, None), errors.EngineUnavailable)


def turning(tables: list[np.ndarray], path: Path, domain: str = MICROSOFT) -> Path:
    """A graph of an attention for each table of radians, (places,)."""
    tensors, nodes = {}, []
    for index, turns in enumerate(tables):
        tensors |= {f"cos{index}": np.cos(turns)[:, None], f"sin{index}": np.sin(turns)[:, None]}
        inputs = ["x", "", "", f"past{index}", *[""] * 3, f"cos{index}", f"sin{index}"]
        nodes.append(helper.make_node("GroupQueryAttention", inputs, [f"y{index}"], domain=domain, do_rotary=1))
    return graph_of(nodes, {name: table.astype(np.float32) for name, table in tensors.items()}, "y0", path)


def test_keys_that_cannot_be_moved(tmp_path: Path) -> None:
    path = turning([np.random.default_rng(0).uniform(0, 6, 8)], tmp_path / "m.onnx")
    says("its keys are not turned by one angle a place", lambda: engine_rotations(path), errors.EngineUnavailable)


def test_keys_of_very_long_texts_can_be_moved(tmp_path: Path) -> None:
    """The tables of half a million positions and more (Qwen2.5 has a million), as graphs compute them: in fp32."""
    turns = np.arange(2**19, dtype=np.float32) * np.float32(0.83)
    (rotation,) = engine_rotations(turning([turns], tmp_path / "m.onnx"))
    assert rotation.angles == (pytest.approx(0.83, abs=1e-7),)


def test_keys_that_are_turned_in_two_ways(tmp_path: Path) -> None:
    slow, quick = engine_rotations(turning([0.1 * np.arange(8), 0.2 * np.arange(8)], tmp_path / "m.onnx"))
    assert (slow.angles, slow.caches) == (pytest.approx((0.1,)), ("past0",))
    assert (quick.angles, quick.caches) == (pytest.approx((0.2,)), ("past1",))


def test_another_domains_operator_turns_no_keys(tmp_path: Path) -> None:
    assert engine_rotations(turning([0.1 * np.arange(8)], tmp_path / "m.onnx", domain="somebody.else")) == ()


def test_a_weight_that_fp16_has_lost(tmp_path: Path) -> None:
    weight = np.array([1, np.inf, 3, 4], dtype=np.float16)
    path = graph_of([helper.make_node("Cast", ["w"], ["y"], to=1)], {"w": weight}, "y", tmp_path / "model.onnx")
    assert ir.load(path).graph.initializers["w"].dtype == ir.DataType.FLOAT16
    says("cannot become bf16: ", lambda: trt_build._to_bf16(path, tmp_path / "out/m.onnx"), errors.EngineUnavailable)


def test_a_graph_whose_range_cannot_be_read(tmp_path: Path) -> None:
    path = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, "y", tmp_path / "model.onnx")
    model = onnx.load(path)
    helper.set_model_props(model, {METADATA: '{"tokens": 1, "larges": 2}'})
    onnx.save(model, path)
    same, found = guard_range(path, None, tmp_path)
    assert same == path and found.reason == "unknown key 'larges'; did you mean 'largest'?"


# -- what runs ---------------------------------------------------------------------------------------------------------


def test_a_package_that_is_there_and_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libonnx.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    says("does not load (libonnx.so", lambda: load_package("onnxruntime-cpu"), errors.EngineUnavailable)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace())
    says("is damaged; reinstall it: ", lambda: load_package("onnxruntime-cpu"), errors.EngineUnavailable)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says("and cannot use this GPU; pytorch.org", trt._check_torch, errors.EngineUnavailable)


def test_a_tensorrt_graph_with_inputs_of_its_own() -> None:
    runner: Any = object.__new__(trt.TrtRunner)
    runner.engine, runner._inputs = Path("engine"), {}
    runner._context = SimpleNamespace(infer_shapes=lambda: ["temperature"])
    runner._select_profile = lambda shapes: None
    says("inputs that no decoder should have: temperature", lambda: runner._bind({}, 1, 0), errors.EngineUnavailable)


def test_a_tensorrt_engine_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = object.__new__(trt.TrtRunner)
    runner.engine, runner._trt, runner._stream = Path("engine"), None, SimpleNamespace(cuda_stream=0)
    runner._context = SimpleNamespace(execute_async_v3=lambda stream: False)
    monkeypatch.setattr(trt, "logger", lambda module: SimpleNamespace(complaint=lambda: "no memory"))
    says("TensorRT: stopped in engine: no memory", runner._enqueue, errors.EngineUnavailable)


def test_a_prompt_of_nothing() -> None:
    says("nothing to continue: a prompt", lambda: generate(ANYTHING, [[]], ANYTHING), errors.RecipeError)


def test_whole_weights_in_pieces() -> None:
    settings = TransferSettings(form="anneal", refit="layers")
    words = "with transfer.form 'anneal' moves whole weights"
    says(words, lambda: check_weights_are_whole(settings, sharded=True), errors.RecipeError)


def test_engines_of_two_devices() -> None:
    cpu, gpu = (SimpleNamespace(path=Path(device), device=device) for device in ("cpu", "cuda"))
    words = "cpu runs on cpu, cuda on cuda: not a comparison"
    says(words, lambda: compare_engines(cpu, gpu, "x", BenchSettings(), 0), errors.RunError)  # type: ignore[arg-type]


def test_a_batch_and_its_limits() -> None:
    growing: Any = SimpleNamespace(in_place=False, model="m", twin=lambda: None)
    says("so texts cannot join a batch", lambda: RunningBatch(growing, 2, 8), errors.EngineUnavailable)
    batch = RunningBatch(SimpleNamespace(**vars(growing) | {"in_place": True}), 1, 8)  # type: ignore[arg-type]
    says("a prompt of 8 tokens; valid: 1 to 7", lambda: batch.join([1] * 8), errors.EngineUnavailable)
    batch._texts[1] = SimpleNamespace(row=0, tokens=8)  # type: ignore[assignment]
    says("the batch is full: 1 texts", lambda: batch.join([1]), errors.EngineUnavailable)
    says("a text has reached 8 tokens", lambda: batch.step({1: 5}), errors.EngineUnavailable)


def test_one_text_and_its_limits() -> None:
    runner: Any = SimpleNamespace(prefill=lambda *_, last_only: np.zeros((1, 1, 4)))
    text = OneText(runner, 4)
    says("a prompt of 0 tokens; valid: 1 to 3", lambda: text.join([]), errors.EngineUnavailable)
    text.join([1, 2, 3])
    says("the batch is full: 1 text", lambda: text.join([1]), errors.EngineUnavailable)
    text._length = 4
    says("a text has reached 4 tokens", lambda: text.step({0: 1}), errors.EngineUnavailable)


def test_prompts_that_a_tokenizer_cannot_make() -> None:
    stubborn: Any = SimpleNamespace(
        encode=lambda text: SimpleNamespace(ids=[0] * 5, offsets=[(0, 1)] * 5, special_tokens_mask=[0] * 5)
    )
    says("this tokenizer makes no such text of common words", lambda: prompts_of(stubborn, 3, 1), errors.RunError)


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    says("no repository of `trsp-deploy triton`", lambda: read_repository(tmp_path), errors.RunError)


def test_a_model_without_a_tokenizer_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made_run(tmp_path / "run") / "engines/ort-cpu-fp32/pruned"
    monkeypatch.setattr(generating_model, "batching", lambda engine: (None, ()))
    out = tmp_path / "repository"
    says(
        "has no tokenizer.json, so a server cannot read text",
        lambda: write_generating_model(engine, "pruned", "m", out, tmp_path, max_length=8, max_batch=1, say=silent),
        errors.ModelError,
    )


def test_a_server_that_does_not_get_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "READY_S", 0)
    server: Any = SimpleNamespace(log="server.log")
    says("tritonserver is not ready after 0 s; see server.log", lambda: process._wait(ANYTHING, server))


def test_a_server_without_this_python(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.99/site-packages/pytriton/tritonserver").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    says("nvidia-pytriton has no Python backend for Python 3.99", lambda: process.find_installation(tmp_path))


def test_requests_that_do_not_end() -> None:
    load: Any = object.__new__(Load)
    load.prompts, load._new_tokens = (), 8
    load._generator = SimpleNamespace(window=lambda *_: ())
    address: Any = SimpleNamespace(grpc="127.0.0.1:1")
    says("m: no request ended within 32 s, 4 at once", lambda: load.window(address, "m", 4, 2.0), errors.RunError)


def test_zero_shot_tasks_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    says("zero-shot tasks need lm-eval: run `pip install", zeroshot._check_lm_eval, errors.UserError)


def test_tasks_that_an_engine_does_not_answer() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'trsp_deploy[eval]'")
    from trsp_deploy.tools.runners.engine_lm import EngineLM

    engine = EngineLM(ANYTHING, ANYTHING, 1, longest=3)
    says(
        "a choice of 4 tokens: model and engine read 3",
        lambda: engine._loglikelihood_tokens([(ANYTHING, [1], [2] * 4)]),
    )
    neither: Any = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    says(
        "this task has items without a prompt, which begin with BOS or EOS",
        lambda: EngineLM(ANYTHING, neither, 1, longest=3).prefix_token_id,
        errors.TextError,
    )
    says("asks for generated text; engines answer", lambda: engine.generate_until([]))
    says("asks for whole texts' likelihoods; engines", lambda: engine.loglikelihood_rolling([]))


# -- all of them -------------------------------------------------------------------------------------------------------

KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.TrspError)}


LEAST = 3  # words on end that tell an error from another; of one with fewer between its values, all of them


def raised() -> list[tuple[str, list[str]]]:
    """Place of every error that the code raises, and what of its words a test may look for."""
    found = []
    for path in sorted((ROOT / "trsp_deploy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in KINDS and call.args:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", phrases(pieces_of(call.args[0]))))
    return [(place, telling) for place, telling in found if telling]


def pieces_of(message: ast.expr) -> list[str]:
    """The strings that a message is put together of."""
    if isinstance(message, ast.JoinedStr):
        return [piece for part in message.values for piece in pieces_of(part)]
    return [message.value] if isinstance(message, ast.Constant) and isinstance(message.value, str) else []


def phrases(pieces: list[str]) -> list[str]:
    """LEAST words on end, as `plain` has them; where no piece has so many, its longest one, if that is two at least."""
    words = [plain(piece).split() for piece in pieces]
    count = min(LEAST, max(map(len, words), default=0))
    return [" ".join(each[at : at + count]) for each in words for at in range(len(each) - count + 1) if count > 1]


def plain(text: str) -> str:
    """A text without what a pattern escapes, and marks at the ends of words."""
    return " ".join(word.strip(".,;:") for word in text.replace("\\", "").split())


def expected() -> str:
    """Every string of the tests that is no docstring."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                found.append(plain(node.value))
    return "\n".join(found)


def test_every_errors_words_are_in_a_test() -> None:
    said, found = expected(), raised()
    assert len(found) > 200
    assert not [(place, telling) for place, telling in found if not any(phrase in said for phrase in telling)]


def test_words_that_tell_an_error_from_others() -> None:
    assert phrases(["is of no", " kind: ever"]) == ["is of no"]
    assert phrases(["no ", " kind: ever"]) == ["kind ever"]
    assert phrases(["no", "kind"]) == []
    assert plain(r"is \(of\) no;") == "is (of) no"
