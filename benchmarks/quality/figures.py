"""What follows from the rows: perplexity ratios with intervals over seeds, and the figures that the targets judge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.quality.rows import Accuracies, Kind, Losses, Row, Selected
from benchmarks.quality.store import Store
from benchmarks.quality.table import RIVALS, Table, dense_row, labelled_rows, selection_row
from benchmarks.targets import above, at_most
from trsp_deploy.recipe import Strict
from trsp_deploy.results import ZeroShot

# Two-sided 95% quantile of Student's t by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Interval(Strict):
    """Mean over seeds and its 95% t-interval; one seed has no interval."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


TARGETS = {
    "untrained_to_sleb": at_most(
        0.72, "default's layers, refitted, nothing trained, over SLEB, perplexity, worst text"
    ),
    "ratio_in_131k": at_most(1.35, "default over dense, perplexity in the calibration's domain, 131k tokens"),
    "ratio_out_131k": at_most(1.30, "default over dense, perplexity, worst text of another domain, 131k tokens"),
    "ratio_in_524k": at_most(1.25, "default over dense, perplexity in the calibration's domain, 524k tokens"),
    "ratio_out_524k": at_most(1.25, "default over dense, perplexity, worst text of another domain, 524k tokens"),
    "to_control_33k": at_most(1.0, "default over remove-then-train, perplexity, worst text, 33k tokens"),
    "to_control_131k": at_most(1.0, "default over remove-then-train, perplexity, worst text, 131k tokens"),
    "to_control_524k": at_most(1.0, "default over remove-then-train, perplexity, worst text, 524k tokens"),
    "annealed_in_131k": at_most(
        1.35, "nothing trained after the removal (refitted, annealed) over dense, the domain, 131k tokens"
    ),
    "annealed_out_131k": at_most(1.30, "the same, worst text of another domain, 131k tokens"),
    "annealed_in_524k": at_most(1.25, "the same, the domain, 524k tokens"),
    "annealed_out_524k": at_most(1.25, "the same, worst text of another domain, 524k tokens"),
    "annealed_to_control_33k": at_most(1.0, "the same over remove-then-train, perplexity, worst text, 33k tokens"),
    "annealed_to_control_131k": at_most(1.0, "the same over remove-then-train, perplexity, worst text, 131k tokens"),
    "annealed_to_control_524k": at_most(1.0, "the same over remove-then-train, perplexity, worst text, 524k tokens"),
    "selection_spread": at_most(1.02, "largest over smallest removal loss of the default selection, five seeds"),
    "selection_loss_to_sleb": at_most(1.0, "mean removal loss of the default selection over SLEB's, five seeds"),
    "selection_passes_to_sleb": at_most(0.1, "forward passes of the default selection over SLEB's"),
    "zero_shot_margin": above(
        0.0,
        "retained zero-shot accuracy of the default less the best rival's at equal tokens, mean of five tasks",
    ),
}
ANNEALED = "refit-anneal"  # the best of the arms that train nothing after the removal
BUDGETS = {"33k": 32, "131k": 128, "524k": 512}  # steps


