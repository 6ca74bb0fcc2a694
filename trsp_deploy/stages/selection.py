"""Stage 1: choose the layers to drop, by TRSP's gates or by the rival that the recipe names (`tools/methods`).

TRSP (arXiv 2505.18232, section 3.1): learn a gate a layer under an l1 penalty, move the layer with the smallest one
into the set P and skip it from then on, let the rest learn again, until enough layers are picked.

What differs from the paper:
- only the gates train; the weights stay frozen, so no weight gradients are computed;
- the few layers with the smallest gates are each taken out in turn, and the one whose true removal
  costs least is picked (`candidates: 1` trusts the gate alone, as the paper does);
- at the end every span of as many consecutive layers behind layer 0 is tried against what was picked (`spans: false`
  leaves that out).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import Recipe
from trsp_deploy.tools.closed_form.span import runs
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods import METHODS
from trsp_deploy.tools.methods.base import Rounds, Selection, checked_finite, removable_layers
from trsp_deploy.tools.methods.trials import Layers, Trials
from trsp_deploy.tools.plan import Pick, PruningPlan, complement
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.checkpoints import Checkpoints, put_back_moments
from trsp_deploy.tools.training.heap import kept_heap
from trsp_deploy.tools.training.losses import TokenLosses
from trsp_deploy.tools.training.processes import Processes
from trsp_deploy.tools.training.shared import autocast, batch_order, mean_loss, pick_device

LAST_TRIALS = 3  # candidates that are not halved any further


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
    checkpoints: where TRSP's gates and SLEB's rounds go on from after a kill; the other rivals start again.
    """
    return select_for_counts(model, train, validation, (num_dropped,), recipe, calibration, checkpoints)[num_dropped]


@kept_heap()
def select_for_counts(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    counts: Sequence[int],
    recipe: Recipe,
    calibration: str,
    checkpoints: Checkpoints | None = None,
) -> dict[int, PruningPlan]:
    """A plan for each number of layers, from one search that goes as far as the largest; arguments as above.

    What a greedy search has picked first serves the smaller numbers; methods that are not greedy choose anew for each.
    """
    model.requires_grad_(False)
    if recipe.plan.method == "trsp":
        found = _by_gates(model, train, validation, counts, recipe, checkpoints)
    else:
        found = _by_rival(model, train, validation, counts, recipe, checkpoints)
    num_layers = len(decoder_layers(model))
    return {
        count: PruningPlan(
            model=recipe.public.model,
            num_layers=num_layers,
            dropped=chosen.dropped,
            kept=complement(chosen.dropped, num_layers),
            method=recipe.plan.method,
            seed=recipe.seed,
            settings=chosen.settings,
            calibration=calibration,
            dense_loss=round(chosen.dense_loss, 6),
            picks=chosen.picks,
        )
        for count, chosen in found.items()
    }


@dataclass(frozen=True)
class Chosen:
    """What a search came to for one number of layers."""

    dropped: Layers
    dense_loss: float  # nats over the validation windows
    settings: dict[str, Any]  # of the method, and what it measured, for the plan's record
    picks: tuple[Pick, ...] = ()


def _by_gates(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    counts: Sequence[int],
    recipe: Recipe,
    checkpoints: Checkpoints | None,
) -> dict[int, Chosen]:
    free = removable_layers(model, train, max(counts))
    picking = GatePicking(model, free, train, validation, recipe, checkpoints)
    dense_loss = picking.held_out_loss()
    found: dict[int, Chosen] = {}
    for count, finals in picking.run(counts).items():
        settings = recipe.plan.model_dump()
        if len(finals) > 1:
            settings["finals"] = {runs_text(layers): loss for layers, loss in finals.items()}
        found[count] = Chosen(next(iter(finals)), dense_loss, settings, picking.picks[:count])
    return found


