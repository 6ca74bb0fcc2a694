"""Intervals and verdicts on samples whose truth is known."""

from __future__ import annotations

import base64
import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.samples import made_up, made_up_report
from trsp_deploy.artifacts import provenance
from trsp_deploy.checks import Tolerances, _quality
from trsp_deploy.errors import TextError
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.results import TURNS, Comparison, Perplexity, Role, TaskScore, Telemetry, ZeroShot
from trsp_deploy.stages.bench import derive
from trsp_deploy.tools.judging import comparisons, goals, statistics
from trsp_deploy.tools.judging.limits import SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    Ratio,
    Speedup,
    change,
    interval,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    retained_accuracy,
    speedup,
)
from trsp_deploy.tools.judging.verdicts import Requirement, claim, judge, settled, too_few, worst
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.reports import html, markdown, plots
from trsp_deploy.tools.reports.baselines import engine_baseline
from trsp_deploy.tools.reports.quality import Price, QualityReport, budget_text, choices_report
from trsp_deploy.tools.reports.record import measured_by, verdict
from trsp_deploy.tools.reports.rows import (
    comparison_rows,
    engine_notes,
    engine_rows,
    machine_rows,
    model_rows,
    provenance_rows,
)

FASTER = Requirement(name="speed-up, end to end", source="--min-speedup", sense="at least", bound=1.15)


@pytest.mark.parametrize("subjects", TURNS)
def test_turns_are_as_many_for_each_and_a_linear_drift_cancels(subjects: int) -> None:
    turns = TURNS[subjects]
    places = [[place for place, subject in enumerate(turns) if subject == each] for each in range(subjects)]
    assert len({len(each) for each in places}) == 1 and len({sum(each) for each in places}) == 1
    if subjects == 3:
        assert all(first != second for first, second in zip(turns, turns[1:] + turns[:1], strict=True))


@pytest.mark.parametrize(("replicates", "draws", "least"), [(2, 300, 0.92), (5, 2000, 0.94), (6, 2000, 0.94)])
def test_the_interval_covers_the_truth_as_often_as_it_says(
    replicates: int, draws: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)  # for the test's time
    generator = np.random.default_rng(1)
    found = [interval(generator.normal(math.log(1.2), 0.1, replicates)) for _ in range(draws)]
    covered = np.mean([each.low <= 1.2 <= each.high for each in found])
    assert least <= covered <= 0.98


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
    made = [
        speedup(made_up(noise=0.03, replicates=8, cycles=2, seed=seed).replicates, 0, "total") for seed in range(200)
    ]
    assert sum(not each.found.low <= 1 <= each.found.high for each in made) <= 14  # 5% expected, 7% a chance of 8%
    assert sum(each.difference != 0 for each in made) <= 4


def test_an_interval_holds_the_truth_as_often_as_it_says_and_is_not_wider_than_that() -> None:
    """The control's own uncertainty, counted in full, made 95% intervals that held the truth in 99 to 100%."""
    made = [
        speedup(made_up(1.2, noise=0.03, replicates=8, cycles=2, seed=seed).replicates, 0, "total").found
        for seed in range(300)
    ]
    held = sum(each.low <= 1.2 <= each.high for each in made)
    assert 276 <= held <= 296, held  # 92 to 98.7%


def test_an_interval_is_no_narrower_than_the_control_deviates() -> None:
    made = made_up(speedup=1.2, noise=0.001)
    shifted = slow_again(made, 0.08).replicates
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


def test_a_ratio_as_text() -> None:
    found = Ratio(ratio=1.2344, low=1.1, high=1.3)
    assert found.text() == "1.23x (1.10 to 1.30)"
    assert found.text(".3f", "") == "1.234 (1.100 to 1.300)"
    assert found.text(".1%", "", more=", limit 1.5") == "123.4% (110.0% to 130.0%, limit 1.5)"


def alone(low: float, high: float) -> Speedup:
    return Speedup(found=Ratio(ratio=math.sqrt(low * high), low=low, high=high), control=None)


def test_what_speedups_claim_together() -> None:
    faster, open_, slower = alone(1.1, 1.3), alone(0.9, 1.1), alone(0.8, 0.9)
    assert claim([faster, faster], 5) == "CONFIRMED"
    assert claim([faster, open_], 5) == claim([faster, faster], 4) == "INCONCLUSIVE"
    assert claim([faster, slower], 5) == "NOT THERE"


