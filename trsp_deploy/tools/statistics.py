"""Statistics of paired samples: ratios with 95% intervals by a bootstrap over the pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trsp_deploy.recipe import Strict
from trsp_deploy.results import Latency, Measurement, Perplexity

RESAMPLES = 2000


class Ratio(Strict):
    """A ratio and its 95% interval."""

    ratio: float
    low: float
    high: float


def speedup(dense: Sequence[float], pruned: Sequence[float]) -> Ratio:
    """exp of the median log ratio of paired blocks, in seconds; the same index is the same moment."""
    return _paired(np.log(np.asarray(dense) / np.asarray(pruned)), np.median)


def prefill_speedup(measurement: Measurement) -> Ratio:
    """Speed-up of reading the prompt."""
    return speedup(measurement.dense.prefill_s, measurement.pruned.prefill_s)


def decode_speedup(measurement: Measurement) -> Ratio:
    """Speed-up of a token; a block's time is the median of its tokens."""
    return speedup(decode_by_block(measurement.dense), decode_by_block(measurement.pruned))


def decode_by_block(latency: Latency) -> list[float]:
    """Median seconds a token of each block."""
    return [float(np.median(block)) for block in latency.decode_s]


def perplexity_ratio(dense: Perplexity, pruned: Perplexity) -> Ratio:
    """pruned / dense perplexity; the pairs are windows of the same tokens."""
    return _paired(np.array(pruned.nll) - np.array(dense.nll), np.mean)


def _paired(logs: np.ndarray, centre: Callable[..., np.ndarray]) -> Ratio:
    # A fixed seed: the same samples always show the same interval.
    picks = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.percentile(centre(logs[picks], axis=1), [2.5, 97.5])
    return Ratio(ratio=float(np.exp(centre(logs))), low=float(np.exp(low)), high=float(np.exp(high)))


def median(values: Sequence[float]) -> float:
    """The median as a plain float."""
    return float(np.median(values))
