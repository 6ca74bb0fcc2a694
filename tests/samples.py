"""Comparisons with made-up samples whose truth is known.

comparison = made_up(speedup=1.2, noise=0.02)
"""

from __future__ import annotations

import numpy as np

from trsp_deploy.recipe import BenchSettings
from trsp_deploy.results import Block, Comparison, Replicate, Subject

NEW_TOKENS = 4


def made_up(
    speedup: float = 1.0, noise: float = 0.01, replicates: int = 8, cycles: int = 4, seed: int = 0, control: bool = True
) -> Comparison:
    """Log-normal noise of size `noise` on every process and on every block; dense takes 10 ms a token, 50 a prompt."""
    generator = np.random.default_rng(seed)
    subjects: tuple[Subject, ...] = ("dense", "again", "pruned") if control else ("dense", "pruned")
    return Comparison(
        engine="made-up",
        settings=BenchSettings(new_tokens=NEW_TOKENS),
        threads=2,
        replicates=tuple(_replicate(subjects, speedup, noise, cycles, generator) for _ in range(replicates)),
        telemetry=(),
        rates=None,
        stopped="budget",
        elapsed_s=60.0,
    )


def _replicate(
    subjects: tuple[Subject, ...], speedup: float, noise: float, cycles: int, generator: np.random.Generator
) -> Replicate:
    def blocks(subject: Subject) -> tuple[tuple[Block, ...], ...]:
        process = np.exp(generator.normal(0, noise)) / (speedup if subject == "pruned" else 1)
        turns = cycles * (3 if len(subjects) == 3 else 2)
        return (tuple(_block(process * np.exp(generator.normal(0, noise))) for _ in range(turns)),)

    return Replicate(
        began_s=0.0,
        together=True,
        load_s=dict.fromkeys(subjects, 0.5),
        peak_rss_bytes=dict.fromkeys(subjects, 10**8),
        gpu_bytes={},
        warmup_blocks=3,
        blocks_per_turn=1,
        cycles_s=1.0,
        order=subjects,
        blocks={subject: blocks(subject) for subject in subjects},
    )


def _block(scale: float) -> Block:
    prefill_s, token_s = 0.05 * scale, 0.01 * scale
    return Block(prefill_s=prefill_s, decode_s=(token_s,) * NEW_TOKENS, total_s=prefill_s + NEW_TOKENS * token_s)
