"""Ratios with intervals, from samples that were taken in pairs.

A speed-up is the geometric mean over replicates (fresh processes) of the median ratio of a block of dense and one of
pruned, over all such pairs. The replicate is the unit: blocks of one process share its memory layout and its moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from trsp_deploy.errors import TextError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import (
    LARGEST_EXPONENT,
    PHASES,
    Block,
    Comparison,
    Metric,
    Perplexity,
    Phase,
    Replicate,
    Subject,
    TaskScore,
    ZeroShot,
)

RESAMPLES = 5000
DRAWN_AT_ONCE = 10_000_000  # values: 80 MB for each array of them, however many documents a text has
CONFIDENCE = 0.95
FEWEST_DOCUMENTS = 10
FEWEST_REPLICATES = 5  # below it an interval is wide, and rests on the normal distribution alone
FEWEST_WINDOWS = 5  # of a text, for the same reason
FEWEST_ITEMS = 50  # of all tasks together: fewer may all be answered alike by chance
FEWEST_ITEMS_EACH = 10  # of every task, whose share of the mean rests on them alone


class Ratio(Strict):
    """A ratio and its 95% interval."""

    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width in log units: about the share that the ratio is uncertain by."""
        return (math.log(self.high) - math.log(self.low)) / 2

    def text(self, form: str = ".2f", unit: str = "x", more: str = "") -> str:
        """The ratio for people, as "1.25x (1.20 to 1.30)".

        form: how each of the three numbers is written, such as ".1%". more: what else stands within the brackets.
        """
        return f"{self.ratio:{form}}{unit} ({self.low:{form}} to {self.high:{form}}{more})"


def decimals(figure: float, wanted: float, least: int) -> int:
    """How many of a figure to show: as many as tell it from what it misses by less, within reason."""
    return next((n for n in range(least, 6) if figure == wanted or round(figure, n) != round(wanted, n)), 6)


class Speedup(Strict):
    """Dense time / pruned time of one phase, and what dense against itself showed in the same blocks."""

    found: Ratio  # the interval is never narrower than the control's deviation from 1
    control: Ratio | None  # dense / dense again; None where it was not measured

    @property
    def noise_floor(self) -> float | None:
        """The largest difference that the control leaves possible between an engine and itself, as a log ratio."""
        return None if self.control is None else _reach(self.control)

    @property
    def difference(self) -> int:
        """1 where pruned is faster beyond doubt and the noise floor, -1 where it is slower, else 0."""
        widest = _no_narrower(self.found, self.noise_floor or 0.0)
        return 1 if widest.low > 1 else -1 if widest.high < 1 else 0


def phase_s(block: Block, phase: Phase) -> float:
    """Seconds of one phase of a block; for decoding, of the median token."""
    if phase == "decode":
        return float(np.median(block.decode_s))
    return block.prefill_s if phase == "prefill" else block.total_s


def device_s(block: Block, phase: Phase) -> float | None:
    """Seconds of one phase of a block by CUDA events; None on a CPU, and end to end, where the host takes part."""
    if phase == "prefill" or block.device_decode_s is None:
        return block.device_prefill_s if phase == "prefill" else None
    return float(np.median(block.device_decode_s)) if phase == "decode" else None


Clock = Callable[[Block, Phase], float]  # seconds of a phase of a block


def speedup(replicates: Sequence[Replicate], case: int, phase: Phase) -> Speedup:
    """Speed-up of one phase at one shape (index into the settings' cases), with its control."""
    return widened(*replicate_ratios(replicates, case, phase))


def widened(ratios: Sequence[float], against_itself: Sequence[float] | None) -> Speedup:
    """Log ratios, one per replicate, as an interval that is never narrower than the control's deviation from 1."""
    found = interval(ratios)
    if against_itself is None:
        return Speedup(found=found, control=None)
    control = interval(against_itself)
    # Two copies of one engine that differ by so much say that this machine, now, tells nothing finer apart. What the
    # control is uncertain by does not belong here: the same noise is in the ratios, so it would count twice.
    return Speedup(found=_no_narrower(found, abs(math.log(control.ratio))), control=control)


