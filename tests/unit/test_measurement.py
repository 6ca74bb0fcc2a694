"""Statistics, limits and parity on samples whose answer is known."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.samples import made_up, scores
from tests.tiny import save_tiny
from trsp_deploy.artifacts import Finished, RunFolder
from trsp_deploy.decoder import DecoderSize, WeightCounts
from trsp_deploy.errors import EngineUnavailable, ParityError, TextError
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.recipe import Case, Recipe
from trsp_deploy.results import Parity, Perplexity, Phase, Rates
from trsp_deploy.stages import bench, evaluate, parity
from trsp_deploy.stages.bench import derive, pair_notes, without_limit
from trsp_deploy.tools.graphs.stored import in_floats, stored_by
from trsp_deploy.tools.judging.limits import (
    PhaseLimit,
    SpeedLimit,
    decode_bytes,
    decode_work,
    prefill_operations,
    speed_limit,
)
from trsp_deploy.tools.judging.statistics import perplexity_ratio
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring import bench_worker, rates, samples, telemetry
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.measuring.worker import Worker
from trsp_deploy.tools.reports import baselines
from trsp_deploy.tools.runners import Runner
from trsp_deploy.tools.runners.agreement import TOLERANCES, agreement


def test_perplexity_ratio_is_of_means():
    dense = Perplexity(text="t", role="dense", origin="", context_length=9, nll=(1.0, 2.0, 3.0))
    pruned = Perplexity(text="t", role="pruned", origin="", context_length=9, nll=(1.5, 2.5, 3.5))
    found = perplexity_ratio(dense, pruned)
    assert found.ratio == pytest.approx(np.exp(0.5)) == pytest.approx(pruned.ppl / dense.ppl)
    assert dense.tokens == 24


def opt_6_7b(layers: int) -> DecoderSize:
    per_layer = 12 * 4096**2 + 13 * 4096
    weights = WeightCounts(
        total=layers * per_layer + 50272 * 4096, layers=(per_layer,) * layers, lm_head=50272 * 4096, embeddings=0
    )
    return DecoderSize(weights=weights, cache_per_token=2 * 4096, attention_width=4096)


def shape(batch: int = 1, prompt: int = 128, new: int = 1) -> Case:
    return Case(batch_size=batch, prompt_tokens=prompt, new_tokens=new)


def test_limit_of_opt_6_7b_is_the_published_bound():
    limit = speed_limit(opt_6_7b(32), opt_6_7b(24), in_floats("fp16"), shape(prompt=1))
    assert limit.decode.ratio == pytest.approx(1.320, abs=0.001)
    long_past = speed_limit(opt_6_7b(32), opt_6_7b(24), in_floats("fp16"), shape(batch=64, prompt=100_000))
    assert long_past.decode.ratio == pytest.approx(32 / 24, abs=0.001)  # the cache dominates


def test_measured_rates_tell_which_resource_binds():
    dense, pruned = opt_6_7b(32), opt_6_7b(24)
    slow_memory = Rates(bytes_per_s=1e9, operations_per_s={"fp16": 1e15})
    slow_products = Rates(bytes_per_s=1e15, operations_per_s={"fp16": 1e9})
    by_bytes = speed_limit(dense, pruned, in_floats("fp16"), shape(new=100), rates=slow_memory)
    assert by_bytes.prefill.ratio == pytest.approx(by_bytes.decode.ratio, rel=0.01)
    by_operations = speed_limit(dense, pruned, in_floats("fp16"), shape(new=100), rates=slow_products, logits=1)
    assert by_operations.prefill.ratio > by_operations.decode.ratio, "the LM head multiplies for one position"
    unknown = speed_limit(dense, pruned, stored_by(load_engine_spec("ort-cpu-int8")), shape(), rates=slow_memory)
    assert unknown.assumed and not by_bytes.assumed
    assert unknown.decode.floor_s == float("inf"), "all of its time is taken for what bytes bind"


def times(prefill: float, decode: float, new: int = 100) -> dict[Phase, float]:
    return {"prefill": prefill, "decode": decode, "total": prefill + new * decode}


def test_a_limit_is_of_the_times_that_dense_takes() -> None:
    """End to end more than the ratio of both least times is possible where the phase that gains more takes longer."""
    limit = SpeedLimit(prefill=PhaseLimit(1.4, 1.0), decode=PhaseLimit(1.1, 0.01), layers=1 / 1.4, new_tokens=100)
    exact = times(1.0, 0.01)
    assert limit.of("prefill", exact) == pytest.approx(1.4) and limit.of("decode", exact) == pytest.approx(1.1)
    assert limit.of("total", exact) == pytest.approx(2 / (1 / 1.4 + 1 / 1.1))
    slow_prompt = times(3.0, 0.01)
    assert limit.of("total", slow_prompt) == pytest.approx(4 / (3 / 1.4 + 1 / 1.1))
    quicker = times(0.9, 0.009)  # than rates allow that were measured too low
    assert limit.of("decode", quicker) == pytest.approx(1.1)
    # A small model on a large GPU: kernels are started for each layer, and their number alone counts.
    launches = times(1.0, 0.1)
    assert limit.of("decode", launches) == pytest.approx(0.1 / (0.01 / 1.1 + 0.09 / 1.4))
    assert limit.of("decode", times(1.0, 1e3)) == pytest.approx(1.4, rel=1e-4)
    # End to end every token counts, those too that something held up: the median one does not tell of them.
    held_up = {**exact, "total": 1.0 + 100 * 0.02}
    assert limit.of("total", held_up) == pytest.approx(3 / (1 / 1.4 + 1 / 1.1 + 1 / 1.4))


@pytest.mark.parametrize(
    ("name", "computes"),
    [
        ("ort-cpu-fp32", "fp32"),
        ("ort-cpu-int8", None),  # products in integers, of weights and activations
        ("ort-cpu-int4", None),  # MatMulNBits at an accuracy level that rounds its inputs too
        ("tensorrt-fp16", "fp16"),
        ("tensorrt-bf16", "bf16"),
        ("tensorrt-int4", "fp16"),  # weights alone are integers
        ("tensorrt-int8", None),
    ],
)
def test_a_limit_says_whether_it_is_by_measured_rates(name: str, computes: str | None) -> None:
    spec = load_engine_spec(name)
    assert stored_by(spec).computes == computes
    rates = Rates(bytes_per_s=1e9, operations_per_s={"fp32": 1e15, "fp16": 1e15, "bf16": 1e15})
    found = speed_limit(opt_6_7b(32), opt_6_7b(24), stored_by(spec), shape(new=100), rates=rates)
    assert found.assumed == (computes is None)
    if computes is not None:
        assert found.prefill.ratio == pytest.approx(found.decode.ratio, rel=0.01), (
            "memory is so slow that it binds the prompt too"
        )
    assert speed_limit(opt_6_7b(32), opt_6_7b(24), stored_by(spec), shape()).assumed


def test_a_head_of_4_bits_raises_what_layers_can_gain():
    dense, pruned = opt_6_7b(32), opt_6_7b(24)
    narrow, wide = (stored_by(load_engine_spec(f"ort-cpu-int4{name}")) for name in ("", "-accurate"))
    assert (narrow.layers, narrow.head) == (0.5625, 0.5625) and wide.layers == pytest.approx(0.5703, abs=1e-4)
    assert wide.head == 1.0625 and narrow.cached == wide.cached == 4
    by_head = [speed_limit(dense, pruned, kept, shape()).decode.ratio for kept in (narrow, wide)]
    assert by_head[0] > by_head[1]
    static = load_engine_spec("tensorrt-int4")
    assert stored_by(static).cached == 2 and stored_by(static).head == 1


def engine_of(name: str, layers: int, **changed: object) -> Subject:
    spec = load_engine_spec(name).model_copy(update=changed)
    return Subject(path=Path(f"{name}-{layers}"), spec=spec, vocabulary=9, cuts_logits=True, size=opt_6_7b(layers))


def test_a_limit_is_of_engines_that_differ_by_their_layers_alone() -> None:
    dense, pruned = engine_of("ort-cpu-int4", 32), engine_of("ort-cpu-int4", 24)
    assert without_limit(dense, pruned) == "" and pair_notes(dense, pruned) == []
    for other, reason in (
        (
            engine_of("ort-cpu-int4-accurate", 32),
            "the specs of ort-cpu-int4-accurate-32 and ort-cpu-int4-24 differ in head_bits, zero_points",
        ),
        (engine_of("ort-cpu-fp32", 32), "differ in block_size, head_bits, precision, zero_points"),
        (engine_of("ort-cpu-int4", 32, threads=1), "differ in threads"),
        (engine_of("ort-cpu-int4", 32, fuse=False), "differ in fuse"),
        (replace(dense, size=None), "ort-cpu-int4-32 has no model beside it"),
        (replace(dense, spec=None), "ort-cpu-int4-32 is a graph alone"),
    ):
        assert reason in without_limit(other, pruned)
        assert any(reason in note for note in pair_notes(other, pruned))
        assert all(phase.limit is None for phase in derive(other, pruned, made_up()).phases)


@pytest.mark.parametrize("threads", [None, 1])
def test_rates_of_all_cores_hold_no_engine_up_that_has_fewer_threads(threads: int | None) -> None:
    rates = Rates(bytes_per_s=1e9, operations_per_s={"fp32": 1e15})
    dense, pruned = (engine_of("ort-cpu-fp32", layers, threads=threads) for layers in (32, 24))
    found = derive(dense, pruned, made_up().model_copy(update={"rates": rates}))
    assert all(phase.limit is not None and phase.limit_assumed == (threads == 1) for phase in found.phases)


@pytest.mark.parametrize(("name", "word"), [("ort-cpu-int4", "pass"), ("ort-cpu-fp32", "inconclusive")])
def test_a_goal_is_held_up_by_limits_that_are_measured_alone(
    name: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as fast again, of a cut that bytes allow a third: integer products may be bound otherwise."""
    found = Rates(bytes_per_s=1e9, operations_per_s={"fp32": 1e15})
    monkeypatch.setattr(bench, "measure_rates", lambda device: found)
    made = made_up(speedup=1.5, noise=0.001)
    dense, pruned = engine_of(name, 32), engine_of(name, 24)
    (goal,) = bench.speedup_goals(dense, pruned, {"decode": 1.2}, made.settings)
    assert goal.outcome(made.replicates).word == word


