"""Which texts the figures of a report rest on, so that who has them can see that they are these."""

from __future__ import annotations

from collections.abc import Iterable

from trsp_deploy.recipe import Strict, shown_name
from trsp_deploy.tools.sources.overlap import overlap_note
from trsp_deploy.tools.sources.texts import Role, Texts
from trsp_deploy.tools.sources.windows import Extent


class TextReport(Strict):
    """One text, and how much of it was read."""

    name: str  # the recipe's
    role: Role
    origin: str
    sha256: str  # of the documents as a JSON list, as Python's json.dumps writes it
    documents: int
    tokens: int  # of an evaluation text those that were read, of a calibration text those that windows are drawn from
    bos: bool  # whether every window begins with the tokenizer's BOS
    overlap: float | None = None  # of an evaluation text, with the calibration texts; from 0 to 1

    @property
    def note(self) -> str:
        """What is to be said of its overlap; empty where there is nothing to say."""
        return overlap_note(self.name, self.overlap)


def text_report(name: str, role: Role, text: Texts, read: Extent, overlap: float | None = None) -> TextReport:
    """A text as it is shown to others: files of this machine by name alone."""
    return TextReport(
        name=name,
        role=role,
        origin=shown_name(text.origin),
        sha256=text.fingerprint,
        documents=len(text.documents),
        tokens=read.tokens,
        bos=read.bos,
        overlap=overlap,
    )


def text_rows(texts: Iterable[TextReport]) -> list[tuple[str, str]]:
    """Texts as label and value."""
    return [
        (
            f"text {text.name}" if text.role == "evaluation" else f"calibration text {shown_name(text.name)}",
            f"{text.origin}; {text.documents:,} documents, {text.tokens:,} tokens, "
            f"{'each window after BOS' if text.bos else 'windows without BOS'}; SHA-256 {text.sha256}",
        )
        for text in texts
    ]