def _no_narrower(found: Ratio, reach: float) -> Ratio:
    """An interval that reaches at least so far to both sides, in log units."""
    middle = math.log(found.ratio)
    low, high = min(math.log(found.low), middle - reach), max(math.log(found.high), middle + reach)
    return Ratio(ratio=found.ratio, low=math.exp(low), high=math.exp(high))


def device_speedup(replicates: Sequence[Replicate], case: int, phase: Phase) -> Speedup | None:
    """Speed-up of one phase in times by CUDA events, with its control; None where a block has none."""
    blocks = [block for replicate in replicates for cases in replicate.blocks.values() for block in cases[case]]
    if any(device_s(block, phase) is None for block in blocks):
        return None

    def clock(block: Block, phase: Phase) -> float:
        return device_s(block, phase) or 0.0

    return widened(*replicate_ratios(replicates, case, phase, clock))


def replicate_ratios(
    replicates: Sequence[Replicate], case: int, phase: Phase, clock: Clock = phase_s
) -> tuple[list[float], list[float] | None]:
    """Log ratios dense / pruned and dense again / dense, one per replicate; None without a control.

    Where every turn had a process of its own, dense's second turn of a cycle is its first one's control. A drift does
    not cancel between these two, so that the noise floor is rather too high than too low.
    clock: that every block was timed by.
    """
    logs = [_logs(replicate, case, phase, clock) for replicate in replicates]
    ratios = [_shift(_dense(each), each["pruned"]) for each in logs]
    if all("again" in each for each in logs):
        return ratios, [_shift(each["again"], each["dense"]) for each in logs]
    if any(replicate.together for replicate in replicates):
        return ratios, None
    turns = [_turns(each["dense"], replicate) for each, replicate in zip(logs, replicates, strict=True)]
    return ratios, [_shift(last, first) for first, last in turns]


Speedups = dict[tuple[int, Phase], Speedup]  # by index of the case, and phase


def speedups(replicates: Sequence[Replicate], cases: int) -> Speedups:
    """Every shape's and phase's speed-up."""
    return {(index, phase): speedup(replicates, index, phase) for index in range(cases) for phase in PHASES}


def _logs(replicate: Replicate, case: int, phase: Phase, clock: Clock = phase_s) -> dict[Subject, np.ndarray]:
    """Log seconds of every block, (blocks,), in the order taken."""
    return {
        subject: np.log([clock(block, phase) for block in cases[case]]) for subject, cases in replicate.blocks.items()
    }


def _shift(one: np.ndarray, other: np.ndarray) -> float:
    """By how much log seconds (blocks,) are more than others, blind to a few that something held up.

    The median over all pairs: Hodges and Lehmann 1963, Annals of Mathematical Statistics 34, 598 to 611. A drift that
    is linear over the replicate cancels between dense and pruned (`results.TURNS`), and to a turn of it between dense
    and itself, now with one sign and now with the other.
    """
    return float(np.median(np.subtract.outer(one, other)))


def _turns(logs: np.ndarray, replicate: Replicate) -> tuple[np.ndarray, np.ndarray]:
    """Of a subject's blocks those of the first and those of the last turn of each cycle."""
    size = replicate.blocks_per_turn
    cycles = logs.reshape(-1, replicate.blocks_per_cycle)
    return cycles[:, :size].ravel(), cycles[:, -size:].ravel()


def _dense(logs: dict[Subject, np.ndarray]) -> np.ndarray:
    """Blocks of dense; both copies count, so that the control costs little of the precision that its time buys."""
    return np.concatenate([logs["dense"], logs["again"]]) if "again" in logs else logs["dense"]


def _reach(ratio: Ratio) -> float:
    return max(abs(math.log(ratio.low)), abs(math.log(ratio.high)))


