"""What an interval decides: words, goals, and checks against a baseline."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from tests.samples import busy, made_up, made_up_report, same_limit, scores, slow_again
from trsp_deploy import cli
from trsp_deploy.checks import Tolerances, _quality
from trsp_deploy.cli import check_jobs
from trsp_deploy.errors import RunError
from trsp_deploy.results import Comparison
from trsp_deploy.tools.judging import comparisons, goals
from trsp_deploy.tools.judging.limits import PhaseLimit, SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    Ratio,
    Speedup,
)
from trsp_deploy.tools.judging.verdicts import Requirement, claim, judge, settled, too_few, worst
from trsp_deploy.tools.reports import ci
from trsp_deploy.tools.reports.baselines import engine_baseline
from trsp_deploy.tools.reports.quality import Price, budget_text, choices_report

FASTER = Requirement(name="speed-up, end to end", source="--min-speedup", sense="at least", bound=1.15)


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


@pytest.mark.parametrize("sense", ["at least", "at most"])
def test_what_is_exactly_at_its_bound_keeps_it(sense: Literal["at least", "at most"]) -> None:
    wanted = Requirement(name="ratio", source="x", sense=sense, bound=1.15)
    assert judge(wanted, Ratio(ratio=1.15, low=1.15, high=1.15)).word == "pass"


def test_a_sentence_tells_what_misses_a_bound_by_little_from_the_bound() -> None:
    wanted = Requirement(name="speed-up", source="--min-speedup", sense="at least", bound=1.2)
    outcome = judge(wanted, Ratio(ratio=1.19, low=1.18, high=1.19996))
    assert outcome.sentence == "speed-up: 1.19000 (1.18000 to 1.19996), at least 1.2 wanted: fail"
    outcome = judge(wanted, Ratio(ratio=1.25, low=1.2, high=1.3))
    assert outcome.sentence == "speed-up: 1.250 (1.200 to 1.300), at least 1.2 wanted: pass"


def test_too_few_replicates_decide_nothing() -> None:
    found = Ratio(ratio=1.3, low=1.2, high=1.4)
    outcome = judge(FASTER, found, too_few(4))
    assert outcome.word == "inconclusive" and "4 replicates, 5 are the fewest that decide" in outcome.sentence
    assert too_few(5) == ""


def test_why_nothing_can_be_decided_is_said_of_an_open_interval_too() -> None:
    """A baseline of two replicates leaves it open however long is measured now, and the outcome did not say so."""
    outcome = judge(FASTER, Ratio(ratio=1.15, low=1.1, high=1.2), "the baseline has 2 replicates")
    assert outcome.word == "inconclusive" and outcome.sentence.endswith("inconclusive; the baseline has 2 replicates")


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
    for far, enough in ((1.001, True), (0.999, False)):  # twice as wide, its end is beyond the bound or before it
        middle = FASTER.bound * 1.05**2 * far
        assert settled(FASTER, found(middle / 1.05, middle * 1.05), replicates=8) == enough


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


@pytest.mark.parametrize(("left", "word"), [(0.81, "pass"), (0.79, "fail")])
def test_a_share_of_the_speedup_is_a_share_of_the_ratio(left: float, word: str) -> None:
    """A fifth lost leaves 0.8, and not the 1 / 1.2 that a fifth more time does."""
    before, now = (made_up(speedup=speed, noise=0.001, seed=1) for speed in (1.2, 1.2 * left))
    assert goals.most_speedup_lost("total", 0.2, "x", earlier(before)[1]).outcome(now.replicates).word == word


@pytest.mark.parametrize("slower", [0, 1])
def test_every_shape_is_held_against_its_own_past(slower: int) -> None:
    """Of shapes whose times and speed-ups differ, one has become slower."""
    then = (1.0, 1.5)
    now = tuple(each * (0.9 if case == slower else 1) for case, each in enumerate(then))
    before, after = (made_up(speedup=1.2, noise=0.001, seed=1, shapes=shapes) for shapes in (then, now))
    latency, ratios = earlier(before)
    for goal in (goals.most_latency("total", 0.05, "x", latency), goals.most_speedup_lost("total", 0.05, "x", ratios)):
        unchanged = goal.ratios(before.replicates)
        assert [each.ratio for each in unchanged] == [pytest.approx(1)] * 2
        outcome = goal.outcome(after.replicates, cases=after.settings.cases)
        assert outcome.word == "fail" and outcome.where == after.settings.cases[slower].title


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


def test_a_busy_machine_decides_nothing_between_two_times() -> None:
    """An engine that is unchanged fails where its baseline is of a busy machine, and a slower one would pass."""
    quiet = made_up(speedup=1.2, noise=0.001, seed=1)
    disturbed = comparisons.disturbance(comparisons.compare(busy(quiet, 0.8), threads={"dense": 2, "pruned": 2}))
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


@pytest.mark.parametrize("sense", ["at least", "at most"])
def test_of_shapes_that_are_open_the_one_whose_interval_is_further_out_is_shown(
    sense: Literal["at least", "at most"],
) -> None:
    """Its estimate is the better one, and its interval is the one that misses the bound by more."""
    wide, narrow = Ratio(ratio=1.02, low=0.9, high=1.15), Ratio(ratio=1.01, low=0.99, high=1.03)
    if sense == "at most":
        wide, narrow = (Ratio(ratio=1 / each.ratio, low=1 / each.high, high=1 / each.low) for each in (wide, narrow))
    goal = goals.Goal(Requirement(name="ratio", source="x", sense=sense, bound=1.0), lambda _: [narrow, wide])
    outcome = goal.outcome(made_up().replicates)
    assert outcome.word == "inconclusive" and outcome.found == wide


def test_an_outcome_names_the_shape_that_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a check at several shapes nothing said which of them had failed."""
    found = [Ratio(ratio=1.3, low=1.29, high=1.31), Ratio(ratio=1.10, low=1.09, high=1.11)]
    monkeypatch.setattr(goals, "speedup", lambda replicates, case, phase: SimpleNamespace(found=found[case]))
    replicates, cases = made_up().replicates, made_up(shapes=(1.0, 1.0)).settings.cases
    outcome = goals.least_speedup("total", 1.2, "x", cases=2).outcome(replicates, cases=cases)
    said = "speed-up, end to end, batch 1, prompt 256: 1.100 (1.090 to 1.110), at least 1.2 wanted: fail"
    assert outcome.word == "fail" and outcome.sentence == said
    junit = ci.junit("e", [outcome], 1.0)
    assert said in junit and 'name="speed-up, end to end"' in junit, "a test's name is the same from check to check"
    assert said in ci.github_annotations([outcome])[0]
    one = goals.least_speedup("total", 1.2, "x", cases=1).outcome(replicates, cases=cases[:1])
    assert one.sentence.startswith("speed-up, end to end: 1.300 (")
    older = one.model_dump(exclude={"where"})
    assert type(one).model_validate(older) == one


