"""Text from an engine: greedy or sampled, several prompts of unequal length at once, each until it ends.

texts = generate(runner, [[5, 9], [7, 3, 1]], Sampling(max_new_tokens=32, end=(2,)))
texts[0].tokens, texts[0].finish
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from trsp_deploy.errors import EngineUnavailable, RecipeError
from trsp_deploy.recipe import Count, NonNegative, Strict
from trsp_deploy.tools.runners.base import Runner

FIRST_RANKED = 64  # tokens that mostly hold what top_p asks for
COLDEST = 1e-6  # of what fp32 can divide logits by


class Sampling(Strict):
    """How tokens are chosen, as in transformers' GenerationConfig."""

    max_new_tokens: Count = 128
    temperature: NonNegative = 0.0  # 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # most likely tokens to choose among; 0 is all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest set of most likely tokens that hold this probability
    seed: Annotated[int, Field(ge=0)] = 0
    end: tuple[int, ...] = ()  # tokens after which a text is over

    @property
    def ignored(self) -> str | None:
        """Name of what is set and decides nothing, as where the likeliest token is taken: harmless in a request, a
        mistake on a command line."""
        fields = Sampling.model_fields
        names = () if self.temperature > 0 else ("top_k", "top_p", "seed")
        return next((name for name in names if getattr(self, name) != fields[name].default), None)


@dataclass(frozen=True)
class Continued:
    """What an engine made of one prompt."""

    tokens: list[int]  # new ones, without the one that ended it
    finish: Literal["stop", "length"]  # ended by one of `Sampling.end`, or by the tokens that were wanted or have room


def generate(runner: Runner, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Continued]:
    """Continue every prompt, as far as the engine has room: in a batch all texts are as long as the longest.

    runner: entered. Raises RecipeError for an empty prompt, EngineUnavailable for a prompt that the engine's shapes do
    not hold, and where its numbers end.
    """
    if not prompts or not all(prompts):
        raise RecipeError("nothing to continue: a prompt has no tokens")
    input_ids, mask = left_padded(prompts)
    random = np.random.default_rng(sampling.seed)
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    logits = runner.prefill(input_ids, mask, last_only=True)
    count = sampling.max_new_tokens
    if runner.longest_text is not None:  # the last token of all is chosen and not read
        count = min(count, max(1, runner.longest_text - input_ids.shape[1] + 1))
    for number in range(count):
        tokens = choose(logits[:, -1], sampling, random)  # (batch,)
        for row in sorted(running):
            if int(tokens[row]) in sampling.end:
                running.discard(row)
            else:
                texts[row].append(int(tokens[row]))
        if not running or number == count - 1:
            break
        logits = runner.decode(tokens[:, None])  # a text that is over goes on unheard
    return [Continued(text, "length" if row in running else "stop") for row, text in enumerate(texts)]


def prompt_tokens(tokens: Sequence[int], added: Sequence[int]) -> list[int]:
    """A prompt's tokens without what its tokenizer put around the text and does not belong there.

    That is what it puts behind a text, such as EOS, for what follows an end is another text; and what it puts before a
    text that begins so itself, as a chat template's does with BOS: models have seen no text with two of them.

    added: 1 for each token that is the tokenizer's own and not of the text, `special_tokens_mask` by its usual name.
    """
    last = next((place for place in range(len(tokens) - 1, 0, -1) if not added[place]), 0)
    begin = next((place for place, own in enumerate(added) if not own), 0)
    twice = tokens[:begin] == tokens[begin : 2 * begin]
    return list(tokens[begin if twice else 0 : last + 1])


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as (batch, longest) int64 ids and mask, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = np.array([[0] * (longest - len(p)) + list(p) for p in prompts], dtype=np.int64)
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
    """One token per row, (batch,) int64, from logits (batch, vocabulary). Raises EngineUnavailable for NaN."""
    likeliest: np.ndarray = logits.argmax(axis=-1).astype(np.int64)  # a NaN where there is one
    if not np.isfinite(np.take_along_axis(logits, likeliest[:, None], axis=-1)).all():
        raise EngineUnavailable("the engine gives logits that are no numbers; an fp32 engine holds what overflows here")
    if sampling.temperature == 0:
        return likeliest
    uniform = random.random(len(logits))
    return np.array([_drawn(row, sampling, u) for row, u in zip(logits, uniform, strict=True)], dtype=np.int64)


def _drawn(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """A token of logits (vocabulary,) by inverse transform of a number in [0, 1).

    Ranking a whole vocabulary takes as long as a small model's step, so no more is ranked than may be chosen.
    """
    scores = logits.astype(np.float32)
    weights = np.exp((scores - np.max(scores)) / np.float32(max(sampling.temperature, COLDEST)))
    tokens = np.arange(len(weights))
    if sampling.top_k:  # first, as transformers: top_p is a share of what is left
        tokens = _largest(weights, sampling.top_k)
    if sampling.top_p < 1:
        tokens = tokens[_nucleus(weights[tokens], sampling.top_p)]
    held = weights[tokens].cumsum(dtype=np.float64)
    below = np.nextafter(held[-1], 0)  # rounding must not lead behind the last token that has a share
    return int(tokens[np.searchsorted(held, min(uniform * held[-1], below), side="right")])


def _largest(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest weights, the largest first, and of equal ones the first."""
    found = np.arange(len(weights))
    if count < len(weights):
        found = np.flatnonzero(weights >= np.partition(weights, -count)[-count])
    return found[np.argsort(-weights[found], kind="stable")][:count]


def _nucleus(weights: np.ndarray, share: float) -> np.ndarray:
    """Indices of the fewest weights that hold a share of all (Holtzman et al., arXiv 1904.09751), the largest first."""
    wanted, count = share * weights.sum(dtype=np.float64), FIRST_RANKED
    while True:
        largest = _largest(weights, count)
        held = weights[largest].cumsum(dtype=np.float64)
        if held[-1] >= wanted or count >= len(weights):
            return largest[: np.searchsorted(held, wanted) + 1]
        count *= 8
