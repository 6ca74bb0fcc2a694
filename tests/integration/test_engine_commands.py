"""The commands on an engine folder: build from any ONNX, inspect, generate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import save_tiny, tiny_tokenizer
from trsp_deploy.cli import run
from trsp_deploy.decoder import load_model
from trsp_deploy.errors import RecipeError
from trsp_deploy.recipe import ExportSettings, read_engine_spec
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.generation import Sampling, choose, generate
from trsp_deploy.tools.runners.inspection import trtexec

PROMPTS = ["The import statement", "A list of"]


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


def test_generate_goes_on_as_transformers_does(place: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(engine), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "9", "--json"]
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)["tokens"]
    assert found == [reference(place, prompt, 9) for prompt in PROMPTS]


def test_sampling_is_repeatable_and_a_text_ends(engine: Path) -> None:
    prompts = [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    hot = Sampling(max_new_tokens=8, temperature=1.5, top_k=50, seed=3)
    with open_engine(engine) as runner:
        greedy = generate(runner, prompts, Sampling(max_new_tokens=8))
        assert generate(runner, prompts, hot) == generate(runner, prompts, hot) != greedy
        ended = generate(runner, prompts, Sampling(max_new_tokens=8, end=(greedy[0][3],)))
        assert ended[0] == greedy[0][: greedy[0].index(greedy[0][3])]
        with pytest.raises(RecipeError, match="no tokens"):
            generate(runner, [[]], hot)


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
    line = trtexec(spec, inputs)
    assert line.startswith("trtexec --onnx=model.onnx") and "--stronglyTyped" in line
    shapes = "input_ids:8x8,attention_mask:8x2056,past_key_values.0.key:8x3x2048x64"
    assert line.count(f"--maxShapes={shapes}") == 2 and "--profile=1" in line and "--noTF32" not in line
    assert "--computeCapabilities" not in line
    targets = {"backend": "tensorrt-rtx", "compute_capabilities": ("sm75", "SM89")}
    assert "--computeCapabilities=75,89" in trtexec(spec.model_copy(update=targets), inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build"], "give a run's folder, or --onnx"),
        (["build", "--onnx", "missing.onnx", "--engine", "ort-cpu-fp32", "--out", "x"], "missing.onnx: no ONNX file"),
        (["build", "--onnx", "missing.onnx", "--out", "x"], "needs one --engine"),
        (["build", "somewhere", "--onnx", "missing.onnx", "--engine", "ort-cpu-fp32", "--out", "x"], "no run's folder"),
        (["inspect", "nowhere"], "no engine here"),
        (["generate", "nowhere", "--prompt", "a"], "no engine here"),
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