def _by_rival(
    model: PreTrainedModel,
    train: torch.Tensor,
    validation: torch.Tensor,
    counts: Sequence[int],
    recipe: Recipe,
    checkpoints: Checkpoints | None,
) -> dict[int, Chosen]:
    """As above, by a method of the table."""
    method, batch_size = METHODS[recipe.plan.method], recipe.plan.batch_size
    rounds = _kept_rounds(checkpoints, Processes(pick_device(recipe)).main)
    with torch.no_grad(), autocast(recipe, pick_device(recipe)):
        dense_loss = mean_loss(model, validation, batch_size)

    def select(count: int) -> Selection:
        with autocast(recipe, pick_device(recipe)) if method.mixed_precision else contextlib.nullcontext():
            if method.go_on is not None:
                return method.go_on(model, train, count, batch_size, rounds)
            return method.select(model, train, count, batch_size)

    largest = select(max(counts))
    order = largest.scores.get("order")
    found: dict[int, Chosen] = {}
    for count in counts:
        selection = largest if count == max(counts) or order is not None else select(count)
        dropped = selection.dropped if order is None else tuple(sorted(order[:count]))
        settings = {
            "batch_size": batch_size,
            "scores": selection.scores,
            "forward_passes": selection.forward_passes,
        }
        found[count] = Chosen(dropped, dense_loss, settings)
    return found


def _kept_rounds(checkpoints: Checkpoints | None, main: bool) -> Rounds:
    """The rounds of a checkpoint, and what keeps the next ones, in the main process alone."""
    state = None if checkpoints is None else checkpoints.load()

    def keep(rounds: Sequence[Any]) -> None:
        if checkpoints is not None and main and checkpoints.due():
            checkpoints.save({"rounds": list(rounds)})

    return Rounds([] if state is None else state["rounds"], keep)


@dataclass
class Round:
    """The gate updates between two picks."""

    optimizer: torch.optim.Optimizer  # that knows nothing at the start
    lm_losses: list[float] = field(default_factory=list)  # nats, one an update
    trajectory: list[tuple[float, ...]] = field(default_factory=list)  # all gates, after each update


