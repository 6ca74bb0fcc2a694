"""The forms of stage 2: what happens to the dropped layers before, during and after the training.

form = FORMS[settings.form](model, gates, dropped, settings, processes)
form.prepare(windows, autocast)
for step in ...:
    form.before_step(step)
    loss = losses(batch).total + settings.weight * form.penalty()
form.finish()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import ModelError, RecipeError, TextError
from trsp_deploy.recipe import TransferSettings
from trsp_deploy.tools.closed_form.layers import refit_kept_layers
from trsp_deploy.tools.closed_form.span import fold_dropped_layers, foldable_spans
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.training.processes import Processes


def check_weights_are_whole(settings: TransferSettings, sharded: bool) -> None:
    """Raise RecipeError where a training moves whole weights and FSDP holds them in pieces."""
    if sharded and settings.form == "anneal" and settings.closed_form != "none":
        raise RecipeError(
            f"transfer.refit '{settings.closed_form}' with transfer.form 'anneal' moves whole weights at every step, "
            "which under FSDP are in pieces; valid: transfer.form train, or a run without FSDP"
        )


class Form:
    """Nothing happens to the dropped layers while the others train; afterwards they are removed (`none`)."""

    closes_first = False  # whether the training sees the model without the dropped layers

    def __init__(
        self,
        model: PreTrainedModel,
        gates: LayerGates,
        dropped: Sequence[int],
        settings: TransferSettings,
        processes: Processes,
    ) -> None:
        self.model = model
        self.gates = gates  # attached, all at 1
        self.dropped = list(dropped)
        self.settings = settings
        self.processes = processes
        self.fitted: str = settings.closed_form  # in closed form
        self.unfitted_because = ""  # why a fold that was asked for was not made

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        """Once, on the dense model, before anything trains; windows: (windows, sequence) int64.

        autocast: what the training runs in. resumed: whether a checkpoint's weights are put back afterwards. What they
        do not hold is worked out again then, so the result must not vary.
        """
        if self.fitted == "span":
            self._look_before_folding(windows)
        # Without adapters every weight of the layers trains, so the checkpoint holds whatever the refit wrote.
        if not resumed or self.settings.lora_rank is not None:
            self.refit(windows, autocast)
        if self.fitted != "none" or self.closes_first:
            self.gates.closed.update(self.dropped)

    def refit(self, windows: torch.Tensor, autocast: AbstractContextManager[None]) -> None:
        """Fit what is kept to what goes, as the settings ask for."""
        batch_size = self.processes.forward_batch(self.settings)
        if self.fitted == "span":
            fold_dropped_layers(self.model, self.dropped, windows, batch_size, autocast=autocast)
        elif self.fitted == "layers":
            refit_kept_layers(self.model, self.dropped, windows, batch_size, autocast)

    def _look_before_folding(self, windows: torch.Tensor) -> None:
        try:
            foldable = foldable_spans(self.model, self.dropped, windows)
        except (ModelError, TextError) as problem:
            if self.settings.refit != "auto":
                raise
            self.fitted, self.unfitted_because = "none", str(problem)
            return
        if not foldable:
            self.fitted, self.unfitted_because = "none", "what goes begins with the first layer, and none is before it"

    def before_step(self, step: int) -> None:
        """Set everything that changes over the steps; it must follow from `step` alone, for runs that are resumed."""

    def moved(self) -> list[torch.Tensor]:
        """Weights that do not train and that the form changes from step to step: they belong to a checkpoint."""
        return []

    def penalty(self) -> torch.Tensor:
        """What is added to the loss, before its weight; a scalar, after the step's forward."""
        return torch.zeros((), device=self.gates.values.device)

    def finish(self) -> None:
        """Once, after the last step: leave the gates as the form ends."""


class Train(Form):
    """Remove first, train afterwards: the control that every other form has to beat."""

    closes_first = True


