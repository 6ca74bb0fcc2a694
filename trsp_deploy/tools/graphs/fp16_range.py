"""The record of what stays in fp32 within an fp16 graph. half.py, which does the work, imports more."""

from __future__ import annotations

from trsp_deploy.recipe import Strict

LARGEST = 65504.0  # of fp16
# Other texts may reach further than the one that was read, though not by much: the largest activations are the model's
# more than the text's. SmolLM2-135M's are 23,060 on Wikipedia and 22,360 on random tokens (docs/log.md).
MARGIN = 2.0
LIMIT = LARGEST / MARGIN
METADATA = "trsp_deploy.fp16_range"  # of a graph that half.py has been over: a `HalfRange` as JSON


class Kept(Strict):
    """One node that computes in fp32."""

    name: str
    operator: str
    largest: float  # magnitude among what it reads and makes


class HalfRange(Strict):
    """What a text showed of an fp16 graph."""

    tokens: int  # of the text
    limit: float = LIMIT  # magnitude from which on a value is fp32
    largest: float  # magnitude of any value
    kept: tuple[Kept, ...] = ()
    error: float | None = None  # of the logits against fp32's, in standard deviations; None where nothing is kept
    reason: str | None = None  # why nothing could be measured; None where it was
