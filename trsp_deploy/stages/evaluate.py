"""Perplexity of a model folder on held-out text: the same tokens for dense and pruned.

Documents joined by a blank line, non-overlapping windows, exp(mean negative log likelihood), as the field reports it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from trsp_deploy.decoder import load_model, next_token_loss
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import Perplexity, Role
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import pick_device


@torch.no_grad()
def evaluate_perplexity(
    model_folder: Path, windows: torch.Tensor, text: str, role: Role, origin: str, recipe: Recipe
) -> Perplexity:
    """Mean loss of each window (windows, context_length) in fp32 on the CPU, in the stored dtype on a GPU."""
    device = pick_device(recipe)
    model = load_model(model_folder, device, torch.float32 if device == "cpu" else "auto")
    losses = []
    with Meter(f"perplexity of {role} on {text}", len(windows)) as meter:
        for window in windows:
            losses.append(next_token_loss(model, window[None].to(device)).item())
            meter.advance(f"ppl {math.exp(sum(losses) / len(losses)):.2f}")
    return Perplexity(text=text, role=role, origin=origin, context_length=windows.shape[1], nll=tuple(losses))
