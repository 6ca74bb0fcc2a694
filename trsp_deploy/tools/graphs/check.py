"""Whether two graphs of one decoder give the same logits: the proof that a pass has to bring."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trsp_deploy.recipe import Float
from trsp_deploy.tools.graphs.decoder_io import PAST

# Largest |difference| over the standard deviation of the logits. A pass changes the order of sums: 1e-5 to 5e-5 was
# measured in fp32 and 0.01 in fp16; a wrong mask, position, factor or head costs more than 1.
TOLERANCES: dict[Float, float] = {"fp32": 1e-3, "fp16": 0.1}
PROMPT, PADDING, STEPS = 11, 4, 3


class Decoder(Protocol):
    """What is asked of a graph: an `OrtRunner` (tools/runners/ort.py) that has been entered."""

    def feeds(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Every input of the graph, to read a prompt; of a fixed length where it says so."""

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Logits (batch, sequence, vocabulary) of a prompt, or (batch, 1, vocabulary) of its last position alone."""

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits (batch, 1, vocabulary) after one more token."""


def texts_at_once(decoder: Decoder, wanted: int) -> int:
    """As many texts as are wanted, or as the graph reads where it is for one number of them alone."""
    ids = np.zeros((wanted, 1), dtype=np.int64)
    return next(len(value) for name, value in decoder.feeds(ids, np.ones_like(ids)).items() if name.startswith(PAST))


def sample_logits(decoder: Decoder, vocabulary: int) -> np.ndarray:
    """Logits (positions, vocabulary) of two random texts of unequal length, left-padded: a prompt and a few steps.

    Behind them the prompt's last ones (rows, vocabulary) once more, asked for alone as generating does.
    """
    rows, random = texts_at_once(decoder, 2), np.random.default_rng(0)
    ids = random.integers(vocabulary, size=(rows, PROMPT))
    mask = np.ones_like(ids)
    mask[0, :PADDING] = 0
    parts = [decoder.prefill(ids, mask)]
    for _ in range(STEPS):
        parts.append(decoder.decode(random.integers(vocabulary, size=(rows, 1))))
    seen = np.concatenate([mask, np.ones((rows, STEPS), dtype=mask.dtype)], axis=1) == 1
    logits: np.ndarray = np.concatenate(parts, axis=1)[seen]  # what stands on padding means nothing
    last = decoder.prefill(ids, mask, last_only=True)
    return np.concatenate([logits, last[:, -1]])


def padding_error(decoder: Decoder, vocabulary: int) -> float:
    """Largest |difference| that left padding and a longer neighbour make to a text's logits, over their standard
    deviation: of a prompt and a few steps."""
    rows, random = texts_at_once(decoder, 2), np.random.default_rng(0)
    ids, mask = random.integers(vocabulary, size=(rows, PROMPT)), np.ones((rows, PROMPT), dtype=np.int64)
    mask[0, :PADDING] = 0
    steps = random.integers(vocabulary, size=(STEPS, rows, 1))
    padded = [decoder.prefill(ids, mask)[:1, PADDING:], *(decoder.decode(step)[:1] for step in steps)]
    only = slice(texts_at_once(decoder, 1))
    alone = [decoder.prefill(ids[only, PADDING:], np.ones_like(ids[only, PADDING:]))[:1]]
    alone += [decoder.decode(step[only])[:1] for step in steps]
    return difference(np.concatenate(alone, axis=1), np.concatenate(padded, axis=1))


def difference(before: np.ndarray, after: np.ndarray) -> float:
    """Largest |difference| of logits over their standard deviation; infinite where a number is not one, but for -inf in
    both, by which a graph rules out what no token of its vocabulary uses."""
    compared = ~(np.isneginf(before) & np.isneginf(after))
    before, after = before[compared], after[compared]
    with np.errstate(invalid="ignore"):  # of infinities that are in both
        error = float(np.abs(after - before).max(initial=0.0) / before.std())
    return error if np.isfinite(error) else float("inf")