def interval(logs: Sequence[float] | np.ndarray) -> Ratio:
    """exp of the mean of logs, one per replicate or window, with a 95% interval: at each end the further out of two.

    One is a bootstrap's percentiles, taken further out by what Student's t asks for (the expanded percentile interval:
    Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.2), which sees skew. It cannot reach
    beyond the smallest and the largest value, so that 95% are 92 to 93% for five or six of them; the other is Student's
    t, which can. Raises ValueError for fewer than two.
    """
    values = np.asarray(logs, dtype=float)
    count, middle = len(values), float(np.mean(values))
    if count < 2:
        raise ValueError("one replicate has no interval")
    if np.ptp(values) == 0:
        return Ratio(ratio=_exp(middle), low=_exp(middle), high=_exp(middle))
    low, high = bootstrap(np.mean, values, confidence=_expanded(count))
    reach = _student(count) * float(scipy.stats.sem(values))
    return Ratio(ratio=_exp(middle), low=_exp(min(low, middle - reach)), high=_exp(max(high, middle + reach)))


def _exp(log: float) -> float:
    """Infinite beyond a float: of what a cut has broken, a text's loss may be that large."""
    return math.exp(log) if log < LARGEST_EXPONENT else math.inf


def _student(count: int) -> float:
    """How many standard errors of a mean of so many values CONFIDENCE reaches to either side."""
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))


def _expanded(count: int) -> float:
    """The confidence to ask of a bootstrap's percentiles over so many values, for CONFIDENCE of it."""
    return 1 - 2 * float(scipy.stats.norm.sf(_student(count) * math.sqrt(count / (count - 1))))


def bootstrap(
    statistic: Callable[..., Any], *data: np.ndarray, confidence: float = CONFIDENCE, paired: bool = False
) -> tuple[float, float]:
    """Both ends of a statistic's percentile interval.

    statistic: of arrays such as `data`, along their `axis`. paired: whether values of one index are drawn together.
    """
    # A fixed seed: the same samples always show the same interval.
    found = scipy.stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(data[0])),
        confidence_level=confidence,
        method="percentile",
        paired=paired,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def change(before: Sequence[float], after: Sequence[float], controls: Sequence[Sequence[float]] = ()) -> Ratio:
    """after / before of logs taken at different times, one per replicate, with a 95% interval (Welch).

    controls: log ratios of dense against itself at either time, as far as they were measured. The interval is never
    narrower than both noise floors together; as errors of two times are, they are added in squares. Not the deviations
    alone, as within one measurement: what differs between two times is in no replicate's spread.
    """
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    low = high = middle = float(new.mean() - old.mean())
    if np.ptp(old) > 0 or np.ptp(new) > 0:
        low, high = scipy.stats.ttest_ind(new, old, equal_var=False).confidence_interval(CONFIDENCE)
    found = Ratio(ratio=math.exp(middle), low=math.exp(low), high=math.exp(high))
    return _no_narrower(found, math.hypot(*(_reach(interval(each)) for each in controls)))


def replicate_logs(replicates: Sequence[Replicate], subject: Subject, case: int, phase: Phase) -> list[float]:
    """Log seconds of each replicate: of its median block."""
    return [float(np.median(_logs(replicate, case, phase)[subject])) for replicate in replicates]


def medians_s(replicates: Sequence[Replicate], subject: Subject, case: int) -> dict[Phase, float]:
    """Median seconds of each phase over every block."""
    blocks = [block for replicate in replicates for block in replicate.blocks[subject][case]]
    return {phase: float(np.median([phase_s(block, phase) for block in blocks])) for phase in PHASES}


def samples_s(comparison: Comparison, subject: Subject, case: int, phase: Phase) -> list[float]:
    """Every single time of a phase in seconds; for decoding, of each token."""
    blocks = [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]
    if phase == "decode":
        return [time for block in blocks for time in block.decode_s]
    return [phase_s(block, phase) for block in blocks]


