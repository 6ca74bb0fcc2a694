"""The GPU bench up to the launch: the same code on the CPU with a tiny model, and its arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.gpu import TINY, Line, Sample, TorchRunner, _same, figures, measure, text, verdict
from trsp_deploy.artifacts import provenance

PAST = TINY.pasts[0]


def line(contender: str, layers: int, seconds: float, read: float, bandwidth: float = 100.0) -> Line:
    samples = (Sample(phase="decode", batch=1, past=PAST, seconds=(seconds * 0.5, seconds, seconds * 3)),)
    return Line(
        contender=contender,
        layers=layers,
        machine=provenance(),
        bandwidth_bytes_per_s=bandwidth,
        bytes_of_a_step=read,
        samples=samples,
    )


def test_figures() -> None:
    dense, pruned = TINY.layers
    lines = [
        line("tensorrt-fp16", dense, 1.0, read=90),
        line("tensorrt-fp16", pruned, 0.8, read=70),
        line("ort-cuda-fp16", dense, 2.0, read=90),
        line("torch-eager", dense, 0.9, read=90),
    ]
    assert figures(lines, TINY) == {
        "bandwidth_share": 0.9,
        "speedup_over_limit": pytest.approx(1.25 / (9 / 7), abs=1e-3),
    }
    assert verdict(lines, TINY)["met"] == {"bandwidth_share": True, "speedup_over_limit": True}
    lines[1] = line("tensorrt-fp16", pruned, 0.9, read=70)
    assert verdict(lines, TINY)["met"]["speedup_over_limit"] is False


def test_what_did_not_run_is_not_met_and_says_so() -> None:
    found = verdict([], TINY)
    assert found["figures"] == {"bandwidth_share": None, "speedup_over_limit": None}
    assert not any(found["met"].values()) and found["targets"] == {"bandwidth_share": 0.8, "speedup_over_limit": 0.95}
    assert "tensorrt-fp16: not run (no CUDA device)" in text([], TINY, {"tensorrt-fp16": "no CUDA device"})


@pytest.mark.parametrize("contender", ["torch-eager", "ort-cpu-fp32"])
def test_a_contender_on_the_cpu(contender: str) -> None:
    found = measure(contender, 2, TINY, "cpu")
    shapes = {(sample.phase, sample.batch, sample.past) for sample in found.samples}
    assert shapes == {("prefill", 1, TINY.prompt)} | {("decode", b, p) for b in TINY.batches for p in TINY.pasts}
    assert all(len(sample.seconds) == TINY.rounds and min(sample.seconds) > 0 for sample in found.samples)
    assert _same(found, contender, 2) and not _same(found, contender, 3)
    assert contender in text([found], TINY, {}) and found.bytes_of_a_step > 0


def test_a_shape_that_fails_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = TorchRunner.decode

    def limited(self, input_ids):
        if len(input_ids) > 1:
            raise RuntimeError("CUDA out of\nmemory")
        return decode(self, input_ids)

    monkeypatch.setattr(TorchRunner, "decode", limited)
    found = measure("torch-eager", 2, TINY, "cpu")
    reasons = {(sample.batch, sample.reason) for sample in found.samples if sample.phase == "decode"}
    assert reasons == {(1, None), (2, "CUDA out of memory")}
