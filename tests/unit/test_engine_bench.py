"""The engine bench's figures from made-up samples: ratios the right way round, and nothing met that is not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.engines import figures, race, subjects
from benchmarks.engines.peers import negative_log_likelihood
from trsp_deploy.decoder import DecoderSize, WeightCounts
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.graphs.stored import in_floats

TOKEN_MS = {
    "ours fp32": 10.0,
    "ours int8": 6.0,
    "ours int4": 4.0,
    "pruned fp32": 8.0,
    "genai fp32": 12.0,
    "optimum fp32": 20.0,
    "genai int4": 5.0,
    "ours fp32, batch 1": 10.0,
    "ours fp32, batch 8": 20.0,
    "ours fp32, past 1900": 13.0,
}
PROMPT_MS = {"ours fp32": 100.0, "ours int8": 40.0}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    layers = {"dense": (1000,) * 10, "pruned": (1000,) * 8}

    def size(name: str) -> DecoderSize:
        weights = WeightCounts(total=0, layers=layers[name], lm_head=1000, embeddings=0)
        return DecoderSize(weights=weights, cache_per_token=0, attention_width=1)

    monkeypatch.setattr(figures.subjects, "model", lambda name: name)
    monkeypatch.setattr(figures, "decoder_size", size)
    return {
        label: [
            {"prefill_s": drift * PROMPT_MS.get(label, 50.0) / 1e3, "decode_s": [drift * token_ms / 1e3] * 3}
            for drift in (1.0, 1.4, 0.8)
        ]
        for label, token_ms in TOKEN_MS.items()
    }


STORED = {precision: in_floats("fp32") for precision in figures.PRECISIONS}


def test_figures(samples: dict[str, list[dict[str, Any]]]) -> None:
    ratios = figures.ratios(
        samples,
        [11_000 * 4 / 9e-3] * 3,
        {"ours int4": 30.0, "genai int4": 33.0},
        STORED,
    )
    found = {name: value.ratio for name, value in ratios.items() if value is not None}
    assert found["fp32_decode_to_genai"] == pytest.approx(1.2)
    assert found["fp32_decode_to_optimum"] == pytest.approx(2.0)
    assert found["int4_decode_to_genai"] == pytest.approx(1.25)
    assert found["int4_perplexity_to_genai"] == pytest.approx(30 / 33, abs=1e-3)
    assert found["int8_prefill_to_fp32"] == pytest.approx(2.5)
    assert found["fp32_floor_share"] == pytest.approx(0.9)
    for precision in ("int8", "int4"):  # as many bytes here, in the time of its own token
        slower = samples["ours fp32"][0]["decode_s"][0] / samples[f"ours {precision}"][0]["decode_s"][0]
        assert found[f"{precision}_floor_share"] == pytest.approx(0.9 * slower)
    assert found["late_to_early"] == pytest.approx(1.3)
    assert found["batch_fp32"] == pytest.approx(4.0)
    assert found["pruned_fp32"] == pytest.approx(1.25 / (11 / 9), abs=1e-3)


def test_what_is_not_measured_is_not_met(samples: dict[str, list[dict[str, Any]]]) -> None:
    ratios = figures.ratios(samples, [1e9], {}, STORED)
    found = figures.verdict({name: None if value is None else value.ratio for name, value in ratios.items()})
    assert found["figures"].keys() == found["targets"].keys() == found["met"].keys()
    for name in ("gpt2_decode_to_optimum", "int4_perplexity_to_genai", "batch_int8"):
        assert found["figures"][name] is None and found["met"][name] is False
    assert found["met"]["fp32_decode_to_genai"] is found["met"]["late_to_early"] is True


def test_a_verdict_is_not_taken_of_what_is_rounded() -> None:
    found = figures.verdict(dict.fromkeys(figures.TARGETS, 0.9999))
    assert found["figures"]["fp32_decode_to_genai"] == 1.0 and found["met"]["fp32_decode_to_genai"] is False


def test_an_engine_of_another_spec_or_other_code_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "HOME", tmp_path)
    monkeypatch.setattr(subjects, "windows", lambda *_: None)
    made: list[str] = []
    monkeypatch.setattr(subjects, "export_onnx", lambda model, precision, settings, out: out.mkdir())
    monkeypatch.setattr(subjects, "model", Path)
    monkeypatch.setattr(subjects, "build_engine", lambda onnx, spec, out, text: (made.append(spec.name), out.mkdir()))
    first = subjects.engine("gpt2", "fp32")
    assert subjects.engine("gpt2", "fp32") == first and len(made) == 1
    assert subjects.engine("gpt2", "int8") != first
    monkeypatch.setattr(subjects, "code_digest", lambda *starts: "other")
    assert subjects.engine("gpt2", "fp32") != first and len(made) == 3


def test_likelihood_is_that_of_the_next_token() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]))
    assert negative_log_likelihood(logits, np.array([2, 0, 2])) == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)


@pytest.mark.parametrize("python", ["nowhere/bin/python", "plain"])
def test_peers_that_are_no_program_took_no_part(python: str, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("not to be run")
    assert subjects.peer_versions(tmp_path / python) == {}
    with pytest.raises(EngineUnavailable, match="no environment of peers at"):
        race._peer(tmp_path / python, "llama", tmp_path)
    with pytest.raises(EngineUnavailable, match="onnxruntime-genai is not installed in"):
        subjects.genai("dense", "fp32", tmp_path / python)


@pytest.mark.parametrize("precision", ["int8", "int4", "int4-accurate"])
def test_what_a_spec_says_of_perplexity_is_what_the_bench_kept(precision: str) -> None:
    newest = ROOT / "benchmarks/results/engines-intel-xeon-processor-2-80ghz.json"
    kept = json.loads(newest.read_text(encoding="utf-8"))["perplexity"]
    spec = (ROOT / f"engines/ort-cpu-{precision}.yaml").read_text(encoding="utf-8")
    assert f"{kept['ours fp32']:.1f} -> {kept[f'ours {precision}']:.1f}" in spec
