"""The GPU bench up to the launch: the same code on the CPU with a tiny model, what it keeps, and its arithmetic."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as bench_command
from benchmarks.gpu import contenders
from benchmarks.gpu import found as kept
from benchmarks.gpu.__main__ import measure
from benchmarks.gpu.contenders import ENGINES, beyond_memory, random_opt, with_profiles
from benchmarks.gpu.found import Line, Sample, figures, key_of, lacking, text, verdict
from benchmarks.gpu.plan import FULL, SETTLING, TINY, Shape, shapes
from benchmarks.gpu.torch_runner import TorchRunner
from tests.breadth import BREADTH
from trsp_deploy.artifacts import provenance
from trsp_deploy.decoder import DecoderSize, WeightCounts
from trsp_deploy.errors import EngineSpecError, EngineUnavailable
from trsp_deploy.tools.library import load_engine_spec

PAST = TINY.pasts[0]
MACHINE = provenance()  # once: what is measured twice is compared, and this knows the time
TENSORRT = [name for name in ENGINES if load_engine_spec(name).profiles]
OPT_7B = DecoderSize(
    weights=WeightCounts(total=6_658_000_000, layers=(201_000_000,) * 32, lm_head=206_000_000, embeddings=214_000_000),
    cache_per_token=2 * 4096,
    attention_width=4096,
)


def line(contender: str, layers: int, seconds: float, read: float, bandwidth: float = 100.0) -> Line:
    samples = (Sample(phase="decode", batch=1, past=PAST, seconds=(seconds * 0.5, seconds, seconds * 3)),)
    return Line(
        key=f"{contender} {layers}",
        contender=contender,
        layers=layers,
        machine=MACHINE,
        bandwidth_bytes_per_s=bandwidth,
        bytes_of_a_step=read,
        samples=samples,
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    dense, pruned = TINY.layers
    lines = [
        line("tensorrt-fp16", dense, 1.0, read=90),
        line("tensorrt-fp16", pruned, 0.8, read=70),
        line("torch-eager", dense, 0.9, read=90),
    ]
    assert figures(lines, TINY) == {
        "bandwidth_share": 0.9,
        "speedup_over_limit": pytest.approx(1.25 / (9 / 7)),
    }
    assert verdict(lines, TINY)["met"] == {"bandwidth_share": True, "speedup_over_limit": True}
    lines[1] = line("tensorrt-fp16", pruned, 0.9, read=70)
    assert verdict(lines, TINY)["met"]["speedup_over_limit"] is False


def test_targets_are_judged_before_rounding() -> None:
    found = verdict([line("tensorrt-fp16", TINY.layers[0], 1.0, read=79.96)], TINY)
    assert found["figures"]["bandwidth_share"] == 0.8 and found["met"]["bandwidth_share"] is False


def test_an_engine_without_a_depth_is_named_and_no_speedup_is_met() -> None:
    dense, pruned = TINY.layers
    lines = [
        line("tensorrt-fp16", dense, 1.0, read=90),
        line("tensorrt-fp16", pruned, 0.7, read=70),
        line("ort-cuda-fp16", dense, 2.0, read=90),
        line("torch-eager", dense, 0.9, read=90),
    ]
    found = verdict(lines, TINY)
    assert found["lacking"] == [f"ort-cuda-fp16, {pruned} layers"]
    assert found["figures"]["speedup_over_limit"] is None and found["met"]["speedup_over_limit"] is False
    assert lacking(lines[:2], TINY) == []
    assert lacking(lines[:2], TINY, ["tensorrt-rtx-fp16", "torch-compiled"]) == [
        f"tensorrt-rtx-fp16, {layers} layers" for layers in TINY.layers
    ]
    failed = lines[1].model_copy(update={"samples": (Sample(phase="decode", batch=1, past=PAST, reason="lost"),)})
    assert lacking([lines[0], failed], TINY) == [f"tensorrt-fp16, {pruned} layers"]


def test_what_did_not_run_is_not_met_and_says_so() -> None:
    found = verdict([], TINY)
    assert found["figures"] == {"bandwidth_share": None, "speedup_over_limit": None}
    assert not any(found["met"].values()) and found["targets"] == {"bandwidth_share": 0.8, "speedup_over_limit": 0.95}
    assert "tensorrt-fp16: not run (no CUDA device)" in text([], TINY, {"tensorrt-fp16": "no CUDA device"})


# -- measuring ---------------------------------------------------------------------------------------------------------


@BREADTH
@pytest.mark.parametrize("contender", ["torch-eager", "ort-cpu-fp32"])
def test_a_contender_on_the_cpu(contender: str) -> None:
    found = measure(contender, 2, TINY, "cpu")
    assert [sample.shape for sample in found.samples] == shapes(TINY)
    assert set(shapes(TINY)) == {("prefill", 1, TINY.prompt)} | {
        ("decode", batch, past) for batch in TINY.batches for past in TINY.pasts
    }
    assert all(len(sample.seconds) == TINY.rounds and min(sample.seconds) > 0 for sample in found.samples)
    assert found.key == key_of(contender, 2, TINY) and found.done
    assert contender in text([found], TINY, {}) and found.bytes_of_a_step > 0


@BREADTH
def test_a_shape_that_fails_is_a_reason_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = TorchRunner.decode

    def limited(self: TorchRunner, input_ids: np.ndarray) -> np.ndarray:
        if len(input_ids) > 1:
            raise RuntimeError("an illegal\naddress" if self._past < TINY.pasts[1] else "CUDA out of memory")
        return decode(self, input_ids)

    monkeypatch.setattr(TorchRunner, "decode", limited)
    found = measure("torch-eager", 2, TINY, "cpu")
    reasons = {(sample.batch, sample.reason, sample.fits) for sample in found.samples if sample.phase == "decode"}
    assert reasons == {(1, None, True), (2, "an illegal address", True), (2, "CUDA out of memory", False)}
    assert not found.done
    page = text([found], TINY, {})
    assert "torch-eager, 2 layers, 2 x past 8: an illegal address" in page
    assert "torch-eager, 2 layers, 2 x past 16: CUDA out of memory" in page


@BREADTH
def test_memory_is_a_reason_also_where_it_lies_deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TorchRunner, input_ids: np.ndarray) -> np.ndarray:
        try:
            raise RuntimeError("CUDA out of memory")
        except RuntimeError as problem:
            raise EngineUnavailable("tensorrt: the GPU's memory is full at batch 1") from problem

    monkeypatch.setattr(TorchRunner, "decode", full)
    assert measure("torch-eager", 2, TINY, "cpu").done


@BREADTH
def test_the_drawn_model_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import OPTForCausalLM

    def models() -> int:
        return sum(type(each) is OPTForCausalLM for each in gc.get_objects())

    gc.collect()
    before, alive = models(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(models()))
    random_opt(tmp_path / "model", 2, TINY, "cpu")
    assert alive == [before]


@BREADTH
def test_no_copy_of_the_weights_stays_longer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    build, opened = contenders.build_engine, contenders.open_engine
    there: dict[str, list[str]] = {}

    def seen(at: str, folder: Path) -> None:
        there[at] = sorted(path.name for path in folder.iterdir())

    def building(onnx: Path, *rest: Any) -> Any:
        seen("build", onnx.parent.parent)
        return build(onnx, *rest)

    def opening(folder: Path) -> Any:
        seen("run", folder.parent)
        return opened(folder)

    monkeypatch.setattr(contenders, "build_engine", building)
    monkeypatch.setattr(contenders, "open_engine", opening)
    assert all(sample.seconds for sample in measure("ort-cpu-fp32", 2, TINY, "cpu").samples)
    assert there == {"build": ["onnx"], "run": ["engine"]}


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_opt(tmp_path_factory.mktemp("gpu-bench") / "model", 2, TINY, "cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that torch.compile made, which run as they are: no C++ compiler is needed."""
    made: list[Any] = []
    compile_ = torch.compile

    def traced(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph

    def compiled(call: Any, *, mode: str, **settings: Any) -> Any:
        return compile_(call, backend=traced, **settings)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    return made


def tokens(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(batch).integers(TINY.vocabulary, size=(batch, length))
    return ids, np.ones_like(ids)


@BREADTH
def test_steps_compile_once_for_a_batch_and_say_what_eager_says(model: Path, graphs: list[Any]) -> None:
    made = []
    with (
        TorchRunner(model, "cpu", TINY, compiled=False) as eager,
        TorchRunner(model, "cpu", TINY, compiled=True) as compiled,
    ):
        for batch in (1, 2, 3):
            for past in (8, 16, 8):
                ids, mask = tokens(batch, past)
                for call in ("prefill", *["decode"] * 4):
                    given = (ids, mask) if call == "prefill" else (ids[:, :1],)
                    expected, found = (getattr(each, call)(*given) for each in (eager, compiled))
                    np.testing.assert_allclose(found, expected, atol=1e-5)
                made.append(len(graphs))
    assert made == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    # A size that only the tensors' values tell would make every step wait for the GPU.
    assert not [node for graph in graphs for node in graph.graph.nodes if "sym_size" in str(node.target)]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_head_runs_on_kept_positions_alone(model: Path, graphs: list[Any], compiled: bool) -> None:
    from transformers import OPTForCausalLM

    ids, mask = tokens(2, 12)
    own = OPTForCausalLM.from_pretrained(model).eval()
    expected = own(input_ids=torch.from_numpy(ids)).logits.detach().numpy()
    read: list[int] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if getattr(module, "out_features", None) == TINY.vocabulary:
            read.append(inputs[0].shape[1])

    with (
        torch.nn.modules.module.register_module_forward_hook(note),
        TorchRunner(model, "cpu", TINY, compiled=compiled) as runner,
    ):
        last, whole = runner.prefill(ids, mask, last_only=True), runner.prefill(ids, mask)
    assert read == [1, 12]
    np.testing.assert_allclose(last, expected[:, -1:], atol=1e-5)
    np.testing.assert_allclose(whole, expected, atol=1e-5)


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORRT)
def test_profiles_cover_every_shape_of_the_plan(name: str) -> None:
    spec = with_profiles(load_engine_spec(name), FULL)
    fixed = spec.cache_length is not None

    def covered(batch: int, sequence: int, past: int) -> bool:
        return any(
            each.batch.min <= batch <= each.batch.max
            and each.sequence.min <= sequence <= each.sequence.max
            and (each.past is None or each.past.min <= past <= each.past.max)
            for each in spec.profiles
        )

    for shape in shapes(FULL):
        assert covered(shape.batch, shape.past, 0), shape
        if shape.phase == "decode":
            assert all(covered(shape.batch, 1, shape.past + step) for step in range(SETTLING + FULL.steps)), shape
    assert spec.cache_length == (FULL.positions if fixed else None)
    assert spec.profiles != load_engine_spec(name).profiles and spec.name == name


def test_a_plan_that_the_spec_cannot_hold_is_refused() -> None:
    with pytest.raises(EngineSpecError, match="a profile reads 4096 tokens"):
        with_profiles(load_engine_spec("tensorrt-fp16-static"), FULL.model_copy(update={"prompt": 4096}))


def test_shapes_beyond_the_memory_have_no_profile() -> None:
    spec = load_engine_spec("tensorrt-fp16")
    unfit = beyond_memory(spec, FULL, OPT_7B, int(85e9))
    assert set(unfit) == {("decode", 64, 1024), ("decode", 64, 1900)}
    assert unfit[Shape("decode", 64, 1024)] == "weights and cache need 99 GB, the GPU has 85"
    assert max(each.sequence.max for each in with_profiles(spec, FULL, unfit).profiles if each.batch.max == 64) == 128
    static = load_engine_spec("tensorrt-fp16-static")
    whole = beyond_memory(static, FULL, OPT_7B, int(80e9))
    assert set(whole) == {("decode", 64, past) for past in FULL.pasts}
    assert {each.batch.max for each in with_profiles(static, FULL, whole).profiles} == {1, 8}
    assert set(beyond_memory(spec, FULL, OPT_7B, int(8e9))) == set(shapes(FULL))
    with pytest.raises(EngineUnavailable, match="no shape of the plan fits"):
        with_profiles(spec, FULL, shapes(FULL))


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_key_holds_all_that_a_line_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tensorrt-fp16"
    keys = [key_of(name, 24, FULL), key_of(name, 32, FULL), key_of("torch-eager", 24, FULL)]
    keys.append(key_of(name, 24, FULL.model_copy(update={"steps": 17})))
    for changed in ({"cpu": "another"}, {"gpus": ("another",)}, {"trsp_deploy": "9"}, {"packages": {"torch": "9"}}):
        with monkeypatch.context() as patched:
            here = provenance().model_copy(update=changed)
            patched.setattr(kept, "provenance", lambda here=here: here)
            keys.append(key_of(name, 24, FULL))
    for constant in ("PASSES", "VERSION"):
        with monkeypatch.context() as patched:
            patched.setattr(kept, constant, "another")
            keys.append(key_of(name, 24, FULL))
    with monkeypatch.context() as patched:
        spec = load_engine_spec(name).model_copy(update={"fuse": False})
        patched.setattr(kept, "load_engine_spec", lambda name: spec)
        keys.append(key_of(name, 24, FULL))
    assert len(set(keys)) == len(keys)
    assert key_of(name, 24, FULL) == keys[0]


class Bench:
    """`main` with processes that are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.results = folder / "gpu.jsonl"
        self.measured: list[tuple[str, int]] = []
        self.samples: dict[tuple[str, int], Sample] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        monkeypatch.setattr(kept, "RESULTS", self.results)
        monkeypatch.setattr(bench_command, "CONTENDERS", ("torch-eager", "ort-cuda-fp16"))
        monkeypatch.setattr(bench_command, "absent", lambda names: {})
        monkeypatch.setattr(bench_command, "_in_a_process", self._measure)
        monkeypatch.setattr(sys, "argv", ["gpu"])

    def _measure(self, contender: str, layers: int, tiny: bool) -> Line | str:
        self.measured.append((contender, layers))
        if (contender, layers) in self.reasons:
            return self.reasons[contender, layers]
        sample = Sample(phase="decode", batch=1, past=FULL.pasts[0], seconds=(layers / 32,))
        made = line(contender, layers, 1.0, read=layers)
        update = {"key": key_of(contender, layers, FULL), "samples": (self.samples.get((contender, layers), sample),)}
        return made.model_copy(update=update)

    def run(self) -> list[tuple[str, int]]:
        """What one call measures."""
        self.measured = []
        assert bench_command.main() == 0
        return self.measured


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def test_what_cannot_be_kept_is_shown_and_nothing_more_is_measured(bench, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "file" / "gpu.jsonl")
    assert bench_command.main() == 1 and bench.measured == [("torch-eager", 32)]
    told = capsys.readouterr()
    assert "its folder cannot be made" in told.err.splitlines()[-1] and "| torch-eager | 32 |" in told.out


def test_a_name_of_no_contender_is_said(bench: Bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "torch-egaer"])
    assert bench_command.main() == 1 and bench.measured == []
    assert "--only 'torch-egaer': no contender's name holds it; there are torch-eager," in capsys.readouterr().err


ALL = [(name, layers) for name in ("torch-eager", "ort-cuda-fp16") for layers in FULL.layers]


def test_a_stopped_bench_goes_on(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run() == ALL
    rows = bench.results.read_bytes().splitlines()
    bench.results.write_bytes(b"\n".join([*rows[:3], rows[3][:40]]))  # the last line is torn
    capsys.readouterr()
    assert bench.run() == ALL[3:]
    assert "gpu.jsonl:4: not a line of this bench, or torn; left out\n" in capsys.readouterr().err
    assert bench.results.read_bytes().splitlines() == [*rows[:3], rows[3][:40], rows[3]]
    assert bench.run() == []


def test_lines_of_another_version_are_neither_taken_nor_reported(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run()
    before = bench.results.read_bytes()
    monkeypatch.setattr(kept, "PASSES", "another")
    bench.reasons[ALL[3]] = "crashed"
    capsys.readouterr()
    assert bench.run() == ALL
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert said.count("| ort-cuda-fp16 |") == 1 and "ort-cuda-fp16: not run (24 layers: crashed)" in said
    assert found["lacking"] == ["ort-cuda-fp16, 24 layers"] and found["figures"]["speedup_over_limit"] is None
    assert bench.results.read_bytes().startswith(before)  # what another version measured stays


def test_what_failed_is_measured_again_after_the_rest(bench: Bench) -> None:
    failed = Sample(phase="decode", batch=1, past=FULL.pasts[0], reason="an illegal address")
    bench.samples[ALL[0]] = failed
    bench.samples[ALL[1]] = failed.model_copy(update={"reason": "out of memory", "fits": False})
    bench.reasons[ALL[3]] = "crashed"
    assert bench.run() == ALL
    bench.samples, bench.reasons = {}, {}
    assert bench.run() == [ALL[3], ALL[0]]
    assert len(bench.results.read_bytes().splitlines()) == 4
    assert bench.run() == []


def test_a_process_ends_with_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked() -> None:
        raise Asked

    monkeypatch.setattr(bench_command, "end_with_parent", asked)
    monkeypatch.setattr(bench_command, "measure", lambda *given: pytest.fail("measured before"))
    with pytest.raises(Asked):
        bench_command._work("torch-eager", 2, TINY, "cpu")


def test_a_process_says_why_it_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(said: str) -> Any:
        return lambda command, **settings: subprocess.CompletedProcess(command, 1, stdout=said)

    monkeypatch.setattr(subprocess, "run", ended("TensorRT cannot read it\n"))
    assert bench_command._in_a_process("tensorrt-fp16", 2, tiny=False) == "TensorRT cannot read it"
    monkeypatch.setattr(subprocess, "run", ended(""))
    assert (
        bench_command._in_a_process("tensorrt-fp16", 2, tiny=False) == "its process ended with 1; the reason is above"
    )