class Found:
    """The rows of a table that are there, asked by name."""

    def __init__(self, table: Table, store: Store) -> None:
        self.table = table
        self.store = store
        self._rows = [row for row in labelled_rows(table) if row in store]
        self.texts = tuple(table.subject.tests)

    def rows(self, kind: Kind, arm: str, steps: int = 0, drop: int | None = None) -> list[Row]:
        """Finished rows of an arm, one a seed."""
        wanted = {"dense-trained": 0}.get(kind, self.table.drop if drop is None else drop)
        return [row for row in self._rows if (row.kind, row.arm, row.steps, row.drop) == (kind, arm, steps, wanted)]

    def log_ratios(self, rows: Iterable[Row], text: str) -> dict[int, float]:
        """Seed -> log of perplexity over the dense model's; empty until the dense row is there."""
        dense = self.losses(dense_row(self.table), text)
        if dense is None:
            return {}
        found = {row.seed: self.losses(row, text) for row in rows}
        return {seed: value - dense for seed, value in found.items() if value is not None}

    def losses(self, row: Row, text: str) -> float | None:
        """Mean loss in nats of a row's model on a text."""
        line = self.store.get(row)
        if line is None or not isinstance(line.outcome, Losses):
            return None
        return float(np.mean(line.outcome.nll[text]))

    def ratio(self, kind: Kind, arm: str, text: str, steps: int = 0, drop: int | None = None) -> Interval | None:
        """Perplexity over the dense model's."""
        return over_seeds(list(self.log_ratios(self.rows(kind, arm, steps, drop), text).values()))

    def ratio_to(self, arm: str, other: str, kind: Kind, text: str, steps: int = 0) -> Interval | None:
        """Perplexity of one arm over another's, in pairs of equal seeds."""
        ours, theirs = (self.log_ratios(self.rows(kind, name, steps), text) for name in (arm, other))
        return over_seeds([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def processors(self, kind: Kind, arm: str, steps: int = 0) -> set[str]:
        """On which processors an arm's rows were made, and in what they multiply: bf16 rounds otherwise than fp32."""
        lines = [self.store.get(row) for row in self.rows(kind, arm, steps)]
        return {f"{line.provenance.cpu} {line.products}".strip() for line in lines if line is not None}

    def selections(self, name: str) -> list[Selected]:
        """Outcomes of a selector, one a seed."""
        lines = [self.store.get(selection_row(self.table, name, seed)) for seed in self.table.selection_seeds]
        return [line.outcome for line in lines if line is not None and isinstance(line.outcome, Selected)]

    def accuracies(self, arm: str) -> dict[int, ZeroShot]:
        """Seed -> zero-shot answers of an arm, or of the dense model by the name `dense`."""
        rows = [row for row in self._rows if (row.kind, row.arm) == ("zero-shot", arm)]
        found = {row.seed: line.outcome for row in rows if (line := self.store.get(row)) is not None}
        return {seed: outcome.score for seed, outcome in found.items() if isinstance(outcome, Accuracies)}

    def retained(self, arm: str) -> dict[int, float]:
        """Seed -> mean accuracy over the dense model's; empty until that has answered."""
        dense = [score.mean_accuracy for score in self.accuracies("dense").values()]
        return {seed: score.mean_accuracy / dense[0] for seed, score in self.accuracies(arm).items() if dense}


def over_seeds(logs: Sequence[float]) -> Interval | None:
    """exp of the mean log and of its t-interval; None without a value."""
    mean = mean_over_seeds(logs)
    if mean is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (mean.low, mean.high))
    return Interval(mean=math.exp(mean.mean), low=low, high=high, seeds=mean.seeds)


def mean_over_seeds(values: Sequence[float]) -> Interval | None:
    """Mean and its t-interval; None without a value."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean=mean, low=None, high=None, seeds=1)
    margin = T_975[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - margin, high=mean + margin, seeds=len(values))


def figures(found: Found) -> dict[str, float | None]:
    """One number for each target; None while a row that it needs is missing."""
    inside, *outside = found.texts
    untrained = (found.ratio_to("layers", "sleb", "untrained", text) for text in found.texts)
    values = {"untrained_to_sleb": _worst(untrained, len(found.table.seeds))}
    for budget in ("131k", "524k"):
        for name, arm in (("ratio", "default"), ("annealed", ANNEALED)):
            values[f"{name}_in_{budget}"] = _ratio(found, arm, [inside], budget)
            values[f"{name}_out_{budget}"] = _ratio(found, arm, outside, budget)
    for budget in BUDGETS:
        values[f"to_control_{budget}"] = _to_control(found, "default", "control", budget)
        values[f"annealed_to_control_{budget}"] = _to_control(found, ANNEALED, "given-text-control", budget)
    values |= _selection_figures(found)
    values["zero_shot_margin"] = _margin(found)
    return {name: values[name] for name in TARGETS}


def _ratio(found: Found, arm: str, texts: Iterable[str], budget: str) -> float | None:
    return _worst((found.ratio("trained", arm, text, BUDGETS[budget]) for text in texts), len(found.table.seeds))


def _to_control(found: Found, arm: str, control: str, budget: str) -> float | None:
    pairs = (found.ratio_to(arm, control, "trained", text, BUDGETS[budget]) for text in found.texts)
    return _worst(pairs, len(found.table.seeds))


def _worst(intervals: Iterable[Interval | None], seeds: int) -> float | None:
    """The largest mean; None when one is missing or lacks a seed: what is not looked at may be the worst."""
    known = list(intervals)
    means = [interval.mean for interval in known if interval is not None and interval.seeds == seeds]
    # numpy's: one that is not a number stays one, and keeps no bound.
    return float(np.max(means)) if means and len(means) == len(known) else None


def _selection_figures(found: Found) -> dict[str, float | None]:
    wanted = len(found.table.selection_seeds)
    ours, sleb = found.selections("default"), found.selections("sleb")
    losses = [selected.removal_loss for selected in ours]
    both = bool(ours and sleb)
    return {
        "selection_spread": max(losses) / min(losses) if len(losses) == wanted and wanted > 1 else None,
        "selection_loss_to_sleb": _over(ours, sleb, "removal_loss") if len(ours) == len(sleb) == wanted else None,
        "selection_passes_to_sleb": _over(ours, sleb, "window_passes") if both else None,
    }


def _over(ours: Sequence[Selected], theirs: Sequence[Selected], field: str) -> float:
    means = [float(np.mean([getattr(selected, field) for selected in side])) for side in (ours, theirs)]
    return means[0] / means[1]


def _margin(found: Found) -> float | None:
    """Mean over the seeds that both have answered with, of the rival that leaves the least."""
    ours, rivals = found.retained("default"), [found.retained(name) for name in RIVALS]
    paired = [[ours[seed] - theirs[seed] for seed in ours if seed in theirs] for theirs in rivals]
    return min(float(np.mean(pairs)) for pairs in paired) if all(paired) else None
