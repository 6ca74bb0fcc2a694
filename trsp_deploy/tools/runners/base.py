"""The one interface that every engine is driven through."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self

import numpy as np


class Runner(abc.ABC):
    """An engine that generates: prefill a prompt, then decode one token at a time.

    A context manager: the engine is loaded, and a GPU touched, only when entered. The runner keeps
    the KV cache and the attention mask between calls; `prefill` starts over.
    Raises EngineUnavailable on entry when this machine cannot run the engine.

    device_s: seconds of the last call on the GPU by CUDA events, from its launch on and without copies to and from it;
    None where the runner has no events of its own.
    """

    device_s: float | None = None

    @property
    def longest_text(self) -> int | None:
        """Tokens that a text may have, its prompt and padding among them; None where nothing is known to end it.

        Of an engine that has been entered.
        """
        return None

    @abc.abstractmethod
    def __enter__(self) -> Self: ...

    @abc.abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abc.abstractmethod
    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Read a prompt into an empty cache.

        input_ids, attention_mask: (batch, sequence) int64; left padding where the mask is 0.
        Returns logits (batch, sequence, vocabulary) float32 in host memory; with `last_only` those of the last
        position, (batch, 1, vocabulary): all that generating needs, and the LM head is spared the others where it can.
        Raises ShapeUnavailable, before anything runs, for a batch, length or padding that the engine does not take:
        callers may then ask for less. EngineUnavailable is a failure.
        """

    @abc.abstractmethod
    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """Append one token to each sequence.

        input_ids: (batch, 1) int64. Returns logits (batch, 1, vocabulary) float32 in host memory.
        """
