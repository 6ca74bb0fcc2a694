"""ShortGPT: drop the layers that turn their input least.

Source: ShortGPT, Men et al. 2024, arXiv 2403.03853, equation 1 (Block Influence); icip-cas/ShortGPT. One-shot:
all layers are scored on the dense model, none again after others are gone.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trsp_deploy.tools.closed_form.hidden_states import visit_layers
from trsp_deploy.tools.methods.base import Selection, checked_finite, removable_layers


def select_by_block_influence(
    model: PreTrainedModel, windows: torch.Tensor, num_dropped: int, batch_size: int
) -> Selection:
    """Choose the `num_dropped` layers of least Block Influence over windows (windows, sequence) int64.

    scores: `block_influence`, one number a layer from 0 (direction kept) to 2. Costs one forward pass.
    Raises RecipeError, TextError or ModelError (`base.py`).
    """
    free = removable_layers(model, windows, num_dropped)
    influence = checked_finite(block_influence(model, windows, batch_size), "block influence")
    lowest = sorted(free, key=influence.__getitem__)[:num_dropped]
    return Selection(tuple(sorted(lowest)), {"block_influence": influence}, forward_passes=1)


def block_influence(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> list[float]:
    """1 - mean over tokens of cos(entering, leaving), for each layer."""
    similarity: dict[int, float] = {}

    def visit(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        # Each token counts once whatever its norm, so the attention sink's massive states cannot drown the rest.
        cosine = torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)  # (batch, sequence)
        similarity[index] = similarity.get(index, 0.0) + cosine.double().sum().item()

    visit_layers(model, windows, batch_size, visit, "block influence")
    return [1 - similarity[index] / windows.numel() for index in sorted(similarity)]
