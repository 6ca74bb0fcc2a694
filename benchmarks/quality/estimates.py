"""How long a row takes, for the estimate of the time left: rough seconds on 2 cores, scaled by what was measured."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.quality.rows import Row
from benchmarks.quality.store import Line, products_here
from trsp_deploy.artifacts import provenance

START_S = 15.0  # imports and loading
TOKEN_S = 1.6e-3  # a forward pass, SmolLM2-135M
TRAINED_TOKEN_S = 5.5e-3  # forward, backward and the dense model's forward
REFIT_TOKEN_S = 2.5e-3
REQUEST_S = 0.15  # zero-shot: one choice of one item
CHOICES = {"piqa": 2, "copa": 2, "arc-easy": 4, "arc-challenge": 4, "sciq": 4}
LAYERS = 30


def estimate_s(row: Row) -> float:
    """Seconds on an idle machine of the kind that the constants were taken on."""
    subject = row.subject
    if row.work == "selection":
        windows = _windows_passed(row) + 2 * subject.validation_windows
        return START_S + windows * subject.context_length * TOKEN_S
    if row.work == "zero-shot":
        return START_S + REQUEST_S * sum(
            min(row.items, 100 if t == "copa" else row.items) * CHOICES[t] for t in row.tasks
        )
    fitted = (row.steps * 4 or subject.fit_windows) if row.transfer.get("refit", "none") != "none" else 0
    tested = len(subject.tests) * subject.test_windows * subject.test_context
    checked = 3 * subject.validation_windows * subject.context_length if row.transfer else 0
    refit = fitted * subject.context_length * REFIT_TOKEN_S
    return START_S + (tested + checked) * TOKEN_S + row.tokens * TRAINED_TOKEN_S + refit


def pace(lines: Iterable[Line]) -> float:
    """Measured over estimated seconds of the rows that this kind of processor made; 1 before the first.

    Of processors of one name, those that multiply in the same precision: the others take twice as long.
    """
    named = [line for line in lines if line.provenance.cpu == provenance().cpu]
    here = [line for line in named if line.products == products_here(line.row)] or named
    estimated = sum(estimate_s(line.row) for line in here)
    return sum(line.elapsed_s for line in here) / estimated if estimated else 1.0


def _windows_passed(row: Row) -> float:
    method = row.plan.get("method", "trsp")
    if method == "sleb":
        return row.windows * sum(LAYERS - gone for gone in range(row.drop))
    if method == "trsp":
        learned = 3 * row.plan.get("steps", 8) * row.plan.get("batch_size", 4)
        verified = 3 * row.plan.get("candidates", 8) * row.plan.get("trial_windows", 1)
        return row.drop * float(learned + verified) + 4 * LAYERS  # and the spans at the end
    return row.windows * (4.0 if method == "fold" else 1.0)


def hours(seconds: float) -> str:
    """For people: 45 s, 12 min or 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