class GatePicking:
    """TRSP's greedy rounds: learn, take out the candidates in turn, close the one that costs least."""

    def __init__(
        self,
        model: PreTrainedModel,
        free: Sequence[int],
        train: torch.Tensor,
        validation: torch.Tensor,
        recipe: Recipe,
        checkpoints: Checkpoints | None,
    ) -> None:
        """model: dense and frozen; free: the layers that may go."""
        self._windows = train
        self._validation = validation
        self._recipe = recipe
        self._settings = recipe.plan
        self._checkpoints = checkpoints
        self._device = pick_device(recipe)
        self._processes = Processes(self._device)
        self._free = frozenset(free)
        self._gates = LayerGates(model, recipe.plan.gate)
        self._losses = TokenLosses(model)
        self._trials = Trials(self._losses, self._gates)
        self._module = self._processes.wrap(self._losses)
        self._picks: list[Pick] = []
        self._round = self._new_round()

    def _new_round(self) -> Round:
        """It begins with the gates as the last one left them."""
        return Round(torch.optim.Adam([self._gates.values], lr=self._settings.learning_rate))

    @property
    def picks(self) -> tuple[Pick, ...]:
        """What was picked so far, in that order."""
        return tuple(self._picks)

    def held_out_loss(self) -> float:
        """Mean loss in nats over the validation windows, in the training's precision."""
        with autocast(self._recipe, self._device):
            return mean_loss(self._losses, self._validation, self._settings.batch_size)

    def run(self, counts: Sequence[int]) -> dict[int, dict[Layers, float]]:
        """Pick layers until the largest of `counts` are closed; then try, for each count, spans against the picks.

        A greedy search cannot see that a span is cheap until most of it is gone. Returns for each count the mean loss
        in nats without each of the last sets of layers tried, best first.
        """
        self._restore()
        rows = self._rows_left()
        with self._gates, self._meter(counts) as meter:
            while len(self._picks) < max(counts):
                while len(self._round.lm_losses) < self._settings.steps:
                    self._update(next(rows))
                    self._save_if_due()
                    meter.advance(f"picked {len(self._picks)}, loss {self._round.lm_losses[-1]:.3f}")
                self._pick(meter)
                self._save_if_due()
            return {count: self._finals(count, meter) for count in counts}

    def _rows_left(self) -> Iterator[torch.Tensor]:
        """Indices of each gate update's windows, from the update that comes next."""
        done = len(self._picks) * self._settings.steps + len(self._round.lm_losses)
        order = batch_order(len(self._windows), self._settings.batch_size, self._recipe.seed)
        return itertools.islice(order, done, None)

    def _meter(self, counts: Sequence[int]) -> Meter:
        """Counts gate updates and losses of trials, from the one that comes next."""
        a_round = self._settings.steps + num_trials(min(self._settings.candidates, len(self._free)))
        finals = sum(num_trials(len(self._spans(count)) + 1) for count in counts)
        done = len(self._picks) * a_round + len(self._round.lm_losses)
        return Meter("selection", max(counts) * a_round + finals, done)

    def _finals(self, count: int, meter: Meter) -> dict[Layers, float]:
        picked, spans = tuple(sorted(pick.layer for pick in self._picks[:count])), self._spans(count)
        return self._try(list(dict.fromkeys([picked, *spans])), count, meter) if spans else {picked: math.nan}

    def _spans(self, num_dropped: int) -> list[Layers]:
        """Every span of consecutive layers behind layer 0 that may go."""
        if not self._settings.spans or num_dropped == 1:
            return []
        count = len(self._gates.values)
        spans = [tuple(range(first, first + num_dropped)) for first in range(1, count - num_dropped + 1)]
        return [span for span in spans if self._free.issuperset(span)]

    def _update(self, rows: torch.Tensor) -> None:
        """One step of the open gates on windows `rows`."""
        values = self._gates.values
        part = self._windows[self._processes.local_rows(rows, "plan.batch_size")]
        with autocast(self._recipe, self._device):
            found = self._module(part.to(self._device))
        loss = found.total + self._settings.l1 * values[self._gates.open].abs().sum()
        (values.grad,) = torch.autograd.grad(loss, [values])
        values.grad = self._processes.mean(values.grad)
        self._round.optimizer.step()
        self._check_gates()
        self._round.lm_losses.append(round(self._processes.mean(found.lm).item(), 5))
        self._round.trajectory.append(tuple(round(value, 5) for value in values.tolist()))

    def _check_gates(self) -> None:
        """Raise ModelError for a gate that is no finite number, on which no choice may rest."""
        broken = next((value for value in self._gates.values.tolist() if not math.isfinite(value)), None)
        if broken is not None:
            wider = " or --set weights=fp32" if self._recipe.weights == "bf16" else ""
            raise ModelError(
                f"a gate is {broken} at update {len(self._round.lm_losses) + 1} of pick {len(self._picks) + 1}, with "
                f"plan.learning_rate {self._settings.learning_rate:g}: a smaller one{wider} may keep it finite"
            )

    def _pick(self, meter: Meter) -> None:
        """Close, of the layers with the smallest gates, the one whose removal costs least."""
        gates = self._gates
        free = [index for index in gates.open if index in self._free]
        smallest = sorted(free, key=lambda index: abs(gates.values[index].item()))[: self._settings.candidates]
        # With one candidate there is nothing to choose between and the gate alone has decided.
        gone = tuple(pick.layer for pick in self._picks)
        tried = self._try([(*gone, layer) for layer in smallest], len(gone), meter)
        losses = {trial[-1]: loss for trial, loss in tried.items()}
        # All processes close the main one's choice, however theirs would round: a gate's gradient is a mean over all.
        layer = self._processes.from_main(min(losses, key=losses.__getitem__))
        gates.closed.add(layer)
        learned = self._round
        self._picks.append(
            Pick(
                layer=layer,
                lm_loss=tuple(learned.lm_losses),
                gates=tuple(learned.trajectory),
                removal_loss=losses,
            )
        )
        self._round = self._new_round()

    def _try(self, trials: list[Layers], turn: int, meter: Meter) -> dict[Layers, float]:
        """Loss in nats without the layers of each of the last trials, all other gates at 1 (`successive_halving`).

        turn: decides the windows' order, by itself, so that one search for several numbers of layers and one for each
        give the same.
        """
        learned = self._gates.values.detach().clone()
        self._gates.reset()
        rows = next(batch_order(len(self._windows), len(self._windows), self._recipe.seed + turn))
        measure = functools.partial(self._losses_without, meter=meter)
        found = successive_halving(trials, self._windows[rows], self._settings.trial_windows, measure)
        with torch.no_grad():
            self._gates.values.copy_(learned)
        return found

    def _losses_without(self, trials: list[Layers], windows: torch.Tensor, meter: Meter) -> dict[Layers, float]:
        def report(trial: Layers, loss: float, read: int) -> None:
            if read == len(windows):
                meter.advance(f"picked {len(self._picks)}, without layers {runs_text(trial)} {loss:.3f}")

        with autocast(self._recipe, self._device):
            return self._trials.losses(trials, windows, self._settings.batch_size, report)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self._checkpoints is not None and self._processes.main and self._checkpoints.due():
            self._checkpoints.save(
                {
                    "gates": self._gates.values.detach(),
                    "optimizer": self._round.optimizer.state_dict(),
                    "picks": [pick.model_dump() for pick in self._picks],
                    "lm_losses": self._round.lm_losses,
                    "trajectory": self._round.trajectory,
                }
            )

    def _restore(self) -> None:
        state = None if self._checkpoints is None else self._checkpoints.load()
        if state is None:
            return
        with torch.no_grad():
            self._gates.values.copy_(state["gates"])
        put_back_moments(state["optimizer"], self._round.optimizer)
        self._picks = [Pick.model_validate(pick) for pick in state["picks"]]
        self._gates.closed.update(pick.layer for pick in self._picks)
        self._round.lm_losses, self._round.trajectory = state["lm_losses"], state["trajectory"]