def test_a_speedup_above_its_limit_passes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.50 where 1.30 is possible: something else was measured, so it neither passes nor ends the measurement."""
    found = Ratio(ratio=1.5, low=1.49, high=1.52)
    monkeypatch.setattr(goals, "speedup", lambda replicates, case, phase: SimpleNamespace(found=found))
    replicates = made_up().replicates

    def goal(bound: float, *limits: float | None) -> goals.Goal:
        known = [None if limit is None else same_limit(limit) for limit in limits]
        return goals.least_speedup("total", bound, "x", cases=2, limits=known)

    doubted = goal(1.2, 1.3, None)
    outcome = doubted.outcome(replicates)
    assert outcome.word == "inconclusive" and outcome.note.startswith("above its limit of 1.300")
    assert not doubted.settled(replicates)
    assert goal(1.2, 1.6, None).outcome(replicates).word == "pass" == goal(1.2).outcome(replicates).word
    assert goal(1.2, 1.495, None).outcome(replicates).word == "pass", "its interval reaches below"
    missed = goal(1.6, 1.3, None)
    assert missed.outcome(replicates).word == "fail" and missed.settled(replicates), "what is possible misses it too"


def test_a_goals_limit_is_by_the_times_that_dense_took() -> None:
    """5 ms of a token are bound by bytes: of dense's 10 ms half is, of pruned's 8 ms more."""
    bytes_bind = PhaseLimit(ratio=1.1, floor_s=0.005)
    limit = SpeedLimit(prefill=bytes_bind, decode=bytes_bind, layers=1 / 1.4, new_tokens=4)
    goal = goals.least_speedup("decode", 1.2, "x", cases=1, limits=[limit])
    assert goal.limits is not None
    assert goal.limits(made_up(speedup=1.25, noise=0).replicates) == [pytest.approx(0.01 / (0.005 / 1.1 + 0.005 / 1.4))]


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


def test_limits_of_a_quality_budget_are_said_to_be_its(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A JUnit file named options that nobody had given."""
    text, right = made_up_report(made_up()).quality["text"], "1" * 400
    asked: list[Tolerances] = []

    def caught(run: Path, tolerances: Tolerances, *rest: object) -> None:
        asked.append(tolerances.model_copy(update={"min_accuracy_retained": 0.99}))
        raise RunError("enough")

    monkeypatch.setattr(check_jobs, "_check", caught)
    for option, sources in (
        ("--quality-budget=99%", ["--quality-budget"] * 2),
        ("--max-ppl-ratio=1.3", ["--min-accuracy-retained", "--max-ppl-ratio"]),
    ):
        assert cli.run(["check", "run", option]) == 1 and "enough" in capsys.readouterr().err
        outcomes = _quality({"t": text}, choices_report(scores(right), scores(right)), asked.pop())
        assert [outcome.requirement.source for outcome in outcomes] == sources
