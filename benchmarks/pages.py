"""Pages that a bench writes a part of: Markdown tables between two markers, the rest belongs to the page's author."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from trsp_deploy.artifacts import writing
from trsp_deploy.errors import RunError


def put_between_markers(page: Path, text: str, name: str) -> None:
    """Replace what stands between a page's lines `<!-- name:start -->` and `<!-- name:end -->`.

    Raises RunError when the page does not have them, once each and in this order.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if content.count(start) != 1 or content.count(end) != 1 or content.index(start) > content.index(end):
        raise RunError(f"{page}: needs one line '{start}' and below it one line '{end}'")
    before, _, rest = content.partition(start)
    _, _, after = rest.partition(end)
    with writing(page) as partial:
        partial.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or a line that says that there is nothing yet."""
    lines = [f"| {' | '.join(cells)} |" for cells in body]
    if not lines:
        return "Not measured yet."
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])
