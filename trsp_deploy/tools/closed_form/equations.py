"""Ridge regression of a group of linear modules: its normal equations, gathered batch by batch, and their solution.

    equations = NormalEquations.empty(group, torch.float32)
    equations.add(entered, now, wanted, sink_positions(now))
    add_to_weights(group.modules, equations.solve(ridge=0.1))

With U what enters the modules and R = wanted - now what their output lacks, the solution is

    S = argmin ||U S - R||^2 + penalty ||S||^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trsp_deploy.errors import TextError
from trsp_deploy.tools.closed_form.layer_modules import Group

SINK_NORM = 5.0  # multiple of the median norm; SmolLM2-135M's ordinary tokens reach 2.5, its sinks 5.6 to 190


@dataclass
class NormalEquations:
    """U'U S = U'R of one group, summed in fp64."""

    group: Group
    gram: torch.Tensor  # U'U over all tokens, (features, features)
    cross: torch.Tensor  # U'R over all tokens, with R = 0 at sinks, (features, outputs)
    dtype: torch.dtype  # of the products of one batch
    ordinary_energy: float = 0.0  # sum of U^2 over ordinary tokens

    @classmethod
    def empty(cls, group: Group, dtype: torch.dtype) -> NormalEquations:
        """No tokens yet; on the group's device."""
        device = group.modules[0].weight.device
        gram, cross = (
            torch.zeros(group.features, columns, dtype=torch.float64, device=device)
            for columns in (group.features, group.outputs)
        )
        return cls(group, gram, cross, dtype)

    def add(self, entered: torch.Tensor, now: torch.Tensor, wanted: torch.Tensor, sinks: torch.Tensor) -> None:
        """Take in a batch: U (tokens in any shape, width), now and wanted (batch, sequence, outputs).

        sinks: (batch, sequence) bool, whose R is 0.
        """
        features = entered.reshape(*now.shape[:-1], -1).to(self.dtype)
        if self.group.has_bias:
            features = torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)
        if self.group.scale is not None:
            features = self.group.scale * features
        flat = features.flatten(0, 1)
        self.gram += (flat.T @ flat).double()
        ordinary = features[~sinks]  # (ordinary tokens, features)
        residual = (wanted.to(self.dtype) - now.to(self.dtype))[~sinks]
        self.cross += (ordinary.T @ residual).double()
        self.ordinary_energy += ordinary.square().sum().item()

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of the tokens of both."""
        energy = self.ordinary_energy + other.ordinary_energy
        return NormalEquations(self.group, self.gram + other.gram, self.cross + other.cross, self.dtype, energy)

    def penalty(self, ridge: float) -> float:
        """What a ridge comes to, relative to the mean square of the features over ordinary tokens.

        Not over all tokens, the gram's own trace, which the sinks rule. Never 0: a layer that computes nothing has
        nothing to map, so its S is 0.
        """
        return max(ridge * self.ordinary_energy / len(self.gram), torch.finfo(torch.float64).tiny)

    def solve(self, ridge: float) -> torch.Tensor:
        """S (features, outputs) in fp64; its last row belongs to the biases where there are any."""
        gram = self.gram.clone()
        gram.diagonal().add_(self.penalty(ridge))
        return torch.linalg.solve(gram, self.cross)


def sink_positions(hidden: torch.Tensor) -> torch.Tensor:
    """Which tokens of (batch, sequence, hidden) are attention sinks, as (batch, sequence) bool: those of massive norm.

    Found by norm and not by place: position 0 is an ordinary token before a model's layers have made it a sink, and
    delimiters further on can be sinks too.
    """
    norm = torch.linalg.vector_norm(hidden.float(), dim=-1)
    return norm > SINK_NORM * norm.median()


def check_tokens(windows: torch.Tensor, hidden: int, purpose: str, fewest_windows: int, ample: int) -> None:
    """Raise TextError where windows (windows, sequence) hold fewer tokens than the fit has unknowns in a column.

    purpose: what they are for; ample: tokens a hidden feature that do well.
    """
    if len(windows) < fewest_windows or windows.numel() < hidden:
        raise TextError(
            f"{len(windows)} calibration windows of {windows.shape[-1]} tokens cannot {purpose} of hidden size "
            f"{hidden}: give at least {hidden} tokens in {fewest_windows} or more windows, better {ample * hidden}"
        )
