"""How far an engine's logits are from those that they should be: of the same tokens, at every position.

The reference is of prompts of unequal length and what it makes of them greedily. The engine is fed the same tokens,
prefill first and then step by step through its own KV cache. It picks another token only where the reference itself
holds a tie within the tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from trsp_deploy.errors import ShapeUnavailable
from trsp_deploy.recipe import Precision
from trsp_deploy.results import perplexity_of
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.generation import left_padded
from trsp_deploy.tools.runners.manifest import Agreement

# Largest |difference of logits| over the standard deviation of the reference's logits. fp32 engines differ in the
# order of their sums only: 2e-5 was measured on SmolLM2-135M. fp16 rounds every product to 11 bits: 0.005 to 0.08 were
# measured, PyTorch's own fp16 among them; bf16 has three bits fewer, and no engine of it has run. Integer engines are
# made from a graph that has passed as fp32, so what is left to find is a quantisation gone wrong: 0.5 to 0.8 (int8) and
# 2.4 (int4) were measured. A wrong mask, position or cache costs more than 1.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 1.0, "int8": 1.5, "int4": 4.0}
# Share by which perplexity may be off PyTorch's of the same model, either way. fp32 on a CPU was off by 8e-6 at most on
# SmolLM2-135M and 50 made-up models of other families; by 0.5% and 0.7% where a graph turned keys otherwise than the
# model (LongRoPE). 16-bit floats: on prompts and what follows them by 0.2% (fp16) and 0.6% (bf16) at most, with the
# tests' tiny models; no engine was measured on a text. int8 was off by 2% on SmolLM2-135M, and 110 times it where
# products overflowed; int4 by 13% with an LM head of 8 bits, by 30% with one of 4. Such a small model is the hard case.
PERPLEXITY_TOLERANCES: dict[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.02, "int8": 0.1, "int4": 0.5}


@dataclass(frozen=True)
class Reference:
    """What an engine is held against: fp32 PyTorch, or the graph that it was built from."""

    input_ids: np.ndarray  # (batch, prompt) int64, left-padded
    attention_mask: np.ndarray  # (batch, prompt) int64
    tokens: np.ndarray  # (batch, new) int64: greedy continuation
    logits: np.ndarray  # (batch, prompt + new, vocabulary) float32

    @property
    def seen(self) -> np.ndarray:
        """(batch, prompt + new) bool: where there is no padding, which holds nothing to compare."""
        return np.concatenate([self.attention_mask == 1, np.ones(self.tokens.shape, dtype=bool)], axis=1)


def read_alone(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int) -> Reference:
    """What an entered runner makes of each prompt by itself, greedily: nothing of it is padded.

    Raises ShapeUnavailable where it takes no single text, or none so long.
    """
    input_ids, mask = left_padded(prompts)
    rows = [_continued(runner, np.array([prompt], dtype=np.int64), new_tokens) for prompt in prompts]
    width, vocabulary = input_ids.shape[1] + new_tokens, rows[0][0].shape[-1]
    logits = np.zeros((len(rows), width, vocabulary), dtype=np.float32)
    for row, (found, _) in zip(logits, rows, strict=True):
        row[-len(found) :] = found  # padding stands on the left
    return Reference(input_ids, mask, np.stack([tokens for _, tokens in rows]), logits)


def _continued(runner: Runner, prompt: np.ndarray, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (prompt + new, vocabulary) of one prompt (1, tokens) and its greedy continuation, (new,) tokens."""
    parts, tokens = [runner.prefill(prompt, np.ones_like(prompt))], []
    for _ in range(new_tokens):
        tokens.append(parts[-1][:, -1:].argmax(-1).astype(np.int64))  # (1, 1)
        parts.append(runner.decode(tokens[-1]))
    return np.concatenate(parts, axis=1)[0], np.concatenate(tokens, axis=1)[0]


