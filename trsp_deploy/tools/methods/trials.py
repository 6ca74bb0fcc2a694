"""Losses of a model without sets of layers, each set tried in turn.

    with LayerGates(model) as gates:
        Trials(TokenLosses(model), gates).losses([(3,), (4,), (3, 4)], windows, batch_size=4)

In front of the first layer that a trial takes out and not every other does, all trials compute the same. What enters
those layers is computed once and kept, so that trying every layer in turn costs half of the layers' work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.training.losses import TokenLosses

Layers = tuple[int, ...]
PROBE_TOKENS = 16


class Trials:
    """Tries sets of layers on one model while its gates are attached.

    resumable: whether trials begin where they part; None before the first one. Not so for a model whose layers read
    more than the one before.
    """

    def __init__(self, losses: TokenLosses, gates: LayerGates) -> None:
        """gates: of the model in `losses`; all at the values that the trials shall have."""
        self._losses = losses
        self._gates = gates
        self.resumable: bool | None = None

    @torch.no_grad()
    def losses(
        self,
        trials: Sequence[Layers],
        windows: torch.Tensor,
        batch_size: int,
        report: Callable[[Layers, float, int], None] | None = None,
    ) -> dict[Layers, float]:
        """Mean next-token loss in nats over `windows` (windows, sequence) without the layers of each trial.

        report: called after each batch of each trial with the trial, its mean so far and the windows that it has read.
        Memory: what enters each layer where trials part, (batch, sequence, hidden), for one batch.
        The gates are closed as before afterwards.
        """
        total, read = dict.fromkeys(trials, 0.0), 0
        device = next(self._losses.parameters()).device
        for batch in windows.to(device).split(batch_size):
            read += len(batch)
            for trial, loss in self._each(trials, batch, self._resumes(batch)):
                total[trial] += loss * len(batch)
                if report is not None:
                    report(trial, total[trial] / read, read)
        return {trial: loss / len(windows) for trial, loss in total.items()}

    def _each(self, trials: Sequence[Layers], batch: torch.Tensor, resume: bool) -> Iterator[tuple[Layers, float]]:
        """Losses on one batch, the trial that parts last before the others: it passes all their places on its way."""
        gates, closed = self._gates, self._gates.closed
        everywhere = set(trials[0]).intersection(*trials)
        parting = {trial: min(set(trial) - everywhere, default=0) for trial in trials}
        gates.entering = dict.fromkeys(parting.values()) if resume else {}
        try:
            for place, trial in enumerate(sorted(trials, key=parting.__getitem__, reverse=True)):
                gates.closed = set(trial)
                gates.start = parting[trial] if resume and place else 0
                yield trial, self._losses(batch).lm.item()
        finally:
            gates.closed, gates.start, gates.entering = closed, 0, {}

    def _resumes(self, windows: torch.Tensor) -> bool:
        """Try it once, at every layer: what two neighbours share shows at one place alone."""
        if self.resumable is None:
            probe = windows[:1, :PROBE_TOKENS]
            trials = [(layer,) for layer in self._gates.open]
            self.resumable = dict(self._each(trials, probe, False)) == dict(self._each(trials, probe, True))
        return self.resumable
