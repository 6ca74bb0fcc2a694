"""How much faster a cut model can be at most: bytes for decoding, operations for prefill.

Batch-1 decoding reads every layer's weights, the LM head and the live KV cache once a token, so its time is at least
bytes over bandwidth; prefill is bound by its multiplications. The bandwidth or the rate is the same for dense and
pruned and cancels in the ratio.
"""

from __future__ import annotations

from trsp_deploy.decoder import DecoderSize
from trsp_deploy.recipe import Precision, Strict

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2}


class SpeedLimit(Strict):
    """Upper bounds of dense time / pruned time."""

    prefill: float
    decode: float


def decode_bytes(size: DecoderSize, precision: Precision, batch: int, past: int) -> int:
    """Bytes that one decode step must read: layers, LM head, and the KV cache of `past` tokens a sequence."""
    cache = batch * past * size.cache_per_token * len(size.weights.layers)
    return BYTES[precision] * (sum(size.weights.layers) + size.weights.lm_head + cache)


def prefill_operations(size: DecoderSize, batch: int, prompt: int) -> int:
    """Multiply-adds x 2 of a prompt: weights at every position (the graph computes all logits), and attention."""
    weights = sum(size.weights.layers) + size.weights.lm_head
    attention = len(size.weights.layers) * 2 * prompt * size.attention_width
    return 2 * batch * prompt * (weights + attention)


def speed_limit(
    dense: DecoderSize, pruned: DecoderSize, precision: Precision, batch: int, prompt: int, past: int
) -> SpeedLimit:
    """The limits of both phases at the measured shapes."""
    return SpeedLimit(
        prefill=prefill_operations(dense, batch, prompt) / prefill_operations(pruned, batch, prompt),
        decode=decode_bytes(dense, precision, batch, past) / decode_bytes(pruned, precision, batch, past),
    )
