"""How much faster a cut model can be at most: bytes for decoding, operations for prefill.

Batch-1 decoding reads every layer's weights, the LM head and the live KV cache once a token, so its time is at least
bytes over bandwidth; prefill is bound by its multiplications. The bandwidth or the rate is the same for dense and
pruned and cancels in the ratio.
"""

from __future__ import annotations

from trsp_deploy.decoder import DecoderSize
from trsp_deploy.recipe import Float, Precision, Strict

# Bytes a weight of the layers and of the LM head, scales and zero points among them; heads keep 8 bits
# (tools/graphs/quantize.py).
WEIGHT_BYTES: dict[Precision, tuple[float, float]] = {
    "fp32": (4, 4),
    "fp16": (2, 2),
    "int8": (1.03, 1.125),
    "int4": (0.57, 1.125),
}
CACHE_BYTES: dict[Float, int] = {"fp32": 4, "fp16": 2}


class SpeedLimit(Strict):
    """Upper bounds of dense time / pruned time."""

    prefill: float
    decode: float


def decode_bytes(size: DecoderSize, precision: Precision, batch: int, past: int, cached: Float | None = None) -> float:
    """Bytes that one decode step must read: layers, LM head, and the KV cache of `past` tokens a sequence.

    cached: precision of the cache; None is fp16 in an fp16 engine, else fp32.
    """
    cache = batch * past * size.cache_per_token * len(size.weights.layers)
    layers, head = WEIGHT_BYTES[precision]
    width = CACHE_BYTES[cached or ("fp16" if precision == "fp16" else "fp32")]
    return layers * sum(size.weights.layers) + head * size.weights.lm_head + width * cache


def prefill_operations(size: DecoderSize, batch: int, prompt: int, logits: int | None = None) -> int:
    """Multiply-adds x 2 of a prompt: layers and attention at every position, the LM head at `logits` of them.

    logits: positions that logits are computed for; None is all of the prompt.
    """
    head = size.weights.lm_head * (prompt if logits is None else logits)
    attention = len(size.weights.layers) * 2 * prompt * size.attention_width
    return 2 * batch * (prompt * (sum(size.weights.layers) + attention) + head)


def speed_limit(
    dense: DecoderSize,
    pruned: DecoderSize,
    precision: Precision,
    batch: int,
    prompt: int,
    past: int,
    *,
    logits: int | None = None,
    cached: Float | None = None,
) -> SpeedLimit:
    """The limits of both phases at the measured shapes; `logits` and `cached` as above."""
    return SpeedLimit(
        prefill=prefill_operations(dense, batch, prompt, logits) / prefill_operations(pruned, batch, prompt, logits),
        decode=decode_bytes(dense, precision, batch, past, cached)
        / decode_bytes(pruned, precision, batch, past, cached),
    )