def successive_halving(
    trials: list[Layers],
    windows: torch.Tensor,
    first: int,
    measure: Callable[[list[Layers], torch.Tensor], Mapping[Layers, float]],
) -> dict[Layers, float]:
    """Tell the best of many trials by losses over windows (windows, sequence), most of them read by few trials.

    Source: Jamieson and Talwalkar 2016, arXiv 1502.07943. All trials read the `first` windows, the better half as many
    more as cost the same again, and so on, so that most windows go to those that are hard to tell apart.
    measure: (trials, windows) -> mean loss in nats of each trial.
    Returns mean losses over what each has read, best first, of the last two or three: the others read less. Raises
    ModelError when one is not finite.
    """
    total, read, count = dict.fromkeys(trials, 0.0), 0, first
    while True:
        part = windows[read : read + count]
        read, count = read + len(part), 2 * count
        if len(part):
            for trial, loss in measure(trials, part).items():
                total[trial] += len(part) * loss
        checked_finite((total[trial] for trial in trials), "the loss without some layers")
        trials = sorted(trials, key=total.__getitem__)
        if len(trials) <= LAST_TRIALS:
            return {trial: total[trial] / read for trial in trials}
        trials = trials[: math.ceil(len(trials) / 2)]


def num_trials(trials: int) -> int:
    """How many losses successive halving measures."""
    return trials if trials <= LAST_TRIALS else trials + num_trials(math.ceil(trials / 2))


def runs_text(layers: tuple[int, ...]) -> str:
    """Layers as text: (4, 13, 14, 15) -> "4,13-15"."""
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs(layers))
