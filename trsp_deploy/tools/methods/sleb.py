"""SLEB: remove, again and again, the layer whose removal costs least on the calibration text.

Source: SLEB, Song et al. 2024, arXiv 2402.09025, section 3.3 (its third metric: the loss of the model without
the layers already removed and without the candidate); jiwonsong-dev/SLEB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods.base import Rounds, Selection, checked_finite, removable_layers
from trsp_deploy.tools.methods.trials import Layers, Trials
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.losses import TokenLosses


def select_by_removal_loss(
    model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int, kept: Rounds | None = None
) -> Selection:
    """Choose `num_dropped` layers greedily, trying every layer that is left in each round.

    windows: (windows, sequence) int64. kept: rounds to go on after; None begins with the first.
    scores: `order` (layers as they went) and `removal_loss` (rounds x layers, nats; None where a layer was gone already
    or may not go).
    Costs num_layers + (num_layers - 1) + ... forward passes, one a trial, of which each computes what is behind the
    candidate alone.
    Raises RecipeError, TextError or ModelError (`base.py`).
    """
    free = removable_layers(model, windows, num_dropped)
    rounds: list[list[float | None]] = [] if kept is None else [*kept.found]
    order = [_cheapest(losses) for losses in rounds]
    passes, done = (sum(len(free) - gone for gone in range(count)) for count in (num_dropped, len(order)))
    batches = math.ceil(len(windows) / batch_size)
    with LayerGates(model) as gates, Meter("sleb", passes * batches, done * batches) as meter:
        gates.closed.update(order)
        trials = Trials(TokenLosses(model), gates)

        def report(layers: Layers, loss: float, read: int) -> None:
            meter.advance(f"removed {len(order)}, without layer {layers[-1]} {loss:.3f}")

        while len(order) < num_dropped:
            candidates = [(*order, layer) for layer in free if layer not in order]
            losses = trials.losses(candidates, windows, batch_size, report)
            checked_finite(losses.values(), "loss without a layer")
            loss_of = {layers[-1]: loss for layers, loss in losses.items()}
            rounds.append([loss_of.get(index) for index in range(len(gates.values))])
            order.append(_cheapest(rounds[-1]))
            gates.closed.add(order[-1])
            if kept is not None:
                kept.keep(rounds)
    return Selection(tuple(sorted(order)), {"order": order, "removal_loss": rounds}, forward_passes=passes)


def _cheapest(losses: Sequence[float | None]) -> int:
    """The layer whose removal costs least; None is one that was not tried."""
    return min((loss, layer) for layer, loss in enumerate(losses) if loss is not None)[1]
