"""Stage 1: learn a gate a layer under an l1 penalty and pick the layers to drop, greedily.

Source: TRSP, arXiv 2505.18232, section 3.1. Train the gates, move the layer with the smallest one into the
set P and skip it from then on, let the rest learn again, until enough layers are picked.

Two additions, each switched off by a setting:
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
    settings = recipe.plan
    device = pick_device(recipe)
    num_layers = len(decoder_layers(model))
    model.requires_grad_(False)
    batch = batches(train, settings.batch_size, recipe.seed)
    picks: list[Pick] = []
    with (
        LayerGates(model, settings.gate) as gates,
        autocast(recipe, device),
        Meter("selection", num_dropped * (settings.steps + min(settings.candidates, num_layers))) as meter,
    ):
        dense_loss = mean_loss(model, validation, settings.batch_size)
        for _ in range(num_dropped):
            losses, trajectory = _learn_gates(model, gates, batch, settings, meter)
            smallest = sorted(gates.open, key=lambda index: abs(gates.values[index].item()))[: settings.candidates]
            removal_loss = _removal_losses(model, gates, smallest, validation, settings, meter)
            # With one candidate there is nothing to verify and the gate alone decides.
            layer = min(removal_loss, key=removal_loss.__getitem__)
            gates.closed.add(layer)
            picks.append(Pick(layer=layer, lm_loss=losses, gates=trajectory, removal_loss=removal_loss))
    dropped = tuple(sorted(gates.closed))
    return PruningPlan(
        model=recipe.model,
        num_layers=num_layers,
        dropped=dropped,
        kept=complement(dropped, num_layers),
        method="trsp",
        seed=recipe.seed,
        settings=settings.model_dump(),
        calibration=calibration,
        dense_loss=dense_loss,
        picks=tuple(picks),
    )


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


def select_by_rival(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    num_dropped: int,
    recipe: Recipe,
    calibration: str,
) -> PruningPlan:
    """Choose layers by the rival method that the recipe names (`tools/methods`); arguments as `select_layers`."""
    method = METHODS[recipe.plan.method]
    batch_size = recipe.plan.batch_size
    with torch.no_grad():  # and in full precision: fold solves equations with what it sees
        dense_loss = mean_loss(model, validation, batch_size)
        found = method.select(model, train, num_dropped, batch_size)
    return PruningPlan(
        model=recipe.model,
        num_layers=len(decoder_layers(model)),
        dropped=found.dropped,
        kept=complement(found.dropped, len(decoder_layers(model))),
        method=recipe.plan.method,
        seed=recipe.seed,
        settings=recipe.plan.model_dump(include={"method", "batch_size"})
        | {"scores": found.scores, "forward_passes": found.forward_passes},
        calibration=calibration,
        dense_loss=dense_loss,
    )
