"""Tokens to text while it is being made: whole characters, spaces kept, nothing that might become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from trsp_deploy.errors import ModelError, one_line

CONTEXT = 5  # tokens before those that are being decoded: a token's text depends on its neighbours
LONGEST_CONTEXT = 64  # where fewer would begin within a character
INCOMPLETE = "�"  # what bytes decode to that are no whole character yet


def read_tokenizer(file: Path) -> Tokenizer:
    """Load a tokenizer.json; a limit or a padding that training left in it is not for prompts.

    Raises ModelError where the file is missing, or none that tokenizers reads.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as problem:  # tokenizers raises nothing more exact
        raise ModelError(f"{file}: is no tokenizer that can be read ({one_line(problem)})") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """The text of one answer, token by token.

    The text of a token depends on those before it (a leading space, half a character), so a few are decoded with it and
    their own text is taken off. tokenizers' DecodeStream does the same and cannot be ended: bytes that never become a
    character would take all that follows with them.

    stop: strings that end the answer; neither they nor what follows is shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-LONGEST_CONTEXT:])
        self._read = len(self._tokens)  # decoded before
        self._first = self._beginning(self._read - CONTEXT)  # decoded from
        self._stop = tuple(stop)
        self._held = ""  # shown only once it can be no part of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown after one more token; empty within a character or a possible stop string."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(INCOMPLETE):
            return ""
        return self._show(text)

    def end(self) -> str:
        """What was held back, now that no token follows."""
        shown = self._show(self._new_text()) if not self.stopped else ""
        shown, self._held = shown + self._held, ""
        return shown

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._first : self._read])
        return self._decode(self._tokens[self._first :])[len(before) :]

    def _beginning(self, first: int) -> int:
        """The last token up to `first` from which there is text that begins with a whole character.

        One byte of another makes its whole run unreadable; and where nothing is in front of a token, as behind special
        tokens alone, it is decoded as a text's first one and loses its space.
        """
        earliest = max(0, first - LONGEST_CONTEXT)
        for place in range(max(0, first), earliest - 1, -1):
            text = self._decode(self._tokens[place : self._read])
            if text and not text.startswith(INCOMPLETE):
                return place
        return max(0, first)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> str:
        before, self._read = self._read, len(self._tokens)
        self._first = max(self._first, self._beginning(before - CONTEXT))
        self._held += text
        places = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if places:
            shown, self.stopped, self._held = self._held[: min(places)], True, ""
            return shown
        keep = max((_overlap(self._held, word) for word in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning of `word`."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