def perplexity_ratio(dense: Perplexity, pruned: Perplexity) -> Ratio:
    """pruned / dense perplexity of the same tokens, with a 95% interval over documents, paired.

    As in `interval`, at each end the further out of a bootstrap, taken further out for few documents, and Student's t:
    that of the ratio of two sums, linear in each document's nats beyond its share. Over windows instead where a text
    has fewer than FEWEST_DOCUMENTS; one window has no interval but its own ratio.
    """
    if not paired_by_documents(dense, pruned):
        windows = np.array(pruned.nll) - np.array(dense.nll)
        if len(windows) > 1:
            return interval(windows)
        one = _exp(float(windows[0]))
        return Ratio(ratio=one, low=one, high=one)
    (before, tokens), (after, _) = (np.array(each.documents).T for each in (dense, pruned))
    lost = after - before  # nats of each document

    def mean(lost: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        total: np.ndarray = lost.sum(axis) / tokens.sum(axis)
        return total

    middle = float(mean(lost, tokens))
    if not lost.any():
        return Ratio(ratio=_exp(middle), low=_exp(middle), high=_exp(middle))
    count = len(lost)
    low, high = bootstrap(mean, lost, tokens, confidence=_expanded(count), paired=True)
    error = float(np.std(lost - middle * tokens, ddof=1)) * math.sqrt(count) / float(tokens.sum())
    reach = _student(count) * error
    return Ratio(ratio=_exp(middle), low=_exp(min(low, middle - reach)), high=_exp(max(high, middle + reach)))


def paired_by_documents(dense: Perplexity, pruned: Perplexity) -> bool:
    """Whether two perplexities can be compared document by document."""
    return min(len(dense.documents), len(pruned.documents)) >= FEWEST_DOCUMENTS


class PairedAccuracy(Strict):
    """Two models on the same items of one task."""

    metric: Metric | None = None  # None in a report of before it was told
    items: int
    dense: float
    pruned: float
    lost: int  # dense was right, pruned is wrong
    gained: int
    p_value: float  # exact McNemar test: how likely chance alone makes lost and gained as unequal
    cut: int | None = None  # items that lost their beginning: longer than what is read at once; None in older reports


def paired_accuracy(dense: TaskScore, pruned: TaskScore) -> PairedAccuracy:
    """McNemar's exact test on items (Psychometrika 12, 1947): only those count that one of the two got right."""
    before, after = np.array(dense.correct), np.array(pruned.correct)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    p_value = float(scipy.stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return PairedAccuracy(
        metric=dense.metric,
        items=len(before),
        dense=dense.accuracy,
        pruned=pruned.accuracy,
        lost=lost,
        gained=gained,
        p_value=p_value,
        cut=dense.cut,  # the pruned model reads the same tokens
    )


def retained_accuracy(dense: ZeroShot, pruned: ZeroShot) -> Ratio:
    """Mean accuracy over the tasks, pruned / dense, with a 95% interval over items, paired, within each task.

    The interval is Jeffreys': half an item is added to the counts of items that both, one or none of the two got right,
    and their shares drawn from what these leave possible. A bootstrap draws no item that was not seen: where one is
    seldom lost, 50 items often show none, and its interval then has no width. Half an item for all tasks together: for
    each it would draw what many tasks of few items say towards 1. Raises TextError when dense has none right.
    """
    if not dense.mean_accuracy:
        raise TextError("zero-shot: the dense model has no item right to retain; ask more with evaluate.task_items")
    generator = np.random.default_rng(0)
    middle = pruned.mean_accuracy / dense.mean_accuracy
    means = np.zeros((2, RESAMPLES))
    for before, after in zip(dense.tasks, pruned.tasks, strict=True):
        outcomes = 2 * np.array(before.correct, dtype=int) + np.array(after.correct, dtype=int)  # (items,)
        counts = np.bincount(outcomes, minlength=4)
        _, gained, lost, both = generator.dirichlet(counts + 0.5 / len(dense.tasks), size=RESAMPLES).T
        means += [both + lost, both + gained]
    low, high = np.percentile(means[1] / means[0], [2.5, 97.5])
    return Ratio(ratio=middle, low=min(float(low), middle), high=max(float(high), middle))
