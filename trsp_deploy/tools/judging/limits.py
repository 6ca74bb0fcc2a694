"""How much faster a cut model can be at most: bytes for decoding, operations for prefill.

Batch-1 decoding reads every layer's weights, the LM head and the live KV cache once per token, so its time is at least
bytes over bandwidth; prefill of a long prompt is bound by its multiplications. Which of them binds is told by the
machine's measured rates (tools/measuring/rates.py); where it is the same for dense and pruned the rate cancels in the
ratio. What an engine takes beyond that least time, such as for starting a kernel, can shrink with the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from trsp_deploy.decoder import DecoderSize
from trsp_deploy.recipe import Case, Precision, Strict
from trsp_deploy.results import Phase, Rates
from trsp_deploy.tools.graphs.stored import Stored


class PhaseLimit(NamedTuple):
    """The least time of one phase."""

    ratio: float  # dense's over pruned's
    floor_s: float = math.inf  # dense's; without measured rates all that it takes counts as such


class SpeedLimit(Strict):
    """Upper bounds of dense time / pruned time at one shape, of a dense engine whose times are known."""

    prefill: PhaseLimit
    decode: PhaseLimit  # of a token
    layers: float  # pruned's number of them over dense's
    new_tokens: int
    assumed: bool = False  # what binds each phase is, for the rate of such products was not measured

    def of(self, phase: Phase, dense_s: Mapping[Phase, float]) -> float:
        """The bound of a phase, or of both together; dense_s: measured, of decoding of a token."""
        if phase == "total":
            reading = dense_s["prefill"]
            token = max(0.0, dense_s["total"] - reading) / self.new_tokens
            least = self._least_s(self.prefill, reading) + self.new_tokens * self._least_s(self.decode, token)
            return (reading + self.new_tokens * token) / least
        limit = self.prefill if phase == "prefill" else self.decode
        return dense_s[phase] / self._least_s(limit, dense_s[phase])

    def _least_s(self, limit: PhaseLimit, dense_s: float) -> float:
        """Seconds that pruned takes at least: its share of the least time, and its layers' of all beyond."""
        within = min(dense_s, limit.floor_s)
        return within / limit.ratio + (dense_s - within) * self.layers


class Work(Strict):
    """What one phase has to do: read memory and multiply, side by side."""

    read_bytes: float
    operations: float

    def seconds(self, rates: Rates, precision: Precision) -> float:
        """The least time that the work takes: the slower of the two at this machine's best."""
        return max(self.read_bytes / rates.bytes_per_s, self.operations / rates.operations_per_s[precision])


def decode_bytes(size: DecoderSize, kept: Stored, batch: int, past: int) -> float:
    """Bytes that one decode step must read: layers, LM head, and the KV cache of `past` tokens per sequence."""
    cache = batch * past * size.cache_per_token * len(size.weights.layers)
    return kept.layers * sum(size.weights.layers) + kept.head * size.weights.lm_head + kept.cached * cache


def prefill_operations(size: DecoderSize, batch: int, prompt: int, logits: int | None = None) -> int:
    """Multiply-adds x 2 of a prompt: layers and attention at every position, the LM head at `logits` of them.

    logits: positions that logits are computed for; None is all of the prompt.
    """
    head = size.weights.lm_head * (prompt if logits is None else logits)
    attention = len(size.weights.layers) * 2 * prompt * size.attention_width
    return 2 * batch * (prompt * (sum(size.weights.layers) + attention) + head)


def prefill_work(size: DecoderSize, kept: Stored, case: Case, logits: int | None = None) -> Work:
    """Work of reading the prompt: the weights once, and the cache written."""
    return Work(
        read_bytes=decode_bytes(size, kept, case.batch_size, case.prompt_tokens),
        operations=prefill_operations(size, case.batch_size, case.prompt_tokens, logits),
    )


def decode_work(size: DecoderSize, kept: Stored, case: Case) -> Work:
    """Work of the median new token."""
    past = case.prompt_tokens + case.new_tokens // 2
    attention = len(size.weights.layers) * 2 * past * size.attention_width
    return Work(
        read_bytes=decode_bytes(size, kept, case.batch_size, past),
        operations=2 * case.batch_size * (sum(size.weights.layers) + size.weights.lm_head + attention),
    )


def speed_limit(
    dense: DecoderSize,
    pruned: DecoderSize,
    kept: Stored,
    case: Case,
    *,
    rates: Rates | None = None,
    logits: int | None = None,
) -> SpeedLimit:
    """The limits of every phase at one shape; `logits` as above.

    rates: this machine's, to know whether bytes or operations bind a phase, and what of its time they bind. Without
    them, or for products that they do not tell, decoding is assumed to be bound by bytes, prefill by operations.
    """
    prefill = [prefill_work(size, kept, case, logits) for size in (dense, pruned)]
    decode = [decode_work(size, kept, case) for size in (dense, pruned)]
    layers = len(pruned.weights.layers) / len(dense.weights.layers)
    if rates is None or kept.computes is None or kept.computes not in rates.operations_per_s:
        by_operations = PhaseLimit(prefill[0].operations / prefill[1].operations)
        by_bytes = PhaseLimit(decode[0].read_bytes / decode[1].read_bytes)
        return SpeedLimit(
            prefill=by_operations, decode=by_bytes, layers=layers, new_tokens=case.new_tokens, assumed=True
        )
    read, step = ([work.seconds(rates, kept.computes) for work in phase] for phase in (prefill, decode))
    return SpeedLimit(
        prefill=PhaseLimit(read[0] / read[1], read[0]),
        decode=PhaseLimit(step[0] / step[1], step[0]),
        layers=layers,
        new_tokens=case.new_tokens,
    )
