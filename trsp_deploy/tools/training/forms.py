"""The forms of stage 2: what happens to the doomed layers before, during and after the training.

form = FORMS[settings.form](model, gates, doomed, settings)
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

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import ModelError, RecipeError, TextError
from trsp_deploy.recipe import TransferSettings
from trsp_deploy.tools.closed_form.layers import refit_kept_layers
from trsp_deploy.tools.closed_form.span import fold_dropped_layers, foldable_spans
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.training.processes import Processes


class Form:
    """Nothing happens to the doomed layers while the others train; afterwards they are removed (`none`)."""

    closes_first = False  # whether the training sees the model without the doomed layers

    def __init__(
        self,
        model: PreTrainedModel,
        gates: LayerGates,
        doomed: Sequence[int],
        settings: TransferSettings,
        processes: Processes,
    ) -> None:
        self.model = model
        self.gates = gates  # attached, all at 1
        self.doomed = list(doomed)
        self.settings = settings
        self.processes = processes
        self.fitted: str = settings.closed_form  # in closed form
        self.unfitted_because = ""  # where `auto` asked for a fold that cannot be

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        """Once, on the dense model, before anything trains; windows: (windows, sequence) int64.

        autocast: what the training runs in. resumed: whether a checkpoint's weights are put back afterwards. What they
        do not hold is worked out again then, so the result must not vary.
        """
        if self.settings.refit == "auto" and self.fitted == "span":
            self._look_before_folding(windows)
        # Without adapters every weight of the layers trains, so the checkpoint holds whatever the refit wrote.
        if not resumed or self.settings.lora_rank is not None:
            self.refit(windows, autocast)
        if self.fitted != "none" or self.closes_first:
            self.gates.closed.update(self.doomed)

    def refit(self, windows: torch.Tensor, autocast: AbstractContextManager[None]) -> None:
        """Fit what is kept to what goes, as the settings ask for."""
        if self.fitted == "span":
            fold_dropped_layers(self.model, self.doomed, windows, self.settings.batch_size, autocast=autocast)
        elif self.fitted == "layers":
            refit_kept_layers(self.model, self.doomed, windows, self.settings.batch_size, autocast)

    def _look_before_folding(self, windows: torch.Tensor) -> None:
        try:
            foldable_spans(self.model, self.doomed, windows)
        except (ModelError, TextError) as problem:
            self.fitted, self.unfitted_because = "none", str(problem)

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


class Anneal(Form):
    """Lower the doomed layers' gates linearly from 1 to exactly 0 over the first `anneal_share` of the steps.

    With a refit, the kept layers move to their refitted weights by the same shares: the training starts from the dense
    model and ends, at gate 0, as it would have gone on from the refit.
    """

    # Weights, refitted minus dense ones, and what rounding has kept from a weight of less than fp32 so far.
    _moves: tuple[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor | None], ...] = ()

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        """Work out the refit and put the dense weights back; a resumed training needs the moves too."""
        if self.fitted == "none":
            return
        if self.processes.sharded:
            raise RecipeError(
                f"transfer.refit '{self.fitted}' with transfer.form 'anneal' moves whole weights at every step, which "
                "under FSDP are in pieces; valid: transfer.form train, or a run without FSDP"
            )
        dense = [(weight, weight.detach().clone()) for weight in decoder_layers(self.model).parameters()]
        self.refit(windows, autocast)
        moves = []
        with torch.no_grad():
            while dense:  # one after the other: each copy is given up for its move, and most moves of a fold are none
                weight, before = dense.pop()
                move = weight.detach() - before
                weight.copy_(before)
                if move.count_nonzero():
                    moves.append((weight, move, None if weight.dtype == torch.float32 else torch.zeros_like(move)))
        self._moves = tuple(reversed(moves))

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
                self.gates.values[self.doomed] = 1.0 - (step + 1) / (self._steps + 1)

    def finish(self) -> None:
        """Go what is left of the way, where the annealing took all steps."""
        if self.settings.steps <= self._steps:
            self._move()
        self._close()

    @torch.no_grad()
    def _move(self) -> None:
        for weight, move, kept_back in self._moves:
            if kept_back is None:
                weight.add_(move, alpha=1 / (self._steps + 1))
                continue
            # A small part of a weight is less than its last bit: added as it is, most of the way would never be gone.
            wanted = weight.float() + move.float() / (self._steps + 1) + kept_back.float()
            weight.copy_(wanted)
            kept_back.copy_(wanted - weight.float())

    def moved(self) -> list[torch.Tensor]:
        weights = [weight.detach() for weight, _, _ in self._moves if not weight.requires_grad]
        return weights + [kept_back for _, _, kept_back in self._moves if kept_back is not None]

    def _close(self) -> None:
        self.gates.closed.update(self.doomed)  # a gate at 0 is the layer removed: no need to compute it


class L2(Form):
    """The paper's penalty: the sum over doomed layers of the norm of f(h) - h over the whole batch, as its code has it.

    Small is not zero, so the removal costs a jump in perplexity, which is measured and reported.
    """

    def prepare(self, windows: torch.Tensor, autocast: AbstractContextManager[None], resumed: bool = False) -> None:
        super().prepare(windows, autocast, resumed)
        self.gates.watched.update(self.doomed)

    def penalty(self) -> torch.Tensor:
        norms = [self.norm(change.float()) for change in self.gates.changes.values()]  # of (batch, sequence, hidden)
        return torch.stack(norms).sum()

    def norm(self, change: torch.Tensor) -> torch.Tensor:
        """Norm of what one layer adds to the rows of all processes."""
        if self.processes.count == 1:
            return torch.linalg.vector_norm(change)
        return self.processes.sum_with_gradient(change.square().sum()).sqrt()


class L1(L2):
    """The same in the l1 norm over sqrt(number of elements), so that one lambda_2 means the same in both forms."""

    def norm(self, change: torch.Tensor) -> torch.Tensor:
        total = self.processes.sum_with_gradient(torch.linalg.vector_norm(change, ord=1))
        return total / math.sqrt(change.numel() * self.processes.count)


FORMS: dict[str, type[Form]] = {"anneal": Anneal, "l2": L2, "l1": L1, "train": Train, "none": Form}
