"""The commands on an engine folder: build from any ONNX, inspect, generate."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.breadth import BREADTH
from tests.tiny import POSITIONS, beginning_tokenizer, ending_tokenizer, english, save_tiny, tiny_tokenizer
from trsp_deploy.artifacts import fingerprint, write_json
from trsp_deploy.cli import run
from trsp_deploy.decoder import load_model
from trsp_deploy.errors import EngineUnavailable, ModelError, RecipeError
from trsp_deploy.recipe import EngineSpec, ExportSettings, read_engine_spec
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools import progress
from trsp_deploy.tools.measuring.subjects import find_subject
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import BACKENDS, BuiltEngine, manifest, open_engine, read_manifest
from trsp_deploy.tools.runners.agreement import TOLERANCES
from trsp_deploy.tools.runners.generation import Sampling, choose, generate
from trsp_deploy.tools.runners.inspection import describe, inspect_engine, tokenizer_folder, trtexec
from trsp_deploy.tools.runners.manifest import PassOutcome

FROM_FILE = ["build", "--onnx", "missing.onnx", "--out", "x"]
PROMPTS = ["The import statement", "A list of"]
Build = Callable[[Path, EngineSpec, Path, np.ndarray | None], BuiltEngine]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run folder has it: dense/ and engines/ort-cpu-fp32/dense, built by the command from an ONNX file."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny("llama", folder / "dense", hidden_size=64)
    with quiet_libraries():
        export_onnx(folder / "dense", "fp32", ExportSettings(), folder / "onnx")
    command = ["build", "--onnx", str(folder / "onnx" / "model.onnx"), "--engine", "ort-cpu-fp32"]
    assert run([*command, "--out", str(folder / "engines" / "ort-cpu-fp32" / "dense")]) == 0
    return folder


@pytest.fixture
def engine(place: Path) -> Path:
    return place / "engines" / "ort-cpu-fp32" / "dense"


def reference(place: Path, prompt: str, new_tokens: int) -> list[int]:
    """Greedy continuation by transformers."""
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    found = load_model(place / "dense").generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return [token for token in found[0, ids.shape[1] :].tolist() if token != 0]


@BREADTH
def test_what_is_built_from_a_file_is_not_built_twice(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, out = tmp_path / "model.onnx", tmp_path / "engine"
    for file in ("model.onnx", "model.onnx_data", "config.json"):
        shutil.copy(place / "onnx" / file, tmp_path)
    command = ["build", "--onnx", str(graph), "--engine", "ort-cpu-int4", "--out", str(out)]

    def built(*more: str) -> tuple[bool, str]:
        """Whether it was, and what was said."""
        before = out.stat().st_mtime_ns if out.exists() else 0
        assert run([*command, "--json", *more]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["reused"] == (out.stat().st_mtime_ns == before)
        return not json.loads(said.out)["reused"], said.err

    (tmp_path / "text.txt").write_text(english()[:30_000])
    text = ["--calibration", str(tmp_path / "text.txt"), "--tokenizer", str(place / "dense")]
    first, said = built()
    assert first and "makes its choices on random tokens; --calibration TEXTS" in said
    assert not built()[0]
    assert built(*text)[0] and not built(*text)[0], "of a text it is another engine"
    manifest = read_manifest(out)
    assert manifest.text is not None and manifest.text.name == str(tmp_path / "text.txt")
    assert "random" not in describe(inspect_engine(out)) and str(tmp_path / "text.txt") in describe(inspect_engine(out))
    weights = out / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineUnavailable) as refused:
        open_engine(out)
    assert str(refused.value).endswith(f"build it again: trsp-deploy {shlex.join([*command, *text])}")
    assert built(*text)[0], "a file of the engine had changed"
    (tmp_path / "model.onnx_data").write_bytes((place / "onnx" / "model.onnx_data").read_bytes()[:-1] + b"x")
    assert built(*text)[0], "the graph's weights had"


def damaged_after(build: Build, damage: Callable[[np.ndarray], None]) -> Build:
    """A backend's build, whose engine has other weights than it was to have."""

    def broken(graph: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
        built = build(graph, spec, folder, calibration)
        weights = np.memmap(folder / f"{built.file}.data", dtype=np.float32, mode="r+")
        damage(weights)
        weights.flush()
        return built

    return broken


@BREADTH
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: weights.sort(), "standard deviations from the logits of"),
        (lambda weights: weights.fill(np.nan), "gives logits that are no numbers; nothing is kept of it"),
    ],
)
def test_an_engine_that_does_not_compute_its_graph_is_not_handed_over(
    place: Path, tmp_path: Path, damage: Any, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """No engine of `build --onnx` was ever run before somebody used it."""
    backend = BACKENDS["onnxruntime-cpu"]
    out, command = tmp_path / "engine", ["build", "--onnx", str(place / "onnx" / "model.onnx"), "--engine"]
    command += ["ort-cpu-fp32", "--out", str(out)]
    assert run(command) == 0
    before = (out / "manifest.json").read_bytes()
    (out / "model.onnx.data").write_bytes(b"")  # so that it has to be built again
    broken = dataclasses.replace(backend, build=damaged_after(backend.build, damage))
    monkeypatch.setitem(BACKENDS, "onnxruntime-cpu", broken)
    capsys.readouterr()
    assert run(command) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: parity: ort-cpu-fp32 ") and words in said
    assert (out / "manifest.json").read_bytes() == before and not list(tmp_path.glob(".*"))


@BREADTH
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_how_far_an_engine_is_from_its_graph_is_kept_and_shown(place: Path, tmp_path: Path, precision: str) -> None:
    command = ["build", "--onnx", str(place / "onnx" / "model.onnx"), "--engine", f"ort-cpu-{precision}"]
    assert run([*command, "--out", str(tmp_path / "engine")]) == 0
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.doubt is None and manifest.agreement is not None and manifest.agreement.passed
    assert (0 < manifest.agreement.max_error < 1e-4) == (precision == "fp32")
    assert "\nagrees     with its graph: logits" in describe(inspect_engine(tmp_path / "engine"))


def test_what_integers_cost_too_much_is_said_and_the_engine_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TOLERANCES, "int4", 1e-6)
    command = ["build", "--onnx", str(place / "onnx" / "model.onnx"), "--engine", "ort-cpu-int4"]
    assert run([*command, "--out", str(tmp_path / "engine")]) == 0
    assert "standard deviations from the graph's, where 1e-06 is much for int4" in capsys.readouterr().err
    assert "\ndoubt      its logits are" in describe(inspect_engine(tmp_path / "engine"))


