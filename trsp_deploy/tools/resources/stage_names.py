"""What the estimates of memory and disk call the stages of a job: by these a job says which it still has to do."""

from __future__ import annotations

from typing import Final

SELECTION: Final = "selection"
TRANSFER: Final = "transfer"
EVALUATION: Final = "evaluation"


def export(precision: str) -> str:
    """Both models written as ONNX; precision: of the graphs."""
    return f"onnx {precision}"


def build(engine: str) -> str:
    """Both engines of a spec, by its name."""
    return f"engine {engine}"


def run(engine: str) -> str:
    """What is measured of them."""
    return f"run {engine}"
