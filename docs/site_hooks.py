"""What MkDocs does not do by itself: pages out of the repository's root, and links from docs/ to files outside it.

MkDocs calls these functions by their names (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, their links turned to where they stand now."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=LINK.sub(_from_root, text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link that leaves docs/ becomes the path as code: the site has no such page, and the repository is elsewhere.

    One that leads nowhere stays, so that the strict build stops at it.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def rewritten(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link[0]
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if link[1].strip("`") == path else f"{link[1]} (`{path}`)"

    return LINK.sub(rewritten, markdown)


def _from_root(link: re.Match[str]) -> str:
    """A link that was written for the root, for a page in docs/."""
    if "://" in link[2]:
        return link[0]
    as_page = {source: page for page, source in PAGES.items()}
    target = as_page.get(link[2]) or (link[2].removeprefix("docs/") if link[2].startswith("docs/") else f"../{link[2]}")
    return f"[{link[1]}]({target}{link[3] or ''})"