def test_a_head_that_multiplies_for_the_whole_prompt_leaves_its_layers_less_to_gain() -> None:
    """One engine that computes all logits is enough: they are the work of both."""
    dense, pruned = engine_of("ort-cpu-fp32", 32), engine_of("ort-cpu-fp32", 24)
    whole = [replace(each, cuts_logits=False) for each in (dense, pruned)]
    case = shape(prompt=100, new=10)
    cut, *others = (
        bench.limits(*pair, case, None).prefill.ratio
        for pair in ((dense, pruned), (whole[0], pruned), (dense, whole[1]))
    )
    before, after = (prefill_operations(each.size, 1, 100) for each in (dense, pruned) if each.size is not None)
    assert others == [pytest.approx(before / after)] * 2 and others[0] < cut - 0.005


def test_bytes_and_operations():
    size = DecoderSize(
        weights=WeightCounts(total=30, layers=(10, 10), lm_head=5, embeddings=5), cache_per_token=4, attention_width=3
    )
    assert decode_bytes(size, in_floats("fp16"), batch=2, past=7) == 2 * (20 + 5 + 2 * 7 * 4 * 2)
    assert prefill_operations(size, batch=1, prompt=10) == 2 * 10 * (25 + 2 * 2 * 10 * 3)
    work = decode_work(size, in_floats("fp16"), shape(batch=2, prompt=7, new=6))  # the median token has 10 before it
    assert work.read_bytes == 2 * (20 + 5 + 2 * 10 * 4 * 2)
    assert work.operations == 2 * 2 * (20 + 5 + 2 * 2 * 10 * 3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"))
    return parity.make_reference(folder, [list(range(3, 15)), list(range(30, 37))])


def test_reference_reads_left_padded_prompts(reference):
    assert reference.attention_mask.tolist()[1] == [0] * 5 + [1] * 7
    assert reference.logits.shape == (2, 12 + parity.NEW_TOKENS, 384)
    greedy = reference.logits[:, 11:-1].argmax(-1)
    assert (greedy == reference.tokens).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_passes_the_reference_and_small_noise(reference, precision):
    assert agreement(reference, reference.logits, precision).passed
    noise = np.random.default_rng(0).uniform(-1, 1, reference.logits.shape) * reference.logits.std()
    found = agreement(reference, reference.logits + 0.5 * TOLERANCES[precision] * noise, precision)
    assert found.passed and found.max_error > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("damage", ["shifted", "cache forgotten", "nan", "swapped rows"])
def test_parity_fails_what_is_broken(reference, precision, damage):
    logits = reference.logits.copy()
    if damage == "shifted":
        logits = np.roll(logits, 1, axis=1)
    elif damage == "cache forgotten":
        logits[:, 12:] = logits[:, 11:12]
    elif damage == "nan":
        logits[0, 3, 5] = np.nan
    else:
        logits = logits[::-1]
    assert not agreement(reference, logits, precision).passed


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.25), ("bf16", 1.0), ("int8", 1.5), ("int4", 4.0)]
)
def test_one_logit_may_be_off_by_so_much_and_no_more(reference, precision, tolerance):
    """Of the unlikeliest next token: neither the choice nor the perplexity tells of it."""
    whole = dataclasses.replace(reference, attention_mask=np.ones_like(reference.attention_mask))
    for share, passes in ((0.99, True), (1.01, False)):
        logits = whole.logits.copy()
        logits[0, -1, logits[0, -1].argmin()] -= share * tolerance * whole.logits.std()
        found = agreement(whole, logits, precision)
        assert found.max_error == pytest.approx(share * tolerance, rel=1e-3)
        assert found.tolerance == tolerance and found.passed == passes


