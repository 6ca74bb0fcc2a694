"""Ratios with intervals, from samples that were taken in pairs.

A speed-up is the geometric mean over replicates (fresh processes) of the median over their cycles of the ratio of
neighbouring blocks. The replicate is the unit: blocks of one process share its memory layout and its moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from trsp_deploy.errors import TextError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import PHASES, Block, Comparison, Perplexity, Phase, Replicate, Subject, TaskScore, ZeroShot

RESAMPLES = 5000
CONFIDENCE = 0.95
FEWEST_DOCUMENTS = 10
FEWEST_REPLICATES = 5  # below it the largest and the smallest of them enclose the mean too seldom
FEWEST_WINDOWS = 5  # of a text, for the same reason
FEWEST_ITEMS = 50  # of all tasks together: fewer may all be answered alike by chance


class Ratio(Strict):
    """A ratio and its 95% interval."""

    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval, in log units: about the share that the ratio is uncertain by."""
        return (math.log(self.high) - math.log(self.low)) / 2


class Speedup(Strict):
    """Dense time / pruned time of one phase, and what dense against itself showed in the same blocks."""

    found: Ratio  # the interval is never narrower than the control's deviation from 1
    control: Ratio | None  # dense / dense again; None where it was not measured
    replicates: int

    @property
    def noise_floor(self) -> float | None:
        """The largest difference that the control leaves possible between an engine and itself, as a log ratio."""
        return None if self.control is None else _reach(self.control)


def phase_s(block: Block, phase: Phase) -> float:
    """Seconds of one phase of a block; of decoding the median token's."""
    if phase == "decode":
        return float(np.median(block.decode_s))
    return block.prefill_s if phase == "prefill" else block.total_s


def device_s(block: Block, phase: Phase) -> float | None:
    """The same by CUDA events; None on a CPU, and end to end, where the host takes part."""
    if phase == "prefill" or block.device_decode_s is None:
        return block.device_prefill_s if phase == "prefill" else None
    return float(np.median(block.device_decode_s)) if phase == "decode" else None


def speedup(replicates: Sequence[Replicate], case: int, phase: Phase) -> Speedup:
    """Speed-up of one phase at one shape (index into the settings' cases), with its control."""
    return widened(*replicate_ratios(replicates, case, phase))


def widened(ratios: Sequence[float], against_itself: Sequence[float] | None) -> Speedup:
    """Log ratios, one a replicate, as an interval that is never narrower than the control's deviation from 1."""
    found = interval(ratios)
    if against_itself is None:
        return Speedup(found=found, control=None, replicates=len(ratios))
    control = interval(against_itself)
    # Two copies of one engine that differ by so much say that this machine, now, tells nothing finer apart.
    reach, middle = _reach(control), math.log(found.ratio)
    low = min(math.log(found.low), middle - reach)
    high = max(math.log(found.high), middle + reach)
    wide = Ratio(ratio=found.ratio, low=math.exp(low), high=math.exp(high))
    return Speedup(found=wide, control=control, replicates=len(ratios))


def replicate_ratios(
    replicates: Sequence[Replicate], case: int, phase: Phase
) -> tuple[list[float], list[float] | None]:
    """Log ratios dense / pruned and dense again / dense, one a replicate; None without a control."""
    values = [_cycles(replicate, case, phase) for replicate in replicates]
    ratios = [_median(_dense(v) - v["pruned"]) for v in values]
    if not all("again" in v for v in values):
        return ratios, None
    return ratios, [_median(v["again"] - v["dense"]) for v in values]


Speedups = dict[tuple[int, Phase], Speedup]  # by index of the case, and phase


def speedups(replicates: Sequence[Replicate], cases: int) -> Speedups:
    """Every shape's and phase's speed-up."""
    return {(index, phase): speedup(replicates, index, phase) for index in range(cases) for phase in PHASES}


def _cycles(replicate: Replicate, case: int, phase: Phase) -> dict[Subject, np.ndarray]:
    """Mean log seconds of each cycle's turns, (cycles,): a drift that is linear over a cycle cancels."""

    def logs(subject: Subject) -> np.ndarray:
        blocks = replicate.blocks[subject][case]
        return np.log([phase_s(block, phase) for block in blocks]).reshape(-1, replicate.blocks_per_cycle).mean(axis=1)

    return {subject: logs(subject) for subject in replicate.blocks}


def _dense(values: dict[Subject, np.ndarray]) -> np.ndarray:
    """Both copies of dense count, so that the control costs little of the precision that its time would have bought."""
    return (values["dense"] + values["again"]) / 2 if "again" in values else values["dense"]


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


def _reach(ratio: Ratio) -> float:
    return max(abs(math.log(ratio.low)), abs(math.log(ratio.high)))


def interval(logs: Sequence[float] | np.ndarray) -> Ratio:
    """exp of the mean of logs, one a replicate or window, with a 95% bootstrap interval.

    Percentiles of a bootstrap are too narrow for few values; they are taken further out by what Student's t asks for
    (the expanded percentile interval: Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.2).
    Raises ValueError for fewer than two.
    """
    values = np.asarray(logs, dtype=float)
    count, middle = len(values), float(np.mean(values))
    if count < 2:
        raise ValueError("one replicate has no interval")
    if np.ptp(values) == 0:
        return Ratio(ratio=math.exp(middle), low=math.exp(middle), high=math.exp(middle))
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(count / (count - 1))
    found = _bootstrap(np.mean, values, confidence=1 - 2 * float(scipy.stats.norm.sf(quantile)))
    return Ratio(ratio=math.exp(middle), low=math.exp(found[0]), high=math.exp(found[1]))


