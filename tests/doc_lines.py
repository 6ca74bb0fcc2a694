"""Command lines as the docs have them, for the tests that parse and that run them."""

from __future__ import annotations

import itertools
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
OURS = re.compile(r"(?:^|[\s;(])(?:trsp-deploy|-m trsp_deploy) +(.*)")
NOT_RUN = "# not run by the tests"  # above a line of a block that runs another program


class Line(NamedTuple):
    """A command line as it was found. `whole`: it stands in a block, so that nothing may be missing in it.

    launcher: what stands before `-m trsp_deploy`, such as `accelerate launch` with its options.
    """

    place: str
    text: str
    whole: bool
    launcher: str = ""


def lines_of(path: Path) -> Iterator[Line]:
    """Command lines of blocks and of inline code."""
    text = path.read_text(encoding="utf-8")
    place = str(path.relative_to(ROOT))
    blocks, rest = _blocks(text) if path.suffix == ".md" else ([], text)
    for line in blocks:
        command = OURS.search(line)
        if command and not line.startswith("#"):
            said = re.split(r"\s+(?:#|\|\||[|;>])", f" {command[1]}")[0]
            launcher = line[: command.start()] if "-m trsp_deploy" in command[0] else ""
            yield Line(place, " ".join(said.split()), whole=True, launcher=launcher)
    names = [*ROOT_COMMAND.commands]
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest):
        words = " ".join(code.split())
        if words.startswith("trsp-deploy "):
            yield Line(place, words.removeprefix("trsp-deploy "), whole=False)
        elif path.suffix == ".md" and words.split()[0] in names and len(words.split()) > 1:
            yield Line(place, words, whole=False)


def unmarked(path: Path) -> list[str]:
    """Lines of a page's blocks that run another program, with an option, and are not marked as NOT_RUN."""
    lines, _ = _blocks(path.read_text(encoding="utf-8"))
    others = re.compile(r"[a-z][\w.-]*(\s[^#]*)?\s--?[A-Za-z]")
    return [
        line
        for before, line in itertools.pairwise(["", *lines])
        if others.match(line) and not OURS.search(line) and before != NOT_RUN
    ]


def _blocks(markdown: str) -> tuple[list[str], str]:
    """The lines of fenced and indented blocks, each with those that a backslash joins to it, and all the rest."""
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
    joined = re.sub(r"\\\n\s*", " ", "\n".join(blocks))
    return [line.strip() for line in joined.splitlines()], "\n".join(rest)