@dataclass(frozen=True)
class Move:
    """A weight on its way from the dense model's value to the refitted one."""

    weight: torch.nn.Parameter
    way: torch.Tensor  # refitted minus dense
    residue: torch.Tensor | None  # what a weight of less than fp32 has rounded off so far; None for fp32

    @torch.no_grad()
    def go_on(self, parts: int) -> None:
        """Go one of `parts` equal parts of the way."""
        if self.residue is None:
            self.weight.add_(self.way, alpha=1 / parts)
            return
        # Compensated (Kahan) summation: a small part is less than a weight's last bit, and added as it is most of the
        # way would never be gone.
        wanted = self.weight.float() + self.way.float() / parts + self.residue.float()
        self.weight.copy_(wanted)
        self.residue.copy_(wanted - self.weight.float())


@torch.no_grad()
def _take_back(dense: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> tuple[Move, ...]:
    """Put the dense values back into refitted weights, and return the ways of those that a refit changed.

    dense: weights and their dense values; emptied, one after the other: each copy is given up for its way, and a fold
    changes few weights.
    """
    moves = []
    while dense:
        weight, before = dense.pop()
        way = weight.detach() - before
        weight.copy_(before)
        if way.count_nonzero():
            moves.append(Move(weight, way, None if weight.dtype == torch.float32 else torch.zeros_like(way)))
    return tuple(reversed(moves))


class Anneal(Form):
    """Lower the dropped layers' gates linearly from 1 to exactly 0 over the first `anneal_share` of the steps.

    With a refit, the kept layers move to their refitted weights by the same shares: the training starts from the dense
    model and ends, at gate 0, as it would have gone on from the refit.
    """

    _moves: tuple[Move, ...] = ()

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        """Work out the refit and put the dense weights back; a resumed training needs the moves too."""
        if self.fitted == "span":
            self._look_before_folding(windows)
        if self.fitted == "none":
            return
        check_weights_are_whole(self.settings, self.processes.sharded)
        dense = [(weight, weight.detach().clone()) for weight in decoder_layers(self.model).parameters()]
        self.refit(windows, autocast)
        self._moves = _take_back(dense)

    @property
    def _steps(self) -> int:
        return max(1, round(self.settings.anneal_share * self.settings.steps))

    def before_step(self, step: int) -> None:
        """Go the step's share of the way from the dense model to the pruned one."""
        if step <= self._steps:
            self._move()
        if step >= self._steps:
            self._close()
        else:
            with torch.no_grad():
                self.gates.values[self.dropped] = 1.0 - (step + 1) / (self._steps + 1)

    def finish(self) -> None:
        """Go what is left of the way, where the annealing took all steps."""
        if self.settings.steps <= self._steps:
            self._move()
        self._close()

    def _move(self) -> None:
        for move in self._moves:
            move.go_on(parts=self._steps + 1)

    def moved(self) -> list[torch.Tensor]:
        weights = [move.weight.detach() for move in self._moves if not move.weight.requires_grad]
        return weights + [move.residue for move in self._moves if move.residue is not None]

    def _close(self) -> None:
        self.gates.closed.update(self.dropped)  # a gate at 0 is the layer removed: no need to compute it


class L2(Form):
    """The paper's penalty: the norm of f(h) - h over the whole batch, summed over dropped layers, as its code has it.

    Small is not zero, so the removal costs a jump in perplexity, which is measured and reported.
    """

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        super().prepare(windows, autocast, resumed)
        self.gates.watched.update(self.dropped)

    def penalty(self) -> torch.Tensor:
        norms = [self.norm(change.float()) for change in self.gates.changes.values()]  # of (batch, sequence, hidden)
        return torch.stack(norms).sum()

    def norm(self, change: torch.Tensor) -> torch.Tensor:
        """Norm of what one layer adds to the rows of all processes."""
        if self.processes.count == 1:
            return torch.linalg.vector_norm(change)
        squares = self.processes.all_reduce_sum(change.square().sum())
        # Of 0 the root's gradient is no number; vector_norm's is 0, as the sum's is.
        return squares.sqrt() if squares > 0 else squares


class L1(L2):
    """The same in the l1 norm over sqrt(number of elements), so that one lambda_2 means the same in both forms."""

    def norm(self, change: torch.Tensor) -> torch.Tensor:
        total = self.processes.all_reduce_sum(torch.linalg.vector_norm(change, ord=1))
        return total / math.sqrt(change.numel() * self.processes.count)


FORMS: dict[str, type[Form]] = {"anneal": Anneal, "l2": L2, "l1": L1, "train": Train, "none": Form}