@pytest.mark.parametrize(("precision", "passes"), [("fp16", False), ("int8", True)])
def test_errors_within_the_tolerance_that_all_point_one_way_fail(reference, precision, passes):
    """Each right token a little less likely: no logit is far off, the perplexity is. Of integers, texts show it."""
    logits = reference.logits.copy()
    ids = np.concatenate([reference.input_ids, reference.tokens], axis=1)
    for place in range(ids.shape[1] - 1):
        logits[range(len(ids)), place, ids[:, place + 1]] -= 0.1 * reference.logits.std()
    found = agreement(reference, logits, precision)
    assert found.max_error <= found.tolerance and found.ppl_ratio > 1.05
    assert found.passed == passes and (found.ppl_tolerance is None) == passes
    same = agreement(reference, reference.logits, precision)
    assert same.passed and same.ppl_ratio == 1


def test_logits_that_are_all_one_number_have_a_distance_too(reference):
    """As where weights are so large that norms end at nought: a traceback."""
    flat = dataclasses.replace(reference, logits=np.zeros_like(reference.logits))
    assert agreement(flat, flat.logits, "fp32").passed
    found = agreement(flat, flat.logits + 0.5, "fp32")
    assert found.max_error == 0.5 and not found.passed


def test_a_parity_of_an_older_run_is_read(reference):
    found = agreement(reference, reference.logits, "fp32").model_dump(mode="json")
    older = {"subject": "x", "role": "dense", "precision": "fp32", **found}
    del older["ppl_ratio"], older["ppl_tolerance"]
    assert Parity.model_validate(older).ppl_ratio is None


