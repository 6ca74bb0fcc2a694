"""What options take: numbers that can be used, files that can be written."""

from __future__ import annotations

import math
from pathlib import Path

import typer


def finite(value: float | None) -> float | None:
    """A callback of options: float() reads nan and inf, and neither is below a least value."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be used")
    return value


def file_to_write(path: Path | None) -> Path | None:
    """A callback of options: said before hours of work, not after them."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the file to write")
    return path
