"""Intervals of times, perplexities and scores whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.breadth import BREADTH
from tests.samples import by_documents, made_up, scores, slow_again
from trsp_deploy.errors import TextError
from trsp_deploy.results import TURNS, Block, Subject
from trsp_deploy.tools.judging import statistics
from trsp_deploy.tools.judging.statistics import (
    Ratio,
    bootstrap,
    change,
    device_s,
    interval,
    medians_s,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    phase_s,
    replicate_logs,
    replicate_ratios,
    retained_accuracy,
    speedup,
)


@pytest.mark.parametrize("subjects", TURNS)
def test_turns_are_as_many_for_each_and_a_linear_drift_cancels(subjects: int) -> None:
    turns = TURNS[subjects]
    places = [[place for place, subject in enumerate(turns) if subject == each] for each in range(subjects)]
    assert len({len(each) for each in places}) == 1 and len({sum(each) for each in places}) == 1
    if subjects == 3:
        assert all(first != second for first, second in zip(turns, turns[1:] + turns[:1], strict=True))


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("control", [True, False])
def test_a_drift_cancels_between_dense_and_pruned(control: bool, first: int) -> None:
    """The machine slows down by 1% from turn to turn."""
    replicate = made_up(speedup=1.2, noise=0, replicates=2, cycles=3, control=control).replicates[0]
    order = tuple(np.roll(replicate.order, first))
    taken: dict[Subject, list[Block]] = {subject: [] for subject in order}
    for place, index in enumerate(3 * TURNS[len(order)]):
        block = replicate.blocks[order[index]][0][0]
        taken[order[index]].append(block.model_copy(update={"prefill_s": block.prefill_s * 1.01**place}))
    blocks = {subject: (tuple(each),) for subject, each in taken.items()}
    drifting = replicate.model_copy(update={"order": order, "blocks": blocks})
    ratios, against_itself = replicate_ratios([drifting], 0, "prefill")
    assert ratios == [pytest.approx(math.log(1.2))]
    assert against_itself is None or abs(against_itself[0]) <= math.log(1.011)


def test_blocks_that_something_held_up_move_nothing() -> None:
    """A mean over a cycle's three blocks would be 12% off."""
    replicate = made_up(speedup=1.2, noise=0, replicates=2, cycles=3).replicates[0]
    (blocks,) = replicate.blocks["pruned"]
    held_up = [block.model_copy(update={"prefill_s": 1.4 * block.prefill_s}) for block in blocks[::3]]
    others = [block for place, block in enumerate(blocks) if place % 3]
    disturbed = replicate.model_copy(update={"blocks": {**replicate.blocks, "pruned": ((*held_up, *others),)}})
    assert replicate_ratios([disturbed], 0, "prefill")[0] == [pytest.approx(math.log(1.2))]


@pytest.mark.parametrize("host_s", [None, 0.002])
def test_one_token_and_one_block_that_something_held_up_move_no_median(host_s: float | None) -> None:
    """A mean would be more than twice as much."""
    made = made_up(noise=0, replicates=2, cycles=1, host_s=host_s)
    replicate, plain = made.replicates[0], made.replicates[0].blocks["pruned"][0][0]
    late = {
        "prefill_s": 10 * plain.prefill_s,
        "decode_s": (*plain.decode_s[1:], 1.0),
        "device_decode_s": None if host_s is None else (*plain.decode_s[1:], 1.0),
    }
    held_up = plain.model_copy(update=late)
    assert phase_s(held_up, "decode") == pytest.approx(plain.decode_s[0])
    assert device_s(held_up, "decode") == (None if host_s is None else pytest.approx(plain.decode_s[0]))
    blocks = (held_up, *replicate.blocks["pruned"][0][1:])
    disturbed = [replicate.model_copy(update={"blocks": {**replicate.blocks, "pruned": (blocks,)}})]
    assert replicate_logs(disturbed, "pruned", 0, "prefill") == [pytest.approx(math.log(plain.prefill_s))]
    assert medians_s(disturbed, "pruned", 0)["prefill"] == pytest.approx(plain.prefill_s)


def test_an_interval_sees_skew() -> None:
    """Nine alike and one far above: Student's t is as far to either side, and what was drawn reaches further up."""
    found = interval([0.0] * 9 + [1.0])
    reach = 2.262 * 0.1  # t of 9 degrees of freedom; the standard error
    assert math.log(found.ratio) == pytest.approx(0.1)
    assert math.log(found.low) == pytest.approx(0.1 - reach, abs=1e-3)
    assert math.log(found.high) == pytest.approx(0.4, abs=0.05) and 0.1 + reach < 0.35


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


@BREADTH
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