@pytest.mark.parametrize(("floor", "words"), [(1.03, ("CONFIRMED", "NOT THERE")), (1.08, ("INCONCLUSIVE",) * 2)])
def test_a_difference_within_the_noise_floor_is_not_claimed(floor: float, words: tuple[str, str]) -> None:
    """5% with an interval that excludes 1, while dense may differ from itself by so much."""
    control = Ratio(ratio=1, low=1 / floor, high=floor)
    found = [alone(middle / 1.02, middle * 1.02).model_copy(update={"control": control}) for middle in (1.05, 0.95)]
    assert tuple(claim([each], 5) for each in found) == words
    assert claim([alone(1.1, 1.3), found[1]], 5) == words[1]


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


def earlier(before: Comparison) -> tuple[goals.Earlier, goals.Earlier]:
    """What a baseline keeps of a comparison, for latency and for the speed-up."""
    kept = engine_baseline(before, {})
    return goals.Earlier(kept.latency, kept.control), goals.Earlier(kept.speedup, kept.control)


def test_goals_judge_the_worst_shape_and_what_was_before() -> None:
    before, now = made_up(speedup=1.2, noise=0.002, seed=1), made_up(speedup=1.1, noise=0.002, seed=2)
    logs, ratios = earlier(before)
    assert goals.least_speedup("total", 1.05, "x", cases=1).outcome(now.replicates).word == "pass"
    slower = goals.most_latency("total", 0.03, "x", logs).outcome(now.replicates)
    assert slower.word == "fail" and slower.found.ratio == pytest.approx(1.2 / 1.1, abs=0.01)
    assert goals.most_latency("total", 0.2, "x", logs).outcome(now.replicates).word == "pass"
    lost = goals.most_speedup_lost("total", 0.03, "x", ratios)
    assert lost.outcome(now.replicates).word == "fail" and lost.settled(now.replicates)
    assert lost.outcome(before.replicates).word == "pass"


def slow_again(made: Comparison, share: float) -> Comparison:
    """The same with dense so much slower the second time."""
    replicates = []
    for replicate in made.replicates:
        blocks = tuple(
            tuple(
                block.model_copy(update={name: (1 + share) * getattr(block, name) for name in ("prefill_s", "total_s")})
                for block in case
            )
            for case in replicate.blocks["again"]
        )
        replicates.append(replicate.model_copy(update={"blocks": {**replicate.blocks, "again": blocks}}))
    return made.model_copy(update={"replicates": tuple(replicates)})


@pytest.mark.parametrize(("then", "now"), [(0.08, 0.0), (0.0, 0.08), (0.06, 0.06)])
def test_a_check_against_a_baseline_knows_both_noise_floors(then: float, now: float) -> None:
    """5% slower than before decides nothing where dense differs from itself by more, be it then or now."""
    before, after = (made_up(speedup=speed, noise=0.001, seed=seed) for seed, speed in enumerate((1.26, 1.2)))
    quiet = goals.most_latency("total", 0.01, "x", earlier(before)[0]).outcome(after.replicates)
    assert quiet.word == "fail"
    latency, ratios = earlier(slow_again(before, then))
    disturbed = slow_again(after, now).replicates
    for goal in (goals.most_latency("total", 0.01, "x", latency), goals.most_speedup_lost("total", 0.01, "x", ratios)):
        outcome = goal.outcome(disturbed)
        assert outcome.word == "inconclusive", goal.requirement.name
        reach = math.log1p(0.06) * math.sqrt(2) if then == now else math.log1p(0.08)
        assert math.log(outcome.found.high / outcome.found.ratio) == pytest.approx(reach, rel=0.05)


def test_a_baseline_of_few_replicates_decides_nothing() -> None:
    before, now = made_up(speedup=2, noise=0.001, replicates=2), made_up(speedup=1, noise=0.001)
    latency, ratios = earlier(before)
    for goal in (goals.most_latency("total", 0.1, "x", latency), goals.most_speedup_lost("total", 0.1, "x", ratios)):
        outcome = goal.outcome(now.replicates)
        assert outcome.word == "inconclusive" and "the baseline has 2 replicates, 5 are the fewest" in outcome.sentence
        assert goal.settled(now.replicates[:5]), "measuring longer now does not help"


