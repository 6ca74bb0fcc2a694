"""Fold: the span of layers that loses least once it is folded into the layer before it.

Source: ReplaceMe, Shopkhoev et al. 2025, arXiv 2505.02819, which takes the span of the smallest angular distance. The
fold itself, its weight edit, is `tools/closed_form/span.py`; `transfer.refit: span` writes it for any selection.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trsp_deploy.errors import RecipeError, TextError
from trsp_deploy.tools.closed_form.equations import sink_positions
from trsp_deploy.tools.closed_form.hidden_states import visit_layers
from trsp_deploy.tools.closed_form.span import RIDGE, fit_spans, folded, projections_before
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods.base import Selection, checked_finite, removable_layers
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.shared import mean_loss

SHORTLIST = 5  # spans whose true loss after folding is measured
HELD_OUT = 0.25  # share of the windows that the trial folds are scored on and not fitted to


def select_span_by_folded_loss(
    model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int
) -> Selection:
    """Choose the span of `num_dropped` layers that loses least once it is folded.

    windows: (windows, sequence) int64. All spans behind layer 0 are ranked by angular distance over ordinary tokens in
    one pass; the SHORTLIST best are folded by way of trial, fitted to the first three quarters of the windows and
    compared by next-token loss on the rest. The ranking alone does not do: of SmolLM2-135M's spans of 8 it prefers
    11-18, whose removal takes the attention sink with it (5.19 nats folded), to 12-19, its second choice (3.81).
    scores: `angular_distance` and `folded_loss` (nats; None outside the shortlist), by first layer.
    Memory: SHORTLIST times that of `fit_spans`, beside the hidden states of one batch.
    Raises RecipeError or TextError (`base.py`; also when the windows hold too few tokens to fit a map) or ModelError
    when the architecture cannot be folded. The model is left as it was, to the last bit.
    """
    free = removable_layers(model, windows, num_dropped)
    fit_windows, held_out = _split(windows)
    distance = checked_finite(span_distances(model, windows, num_dropped, batch_size), "angular distance")
    candidates = [first for first in free if first and first + num_dropped - 1 in free]
    if not candidates:
        raise RecipeError(
            f"no span of {num_dropped} layers leaves both layer 0 and what cannot go; valid: fewer layers"
        )
    ranked = sorted(candidates, key=lambda first: distance[first - 1])[:SHORTLIST]
    spans = [(first, first + num_dropped - 1) for first in ranked]
    fits = fit_spans(model, projections_before(model, spans, fit_windows), fit_windows, batch_size)
    losses: dict[int, float] = {}
    with LayerGates(model) as gates, Meter("fold: trials", len(fits)) as meter:
        for fit in fits:
            first = fit.kept + 1
            gates.closed = set(range(first, fit.last + 1))
            with folded(fit, RIDGE):
                losses[first] = mean_loss(model, held_out, batch_size)
            meter.advance(f"layers {first} to {fit.last} folded {losses[first]:.3f}")
    checked_finite(losses.values(), "loss after folding")
    first = min(losses, key=losses.__getitem__)
    return Selection(
        dropped=tuple(range(first, first + num_dropped)),
        scores={
            "angular_distance": [None, *distance],
            "folded_loss": [losses.get(index) for index in range(len(distance) + 1)],
        },
        forward_passes=1 + (len(fit_windows) + len(fits) * len(held_out)) / len(windows),
    )


def span_distances(model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int) -> list[float]:
    """Mean angular distance between what enters and what leaves each span that starts at layer 1, 2, ...

    Over all tokens but sinks, which look unchanged by any span.
    """
    entered: dict[int, torch.Tensor] = {}
    total: dict[int, float] = {}
    count: dict[int, int] = {}

    def visit(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        entered[index] = entering
        first = index - num_dropped + 1
        if first < 1:
            return
        start = entered.pop(first)
        ordinary = ~(sink_positions(start) | sink_positions(leaving))
        cosine = torch.cosine_similarity(start.float(), leaving.float(), dim=-1)[ordinary]
        total[first] = total.get(first, 0.0) + (cosine.clamp(-1, 1).arccos() / torch.pi).double().sum().item()
        count[first] = count.get(first, 0) + len(cosine)

    visit_layers(model, windows, batch_size, visit, "fold: distances")
    return [total[first] / count[first] for first in sorted(total)]


def _split(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to fit trial folds to, and windows to score them on."""
    held_out = max(1, round(HELD_OUT * len(windows)))
    if len(windows) < 2:
        raise TextError("fold needs at least 2 calibration windows: one to fit to and one to compare spans on")
    return windows[:-held_out], windows[-held_out:]