def test_a_ratio_as_text() -> None:
    found = Ratio(ratio=1.2344, low=1.1, high=1.3)
    assert found.text() == "1.23x (1.10 to 1.30)"
    assert found.text(".3f", "") == "1.234 (1.100 to 1.300)"
    assert found.text(".1%", "", more=", limit 1.5") == "123.4% (110.0% to 130.0%, limit 1.5)"


def test_a_change_has_width_where_only_its_controls_vary() -> None:
    found = change([1.0] * 5, [1.0] * 5, [[0.01] * 5, [-0.01] * 5])
    assert found.ratio == 1 and math.log(found.high) == pytest.approx(math.hypot(0.01, 0.01))


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


@BREADTH
def test_many_tasks_of_few_items_are_not_drawn_towards_no_loss() -> None:
    """Half an item for each outcome of each task had the low end above the truth in 12% of such trials, for 2.5%."""
    generator, tasks, items, above = np.random.default_rng(0), 8, 10, 0
    for _ in range(200):
        dense = generator.random((tasks, items)) < 0.6
        pruned = np.where(dense, generator.random((tasks, items)) < 0.6, generator.random((tasks, items)) < 0.06)
        before, after = (
            scores(*("".join("01"[int(right)] for right in task) for task in answers)) for answers in (dense, pruned)
        )
        above += retained_accuracy(before, after).low > (0.6 * 0.6 + 0.4 * 0.06) / 0.6
    assert above <= 12, above


def test_a_bootstrap_draws_in_parts_what_it_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once a text of 100,000 short documents took 11 GB."""
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap(np.mean, values)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 4_000)
    assert bootstrap(np.mean, values) == whole


def test_a_ratio_of_few_items_has_an_interval_and_of_none_right_no_ratio() -> None:
    kept = retained_accuracy(scores("1100000000"), scores("1000000000"))
    assert kept.ratio == 0.5 and np.isfinite([kept.low, kept.high]).all()
    assert retained_accuracy(scores("1" * 50), scores("0" * 50)).low == 0
    with pytest.raises(TextError, match="has no item right"):
        retained_accuracy(scores("00"), scores("10"))


@BREADTH
@pytest.mark.parametrize(
    ("items", "lost", "gained"), [(50, 0.02, 0.0), (50, 0.1, 0.0), (100, 0.02, 0.01), (60, 0.2, 0.1)]
)
def test_accuracy_that_is_seldom_lost_has_an_interval_that_holds_the_truth(
    items: int, lost: float, gained: float
) -> None:
    """A bootstrap's held it in half of the trials of the first row: no item was lost, and none could be drawn."""
    generator, held = np.random.default_rng(0), 0
    truth = (0.7 * (1 - lost) + 0.3 * gained) / 0.7
    for _ in range(200):
        dense = generator.random(items) < 0.7
        pruned = np.where(dense, generator.random(items) >= lost, generator.random(items) < gained)
        before, after = (scores("".join("01"[int(right)] for right in answers)) for answers in (dense, pruned))
        found = retained_accuracy(before, after)
        held += found.low <= truth <= found.high
    assert held >= 182, held  # 91%: 95% of 200, less what chance takes once in a hundred


def test_perplexity_is_paired_by_documents() -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(3, 1, 40)  # documents differ much more than the two models do
    pruned = dense + generator.normal(0.2, 0.02, 40)
    before, after = by_documents(dense.tolist()), by_documents(pruned.tolist())
    found = perplexity_ratio(before, after)
    assert paired_by_documents(before, after) and found.ratio == pytest.approx(after.ppl / before.ppl)
    assert math.exp(0.18) < found.low < found.ratio < found.high < math.exp(0.22)
    assert not paired_by_documents(by_documents([1.0] * 5), by_documents([1.0] * 5))


@BREADTH
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


def test_change_compares_two_times() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.normal(0, 0.005, 20), generator.normal(math.log(1.05), 0.005, 20)
    found = change(before.tolist(), after.tolist())
    assert found.ratio == pytest.approx(1.05, abs=0.01) and 1 < found.low < 1.05 < found.high
    assert change([1.0, 1.0], [1.0, 1.0]).high == 1.0


def test_a_change_takes_each_times_own_spread() -> None:
    """Five unlike values, then twenty that are nearly one: Student's t of the five, and not of a spread of all."""
    found = change([-0.1, -0.05, 0.0, 0.05, 0.1], [0.001, -0.001] * 10)
    error = math.sqrt(0.025 / 4 / 5)  # of the mean of the five
    assert (
        math.log(found.high) == pytest.approx(2.776 * error, rel=0.01) == pytest.approx(-math.log(found.low), rel=0.01)
    )