def busy(made: Comparison, others: float | None, cores: int | None = 2) -> Comparison:
    """The same beside other work of so many cores."""
    samples = tuple(
        Telemetry(at_s=at_s, load=2, busy_share=1, steal_share=0, others_cores=others, mhz=None) for at_s in range(3)
    )
    return made.model_copy(update={"telemetry": samples, "cores": cores})


BOTH: dict[Role, int] = {"dense": 2, "pruned": 2}


@pytest.mark.parametrize(
    ("others", "cores", "threads", "said"),
    [
        (0.8, 2, BOTH, "other work took the time of 0.80 cores from the engines, which compute on 2"),
        (0.08, 2, BOTH, ""),  # what a machine does of itself
        (0.8, 8, BOTH, ""),  # on cores that the engines leave free
        (7.2, 8, BOTH, "other work took the time of 1.20 cores from the engines, which compute on 2"),
        (1.8, 2, {}, "other work took the time of 0.80 cores from the engines, which compute on 1"),  # engines on a GPU
        (None, 2, BOTH, ""),  # files older than this figure
        (0.8, None, BOTH, ""),
    ],
)
def test_what_others_took_from_the_engines_is_counted(
    others: float | None, cores: int | None, threads: dict[Role, int], said: str
) -> None:
    found = comparisons.compare(busy(made_up(), others, cores), threads=threads)
    assert comparisons.disturbance(found).startswith(said) and bool(comparisons.disturbance(found)) == bool(said)
    assert not said or any(note.startswith(said) for note in comparisons.notes(found))


def test_a_busy_machine_decides_nothing_between_two_times() -> None:
    """An engine that is unchanged fails where its baseline is of a busy machine, and a slower one would pass."""
    quiet = made_up(speedup=1.2, noise=0.001, seed=1)
    disturbed = comparisons.disturbance(comparisons.compare(busy(quiet, 0.8), threads=BOTH))
    for now in (quiet, made_up(speedup=1.0, noise=0.001, seed=2)):
        word = "pass" if now is quiet else "fail"
        for share, kept in ((0.05, engine_baseline(quiet, {})), (0.05, engine_baseline(quiet, {}, disturbed))):
            for goal in (
                goals.most_latency("total", share, "x", kept.earlier_latency),
                goals.most_speedup_lost("total", share, "x", kept.earlier_speedup),
            ):
                assert goal.outcome(now.replicates).word == ("inconclusive" if kept.disturbance else word)
                beside = goal.outcome(now.replicates, disturbed)
                assert beside.word == "inconclusive" and "other work took the time of 0.80 cores" in beside.note
                assert beside.note.startswith("when the baseline was made, ") == bool(kept.disturbance)
                assert goal.settled(now.replicates), "measuring longer does not help"
    within = goals.least_speedup("total", 1.1, "x", cases=1)
    assert within.outcome(quiet.replicates, disturbed).word == "pass", "turns of one measurement bear it alike"


def test_a_change_has_width_where_only_its_controls_vary() -> None:
    found = change([1.0] * 5, [1.0] * 5, [[0.01] * 5, [-0.01] * 5])
    assert found.ratio == 1 and math.log(found.high) == pytest.approx(math.hypot(0.01, 0.01))


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


