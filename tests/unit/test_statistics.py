"""Intervals and verdicts on samples whose truth is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.samples import made_up, made_up_report
from trsp_deploy.checks import Tolerances, _quality
from trsp_deploy.errors import TextError
from trsp_deploy.results import TURNS, Perplexity, TaskScore, Telemetry, ZeroShot
from trsp_deploy.tools.judging import comparisons, goals
from trsp_deploy.tools.judging.limits import SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    Ratio,
    change,
    interval,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    replicate_logs,
    replicate_ratios,
    retained_accuracy,
    speedup,
)
from trsp_deploy.tools.judging.verdicts import Requirement, judge, settled, too_few, worst
from trsp_deploy.tools.reports.record import choices_report, verdict
from trsp_deploy.tools.reports.rows import budget_text, engine_rows

FASTER = Requirement(name="speed-up, end to end", source="--min-speedup", sense="at least", bound=1.15)


@pytest.mark.parametrize("subjects", TURNS)
def test_turns_are_as_many_for_each_and_a_linear_drift_cancels(subjects: int) -> None:
    turns = TURNS[subjects]
    places = [[place for place, subject in enumerate(turns) if subject == each] for each in range(subjects)]
    assert len({len(each) for each in places}) == 1 and len({sum(each) for each in places}) == 1
    if subjects == 3:
        assert all(first != second for first, second in zip(turns, turns[1:] + turns[:1], strict=True))


@pytest.mark.parametrize("replicates", [5, 8, 15])
def test_the_interval_covers_the_truth(replicates: int) -> None:
    generator = np.random.default_rng(1)
    found = [interval(generator.normal(math.log(1.2), 0.1, replicates).tolist()) for _ in range(300)]
    covered = np.mean([each.low <= 1.2 <= each.high for each in found])
    assert 0.92 <= covered <= 0.99


def test_equal_samples_have_no_width_and_one_has_no_interval() -> None:
    found = interval([0.0] * 5)
    assert (found.ratio, found.low, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="one replicate"):
        interval([0.0])


@pytest.mark.parametrize("control", [True, False])
def test_a_speedup_is_found_in_every_phase(control: bool) -> None:
    made = made_up(speedup=1.2, noise=0.005, control=control)
    for phase in ("prefill", "decode", "total"):
        found = speedup(made.replicates, 0, phase)
        assert found.found.ratio == pytest.approx(1.2, abs=0.02) and found.found.low <= 1.2 <= found.found.high
        assert (found.control is not None) == control


def test_an_engine_against_itself_is_seldom_called_different() -> None:
    wrong = 0
    for seed in range(200):
        found = speedup(made_up(noise=0.03, replicates=8, cycles=2, seed=seed).replicates, 0, "total").found
        wrong += not found.low <= 1 <= found.high
    assert wrong <= 6  # the control's deviation widens the interval, so fewer than the 5% of the bootstrap alone


def test_an_interval_is_no_narrower_than_the_control_deviates() -> None:
    made = made_up(speedup=1.2, noise=0.001)
    shifted = []
    for replicate in made.replicates:  # dense, the second time, 8% slower than the first
        blocks = tuple(
            tuple(
                block.model_copy(update={"prefill_s": 1.08 * block.prefill_s, "total_s": 1.08 * block.total_s})
                for block in case
            )
            for case in replicate.blocks["again"]
        )
        shifted.append(replicate.model_copy(update={"blocks": {**replicate.blocks, "again": blocks}}))
    found = speedup(shifted, 0, "total")
    assert found.noise_floor == pytest.approx(math.log(1.08), abs=0.01)
    assert found.found.low < found.found.ratio / 1.075 and found.found.high > 1.075 * found.found.ratio


@pytest.mark.parametrize(
    ("low", "high", "word"), [(1.16, 1.25, "pass"), (1.15, 1.25, "pass"), (1.1, 1.2, "inconclusive"), (1, 1.1, "fail")]
)
def test_a_verdict_follows_the_interval(low: float, high: float, word: str) -> None:
    found = Ratio(ratio=(low + high) / 2, low=low, high=high)
    outcome = judge(FASTER, found, too_few(8))
    assert outcome.word == word and word in outcome.sentence
    most = Requirement(name="perplexity", source="--max-ppl-ratio", sense="at most", bound=1.15)
    opposite = {"pass": "fail", "fail": "pass", "inconclusive": "inconclusive"}
    if low != 1.15:
        assert judge(most, found).word == opposite[word]


def test_too_few_replicates_decide_nothing() -> None:
    found = Ratio(ratio=1.3, low=1.2, high=1.4)
    outcome = judge(FASTER, found, too_few(4))
    assert outcome.word == "inconclusive" and "4 replicates, 5 are the fewest that decide" in outcome.sentence
    assert too_few(5) == ""


def test_one_failure_fails_and_one_doubt_leaves_doubt() -> None:
    assert worst(["pass", "fail", "inconclusive"]) == "fail"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["pass"]) == worst([]) == "pass"


def test_measuring_ends_early_only_with_a_margin() -> None:
    def found(low: float, high: float) -> Ratio:
        return Ratio(ratio=math.sqrt(low * high), low=low, high=high)

    assert settled(FASTER, found(1.22, 1.28), replicates=8)
    assert not settled(FASTER, found(1.16, 1.3), replicates=8), "decided, and twice as wide it would not be"
    assert settled(FASTER, found(1.0, 1.05), replicates=8)
    assert not settled(FASTER, found(1.22, 1.28), replicates=4)


def test_goals_judge_the_worst_shape_and_what_was_before() -> None:
    before, now = made_up(speedup=1.2, noise=0.002, seed=1), made_up(speedup=1.1, noise=0.002, seed=2)
    logs: goals.Logs = {"total": tuple(replicate_logs(before.replicates, "pruned", 0, "total"))}
    ratios: goals.Logs = {"total": tuple(replicate_ratios(before.replicates, 0, "total")[0])}
    assert goals.least_speedup("total", 1.05, "x", cases=1).outcome(now.replicates).word == "pass"
    slower = goals.most_latency("total", 0.03, "x", [logs]).outcome(now.replicates)
    assert slower.word == "fail" and slower.found.ratio == pytest.approx(1.2 / 1.1, abs=0.01)
    assert goals.most_latency("total", 0.2, "x", [logs]).outcome(now.replicates).word == "pass"
    lost = goals.most_speedup_lost("total", 0.03, "x", [ratios])
    assert lost.outcome(now.replicates).word == "fail" and lost.settled(now.replicates)
    assert lost.outcome(before.replicates).word == "pass"


def scores(*correct: str) -> ZeroShot:
    """Tasks as strings of 1 (right) and 0 (wrong)."""
    tasks = [TaskScore(task=f"t{n}", metric="acc", correct=tuple(c == "1" for c in s)) for n, s in enumerate(correct)]
    return ZeroShot(role="dense", tasks=tuple(tasks))


def test_one_shape_that_misses_fails_whatever_is_open_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape 0 is open, shape 1 misses 1.2 for certain although its interval begins later."""
    found = [Ratio(ratio=1.15, low=1.05, high=1.25), Ratio(ratio=1.10, low=1.09, high=1.11)]
    monkeypatch.setattr(goals, "speedup", lambda replicates, case, phase: SimpleNamespace(found=found[case]))
    goal, replicates = goals.least_speedup("total", 1.2, "x", cases=2), made_up().replicates
    assert goal.outcome(replicates).word == "fail" and goal.outcome(replicates).found == found[1]
    assert goal.settled(replicates)
    found[1] = Ratio(ratio=1.3, low=1.29, high=1.31)
    assert goal.outcome(replicates).word == "inconclusive" and not goal.settled(replicates)
    found[0] = Ratio(ratio=1.4, low=1.38, high=1.42)
    assert goal.outcome(replicates).found == found[1] and goal.settled(replicates)


