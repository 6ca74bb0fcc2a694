"""Text from an engine: greedy or sampled, several prompts of unequal length at once, each until it ends.

texts = generate(runner, [[5, 9], [7, 3, 1]], Sampling(max_new_tokens=32, end=(2,)))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trsp_deploy.errors import ModelError, RecipeError
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import Count, NonNegative, Positive, Strict
from trsp_deploy.tools.runners.base import Runner


class Sampling(Strict):
    """How tokens are chosen, as in transformers' GenerationConfig."""

    max_new_tokens: Count = 128
    temperature: NonNegative = 0.0  # 0 is greedy
    top_k: int = 0  # most likely tokens to choose among; 0 is all
    top_p: Positive = 1.0  # smallest set of most likely tokens that hold this probability
    seed: int = 0
    end: tuple[int, ...] = ()  # tokens after which a text is over


def end_tokens(model_folder: Path) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config where there is one, else of the model's."""
    for file in ("generation_config.json", "config.json"):
        path = model_folder / file
        if path.is_file():
            found = read_json(path, ModelError).get("eos_token_id")
            if found is not None:
                return (found,) if isinstance(found, int) else tuple(found)
    return ()


def generate(runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continue every prompt; returns the new tokens of each, the ending one not among them.

    runner: entered. Raises RecipeError for an empty prompt, EngineUnavailable where the engine's shapes end.
    """
    if not prompts or not all(prompts):
        raise RecipeError("nothing to continue: a prompt has no tokens")
    input_ids, mask = left_padded(prompts)
    random = np.random.default_rng(sampling.seed)
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    logits = runner.prefill(input_ids, mask, last_only=True)
    for number in range(sampling.max_new_tokens):
        tokens = choose(logits[:, -1], sampling, random)  # (batch,)
        for row in sorted(running):
            if int(tokens[row]) in sampling.end:
                running.discard(row)
            else:
                texts[row].append(int(tokens[row]))
        if not running or number == sampling.max_new_tokens - 1:
            break
        logits = runner.decode(tokens[:, None])  # a text that is over goes on unheard
    return texts


def left_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as (batch, longest) int64 ids and mask, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = np.array([[pad] * (longest - len(p)) + list(p) for p in prompts], dtype=np.int64)
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=np.int64)
    return input_ids, mask


def penalised(logits: np.ndarray, tokens: Sequence[int], penalty: float) -> np.ndarray:
    """Logits (vocabulary,) with those of `tokens` less likely, as transformers' repetition_penalty (CTRL,
    arXiv 1909.05858, section 4.1): positive ones divided by it, negative ones multiplied."""
    if penalty == 1.0:
        return logits
    result, seen = logits.copy(), np.unique(np.asarray(tokens))
    result[seen] = np.where(result[seen] > 0, result[seen] / penalty, result[seen] * penalty)
    return result


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> np.ndarray:
    """One token a row, (batch,) int64, from logits (batch, vocabulary)."""
    if sampling.temperature == 0:
        greedy: np.ndarray = logits.argmax(axis=-1).astype(np.int64)
        return greedy
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, axis=-1, kind="stable")  # most likely first
    ranked = np.take_along_axis(scores, order, axis=-1)
    shares = np.exp(ranked - ranked[:, :1])
    shares /= shares.sum(axis=-1, keepdims=True)
    if sampling.top_k:  # first, as transformers: top_p is a share of what is left
        shares[:, sampling.top_k :] = 0.0
        shares /= shares.sum(axis=-1, keepdims=True)
    before = shares.cumsum(axis=-1) - shares  # what more likely tokens hold: below top_p for all that may be chosen
    shares = np.where(before < sampling.top_p, shares, 0.0)
    shares /= shares.sum(axis=-1, keepdims=True)
    # Inverse transform: the first rank whose cumulated share exceeds a uniform draw.
    picked = (shares.cumsum(axis=-1) > random.random((len(shares), 1))).argmax(axis=-1)
    chosen: np.ndarray = np.take_along_axis(order, picked[:, None], axis=-1)[:, 0].astype(np.int64)
    return chosen
