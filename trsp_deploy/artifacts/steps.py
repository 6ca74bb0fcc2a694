"""The names of a run's steps, under which it keeps their records; a role is "dense" or "pruned".

steps.build("ort-cpu-fp32", "pruned")   # "build-ort-cpu-fp32-pruned"
"""

from __future__ import annotations

import re
from collections.abc import Iterable

DENSE, PLAN, SELF_GENERATED, PRUNE = "dense", "plan", "self-generated", "prune"
PLANS = "plans"  # of a sweep
SERVED = "served"  # no step, yet of a provenance of its own: what `bench-server` measured
EXPORT, PARITY, BENCH, EVALUATE, ZERO_SHOT = "export-", "parity-", "bench-", "evaluate-", "zero-shot-"
MEASURING = (PARITY, BENCH, EVALUATE, ZERO_SHOT)  # how steps begin whose results a report shows


def model(role: str) -> str:
    """What makes the folder of a role's model."""
    return PRUNE if role == "pruned" else DENSE


def export(role: str, precision: str) -> str:
    """A model written as ONNX."""
    return f"{EXPORT}{role}-{precision}"


def build(engine: str, role: str) -> str:
    """An engine built."""
    return f"build-{engine}-{role}"


def parity(subject: str, role: str, precision: str) -> str:
    """A graph or an engine compared with PyTorch; subject: "onnx", or the engine's name."""
    return f"{PARITY}{subject}-{role}-{precision}"


def bench(engine: str) -> str:
    """Dense and pruned timed in turn on one engine."""
    return f"{BENCH}{engine}"


def evaluate(text: str, role: str, engine: str | None = None) -> str:
    """Perplexity on a text, in PyTorch or through an engine."""
    return f"{EVALUATE}{text}-{role}" if engine is None else f"{EVALUATE}{engine}-{text}-{role}"


def zero_shot(engine: str, role: str) -> str:
    """Zero-shot tasks answered through an engine."""
    return f"{ZERO_SHOT}{engine}-{role}"


# Each after those that it may be of; behind a role no name follows, which may say "-dense-" too.
_OF_DENSE = (
    *(DENSE, SELF_GENERATED, export("dense", r"\w+"), build(".+", "dense")),
    *(parity(".+", "dense", r"\w+"), evaluate(".+", "dense"), zero_shot(".+", "dense")),
)


def of_dense(names: Iterable[str]) -> list[str]:
    """Those of the steps that make something of the dense model alone, each after those that it may be of."""
    there = list(names)
    return [name for pattern in _OF_DENSE for name in there if re.fullmatch(pattern, name)]
