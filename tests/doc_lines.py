"""Command lines as the docs have them, for the tests that parse and that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from typer.main import get_command

from trsp_deploy.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
GENERATED = ROOT / "docs" / "cli.md"  # its usage lines are no commands; `trsp_deploy.cli.reference` writes it
ROOT_COMMAND: Any = get_command(app)


class Line(NamedTuple):
    """A command line as it was found. `whole`: it stands in a block, so that nothing may be missing in it."""

    place: str
    text: str
    whole: bool


def lines_of(path: Path) -> Iterator[Line]:
    """Command lines of blocks and of inline code."""
    text = path.read_text(encoding="utf-8")
    place = str(path.relative_to(ROOT))
    blocks, rest = _blocks(text) if path.suffix == ".md" else ("", text)
    for line in re.sub(r"\\\n\s*", " ", blocks).splitlines():
        command = re.search(r"(?:^|[\s;(])(?:trsp-deploy|-m trsp_deploy) +(.*)", line.strip())
        if command and not line.strip().startswith("#"):
            said = re.split(r"\s+(?:#|\|\||[|;>])", f" {command[1]}")[0]
            yield Line(place, " ".join(said.split()), whole=True)
    names = [*ROOT_COMMAND.commands]
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest):
        words = " ".join(code.split())
        if words.startswith("trsp-deploy "):
            yield Line(place, words.removeprefix("trsp-deploy "), whole=False)
        elif path.suffix == ".md" and words.split()[0] in names and len(words.split()) > 1:
            yield Line(place, words, whole=False)


def _blocks(markdown: str) -> tuple[str, str]:
    """The text of fenced and indented blocks, and all the rest."""
    blocks: list[str] = []
    rest: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            blocks.append(line)
        else:
            rest.append(line)
    return "\n".join(blocks), "\n".join(rest)
