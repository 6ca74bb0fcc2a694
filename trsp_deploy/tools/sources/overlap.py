"""How much of an evaluation text stands in the calibration text word for word, which flatters what learned from it.

    share = overlap(load_texts("held-out.jsonl", "evaluation"), [load_texts("texts.jsonl", "calibration")])

Compared are sequences of 13 words without case and punctuation. Those that more than 10 documents have are left out, as
phrases that anyone uses, such as a chat template's system prompt. Both are as in GPT-3's study of contamination (Brown
et al. 2020, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from trsp_deploy.tools.sources.texts import Texts

SEQUENCE = 13  # words; a shorter document is one sequence
COMMON = 10  # calibration documents
TOLD = 0.01  # share from which on people are told
WORD = re.compile(r"\w+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of an earlier word is lost


def overlap(text: Texts, calibration: Iterable[Texts]) -> float:
    """Share of a text's different word sequences that stand in the calibration texts, from 0 to 1.

    Takes time linear in all of them, about a second for a million words, and memory for the one text.
    """
    wanted = np.unique(np.concatenate([_sequences(document) for document in text.documents]))
    if not len(wanted):  # no document has a word
        return 0.0
    counts = np.zeros(len(wanted), dtype=np.int64)  # calibration documents that have each
    for document in (document for other in calibration for document in other.documents):
        found = _sequences(document)
        places = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
        counts[places[wanted[places] == found]] += 1
    own = counts[counts <= COMMON]
    return float((own > 0).mean()) if len(own) else 1.0


def overlap_note(name: str, share: float | None) -> str:
    """What to say of an evaluation text that shares so much with the calibration text; empty where that is nothing."""
    if share is None or share < TOLD:
        return ""
    return f"evaluation '{name}': {share:.1%} of it stands in the calibration text, and flatters what learned from it"


def _sequences(document: str) -> np.ndarray:
    """Hashes of a document's different word sequences, (sequences,) uint64, sorted."""
    words = np.fromiter(map(hash, WORD.findall(document.lower())), dtype=np.int64).view(np.uint64)
    length = min(SEQUENCE, len(words))
    if not length:
        return words
    found = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for begin in range(length):
        found = found * FACTOR + words[begin : begin + len(found)]
    return np.unique(found)