def _bootstrap(
    statistic: Callable[..., Any], *data: np.ndarray, confidence: float = CONFIDENCE, paired: bool = False
) -> tuple[float, float]:
    # A fixed seed: the same samples always show the same interval.
    found = scipy.stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        paired=paired,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def change(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """after / before of logs taken at different times, one a replicate each, with a 95% interval (Welch)."""
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    middle = float(new.mean() - old.mean())
    if np.ptp(old) == 0 and np.ptp(new) == 0:
        return Ratio(ratio=math.exp(middle), low=math.exp(middle), high=math.exp(middle))
    low, high = scipy.stats.ttest_ind(new, old, equal_var=False).confidence_interval(CONFIDENCE)
    return Ratio(ratio=math.exp(middle), low=math.exp(low), high=math.exp(high))


def replicate_logs(replicates: Sequence[Replicate], subject: Subject, case: int, phase: Phase) -> list[float]:
    """Log seconds of each replicate: the median over its cycles."""
    return [_median(_cycles(replicate, case, phase)[subject]) for replicate in replicates]


def median_s(comparison: Comparison, subject: Subject, case: int, phase: Phase) -> float:
    """Median seconds of a phase over every block."""
    blocks = [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]
    return float(np.median([phase_s(block, phase) for block in blocks]))


def samples_s(comparison: Comparison, subject: Subject, case: int, phase: Phase) -> list[float]:
    """Every single time of a phase in seconds: of decoding, each token's."""
    blocks = [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]
    if phase == "decode":
        return [time for block in blocks for time in block.decode_s]
    return [phase_s(block, phase) for block in blocks]


def perplexity_ratio(dense: Perplexity, pruned: Perplexity) -> Ratio:
    """pruned / dense perplexity of the same tokens, with a bootstrap over documents, paired.

    Over windows instead where a text has fewer than FEWEST_DOCUMENTS; one window has no interval but its own ratio.
    """
    if not paired_by_documents(dense, pruned):
        windows = np.array(pruned.nll) - np.array(dense.nll)
        if len(windows) > 1:
            return interval(windows)
        one = math.exp(float(windows[0]))
        return Ratio(ratio=one, low=one, high=one)
    (before, tokens), (after, _) = (np.array(each.documents).T for each in (dense, pruned))
    lost = after - before  # nats of each document

    def mean(lost: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        total: np.ndarray = lost.sum(axis) / tokens.sum(axis)
        return total

    middle = float(mean(lost, tokens))
    low, high = (middle, middle) if not lost.any() else _bootstrap(mean, lost, tokens, paired=True)
    return Ratio(ratio=math.exp(middle), low=math.exp(low), high=math.exp(high))


def paired_by_documents(dense: Perplexity, pruned: Perplexity) -> bool:
    """Whether two perplexities can be compared document by document."""
    return min(len(dense.documents), len(pruned.documents)) >= FEWEST_DOCUMENTS


class PairedAccuracy(Strict):
    """Two models on the same items of one task."""

    items: int
    dense: float
    pruned: float
    lost: int  # dense was right, pruned is wrong
    gained: int
    p_value: float  # exact McNemar test: of so unequal a lost and gained by chance alone


def paired_accuracy(dense: TaskScore, pruned: TaskScore) -> PairedAccuracy:
    """McNemar's exact test on items (Psychometrika 12, 1947): only those count that one of the two got right."""
    before, after = np.array(dense.correct), np.array(pruned.correct)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    p_value = float(scipy.stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return PairedAccuracy(
        items=len(before), dense=dense.accuracy, pruned=pruned.accuracy, lost=lost, gained=gained, p_value=p_value
    )


def retained_accuracy(dense: ZeroShot, pruned: ZeroShot) -> Ratio:
    """Mean accuracy over the tasks, pruned / dense, with a bootstrap over items, paired, within each task.

    Raises TextError when dense has none.
    """
    if not dense.mean_accuracy:
        raise TextError("zero-shot: the dense model has no item right to retain; ask more with evaluate.task_items")
    generator = np.random.default_rng(0)
    middle = pruned.mean_accuracy / dense.mean_accuracy
    means = np.zeros((2, RESAMPLES))
    for before, after in zip(dense.tasks, pruned.tasks, strict=True):
        picks = generator.integers(before.items, size=(RESAMPLES, before.items))
        means += [np.array(score.correct)[picks].mean(axis=1) for score in (before, after)]
    some = means[0] > 0  # a resample without one right item says nothing of a ratio
    low, high = np.percentile(means[1, some] / means[0, some], [2.5, 97.5])
    return Ratio(ratio=middle, low=float(low), high=float(high))


def paired_ratio(slow: Sequence[float], quick: Sequence[float]) -> Ratio:
    """exp of the median log ratio of paired blocks, in seconds; the same index is the same moment."""
    logs = np.log(np.asarray(slow) / np.asarray(quick))
    low, high = (float(logs[0]),) * 2 if np.ptp(logs) == 0 else _bootstrap(np.median, logs)
    return Ratio(ratio=float(np.exp(np.median(logs))), low=math.exp(low), high=math.exp(high))
