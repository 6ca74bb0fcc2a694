"""What every command prints with; light, so that those which only list answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 120


def console(file: TextIO) -> Console:
    """A console on a stream; piped output gets a fixed width instead of a terminal's."""
    return Console(file=file, highlight=False, width=None if file.isatty() else PIPED_WIDTH)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under headings, without lines."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))  # Text: a `[gpu]` in a pip command is no markup
    return table