def test_padding_positions_do_not_count(reference):
    logits = reference.logits.copy()
    logits[1, :5] = np.nan  # what stands before the shorter prompt
    assert agreement(reference, logits, "fp32").passed


def on_text(ppl: float, role: str = "pruned", tokens: int = 63) -> Perplexity:
    return Perplexity(text="t", role=role, origin="", context_length=tokens + 1, nll=(math.log(ppl),))


@pytest.mark.parametrize(
    ("precision", "kept", "broken"),
    [
        ("fp32", 10.04, 10.06),
        ("fp16", 10.19, 10.21),
        ("bf16", 10.19, 10.21),
        ("int8", 10.9, 11.1),
        ("int4", 14.9, 15.1),
    ],
)
def test_an_engines_perplexity_is_pytorchs(precision, kept, broken):
    reference = on_text(10.0)
    found = parity.check_perplexity(reference, on_text(kept), "ort", precision)
    assert found.ratio == pytest.approx(kept / 10) and (found.role, found.text) == ("pruned", "t")
    for wrong in (broken, 100 / broken):  # lower is no better: it is another model
        with pytest.raises(ParityError, match=rf"parity: ort \(pruned, {precision}\) has perplexity .* PyTorch 10.00"):
            parity.check_perplexity(reference, on_text(wrong), "ort", precision)


