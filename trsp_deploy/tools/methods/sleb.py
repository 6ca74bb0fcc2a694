"""SLEB: remove, again and again, the layer whose removal costs least on the calibration text.

Source: SLEB, Song et al. 2024, arXiv 2402.09025, section 3.3 (its third metric: the loss of the model without
the layers already removed and without the candidate); jiwonsong-dev/SLEB.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods.base import Selection, checked_finite, checked_num_layers
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import mean_loss


def select_by_removal_loss(
    model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int
) -> Selection:
    """Choose `num_dropped` layers greedily, trying every layer that is left in each round.

    windows: (windows, sequence) int64. scores: `order` (layers as they went) and `removal_loss` (rounds x layers, nats;
    None where a layer was gone already). Costs num_layers + (num_layers - 1) + ... forward passes, one a trial.
    Raises RecipeError, TextError or ModelError (`base.py`).
    """
    num_layers = checked_num_layers(model, windows, num_dropped)
    order: list[int] = []
    rounds: list[list[float | None]] = []
    trials = sum(num_layers - gone for gone in range(num_dropped))
    with LayerGates(model) as gates, Meter("sleb", trials) as meter:
        for _ in range(num_dropped):
            candidates = gates.open
            losses = checked_finite(_removal_losses(model, gates, windows, batch_size, meter), "loss without a layer")
            loss_of = dict(zip(candidates, losses, strict=True))
            layer = min(candidates, key=loss_of.__getitem__)
            gates.closed.add(layer)
            order.append(layer)
            rounds.append([loss_of.get(index) for index in range(num_layers)])
    return Selection(tuple(sorted(order)), {"order": order, "removal_loss": rounds}, forward_passes=trials)


def _removal_losses(
    model: PreTrainedModel, gates: LayerGates, windows: torch.Tensor, batch_size: int, meter: Meter
) -> list[float]:
    """Loss in nats without each open layer in turn, beside the layers already closed."""
    losses = []
    for layer in gates.open:
        gates.closed.add(layer)
        losses.append(mean_loss(model, windows, batch_size))
        gates.closed.remove(layer)
        meter.advance(f"removed {len(gates.closed)}, without layer {layer} {losses[-1]:.3f}")
    return losses
