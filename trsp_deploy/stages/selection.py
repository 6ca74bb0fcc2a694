"""Stage 1: choose the layers to drop, by TRSP's gates or by the rival that the recipe names (`tools/methods`).

TRSP (arXiv 2505.18232, section 3.1): learn a gate a layer under an l1 penalty, move the layer with the smallest one
into the set P and skip it from then on, let the rest learn again, until enough layers are picked.

What differs from the paper:
- only the gates train; the weights stay frozen, so no weight gradients are computed;
- the few layers with the smallest gates are each taken out in turn, and the one whose true removal
  costs least is picked (`candidates: 1` trusts the gate alone, as the paper does).
"""

from __future__ import annotations

import itertools
import math

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.recipe import Recipe
from trsp_deploy.tools.checkpoints import Checkpoints
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.losses import TokenLosses
from trsp_deploy.tools.methods import METHODS
from trsp_deploy.tools.plan import Pick, PruningPlan, complement
from trsp_deploy.tools.processes import Processes
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import autocast, batch_order, mean_loss, pick_device


def select_layers(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    num_dropped: int,
    recipe: Recipe,
    calibration: str,
    checkpoints: Checkpoints | None = None,
) -> PruningPlan:
    """Choose `num_dropped` layers of `model`.

    train, validation: (windows, sequence) int64 token ids; the validation windows are never trained on.
    calibration: where the text came from, for the plan's own record.
    checkpoints: where TRSP's gates go on from after a kill; the rivals are quick and start again.
    """
    model.requires_grad_(False)
    batch_size = recipe.plan.batch_size
    num_layers = len(decoder_layers(model))
    picks: tuple[Pick, ...] = ()
    settings = recipe.plan.model_dump()
    if recipe.plan.method == "trsp":
        picking = GatePicking(model, train, validation, recipe, checkpoints)
        dense_loss = picking.held_out_loss()
        picks = picking.run(num_dropped)
        dropped = tuple(sorted(pick.layer for pick in picks))
    else:
        with torch.no_grad(), autocast(recipe, pick_device(recipe)):
            dense_loss = mean_loss(model, validation, batch_size)
        # In full precision: fold solves equations with what it sees.
        found = METHODS[recipe.plan.method].select(model, train, num_dropped, batch_size)
        dropped = found.dropped
        settings = {"batch_size": batch_size, "scores": found.scores, "forward_passes": found.forward_passes}
    return PruningPlan(
        model=recipe.model,
        num_layers=num_layers,
        dropped=dropped,
        kept=complement(dropped, num_layers),
        method=recipe.plan.method,
        seed=recipe.seed,
        settings=settings,
        calibration=calibration,
        dense_loss=round(dense_loss, 6),
        picks=picks,
    )