def test_a_perplexity_that_is_no_number_is_refused_and_a_gpus_reference_is_rounded():
    with pytest.raises(ParityError, match="has perplexity inf on t"):
        parity.check_perplexity(on_text(10.0), on_text(10.0).model_copy(update={"nll": (math.nan,)}), "ort", "int4")
    assert parity.check_perplexity(on_text(10.0), on_text(10.1), "ort", "fp32", rounded=True).tolerance == 0.02
    huge = on_text(10.0).model_copy(update={"nll": (1000.0,)})
    assert parity.check_perplexity(huge, huge, "ort", "fp32").ratio == 1


@pytest.mark.parametrize(("scale", "sound"), [(1.2, True), (1.7, False)])
def test_damage_that_hits_both_models_alike_is_found(monkeypatch, scale, sound):
    """Their ratio says nothing of it."""
    recipe = SimpleNamespace(evaluation={"t": "t.txt"}, device="cpu")
    proof = Proof(SimpleNamespace(run=None, recipe=recipe), None, None)
    ppl = {"dense": 10.0, "pruned": 12.0}
    monkeypatch.setattr(proof, "_perplexity", lambda text, role: on_text(ppl[role], role))
    monkeypatch.setattr(proof, "_engine_perplexity", lambda spec, text, role, opened: on_text(scale * ppl[role], role))
    proof.engines = SimpleNamespace(path=lambda spec, role: Path(role))
    spec = load_engine_spec("ort-cpu-int4")
    if sound:
        assert proof.engine_quality(spec)["t"].ratio == pytest.approx(1.2)
        assert [round(each.ratio, 3) for each in proof.check_perplexity(spec)] == [1.2, 1.2]
    else:
        with pytest.raises(ParityError, match=r"ort-cpu-int4 \(dense, int4\) has perplexity 17.00 on t, PyTorch 10.00"):
            proof.engine_quality(spec)


def test_an_engine_is_opened_once_for_all_texts_and_again_behind_one_that_it_cannot_read(monkeypatch):
    """Of 13 GB it was read, and held against its SHA-256, for every text."""
    opened, said = [], []

    @contextlib.contextmanager
    def open_engine(folder):
        opened.append(f"+{folder}")
        yield folder
        opened.append(f"-{folder}")

    def perplexity(spec, text, role, get):
        if text == "long":
            get()
            raise EngineUnavailable("its profiles are shorter")
        return on_text(10.0, role) if text == "known" else on_text(10.0, str(get()))

    monkeypatch.setattr("trsp_deploy.pipeline.proof.open_engine", open_engine)
    recipe = SimpleNamespace(evaluation=dict.fromkeys(("a", "b", "long", "c", "known"), "t.txt"), device="cpu")
    proof = Proof(SimpleNamespace(run=None, recipe=recipe, say=said.append), None, None)
    proof.engines = SimpleNamespace(path=lambda spec, role: Path(role))
    monkeypatch.setattr(proof, "_engine_perplexity", perplexity)
    found = proof.engine_perplexity(load_engine_spec("ort-cpu-int4"))
    assert list(found) == ["a", "b", "c", "known"] and all(list(both) == ["dense", "pruned"] for both in found.values())
    assert opened == ["+dense", "-dense", "+dense", "-dense", "+pruned", "-pruned"]
    assert said == ["ort-cpu-int4: its perplexity on long is not measured (its profiles are shorter)"]
    recipe.evaluation = {"known": "t.txt"}
    proof.engine_perplexity(load_engine_spec("ort-cpu-fp32"))
    assert len(opened) == 6, "nothing is opened for what is known"


def test_a_dense_model_without_a_right_answer_leaves_the_rest_its_report(monkeypatch):
    """Of a few items of a hard task that is likely, and it had ended the whole job at its last step."""
    said = []
    recipe = Recipe.model_validate({"model": "m", "evaluate": {"tasks": ["arc-challenge"]}})
    proof = Proof(SimpleNamespace(run=None, recipe=recipe, say=said.append), None, None)
    monkeypatch.setattr(proof, "_engine_zero_shot", lambda spec, role: scores("000"))
    assert proof.engine_choices(load_engine_spec("ort-cpu-fp32")) is None
    words = "ort-cpu-fp32: its accuracy is not compared (zero-shot: the dense model has no item right to retain"
    assert len(said) == 1 and said[0].startswith(words)


