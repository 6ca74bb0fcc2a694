"""What the GPU bench times: a random OPT, a prompt, and decoding at several past lengths and batches."""

from __future__ import annotations

from typing import Literal, NamedTuple

from trsp_deploy.recipe import Strict

SETTLING = 2  # decoding steps before those that count: compiling, capturing a CUDA graph


class Plan(Strict):
    """What is measured."""

    layers: tuple[int, int]  # dense, and after a quarter was removed
    hidden_size: int
    ffn_dim: int
    heads: int
    vocabulary: int
    positions: int
    prompt: int
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int = 16  # decoding steps of one sample
    rounds: int = 7  # samples


FULL = Plan(
    layers=(32, 24),
    hidden_size=4096,
    ffn_dim=16384,
    heads=32,
    vocabulary=50272,
    positions=2048,
    prompt=2048,
    pasts=(128, 1024, 1900),
    batches=(1, 8, 64),
)
TINY = Plan(
    layers=(4, 3),
    hidden_size=64,
    ffn_dim=128,
    heads=4,
    vocabulary=384,
    positions=64,
    prompt=32,
    pasts=(8, 16),
    batches=(1, 2),
    steps=2,
    rounds=2,
)


class Shape(NamedTuple):
    """What one sample times."""

    phase: Literal["prefill", "decode"]
    batch: int
    past: int  # tokens in the cache before; of a prompt, its length

    def __str__(self) -> str:
        return f"prompt {self.past}" if self.phase == "prefill" else f"{self.batch} x past {self.past}"


def shapes(plan: Plan) -> list[Shape]:
    """Every shape of a plan: its prompt, then decoding."""
    steps = [Shape("decode", batch, past) for batch in plan.batches for past in plan.pasts]
    return [Shape("prefill", 1, plan.prompt), *steps]