class GatePicking:
    """TRSP's greedy rounds: learn, take out the candidates in turn, close the one that costs least."""

    def __init__(
        self,
        model: PreTrainedModel,
        train: torch.Tensor,
        validation: torch.Tensor,
        recipe: Recipe,
        checkpoints: Checkpoints | None,
    ) -> None:
        """model: dense and frozen."""
        self._windows = train
        self._validation = validation
        self._recipe = recipe
        self._settings = recipe.plan
        self._checkpoints = checkpoints
        self._device = pick_device(recipe)
        self._processes = Processes(self._device)
        self._gates = LayerGates(model, recipe.plan.gate)
        self._losses = TokenLosses(model)
        self._module = self._processes.wrap(self._losses)
        self._picks: list[Pick] = []
        self._start_round()

    def _start_round(self) -> None:
        """A round begins with the gates as the last one left them, and with an optimiser that knows nothing."""
        self._optimizer = torch.optim.Adam([self._gates.values], lr=self._settings.learning_rate)
        self._lm_losses: list[float] = []  # nats, one an update
        self._trajectory: list[tuple[float, ...]] = []  # all gates, after each update

    def held_out_loss(self) -> float:
        """Mean loss in nats over the validation windows, in the training's precision."""
        with autocast(self._recipe, self._device):
            return mean_loss(self._losses, self._validation, self._settings.batch_size)

    def run(self, num_dropped: int) -> tuple[Pick, ...]:
        """Pick layers until `num_dropped` are closed."""
        steps, gates = self._settings.steps, self._gates
        trials = _num_trials(min(self._settings.candidates, len(gates.open)))
        self._restore()
        done = len(self._picks) * (steps + trials) + len(self._lm_losses)
        order = batch_order(len(self._windows), self._settings.batch_size, self._recipe.seed)
        order = itertools.islice(order, len(self._picks) * steps + len(self._lm_losses), None)
        with gates, Meter("selection", num_dropped * (steps + trials), done) as meter:
            while len(self._picks) < num_dropped:
                while len(self._lm_losses) < steps:
                    self._update(next(order))
                    self._save_if_due()
                    meter.advance(f"picked {len(self._picks)}, loss {self._lm_losses[-1]:.3f}")
                self._pick(meter)
                self._save_if_due()
        return tuple(self._picks)

    def _update(self, rows: torch.Tensor) -> None:
        """One step of the open gates on windows `rows`."""
        values = self._gates.values
        part = self._windows[self._processes.share(rows, "plan.batch_size")]
        with autocast(self._recipe, self._device):
            found = self._module(part.to(self._device))
        loss = found.total + self._settings.l1 * values[self._gates.open].abs().sum()
        (values.grad,) = torch.autograd.grad(loss, [values])
        values.grad = self._processes.mean(values.grad)
        self._optimizer.step()
        self._lm_losses.append(round(self._processes.mean(found.lm).item(), 5))
        self._trajectory.append(tuple(round(value, 5) for value in values.tolist()))

    def _pick(self, meter: Meter) -> None:
        """Close, of the layers with the smallest gates, the one whose removal costs least."""
        gates = self._gates
        smallest = sorted(gates.open, key=lambda index: abs(gates.values[index].item()))[: self._settings.candidates]
        # With one candidate there is nothing to choose between and the gate alone has decided.
        removal_loss = self._removal_losses(smallest, meter)
        layer = min(removal_loss, key=removal_loss.__getitem__)
        gates.closed.add(layer)
        self._picks.append(
            Pick(layer=layer, lm_loss=tuple(self._lm_losses), gates=tuple(self._trajectory), removal_loss=removal_loss)
        )
        self._start_round()

    def _removal_losses(self, candidates: list[int], meter: Meter) -> dict[int, float]:
        """Loss once each candidate is gone beside the layers already picked, all other gates at 1.

        Successive halving (Jamieson and Talwalkar 2016): all candidates read `trial_windows` windows, the better half
        as many more as cost the same again, and so on, so that most windows go to those that are hard to tell apart.
        Returned are mean losses in nats over what each has read, of the last two or three: the others read less.
        """
        gates, learned = self._gates, self._gates.values.detach().clone()
        gates.reset()
        rows = next(batch_order(len(self._windows), len(self._windows), self._recipe.seed + len(self._picks)))
        total, losses, read, share = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0), 0, 1
        while True:
            part = rows[read : read + share * self._settings.trial_windows]
            for layer in candidates:
                total[layer] += len(part) * self._loss_without(layer, self._windows[part]) if len(part) else 0.0
                losses[layer] = total[layer] / (read + len(part))
                meter.advance(f"picked {len(gates.closed)}, without layer {layer} {losses[layer]:.3f}")
            read, share = read + len(part), 2 * share
            losses = {layer: losses[layer] for layer in candidates}
            if len(candidates) <= 3:
                break
            candidates = sorted(candidates, key=losses.__getitem__)[: math.ceil(len(candidates) / 2)]
        with torch.no_grad():
            gates.values.copy_(learned)
        return losses

    def _loss_without(self, layer: int, windows: torch.Tensor) -> float:
        self._gates.closed.add(layer)
        with autocast(self._recipe, self._device):
            loss = mean_loss(self._losses, windows, self._settings.batch_size)
        self._gates.closed.remove(layer)
        return loss

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self._checkpoints is not None and self._processes.main and self._checkpoints.due():
            self._checkpoints.save(
                {
                    "gates": self._gates.values.detach(),
                    "optimizer": self._optimizer.state_dict(),
                    "picks": [pick.model_dump() for pick in self._picks],
                    "lm_losses": self._lm_losses,
                    "trajectory": self._trajectory,
                }
            )

    def _restore(self) -> None:
        state = None if self._checkpoints is None else self._checkpoints.load()
        if state is None:
            return
        with torch.no_grad():
            self._gates.values.copy_(state["gates"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._picks = [Pick.model_validate(pick) for pick in state["picks"]]
        self._gates.closed.update(pick.layer for pick in self._picks)
        self._lm_losses, self._trajectory = state["lm_losses"], state["trajectory"]


def _num_trials(candidates: int) -> int:
    """How many removals are tried for one pick."""
    return candidates if candidates <= 3 else candidates + _num_trials(math.ceil(candidates / 2))