def test_a_speedup_above_its_limit_passes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.50 where 1.30 is possible: something else was measured, so it neither passes nor ends the measurement."""
    found = Ratio(ratio=1.5, low=1.49, high=1.52)
    monkeypatch.setattr(goals, "speedup", lambda replicates, case, phase: SimpleNamespace(found=found))
    replicates = made_up().replicates

    def goal(bound: float, *limits: float | None) -> goals.Goal:
        return goals.least_speedup("total", bound, "x", cases=2, limits=limits)

    doubted = goal(1.2, None, 1.3)
    outcome = doubted.outcome(replicates)
    assert outcome.word == "inconclusive" and outcome.note.startswith("above its limit of 1.300")
    assert not doubted.settled(replicates)
    assert goal(1.2, None, 1.6).outcome(replicates).word == "pass" == goal(1.2).outcome(replicates).word
    assert goal(1.2, None, 1.495).outcome(replicates).word == "pass", "its interval reaches below"
    missed = goal(1.6, None, 1.3)
    assert missed.outcome(replicates).word == "fail" and missed.settled(replicates), "what is possible misses it too"


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


@pytest.mark.parametrize("documents", [10, 15])
def test_an_interval_over_few_documents_covers_the_truth(documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of unlike lengths, 20% worse: percentiles alone hold that in 89% of draws."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)  # for the test's time
    generator = np.random.default_rng(3)
    covered = []
    for _ in range(700):
        tokens = np.exp(generator.normal(6, 0.8, documents)).astype(int) + 20
        losses = 0.2 + generator.normal(0, 0.1, documents) + generator.normal(0, 0.5, documents) / np.sqrt(tokens)
        dense, pruned = (
            by_documents([0.0]).model_copy(
                update={"documents": tuple((float(loss * n), int(n)) for loss, n in zip(each, tokens, strict=True))}
            )
            for each in (3 + 0 * losses, 3 + losses)
        )
        found = perplexity_ratio(dense, pruned)
        covered.append(found.low <= math.exp(0.2) <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


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
        assert budget_text(Price("e", {"t": close})).startswith("99.0% kept" if windows == 5 else "99.0% not decided")
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


def test_a_figure_above_its_limit_is_noted_wherever_notes_are() -> None:
    lines = [line for line in comparisons.notes(report(1.5, 0.005)) if "above its limit" in line]
    assert len(lines) == 3 and all(line.endswith("distrust it") for line in lines)
    assert lines[2].startswith("end to end, batch 1, prompt 128: 1.5") and "above its limit of 1.300x" in lines[2]
    noisy = report(1.31, 0.05)
    estimates = [phase for phase in noisy.phases if phase.speedup.ratio > 1.3]
    assert estimates and not any(phase.above_limit for phase in noisy.phases)
    reaching = [line for line in comparisons.notes(noisy) if line.endswith("its interval reaches below")]
    assert len(reaching) == len(estimates)
    assert not any("limit" in line for line in comparisons.notes(report(1.2, 0.005)))


def test_an_assumed_limit_says_so() -> None:
    made = made_up(speedup=1.2, noise=0.005)
    limit = SpeedLimit(prefill=1.3, decode=1.3, total=1.3, assumed=True)
    found = comparisons.compare(made, lambda case: limit)
    assert all(phase.limit_assumed for phase in found.phases)
    assert any(line.startswith("limits are assumed") for line in comparisons.notes(found))
    assert not any("assumed" in line for line in comparisons.notes(report(1.2)))


def test_efficiency_is_the_share_of_what_was_possible() -> None:
    found = report(1.15, noise=0.001)
    assert found.of("decode").efficiency == pytest.approx(0.5, abs=0.02)
    assert found.blocks == 8 * 3 * 12 and found.replicates == 8


def test_cuda_events_tell_the_gpus_time_from_the_hosts() -> None:
    found = comparisons.compare(made_up(speedup=1.25, noise=0.005, host_s=0.02))
    decode = found.of("decode")
    assert decode.speedup.ratio == pytest.approx(0.030 / 0.028, rel=0.01)  # the host takes 20 ms of each token
    assert decode.device is not None and decode.device.control is not None
    assert decode.device.dense_s == pytest.approx(0.010, rel=0.02)
    assert decode.device.pruned_s == pytest.approx(0.008, rel=0.02)
    assert 1 < decode.device.speedup.low < 1.25 < decode.device.speedup.high and decode.device_speedup is not None
    assert decode.device_speedup == decode.device.speedup.ratio == pytest.approx(1.25, rel=0.01)
    assert decode.device.control.low < 1 < decode.device.control.high
    rows = {row[0]: row for row in comparison_rows(found)}
    assert (
        rows["decode, GPU time by CUDA events"][1] == "10.0 ms"
        and "1.25x (" in rows["decode, GPU time by CUDA events"][3]
    )
    assert "prefill, GPU time by CUDA events" in rows and "end to end, GPU time by CUDA events" not in rows
    assert found.of("total").device is None, "the host takes part in it"


def test_a_cpu_has_no_gpu_time() -> None:
    made = made_up()
    assert all(phase.device is phase.device_speedup is None for phase in comparisons.compare(made).phases)
    assert not any("CUDA" in row[0] for row in comparison_rows(comparisons.compare(made)))
    others = made_up(host_s=0.02).replicates[1:]
    some = made.model_copy(update={"replicates": (made.replicates[0], *others)})  # a driver that failed once
    assert comparisons.compare(some).of("decode").device is None
    older = comparisons.compare(made).model_dump(mode="json")
    for phase in older["phases"]:
        del phase["device"]
    assert comparisons.ComparisonReport.model_validate(older) == comparisons.compare(made)


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
    assert "load 2.0 on 2 cores, 90% busy" in comparisons.notes(found)[-2]
    alone = comparisons.compare(made_up(control=False))
    assert any("no control" in note for note in comparisons.notes(alone))


@pytest.mark.parametrize(
    ("load", "threads", "note"),
    [
        (1.4, {"dense": 1, "pruned": 1}, "load 1.4 on 2 cores, 50% busy, engine threads: 1"),
        (2.9, {"dense": 2, "pruned": 2}, "load 2.9 on 2 cores, 50% busy, engine threads: 2"),
        (2.9, {"dense": 2, "pruned": 1}, "load 2.9 on 2 cores, 50% busy, engine threads: dense 2, pruned 1"),
        (9.0, {"dense": 2, "pruned": 2}, "engine threads: 2; more than the engines explain, so others were at work"),
        (2.5, {}, "load 2.5 on 2 cores, 50% busy; more than the engines explain, so others were at work"),  # a GPU
    ],
)
def test_load_and_threads_are_told(load: float, threads: dict[Role, int], note: str) -> None:
    samples = tuple(Telemetry(at_s=i, load=load, busy_share=0.5, steal_share=0, mhz=None) for i in range(3))
    found = comparisons.compare(made_up().model_copy(update={"telemetry": samples}), threads=threads)
    (line,) = [line for line in comparisons.notes(found) if line.startswith("load ")]
    assert line.endswith(note)


@pytest.mark.parametrize(("affinity", "said"), [((0, 1), "0-1"), ((0, 2, 3, 4, 9), "0, 2-4, 9"), ((7,), "7")])
def test_the_cores_that_a_comparison_may_run_on_are_named(affinity: tuple[int, ...], said: str) -> None:
    samples = (Telemetry(at_s=0, load=1, busy_share=0.5, steal_share=0, mhz=None),)
    made = made_up().model_copy(update={"telemetry": samples, "affinity": affinity})
    found = comparisons.compare(made)
    assert found.affinity == affinity
    assert any(note.startswith(f"load 1.0 on 2 cores (of numbers {said}), ") for note in comparisons.notes(found))


def test_threads_are_the_engines_own() -> None:
    cpu, gpu = load_engine_spec("ort-cpu-fp32"), load_engine_spec("tensorrt-fp16")

    def of(spec: EngineSpec | None) -> Subject:
        return Subject(path=Path("e"), spec=spec, vocabulary=9, cuts_logits=True, size=None)

    one = of(cpu.model_copy(update={"threads": 1}))
    assert derive(one, of(None), made_up()).threads == {"dense": 1, "pruned": 2}  # a file takes every core
    assert derive(of(gpu), of(gpu), made_up()).threads == {} and derive(of(gpu), of(gpu), made_up()).cores == 2


def test_headlines_are_of_the_least_of_several_shapes_and_name_it() -> None:
    made = made_up(speedup=1.5, shapes=(1.0, 0.8, 0.9))
    report = made_up_report(made)
    found = report.engines[0].comparison
    assert found is not None and found.headline.prompt_tokens == 256
    assert found.of("total").speedup.ratio == pytest.approx(1.2, rel=0.01)
    where = "at batch 1, prompt 256, the least of 3 shapes"
    assert f"CONFIRMED on ort-cpu-fp32 {where}: end to end 1.20x (" in report.verdict
    assert any(f"end to end, {where}" in note or f"end to end {where}" in note for note in comparisons.notes(found))
    page = html.render(report, {"ort-cpu-fp32": made})
    assert f"Faster: ort-cpu-fp32 ({where}) generates 1.20 times as fast" in page
    assert f"<b>1.20x</b><span>end to end {where}, of 1.40x possible</span>" in page
    assert "Every block at batch 1, prompt 256." in page and f"The band is the interval {where}." in page
    drawn = plots.samples(made, 1)
    assert drawn in page and drawn != plots.samples(made, 0)
    assert "rate, batch 1, prompt 256" in [row[0] for row in comparison_rows(found)]


def test_one_shape_needs_no_name() -> None:
    report = made_up_report(made_up(speedup=1.25))
    assert "shapes" not in report.verdict and "CONFIRMED on ort-cpu-fp32: end to end 1.2" in report.verdict


def test_every_percentile_has_its_row() -> None:
    titles = [row[0] for row in comparison_rows(comparisons.compare(made_up(cycles=20)))]
    assert "decode, p90" in titles and "decode, p95" in titles


def test_the_page_carries_what_quality_is_derived_from() -> None:
    made, score = made_up(), scores("1101")
    answers = {"evaluate-text-dense": by_documents([1.0, 2.0]), "zero-shot-ort-cpu-fp32-dense": score}
    page = html.render(made_up_report(made), {"ort-cpu-fp32": made}, answers)
    data = page.partition('download="quality.json.gz" href="data:application/gzip;base64,')[2].partition('"')[0]
    kept = json.loads(gzip.decompress(base64.b64decode(data)))
    assert Perplexity.model_validate(kept["evaluate-text-dense"]) == answers["evaluate-text-dense"]
    assert kept["zero-shot-ort-cpu-fp32-dense"]["tasks"][0]["correct"] == [True, True, False, True]


def budgets(quality: dict[str, QualityReport]) -> str:
    return budget_text(Price("e", quality))


def test_the_report_says_plainly_that_a_budget_is_not_kept() -> None:
    text = made_up_report(made_up()).quality["text"]
    assert budgets({"a": text}).startswith("99.0% not kept, 99.9% not kept (worst text 1.50x")
    close = text.model_copy(update={"ratio": 1.0, "ratio_low": 0.999, "ratio_high": 1.005})
    assert budgets({"a": close}).startswith("99.0% kept, 99.9% not decided")


def test_a_budget_is_of_accuracy_too() -> None:
    text = made_up_report(made_up()).quality["text"].model_copy(update={"ratio": 1, "ratio_low": 1, "ratio_high": 1})
    half, all_right = scores("10" * 200), scores("1" * 400)
    lost = choices_report(all_right, half)
    assert budget_text(Price("e", {"a": text}, lost)) == (
        "99.0% not kept, 99.9% not kept (worst text 1.00x; they allow 1.01x and 1.001x; accuracy 50.0% retained)"
    )
    assert budget_text(Price("e", {}, lost)).startswith("99.0% not kept, 99.9% not kept (accuracy 50.0% retained)")
    assert budget_text(Price("e", {}, choices_report(half, half))).startswith("99.0% kept, 99.9% kept (accuracy 100")
    few = choices_report(scores("10"), scores("10"))
    assert budget_text(Price("e", {}, few)).startswith("99.0% not decided")
    assert budget_text(Price(None, {})) == "neither a text nor a task was evaluated"


def test_the_price_is_the_engines_and_pytorchs_only_where_no_engine_read() -> None:
    made = made_up(speedup=1.25)
    report = made_up_report(made)
    near = report.quality["text"].model_copy(update={"ratio": 1.005, "ratio_low": 1.004, "ratio_high": 1.006})
    far = near.model_copy(update={"ratio": 3.0, "ratio_low": 2.9, "ratio_high": 3.1, "pruned_ppl": 30.0})
    ran, absent = report.engines
    engines = (ran.model_copy(update={"quality": {"text": far}}), absent)
    quality = {"text": near, "long": near}
    judged = report.model_copy(
        update={"quality": quality, "engines": engines, "verdict": verdict(list(engines), quality)}
    )
    assert "Perplexity through ort-cpu-fp32: 3.00x on text." in judged.verdict
    assert "Perplexity in PyTorch and through no engine: 1.00x on long." in judged.verdict
    rows = dict(model_rows(judged))
    assert rows["quality budgets, ort-cpu-fp32"].startswith("99.0% not kept")
    assert rows["quality budgets, PyTorch"].startswith("99.0% kept")
    assert "ort-cpu-fp32: its perplexity on long is not measured" in engine_notes(judged)
    page = html.render(judged, {"ort-cpu-fp32": made})
    assert "The price through ort-cpu-fp32: perplexity (how surprised the model is by held-out text) up by 200%" in page
    assert "<b>3.00x</b><span>perplexity on text</span>" in page and "<b>1.00x</b>" not in page
    none_ran = judged.model_copy(update={"engines": (absent,), "verdict": verdict([absent], quality)})
    assert "Perplexity in PyTorch and through no engine: 1.00x on text, 1.00x on long." in none_ran.verdict
    page = html.render(none_ran, {})
    assert "The price in PyTorch and through no engine: perplexity" in page
    assert "<b>1.00x</b><span>perplexity on text, PyTorch</span>" in page


def test_pages_say_when_and_with_what_figures_were_taken() -> None:
    made = made_up()
    report = made_up_report(made)
    rows = dict(provenance_rows(report))
    assert rows["measured"] == "2025-12-01T10:00:00Z to 2026-01-01T10:00:00Z" and rows["written"] > rows["measured"]
    assert rows["measured otherwise"] == "torch 2.8.0 (now 2.9.0): bench-ort-cpu-fp32"
    for page in (html.render(report, {"ort-cpu-fp32": made}), markdown.render(report)):
        assert "torch 2.8.0 (now 2.9.0)" in page and rows["written"] in page
    on_gpu = report.provenance.model_copy(update={"gpus": ("NVIDIA X",), "driver": "580.1"})
    assert dict(machine_rows(on_gpu, ""))["GPU"] == "NVIDIA X, driver 580.1"


def test_what_was_measured_otherwise_is_found() -> None:
    now = provenance()
    then = now.model_copy(update={"trsp_deploy": "0.0.1", "time": "2025-01-01T00:00:00Z", "python": "3.9.0"})
    then = then.model_copy(update={"packages": {**then.packages, "numpy": "1.0"}, "driver": "1.2"})
    found = {each.step: each for each in measured_by({"bench-e": then, "evaluate-t-dense": now, "prune": then}, now)}
    assert found.keys() == {"bench-e", "evaluate-t-dense"} and found["evaluate-t-dense"].differs == {}
    assert found["bench-e"].differs == {
        "trsp_deploy": ("0.0.1", now.trsp_deploy),
        "Python": ("3.9.0", now.python),
        "numpy": ("1.0", now.packages["numpy"]),
        "driver": ("1.2", now.driver or "none"),
    }
    with_task_library = now.model_copy(update={"packages": {**now.packages, "lm-eval": "0.4"}, "driver": "1.2"})
    without = {name: version for name, version in now.packages.items() if name != "lm-eval"}
    older = now.model_copy(update={"time": None, "driver": None, "packages": without})
    assert older.differences(with_task_library) == {}, "what was not looked up then is no difference"


def test_accuracy_alone_has_a_price_too() -> None:
    made = made_up(speedup=1.25)
    report = made_up_report(made)
    choices = choices_report(scores("1" * 100), scores("1" * 90 + "0" * 10))
    engines = (report.engines[0].model_copy(update={"quality": {}, "choices": choices}),)
    asked = report.model_copy(update={"quality": {}, "engines": engines, "verdict": verdict(list(engines), {})})
    assert asked.verdict.endswith("Accuracy through ort-cpu-fp32: 90.0% of dense's.")
    assert dict(model_rows(asked))["quality budgets, ort-cpu-fp32"].startswith("99.0% not kept")
    page = html.render(asked, {"ort-cpu-fp32": made})
    assert "The price through ort-cpu-fp32: 90.0% of dense" in page and "<b>90.0%</b><span>of accuracy retained" in page


def test_accuracy_is_on_the_pages_and_a_run_without_texts_says_nothing_of_them() -> None:
    report = made_up_report(made_up())
    choices = choices_report(scores("1110", "1011"), scores("0110", "1010"))
    engines = tuple(each.model_copy(update={"choices": choices}) for each in report.engines)
    rows = engine_rows(report.model_copy(update={"engines": engines}))
    assert any(row[2] == "accuracy, t0" and row[3] == "75.0%" and "1 of 4 lost" in row[5] for row in rows)
    assert any(row[2] == "accuracy retained" for row in rows)
    assert ("", "", "ppl on text to PyTorch", "1.0000x", "1.0012x", "within 0.5%", "", "") in rows
    unread = [each.model_copy(update={"quality": {}}) for each in engines]
    assert "Perplexity" not in verdict(unread, {})


def test_verdict_without_an_engine_claims_nothing() -> None:
    assert verdict([], {}).startswith("NOT MEASURED")
