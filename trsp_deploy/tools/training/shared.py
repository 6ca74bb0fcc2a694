"""What both training stages share: hardware choices, batches, the learning-rate curve and held-out loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from trsp_deploy.errors import RecipeError
from trsp_deploy.recipe import Recipe
from trsp_deploy.tools.training.losses import TokenLosses

TRAINING_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(recipe: Recipe) -> str:
    """Return "cpu" or "cuda"; raises RecipeError when the recipe wants a GPU that is not there."""
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "device 'cuda': torch finds no CUDA device here; valid: auto, cpu (`trsp-deploy doctor` says why)"
        )
    return recipe.device


def has_fast_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are quicker than in fp32 on this hardware."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(recipe: Recipe, device: str) -> contextlib.AbstractContextManager[None]:
    """bf16 matrix products with fp32 weights and residual stream, where the recipe and the hardware have them."""
    if recipe.autocast == "auto" and has_fast_bf16(device):
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def batch_order(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless shuffled batches of indices below `count`, (batch_size,) each.

    Where the batch size divides `count`, all come once before any comes twice; elsewhere each shuffle's rest is left
    out.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        if len(order) < batch_size:
            order = order.repeat(math.ceil(batch_size / len(order)))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def batches(windows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless shuffled batches of (batch_size, sequence); in the order of `batch_order`."""
    return (windows[rows] for rows in batch_order(len(windows), batch_size, seed))


def learning_rate(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a half cosine to 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def mean_loss(model: PreTrainedModel | TokenLosses, windows: torch.Tensor, batch_size: int) -> float:
    """Mean next-token loss in nats over windows (windows, sequence); a TokenLosses need not find its head again."""
    losses = model if isinstance(model, TokenLosses) else TokenLosses(model)
    device = next(losses.parameters()).device
    total = 0.0
    for part in windows.split(batch_size):
        total += losses(part.to(device)).lm.item() * len(part)
    return total / len(windows)