@pytest.mark.parametrize("problem", [TextError("neither right nor wrong"), EngineUnavailable("a choice of 9 tokens")])
def test_a_task_that_fails_when_it_is_asked_leaves_the_rest_its_report(monkeypatch, problem):
    said = []
    recipe = Recipe.model_validate({"model": "m", "evaluate": {"tasks": ["arc-challenge"]}})
    proof = Proof(SimpleNamespace(run=None, recipe=recipe, say=said.append), None, None)

    def failing(spec, role):
        raise problem

    monkeypatch.setattr(proof, "_engine_zero_shot", failing)
    assert proof.engine_choices(load_engine_spec("ort-cpu-fp32")) is None
    assert said == [f"ort-cpu-fp32: its accuracy is not measured ({problem})"]


@pytest.mark.parametrize(("tokens", "lengths"), [(80, [40, 23]), (63, [40, 23]), (32, [20, 12]), (2, [1, 1])])
def test_a_short_calibration_text_is_two_prompts_all_the_same(monkeypatch, tokens, lengths):
    """One without a token gave no numbers, and the graph was blamed for it."""
    prompts = []
    monkeypatch.setattr(parity, "make_reference", lambda folder, given: prompts.extend(given))
    texts = SimpleNamespace(calibration_windows=lambda: (torch.arange(tokens)[None], None))
    inputs = SimpleNamespace(run=None, recipe=None, texts=texts)
    Proof(inputs, SimpleNamespace(ready=lambda role: Path()), None)._reference("dense")
    assert [len(prompt) for prompt in prompts] == lengths
    assert prompts[0] + prompts[1] == list(range(min(tokens, 63)))


def test_a_failed_parity_stops_with_one_line(reference):
    class Broken:
        def prefill(self, input_ids, attention_mask):
            return np.zeros((*input_ids.shape, 384), dtype=np.float32)

        def decode(self, input_ids):
            return np.zeros((len(input_ids), 1, 384), dtype=np.float32)

    words = (
        r"greedy tokens equal, perplexity .* times PyTorch's \(tolerance 0.5%\); nothing made from it can be trusted"
    )
    with pytest.raises(ParityError, match=rf"parity: ort \(pruned, fp32\) is .* {words}"):
        parity.check_parity(reference, Broken(), "ort", "pruned", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_logits_that_are_off_beyond_any_perplexity_fail_in_one_line(reference, precision):
    """A perplexity ratio beyond a float had ended the job in a traceback."""

    class Scaled:
        def prefill(self, input_ids, attention_mask):
            self.place = input_ids.shape[1]
            return 1e5 * reference.logits[:, : self.place]

        def decode(self, input_ids):
            self.place += 1
            return 1e5 * reference.logits[:, self.place - 1 : self.place]

    with pytest.raises(ParityError, match="perplexity inf times PyTorch's"):
        parity.check_parity(reference, Scaled(), "ort", "pruned", precision)


def test_times_of_a_processor_of_the_same_name_are_not_taken_for_this_ones(monkeypatch, tmp_path):
    """Whose fp32 engine is the same file: a run that moved from one "AMD EPYC" to another kept its times."""
    for role in ("dense", "pruned"):
        (tmp_path / role).mkdir()
    pair = tuple(SimpleNamespace(path=tmp_path / role) for role in ("dense", "pruned"))
    measured = []
    monkeypatch.setattr(bench, "compare_engines", lambda *_: measured.append(1) or made_up())
    with RunFolder(tmp_path / "run") as run:
        inputs = SimpleNamespace(run=run, recipe=Recipe(model="m"), say=pytest.fail)
        proof = Proof(inputs, None, SimpleNamespace(pair=lambda spec: pair, made=lambda spec, role: "as built"))
        for sets, count in (("avx2", 1), ("avx2", 1), ("avx512_vnni", 2), ("avx512_vnni", 2)):
            monkeypatch.setattr(baselines, "instruction_sets", lambda sets=sets: (sets,))
            proof._measure(load_engine_spec("ort-cpu-fp32"))
            assert len(measured) == count


def test_times_that_were_slowed_on_purpose_are_taken_for_no_others(monkeypatch, tmp_path):
    """A record of a bench under TRSP_DEPLOY_PLANT had its figures in every later report, which said nothing of it."""
    for role in ("dense", "pruned"):
        (tmp_path / role).mkdir()
    pair = tuple(
        SimpleNamespace(path=tmp_path / role, device="cpu", vocabulary=9, name="x") for role in ("dense", "pruned")
    )
    measured, said, spec = [], [], load_engine_spec("ort-cpu-fp32")
    monkeypatch.setattr(bench, "measure_rates", lambda device: None)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: measured.append(1) or made_up())
    with RunFolder(tmp_path / "run") as run:
        inputs = SimpleNamespace(run=run, recipe=Recipe(model="m"), say=said.append)
        proof = Proof(inputs, None, SimpleNamespace(pair=lambda spec: pair, made=lambda spec, role: "as built"))
        proof._measure(spec)
        assert run.record("bench-ort-cpu-fp32").settings == Recipe(model="m").bench.model_dump(mode="json")
        for planted, count in (("", 1), ("0", 1), ("pruned=0.3", 2), ("pruned=0.3", 2), ("0.1", 3), ("", 4), ("", 4)):
            monkeypatch.setenv(bench_worker.PLANTED, planted)
            proof._measure(spec)
            assert len(measured) == count, planted
            found = Finished(run)
            found.ask(proof._bench_step(spec))
            assert found.steps == {"bench-ort-cpu-fp32"}
        monkeypatch.setenv(bench_worker.PAUSED, "0.3")
        (found := Finished(run)).ask(proof._bench_step(spec))
        assert not found.steps
    assert said == [f"slowed on purpose: TRSP_DEPLOY_PLANT={share}" for share in ("pruned=0.3", "0.1")]