def logits_of(reference: Reference, runner: Runner, *, one_by_one: bool = False) -> np.ndarray:
    """The engine's logits for the reference's tokens, (batch, prompt + new, vocabulary).

    An engine for one text at a time, or for texts without padding, reads the prompts one after the other, as it will
    read users' texts; what stands for padding is 0 then. One that breaks off in the middle is none of those.
    one_by_one: the engine's inputs are known to be of one text, which ONNX Runtime says no sooner than it fails.
    """
    if not one_by_one:
        with contextlib.suppress(ShapeUnavailable):
            return _fed(runner, reference.input_ids, reference.attention_mask, reference.tokens)
    logits = np.zeros_like(reference.logits)
    for row, mask in enumerate(reference.attention_mask):
        prompt = reference.input_ids[row : row + 1, mask == 1]
        found = _fed(runner, prompt, np.ones_like(prompt), reference.tokens[row : row + 1])
        logits[row, -found.shape[1] :] = found[0]
    return logits


def _fed(runner: Runner, input_ids: np.ndarray, attention_mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits (batch, prompt + new, vocabulary) of prompts and of what is given as following them."""
    parts = [runner.prefill(input_ids, attention_mask)]
    for step in range(tokens.shape[1]):
        parts.append(runner.decode(tokens[:, step : step + 1]))
    return np.concatenate(parts, axis=1)


def ruled_out(reference: Reference, logits: np.ndarray) -> np.ndarray:
    """(batch, prompt + new, vocabulary) bool: tokens that reference and engine both give -inf, as a graph does that
    masks what no token of its vocabulary uses."""
    found: np.ndarray = np.isneginf(reference.logits) & np.isneginf(logits)
    return found


def agreement(reference: Reference, logits: np.ndarray, precision: Precision, *, of_text: bool = True) -> Agreement:
    """How far an engine's logits (batch, prompt + new, vocabulary) are from the reference's.

    of_text: whether the prompts are of a text. Of random tokens perplexity is not judged: rounding to bf16 alone moves
    that of a few by -3 to 6% on SmolLM2-135M, and that of text by 0.6% at most.
    """
    if (both := ruled_out(reference, logits)).any():  # the least of numbers: no token picks it, nor does it differ
        least = reference.logits[np.isfinite(reference.logits)].min(initial=0.0)
        reference = dataclasses.replace(reference, logits=np.where(both, least, reference.logits))
        logits = np.where(both, least, logits)
    seen = reference.seen
    expected, actual = reference.logits[seen], logits[seen]  # (positions, vocabulary): padding holds nothing
    spread = float(expected.std()) or 1.0  # logits that are all one number differ in their own unit
    error = float(np.abs(actual - expected).max()) / spread  # NaN stays NaN and fails below
    top_two = np.partition(expected, -2, axis=-1)[:, -2:]
    margin = (top_two[:, 1] - top_two[:, 0]) / spread
    tolerance = TOLERANCES[precision]
    differs = actual.argmax(-1) != expected.argmax(-1)
    wrong = differs & (margin > 2 * tolerance)
    off = _nats(logits, reference, seen) - _nats(reference.logits, reference, seen)
    # Of integers so few tokens say too little: theirs is held against whole texts.
    bound = PERPLEXITY_TOLERANCES[precision] if of_text and precision in ("fp32", "fp16", "bf16") else None
    near = bound is None or abs(off) <= math.log1p(bound)
    return Agreement(
        max_error=error,
        tolerance=tolerance,
        tokens_compared=len(differs),
        tokens_equal=int((~differs).sum()),
        ppl_ratio=perplexity_of(off),
        ppl_tolerance=bound,
        passed=bool(error <= tolerance and not wrong.any() and near),
    )


def _nats(logits: np.ndarray, reference: Reference, seen: np.ndarray) -> float:
    """Mean loss of each next token of the prompts and of what follows them, by logits of the reference's shape.

    seen: (batch, prompt + new), where there is no padding.
    """
    ids = np.concatenate([reference.input_ids, reference.tokens], axis=1)  # (batch, prompt + new)
    known = seen[:, :-1]
    before, after = logits[:, :-1][known], ids[:, 1:][known]  # (tokens, vocabulary), (tokens,)
    return float(np.mean(scipy.special.logsumexp(before, axis=-1) - before[np.arange(len(after)), after]))