def test_choices_are_compared_item_by_item() -> None:
    found = paired_accuracy(scores("1110001111").tasks[0], scores("0000011111").tasks[0])
    assert (found.items, found.lost, found.gained) == (10, 3, 1)
    assert found.p_value == pytest.approx(0.625)  # two-sided binomial of 3 in 4
    same = paired_accuracy(scores("10").tasks[0], scores("10").tasks[0])
    assert same.p_value == 1.0


def test_retained_accuracy_counts_each_task_once() -> None:
    dense, pruned = scores("1" * 100, "10" * 10), scores("10" * 50, "10" * 10)
    found = retained_accuracy(dense, pruned)
    assert found.ratio == pytest.approx((0.5 + 0.5) / (1 + 0.5)) and found.low < found.ratio < found.high
    assert retained_accuracy(dense, dense).low == retained_accuracy(dense, dense).high == 1.0


def by_documents(losses: list[float], tokens: int = 10) -> Perplexity:
    documents = tuple((loss * tokens, tokens) for loss in losses)
    return Perplexity(
        text="t", role="dense", origin="", context_length=11, nll=(float(np.mean(losses)),), documents=documents
    )


def test_a_ratio_of_few_items_has_an_interval_and_of_none_right_no_ratio() -> None:
    kept = retained_accuracy(scores("1100000000"), scores("1000000000"))
    assert kept.ratio == 0.5 and np.isfinite([kept.low, kept.high]).all()
    with pytest.raises(TextError, match="has no item right"):
        retained_accuracy(scores("00"), scores("10"))


