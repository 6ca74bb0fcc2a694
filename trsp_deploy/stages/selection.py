"""Stage 1: choose the layers to drop, by TRSP's gates or by the rival that the recipe names (`tools/methods`).

TRSP (arXiv 2505.18232, section 3.1): learn a gate a layer under an l1 penalty, move the layer with the smallest one
into the set P and skip it from then on, let the rest learn again, until enough layers are picked.

What differs from the paper:
- only the gates train; the weights stay frozen, so no weight gradients are computed;
- the few layers with the smallest gates are each taken out in turn, and the one whose true removal
  costs least on held-out text is picked (`candidates: 1` trusts the gate alone, as the paper does).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers, next_token_loss
from trsp_deploy.recipe import PlanSettings, Recipe
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods import METHODS
from trsp_deploy.tools.plan import Pick, PruningPlan, complement
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import autocast, batches, mean_loss, pick_device


def select_layers(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    num_dropped: int,
    recipe: Recipe,
    calibration: str,
) -> PruningPlan:
    """Choose `num_dropped` layers of `model`.

    train, validation: (windows, sequence) int64 token ids; the validation windows are never trained on.
    calibration: where the text came from, for the plan's own record.
    """
    model.requires_grad_(False)
    batch_size = recipe.plan.batch_size
    with torch.no_grad(), autocast(recipe, pick_device(recipe)):  # as the removal losses it is compared with
        dense_loss = round(mean_loss(model, validation, batch_size), 6)
    picks: tuple[Pick, ...] = ()
    settings = recipe.plan.model_dump()
    if recipe.plan.method == "trsp":
        picks = _pick_by_gates(model, train, validation, num_dropped, recipe)
        dropped = tuple(sorted(pick.layer for pick in picks))
    else:
        # In full precision: fold solves equations with what it sees.
        found = METHODS[recipe.plan.method].select(model, train, num_dropped, batch_size)
        dropped = found.dropped
        settings = {"batch_size": batch_size, "scores": found.scores, "forward_passes": found.forward_passes}
    num_layers = len(decoder_layers(model))
    return PruningPlan(
        model=recipe.model,
        num_layers=num_layers,
        dropped=dropped,
        kept=complement(dropped, num_layers),
        method=recipe.plan.method,
        seed=recipe.seed,
        settings=settings,
        calibration=calibration,
        dense_loss=dense_loss,
        picks=picks,
    )


def _pick_by_gates(
    model: PreTrainedModel, train: torch.Tensor, validation: torch.Tensor, num_dropped: int, recipe: Recipe
) -> tuple[Pick, ...]:
    """TRSP's greedy rounds: learn, take out the candidates in turn, close the one that costs least."""
    settings = recipe.plan
    batch = batches(train, settings.batch_size, recipe.seed)
    picks: list[Pick] = []
    with (
        LayerGates(model, settings.gate) as gates,
        autocast(recipe, pick_device(recipe)),
        Meter("selection", num_dropped * (settings.steps + min(settings.candidates, len(gates.open)))) as meter,
    ):
        for _ in range(num_dropped):
            losses, trajectory = _learn_gates(model, gates, batch, settings, meter)
            smallest = sorted(gates.open, key=lambda index: abs(gates.values[index].item()))[: settings.candidates]
            removal_loss = _removal_losses(model, gates, smallest, validation, settings, meter)
            # With one candidate there is nothing to choose between and the gate alone has decided.
            layer = min(removal_loss, key=removal_loss.__getitem__)
            gates.closed.add(layer)
            picks.append(Pick(layer=layer, lm_loss=losses, gates=trajectory, removal_loss=removal_loss))
    return tuple(picks)


def _learn_gates(
    model: PreTrainedModel,
    gates: LayerGates,
    batch: Iterator[torch.Tensor],
    settings: PlanSettings,
    meter: Meter,
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Train the open gates for `settings.steps` updates; returns LM losses and gate values by update."""
    optimizer = torch.optim.Adam([gates.values], lr=settings.learning_rate)
    losses, trajectory = [], []
    for _ in range(settings.steps):
        lm_loss = next_token_loss(model, next(batch).to(gates.values.device))
        loss = lm_loss + settings.l1 * gates.values[gates.open].abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(lm_loss.item(), 5))
        trajectory.append(tuple(round(value, 5) for value in gates.values.tolist()))
        meter.advance(f"picked {len(gates.closed)}, loss {lm_loss.item():.3f}")
    return tuple(losses), tuple(trajectory)


def _removal_losses(
    model: PreTrainedModel,
    gates: LayerGates,
    candidates: list[int],
    validation: torch.Tensor,
    settings: PlanSettings,
    meter: Meter,
) -> dict[int, float]:
    """Held-out loss once each candidate is gone beside the layers already picked, all other gates at 1."""
    learned = gates.values.detach().clone()
    gates.reset()
    losses = {}
    for layer in candidates:
        gates.closed.add(layer)
        losses[layer] = mean_loss(model, validation, settings.batch_size)
        gates.closed.remove(layer)
        meter.advance(f"picked {len(gates.closed)}, without layer {layer} {losses[layer]:.3f}")
    with torch.no_grad():
        gates.values.copy_(learned)
    return losses
