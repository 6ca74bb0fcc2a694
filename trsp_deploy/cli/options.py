"""What options take for a number."""

from __future__ import annotations

import math

import typer


def finite(value: float | None) -> float | None:
    """A callback of options: float() reads nan and inf, and neither is below a least value."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be used")
    return value