class Driver(SimpleNamespace):
    """NVML of a GPU with some processes on it, as process number -> bytes."""

    NVMLError = RuntimeError

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes.items()]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=sum(self.processes.values()))


@pytest.mark.parametrize("in_a_container", [False, True])
def test_gpu_memory_is_the_engines_own(monkeypatch, in_a_container):
    parent, here = 3_000, (1 if in_a_container else os.getpid())  # the driver lists the host's numbers
    driver = Driver(processes={here + 1: parent})
    monkeypatch.setattr(telemetry, "_nvml", lambda: (driver, None))
    before = telemetry.gpu_memory_used()
    driver.processes[here] = 4_000
    assert bench_worker._peak_memory(before)["gpu_bytes"] == 4_000
    assert bench_worker._peak_memory(None)["gpu_bytes"] is None, "an engine on the CPU"


def test_a_kernel_that_tells_no_peak_tells_what_a_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """gVisor's has no VmHWM, and the first block ended in a traceback."""
    monkeypatch.setattr(bench_worker, "peak_resident_bytes", lambda: None)
    assert (bench_worker._peak_memory(None)["peak_rss_bytes"] or 0) > 2**20


def test_who_else_is_on_the_gpu():
    assert telemetry._others({1, 2, 3}, {1, 2, 9}) == 1
    assert telemetry._others({71, 72}, {1, 2, 3}) == 0, "in a container, maybe ourselves"
    assert telemetry._others({71, 72, 73, 74, 75}, {1, 2, 3}) == 2


def test_only_the_warm_up_says_what_an_engine_holds_on_the_gpu():
    taken = samples._Taken(["dense"], 1)
    block = {"prefill_s": 1.0, "decode_s": [1.0], "total_s": 2.0, "peak_rss_bytes": 10}
    taken.add_warmup("dense", {**block, "gpu_bytes": 5})
    taken.add("dense", 0, {**block, "gpu_bytes": 50})  # meanwhile the others were loaded
    assert (taken.gpu_bytes, taken.peak_rss_bytes) == ({"dense": 5}, {"dense": 10})