def test_a_graph_without_numbers_makes_no_engine(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "onnx", tmp_path / "onnx")
    weights = np.memmap(tmp_path / "onnx" / "model.onnx_data", dtype=np.float32, mode="r+")
    weights.fill(np.nan)
    weights.flush()
    command = ["build", "--onnx", str(tmp_path / "onnx" / "model.onnx"), "--engine", "ort-cpu-fp32"]
    assert run([*command, "--out", str(tmp_path / "engine")]) == 4
    assert f"no numbers, and so does {tmp_path / 'onnx' / 'model.onnx'}" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_an_engine_that_cannot_run_here_says_that_nothing_was_held(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(spec: EngineSpec) -> None:
        raise EngineUnavailable("no such device")

    backend = dataclasses.replace(BACKENDS["onnxruntime-cpu"], check_run=elsewhere)
    monkeypatch.setitem(BACKENDS, "onnxruntime-cpu", backend)
    command = ["build", "--onnx", str(place / "onnx" / "model.onnx"), "--engine", "ort-cpu-fp32"]
    assert run([*command, "--out", str(tmp_path / "engine")]) == 0
    assert "ort-cpu-fp32: its logits are not held against the graph's: no such device" in capsys.readouterr().err
    assert "\ndoubt      its logits are not held" in describe(inspect_engine(tmp_path / "engine"))


def test_a_tokenizer_without_a_config_of_its_own_reads_the_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused, with advice to give the option that was given."""
    save_tiny("qwen2", tmp_path / "words", num_hidden_layers=1)
    (tmp_path / "words" / "tokenizer_config.json").unlink()
    (tmp_path / "text.txt").write_text(english()[:30_000])
    command = ["build", "--onnx", str(place / "onnx" / "model.onnx"), "--engine", "ort-cpu-int4"]
    command += ["--out", str(tmp_path / "engine"), "--calibration", str(tmp_path / "text.txt"), "--tokenizer"]
    assert run([*command, str(tmp_path / "words")]) == 0
    assert run([*command, str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'nowhere'}: has no tokenizer that can be read" in said and "--tokenizer" not in said


def test_an_engine_in_a_run_knows_its_tokenizer_without_a_config(place: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engines" / "ort-cpu-fp32" / "dense"
    shutil.copytree(place / "dense", tmp_path / "dense")
    shutil.copytree(place / "engines" / "ort-cpu-fp32" / "dense", engine)
    (tmp_path / "dense" / "tokenizer_config.json").unlink()
    assert tokenizer_folder(engine) == tmp_path / "dense"
    (tmp_path / "dense" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer in .*; give its folder with --tokenizer"):
        tokenizer_folder(engine)


def test_an_engine_at_a_link_lies_where_it_leads_and_is_of_its_graph(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, link = tmp_path / "graph", tmp_path / "engine"
    graph.mkdir()
    for file in ("model.onnx", "model.onnx_data"):
        shutil.copy(place / "onnx" / file, graph)
    link.symlink_to(tmp_path / "another" / "disk" / "engine")
    (tmp_path / "another" / "disk").mkdir(parents=True)
    command = ["build", "--onnx", str(graph / "model.onnx"), "--engine", "ort-cpu-fp32", "--out", str(link), "--json"]
    for reused in (False, True):
        assert run(command) == 0
        assert json.loads(capsys.readouterr().out)["reused"] is reused
    assert link.is_symlink() and (tmp_path / "another" / "disk" / "engine" / "manifest.json").is_file()
    weights = graph / "model.onnx_data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineUnavailable, match="by now, the engine was built from"):
        open_engine(link)


def test_an_engine_of_another_graph_or_spec_is_not_opened(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("model.onnx", "model.onnx_data"):
        shutil.copy(place / "onnx" / file, tmp_path)
    graph, weights, spec, out = (tmp_path / name for name in ("model.onnx", "model.onnx_data", "mine.yaml", "engine"))
    plain = "description: mine\nbackend: onnxruntime-cpu\nprecision: fp32\nfuse: false\n"
    spec.write_text(plain)
    command = ["build", "--onnx", str(graph), "--engine", str(spec), "--out", str(out)]

    def refused(words: str) -> None:
        said = []
        for used in (["generate", str(out), "--prompt", "a"], ["compare", str(out), str(out)]):
            assert run(used) == 1
            said.append(capsys.readouterr().err)
        for line in said:
            assert words in line and line.endswith(f"; build it again: trsp-deploy {shlex.join(command)}\n")

    assert run(command) == 0
    open_engine(out)
    os.utime(weights, ns=(1, 1))
    open_engine(out)  # the same bytes at another time

    old = weights.read_bytes()
    weights.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    capsys.readouterr()
    refused(f"engine mine: {weights} has SHA-256")
    assert run(command) == 0
    open_engine(out)

    spec.write_text(f"{plain}threads: 1  # a core is enough\n")
    capsys.readouterr()
    refused(f"{spec} has another threads by now than it was built with")
    spec.write_text(f"{plain}threads: none\n")
    with pytest.raises(EngineUnavailable, match=r"its spec has changed: .*mine\.yaml: .*threads"):
        open_engine(out)
    spec.write_text(f"{plain}# nothing else\n".replace("mine", "my own"))
    open_engine(out)

    graph.unlink()
    weights.unlink()
    spec.unlink()
    open_engine(out)  # of what is not known any more


@BREADTH
def test_an_engine_is_of_the_files_that_it_was_asked_for_last(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a graph is another one: it is looked at when the engine is opened, and the first one no more."""
    for name in ("first", "copy"):
        shutil.copytree(place / "onnx", tmp_path / name)
        (tmp_path / name / "mine.yaml").write_text("description: mine\nbackend: onnxruntime-cpu\nprecision: fp32\n")

    def reused(graph: str, spec: str) -> bool:
        command = ["build", "--onnx", str(tmp_path / graph / "model.onnx"), "--out", str(tmp_path / "engine")]
        assert run([*command, "--engine", str(tmp_path / spec / "mine.yaml"), "--json"]) == 0
        return bool(json.loads(capsys.readouterr().out)["reused"])

    assert not reused("first", "first") and reused("first", "first")
    assert not reused("copy", "first") and not reused("copy", "copy") and reused("copy", "copy")
    spec = tmp_path / "copy" / "mine.yaml"
    spec.write_text(spec.read_text().replace("mine", "other words about it"))
    assert reused("copy", "copy")
    for file in ("first/model.onnx_data", "first/mine.yaml", "copy/mine.yaml"):
        open_engine(tmp_path / "engine")
        path = tmp_path / file
        path.write_bytes(path.read_bytes()[:-1] + b"8")
    with pytest.raises(EngineUnavailable, match=r"copy/mine\.yaml has another|its spec has changed"):
        open_engine(tmp_path / "engine")


@BREADTH
def test_nothing_goes_that_is_no_engines(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, engine, file = place / "onnx" / "model.onnx", tmp_path / "engine", tmp_path / "file"

    def build(spec: str, out: Path) -> tuple[int, str]:
        code = run(["build", "--onnx", str(graph), "--engine", spec, "--out", str(out)])
        return code, capsys.readouterr().err

    file.write_text("mine")
    code, said = build("ort-cpu-fp32", file)
    assert code == 1 and "is a file, and an engine is a folder" in said and file.read_text() == "mine"
    assert build("ort-cpu-fp32", engine)[0] == 0
    (engine / "notes.md").write_text("mine")
    assert build("ort-cpu-fp32", engine)[0] == 0, "the same engine stays"
    code, said = build("ort-cpu-int8", engine)
    assert code == 1 and "notes.md in it is yours: move that away" in said
    assert (engine / "notes.md").read_text() == "mine" and read_manifest(engine).name == "ort-cpu-fp32"
    (engine / "notes.md").unlink()
    (engine / "manifest.json.sig").write_text("of the engine that goes")
    assert build("ort-cpu-int8", engine)[0] == 0 and not (engine / "manifest.json.sig").exists()


def test_inspect_says_what_the_engine_is(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(engine)]) == 0
    said = capsys.readouterr().out
    for words in (
        "onnxruntime-cpu",
        "fp32",
        "fuse-attention: 6 places",
        "GroupQueryAttention 6",
        "12 x past_key_values",
    ):
        assert words in said
    assert run(["inspect", str(engine), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"]["GroupQueryAttention"] == 6 and found["trtexec"] is None


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "A list of", "--max-tokens", "1"]])
def test_that_a_large_engine_is_being_read_is_said(
    command: list[str], engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files' SHA-256 take minutes where they have gigabytes."""

    def slow(path: Path) -> str:
        time.sleep(0.2)
        return fingerprint(path)

    monkeypatch.setattr(manifest, "fingerprint", slow)
    monkeypatch.setattr(progress, "Heartbeat", functools.partial(progress.Heartbeat, interval_s=0.05))
    assert run([command[0], str(engine), *command[1:]]) == 0
    said = capsys.readouterr()
    assert f"{engine}: compares its files with what was built: 0 s so far" in said.err and "so far" not in said.out


def test_inspect_lists_every_node_where_it_is_asked_to(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(engine)]) == 0
    before = capsys.readouterr().out
    assert run(["inspect", str(engine), "--layers"]) == 0
    said, _, table = capsys.readouterr().out.partition("\n\n")
    head, *lines = table.splitlines()
    assert f"{said}\n" == before and head.split() == ["kind", "precisions", "weights", "MB", "layer"], "no kernels"
    graph = onnx.load(engine / "model.onnx", load_external_data=False).graph
    assert [(line.split()[0], line.split()[-1]) for line in lines] == [(each.op_type, each.name) for each in graph.node]
    sizes = {tensor.name: math.prod(tensor.dims) * 4 for tensor in graph.initializer if tensor.data_type == 1}
    head_node = next(each for each in graph.node if "logits" in each.output)
    (weight,) = (name for name in head_node.input if name in sizes)
    assert lines[list(graph.node).index(head_node)].split()[1:3] == ["float", f"{sizes[weight] / 1e6:.3f}"]
    assert run(["inspect", str(engine), "--layers", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["nodes"]) == len(lines)


def test_a_subject_has_the_size_of_what_it_runs_from(place: Path, engine: Path) -> None:
    manifest = read_manifest(engine)
    on_disk = sum((engine / name).stat().st_size for name in manifest.files)
    assert find_subject(engine, "dense", None).size_bytes == on_disk == manifest.size_bytes
    graph = place / "onnx" / "model.onnx"
    both = graph.stat().st_size + graph.with_name("model.onnx_data").stat().st_size
    assert find_subject(graph, "dense", None).size_bytes == both


def test_inspect_says_what_no_json_number_is(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass after which logits are no numbers is infinitely far off."""
    shutil.copytree(engine, tmp_path / "engine")
    left_out = PassOutcome(name="cut-logits", error=float("inf"), reason="no numbers, ∞")
    manifest = read_manifest(engine).model_copy(update={"passes": (left_out,)})
    write_json(tmp_path / "engine" / "manifest.json", manifest)
    assert run(["inspect", str(tmp_path / "engine"), "--json"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said, parse_constant=pytest.fail)["manifest"]["passes"][0]["error"] == "Infinity"
    assert said.isascii(), "as of every other command, whatever the terminal's encoding"


def test_generate_goes_on_as_transformers_does(place: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(engine), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "9", "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    assert found == [reference(place, prompt, 9) for prompt in PROMPTS]


def test_a_prompt_does_not_end_with_what_its_tokenizer_puts_behind_a_text(
    place: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = ending_tokenizer()
    ending.save_pretrained(tmp_path)
    said = f"{PROMPTS[0]}{ending.eos_token}"  # an end that the user wrote is the prompt's
    assert ending(PROMPTS[0])["input_ids"][-1] == ending.eos_token_id
    command = ["generate", str(engine), "--prompt", PROMPTS[0], "--prompt", said, "--max-tokens", "9", "--json"]
    assert run([*command, "--tokenizer", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    assert found == [reference(place, PROMPTS[0], 9), reference(place, said, 9)]


def test_a_prompt_that_begins_with_bos_gets_no_second_one(
    place: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a chat template writes it."""
    beginning = beginning_tokenizer()
    beginning.save_pretrained(tmp_path)
    said = f"{beginning.bos_token}{PROMPTS[0]}"
    assert beginning(said)["input_ids"][:2] == [beginning.bos_token_id] * 2, "by itself"
    command = ["generate", str(engine), "--prompt", PROMPTS[0], "--prompt", said, "--max-tokens", "9", "--json"]
    assert run([*command, "--tokenizer", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    assert found == [reference(place, said, 9)] * 2


def test_sampling_is_repeatable_and_a_text_ends(engine: Path) -> None:
    prompts = [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    hot = Sampling(max_new_tokens=8, temperature=1.5, top_k=50, seed=3)
    with open_engine(engine) as runner:
        greedy = generate(runner, prompts, Sampling(max_new_tokens=8))
        assert generate(runner, prompts, hot) == generate(runner, prompts, hot) != greedy
        first = greedy[0].tokens
        ended = generate(runner, prompts, Sampling(max_new_tokens=8, end=(first[3],)))
        assert ended[0].finish == "stop" and greedy[0].finish == "length"
        assert ended[0].tokens == first[: first.index(first[3])]
        with pytest.raises(RecipeError, match="no tokens"):
            generate(runner, [[]], hot)


def test_a_text_ends_where_the_engine_does(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = english()[:2000]
    count = len(tiny_tokenizer()(prompt)["input_ids"])
    while count > POSITIONS - 3:
        prompt = prompt[:-1]
        count = len(tiny_tokenizer()(prompt)["input_ids"])
    command = ["generate", str(engine), "--prompt", prompt, "--max-tokens", "20", "--json"]
    assert run(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["finish"] == ["length"] and len(found["tokens"][0]) == POSITIONS - count + 1
    assert said.err == f"{engine}: holds {POSITIONS} tokens of a text, which ended there\n"
    assert run([*command[:3], english()[:2000], "--max-tokens", "1"]) == 1, "a prompt that does not fit"
    assert f"holds for texts of up to {POSITIONS} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--top-k", "-5"), ("--top-p", "1.5"), ("--max-tokens", "2000000000")])
def test_what_cannot_be_chosen_by_is_one_line(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "nowhere", "--prompt", "x", option, value]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Invalid value for '{option}': Input should be ")


def test_chosen_tokens_follow_the_probabilities() -> None:
    logits = np.log(np.tile([0.5, 0.3, 0.15, 0.05], (4000, 1)))
    random = np.random.default_rng(0)

    def shares(**changes: float) -> list[float]:
        tokens = choose(logits, Sampling.model_validate({"temperature": 1.0, **changes}), random)
        return [float((tokens == token).mean()) for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.9) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(top_p=0.01) == [1, 0, 0, 0], "the most likely token is always among them"
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.03)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_trtexec_line_has_every_profile() -> None:
    profile = {
        "batch": {"min": 1, "opt": 1, "max": 8},
        "sequence": {"min": 1, "opt": 1, "max": 8},
        "past": {"min": 0, "opt": 256, "max": 2048},
    }
    values = {"name": "t", "description": "", "backend": "tensorrt", "precision": "fp16", "profiles": [profile] * 2}
    spec = read_engine_spec(values, "test")
    cache = ("float16", ("batch_size", 3, "past", 64))
    inputs = {
        "input_ids": ("int64", ("b", "s")),
        "attention_mask": ("int64", ("b", "t")),
        "past_key_values.0.key": cache,
    }
    line = trtexec(spec, inputs, "model.onnx", "dense")
    assert line.startswith("trtexec --onnx=model.onnx") and "--stronglyTyped" in line
    assert "--saveEngine=../dense-trtexec.engine" in line and "--skipInference" in line
    shapes = "input_ids:8x8,attention_mask:8x2056,past_key_values.0.key:8x3x2048x64"
    assert line.count(f"--maxShapes={shapes}") == 2 and "--profile=1" in line and "--noTF32" not in line
    assert "--computeCapabilities" not in line
    targets = {"backend": "tensorrt-rtx", "compute_capabilities": ("sm75", "SM89")}
    assert "--computeCapabilities=75,89" in trtexec(spec.model_copy(update=targets), inputs, "model.onnx", "dense")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build"], "give a run's folder, or --onnx"),
        (["build", "--onnx", "missing.onnx", "--engine", "ort-cpu-fp32", "--out", "x"], "missing.onnx: no ONNX file"),
        (["build", "--onnx", "missing.onnx", "--out", "x"], "needs one --engine"),
        (
            ["build", "--onnx", "x/m.onnx", "--engine", "ort-cpu-fp32", "--out", "x"],
            "is replaced by the engine, and x/m",
        ),
        (["build", "somewhere", "--calibration", "x"], "--calibration and --tokenizer are for --onnx"),
        ([*FROM_FILE, "--engine", "ort-cpu-fp32", "--calibration", "t"], "reads no text"),
        ([*FROM_FILE, "--engine", "ort-cpu-int4", "--calibration", "t"], "no tokenizer in ."),
        (["build", "somewhere", "--onnx", "missing.onnx", "--engine", "ort-cpu-fp32", "--out", "x"], "no run's folder"),
        (["inspect", "nowhere"], "no engine here"),
        (["generate", "nowhere", "--prompt", "a"], "no engine here"),
        (["generate", "nowhere", "--prompt", "a", "--top-k", "5"], "--top-k 5: is for sampling, and --temperature 0"),
        (["generate", "nowhere", "--prompt", "a", "--top-p", "0.5"], "--top-p 0.5: is for sampling"),
        (["generate", "nowhere", "--prompt", "a", "--seed", "3"], "--seed 3: is for sampling"),
        (["generate", "nowhere", "--prompt", "a", "--seed", "3", "--temperature", "1"], "no engine here"),
    ],
)
def test_each_mistake_has_its_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
