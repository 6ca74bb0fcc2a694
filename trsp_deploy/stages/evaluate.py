"""Perplexity on held-out text, of a model folder or of an engine: the same tokens for dense and pruned.

Documents joined by a blank line, non-overlapping windows, exp(mean negative log likelihood), as the field reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax

from trsp_deploy.decoder import load_model, next_token_logits
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import Perplexity, Role, perplexity_of
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.runners import Runner
from trsp_deploy.tools.training.heap import kept_heap
from trsp_deploy.tools.training.shared import pick_device

ROWS = 64  # of an engine's logits, (tokens, vocabulary), that losses are worked out of at a time
Losses = Callable[[torch.Tensor], np.ndarray]  # a window (context_length,) -> nats of each token but the first


@kept_heap()
@torch.no_grad()
def evaluate_perplexity(
    model_folder: Path,
    windows: torch.Tensor,
    text: str,
    role: Role,
    origin: str,
    recipe: Recipe,
    documents: np.ndarray | None = None,
) -> Perplexity:
    """Losses of windows (windows, context_length) in fp32 on the CPU, in the stored dtype on a GPU.

    documents: which one each token belongs to, (windows * context_length,).
    """
    device = pick_device(recipe)
    model = load_model(model_folder, device, torch.float32 if device == "cpu" else "auto")

    def losses(window: torch.Tensor) -> np.ndarray:
        ids = window[None].to(device)  # (1, context_length)
        logits = next_token_logits(model, ids)[0].float()  # (context_length - 1, vocabulary)
        found: np.ndarray = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().numpy()
        return found

    return _perplexity(losses, windows, f"perplexity of {role} on {text}", text, role, origin, documents)


@kept_heap()
def evaluate_engine(
    runner: Runner,
    windows: torch.Tensor,
    text: str,
    role: Role,
    origin: str,
    engine: str,
    documents: np.ndarray | None = None,
) -> Perplexity:
    """Losses of windows through an open engine: what is shipped is what is judged."""

    def losses(window: torch.Tensor) -> np.ndarray:
        ids = window[None].numpy()  # (1, context_length)
        logits = runner.prefill(ids, np.ones_like(ids))[0, :-1]  # (context_length - 1, vocabulary)
        return _nats(logits, ids[0, 1:])

    return _perplexity(losses, windows, f"perplexity of {engine}, {role}, on {text}", text, role, origin, documents)


def _nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Losses (tokens,) of `targets` (tokens,) by logits (tokens, vocabulary); a few rows at a time are copied."""
    found = np.empty(len(targets), dtype=logits.dtype)
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        of_rows = log_softmax(logits[rows], axis=-1)  # (ROWS or what is left, vocabulary)
        found[rows] = -np.take_along_axis(of_rows, targets[rows, None], axis=-1)[:, 0]
    return found


def _perplexity(
    losses: Losses,
    windows: torch.Tensor,
    title: str,
    text: str,
    role: Role,
    origin: str,
    documents: np.ndarray | None,
) -> Perplexity:
    found: list[np.ndarray] = []
    nats = 0.0  # of all windows' means
    with Meter(title, len(windows)) as meter:
        for window in windows:
            found.append(losses(window))
            nats += float(found[-1].mean())
            meter.advance(f"ppl {perplexity_of(nats / len(found)):.2f}")
    by_document = () if documents is None else _by_document(found, documents.reshape(windows.shape)[:, 1:])
    means = tuple(float(window.mean()) for window in found)
    return Perplexity(
        text=text, role=role, origin=origin, context_length=windows.shape[1], nll=means, documents=by_document
    )


def _by_document(losses: Iterable[np.ndarray], documents: np.ndarray) -> tuple[tuple[float, int], ...]:
    """Nats in all and tokens of each document that has any."""
    nats = np.bincount(documents.ravel(), weights=np.concatenate(list(losses)))
    tokens = np.bincount(documents.ravel())
    return tuple((float(total), int(count)) for total, count in zip(nats, tokens, strict=True) if count)