def test_perplexity_is_paired_by_documents() -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(3, 1, 40)  # documents differ much more than the two models do
    pruned = dense + generator.normal(0.2, 0.02, 40)
    before, after = by_documents(dense.tolist()), by_documents(pruned.tolist())
    found = perplexity_ratio(before, after)
    assert paired_by_documents(before, after) and found.ratio == pytest.approx(after.ppl / before.ppl)
    assert math.exp(0.18) < found.low < found.ratio < found.high < math.exp(0.22)
    assert not paired_by_documents(by_documents([1.0] * 5), by_documents([1.0] * 5))


def test_few_windows_are_as_uncertain_as_few_replicates() -> None:
    dense, pruned = by_documents([1.0]), by_documents([1.0])
    before, after = [3.0, 3.1], [3.2, 3.35]
    found = perplexity_ratio(
        dense.model_copy(update={"nll": tuple(before)}), pruned.model_copy(update={"nll": tuple(after)})
    )
    gains = np.subtract(after, before)
    assert found == interval(gains) and found.low <= math.exp(gains.min()) < math.exp(gains.max()) <= found.high
    one = perplexity_ratio(dense, pruned.model_copy(update={"nll": (1.25,)}))
    assert one.low == one.high == pytest.approx(math.exp(0.25))


def test_quality_of_a_window_or_a_few_items_decides_nothing() -> None:
    text = made_up_report(made_up()).quality["text"]
    limits = Tolerances(max_ppl_ratio=100, min_accuracy_retained=0.5)
    for windows, word in ((1, "inconclusive"), (4, "inconclusive"), (5, "pass")):
        short = text.model_copy(update={"pairs": "windows", "tokens": windows * (text.context_length - 1)})
        right = "1" * 10 * windows
        outcomes = _quality({"t": short}, choices_report(scores(right), scores(right)), limits)
        assert [outcome.word for outcome in outcomes] == [word, word]
        assert all(("are the fewest that decide" in outcome.note) == (word == "inconclusive") for outcome in outcomes)
        close = short.model_copy(update={"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0})
        assert budget_text({"t": close}).startswith("99.0% kept" if windows == 5 else "99.0% not decided")
    assert not text.doubt, "its documents are paired"


def test_change_compares_two_times() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.normal(0, 0.005, 20), generator.normal(math.log(1.05), 0.005, 20)
    found = change(before.tolist(), after.tolist())
    assert found.ratio == pytest.approx(1.05, abs=0.01) and 1 < found.low < 1.05 < found.high
    assert change([1.0, 1.0], [1.0, 1.0]).high == 1.0


def report(speed: float, noise: float = 0.005, limit: float = 1.3) -> comparisons.ComparisonReport:
    made = made_up(speedup=speed, noise=noise)
    return comparisons.compare(made, lambda case: SpeedLimit(prefill=limit, decode=limit, total=limit))


@pytest.mark.parametrize(
    ("speed", "noise", "words"),
    [
        (1.25, 0.005, ["CONFIRMED on e: end to end 1.2"]),
        (1.01, 0.05, ["INCONCLUSIVE on e"]),
        (0.8, 0.005, ["NOT THERE on e"]),
        (1.5, 0.005, ["CONFIRMED on e", "Above its limit, so distrust it: prefill, batch 1, prompt 128; decode"]),
    ],
)
def test_the_sentence_follows_the_intervals(speed: float, noise: float, words: list[str]) -> None:
    text = comparisons.sentence("e", report(speed, noise))
    assert all(word in text for word in words), text


def test_efficiency_is_the_share_of_what_was_possible() -> None:
    found = report(1.15, noise=0.001)
    assert found.of("decode").efficiency == pytest.approx(0.5, abs=0.02)
    assert found.blocks == 8 * 3 * 12 and found.replicates == 8


def test_a_percentile_needs_samples_beyond_it() -> None:
    few, many = (comparisons.compare(made_up(cycles=cycles)) for cycles in (4, 20))
    assert set(few.of("decode").tail) == {"p90"} and not few.of("prefill").tail  # 384 tokens, 96 prompts
    assert set(many.of("decode").tail) == {"p90", "p95"}
    dense, pruned = many.of("decode").tail["p95"]
    assert dense > many.of("decode").dense_s and pruned > many.of("decode").pruned_s


def test_what_disturbed_is_said() -> None:
    samples = tuple(Telemetry(at_s=i, load=2, busy_share=0.9, steal_share=0.1, mhz=None) for i in range(3))
    found = comparisons.compare(made_up().model_copy(update={"telemetry": samples}))
    assert any("hypervisor took 10%" in note for note in comparisons.notes(found))
    assert any("dense against itself" in note for note in comparisons.notes(found))
    alone = comparisons.compare(made_up(control=False))
    assert any("no control" in note for note in comparisons.notes(alone))


def test_the_report_says_plainly_that_a_budget_is_not_kept() -> None:
    text = made_up_report(made_up()).quality["text"]
    assert budget_text({"a": text}).startswith("99.0% not kept, 99.9% not kept (worst text 1.50x")
    close = text.model_copy(update={"ratio": 1.0, "ratio_low": 0.999, "ratio_high": 1.005})
    assert budget_text({"a": close}).startswith("99.0% kept, 99.9% not decided")


def test_accuracy_is_on_the_pages_and_a_run_without_texts_says_nothing_of_them() -> None:
    report = made_up_report(made_up())
    choices = choices_report(scores("1110", "1011"), scores("0110", "1010"))
    engines = tuple(each.model_copy(update={"choices": choices}) for each in report.engines)
    rows = engine_rows(report.model_copy(update={"engines": engines}))
    assert any(row[2] == "accuracy, t0" and row[3] == "75.0%" and "1 of 4 lost" in row[5] for row in rows)
    assert any(row[2] == "accuracy retained" for row in rows)
    assert "Perplexity" not in verdict(list(report.engines), {})


def test_verdict_without_an_engine_claims_nothing() -> None:
    assert verdict([], {}).startswith("NOT MEASURED")