@pytest.mark.parametrize(
    ("seconds", "blocks"),
    [
        ([1.0, 0.5, 0.49, 0.3], 3),  # hardly quicker than the block before
        ([1.0, 1.2, 0.3], 2),  # slower
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], samples.LONGEST_WARMUP),  # quicker every time: it has to end
    ],
)
def test_warm_up_ends_when_blocks_stop_getting_quicker(monkeypatch, seconds, blocks):
    now, left = [0.0], list(seconds)

    def block(prompt, new_tokens):
        now[0] += left.pop(0)
        return {"gpu_bytes": None}

    taken, paused = samples._Taken(["dense"], 1), []
    worker = SimpleNamespace(load=lambda: 0.5, block=block, pause=lambda: paused.append(True))
    monkeypatch.setattr(samples, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    samples._warm("dense", worker, [(shape(), [[1]])], taken)
    assert (taken.warmup_blocks, len(left), paused) == (blocks, len(seconds) - blocks, [True])
    assert taken.load_s == {"dense": 0.5} and taken.blocks == {"dense": [[]]}, "nothing of it counts"


def test_a_gpu_that_torch_cannot_use_has_no_rates(monkeypatch):
    def lacking(device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(rates, "fresh_rates", lacking)
    rates.measure_rates.cache_clear()
    try:
        assert rates.measure_rates("cuda") is None
        with pytest.raises(AssertionError):
            rates.measure_rates("cpu")
    finally:
        rates.measure_rates.cache_clear()


def test_rates_are_of_as_many_threads_as_engines_have(monkeypatch):
    """With OMP_NUM_THREADS=1, as here, the limit would be that of one core."""
    threads = []
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 4)
    monkeypatch.setitem(rates.SIDE, "cpu", 1)
    monkeypatch.setattr(rates, "usable_cores", lambda: 3)
    monkeypatch.setattr(rates, "_best", lambda work, device: threads.append(torch.get_num_threads()) or 1.0)
    before = torch.get_num_threads()
    rates.fresh_rates("cpu")
    assert threads == [3, 3] and torch.get_num_threads() == before


def test_a_planted_slow_down_is_for_every_engine_or_for_one():
    dense, pruned = Path("run/engines/e/dense"), Path("run/engines/e/pruned")
    assert [bench_worker.planted_share("0.05", engine) for engine in (dense, pruned)] == [0.05, 0.05]
    assert [bench_worker.planted_share("pruned=0.05", engine) for engine in (dense, pruned)] == [0.0, 0.05]


def test_losses_through_an_engine_take_no_second_window_of_logits():
    """Of 2048 tokens and 150,000 words one copy of the logits is 1.2 GB, and there were three."""
    windows = torch.from_numpy(np.random.default_rng(0).integers(1000, size=(2, 401)))
    logits = np.random.default_rng(1).normal(size=(1, 401, 1000)).astype(np.float32)
    runner = SimpleNamespace(prefill=lambda ids, mask: logits)
    evaluate.evaluate_engine(runner, windows[:1], "t", "dense", "o", "e")  # what is made once, is
    tracemalloc.start()
    try:
        found = evaluate.evaluate_engine(runner, windows, "t", "dense", "o", "e")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < logits.nbytes
    exact = torch.from_numpy(logits[0, :-1]).double()
    expected = [float(torch.nn.functional.cross_entropy(exact, window[1:])) for window in windows]
    np.testing.assert_allclose(found.nll, expected, rtol=1e-6)


class Clock:
    """Of seconds that pass when it is looked at, a microsecond each time, and when something takes some."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now


class Steady(Runner):
    """An engine whose calls take as long as they are told to."""

    def __init__(self, clock, call_s):
        self.clock, self.call_s = clock, call_s

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        return None

    def prefill(self, input_ids, attention_mask, *, last_only=False):
        self.clock.now += self.call_s
        return np.zeros((1, 1, 4), dtype=np.float32)

    def decode(self, input_ids):
        return self.prefill(input_ids, input_ids)


@pytest.mark.parametrize(("shares", "on_the_clock"), [({"planted": 0.5}, 1.5), ({"paused": 0.5}, 1.0), ({}, 1.0)])
def test_a_wait_takes_its_time_on_the_clock_or_off_it(shares, on_the_clock, monkeypatch):
    call_s, calls, clock = 2e-3, 21, Clock()
    monkeypatch.setattr(bench_worker, "time", clock)
    block = bench_worker.measure_block(Steady(clock, call_s), [[1, 2]], calls - 1, **shares)
    assert clock.now == pytest.approx(calls * call_s * (1.5 if shares else 1), rel=0.01)
    times = [block["prefill_s"], *block["decode_s"]]
    assert times == pytest.approx([call_s * on_the_clock] * calls, rel=0.01)
    assert block["total_s"] == pytest.approx(sum(times), rel=0.01)


def test_no_file_of_the_working_directory_is_a_module_of_a_worker(tmp_path, monkeypatch):
    """That may be a folder with a model from somebody else, whose code would run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    for name in ("json", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()")
    with pytest.raises(EngineUnavailable, match="no engine here"), Worker(tmp_path):
        pass
    assert not (tmp_path / "ran").exists()


def test_a_worker_that_cannot_start_says_why(tmp_path):
    with pytest.raises(EngineUnavailable, match="no engine here"), Worker(tmp_path):
        pass
