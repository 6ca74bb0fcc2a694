"""UIDL: drop the contiguous span of layers that turns the last token's hidden state least.

Source: "The Unreasonable Ineffectiveness of the Deeper Layers", Gromov et al. 2024, arXiv 2403.17887, section 3
(steps 1 and 2, angular distance); arcee-ai/PruneMe. The healing by QLoRA that follows there is a training of its own.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from trsp_deploy.tools.closed_form.hidden_states import visit_layers
from trsp_deploy.tools.methods.base import Selection, checked_finite, removable_layers


def select_span_by_angle(model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int) -> Selection:
    """Choose the span of `num_dropped` layers of least angular distance over windows (windows, sequence) int64.

    scores: `angular_distance`, one number for each first layer of a span, from 0 (same direction) to 1 (opposite).
    Costs one forward pass. Raises RecipeError, TextError or ModelError (`base.py`).
    """
    free = removable_layers(model, windows, num_dropped)
    states = last_token_states(model, windows, batch_size)  # (layers + 1, windows, hidden)
    distance = checked_finite(
        (angular_distance(states[i], states[i + num_dropped]) for i in range(len(states) - num_dropped)),
        "angular distance",
    )
    first = min((i for i in free if i + num_dropped - 1 in free), key=distance.__getitem__)
    return Selection(tuple(range(first, first + num_dropped)), {"angular_distance": distance}, forward_passes=1)


def last_token_states(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Each window's last hidden state before layer 0, before layer 1, ... and after the last layer, in float32.

    Shape (layers + 1, windows, hidden), on the CPU. The last one is what leaves the last layer, before the final norm.
    """
    parts: dict[int, list[torch.Tensor]] = {}

    def visit(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if index == 0:
            parts.setdefault(0, []).append(entering[:, -1].float().cpu())
        parts.setdefault(index + 1, []).append(leaving[:, -1].float().cpu())

    visit_layers(model, windows, batch_size, visit, "angular distance")
    return torch.stack([torch.cat(parts[index]) for index in sorted(parts)])


def angular_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean of arccos(cos(first, second)) / pi over states (..., hidden); equation 6 of section 3.2."""
    cosine = torch.cosine_similarity(first.double(), second.double(), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1)).mean().item() / math.pi
