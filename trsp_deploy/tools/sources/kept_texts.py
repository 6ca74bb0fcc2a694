"""A run's copies of its texts, so that a run can be taken to a machine that has not got them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from trsp_deploy.artifacts import write_json
from trsp_deploy.tools.sources.texts import Texts

LARGEST = 64_000_000  # characters; WikiText-2 has 11 million, and of a corpus a run reads a part


def is_small(text: Texts) -> bool:
    """Whether a text is small enough for a copy."""
    return sum(map(len, text.documents)) <= LARGEST


def keep_text(path: Path, name: str, text: Texts) -> None:
    """Write a text, whole or not at all; name: the recipe's for it."""
    write_json(path, text.model_copy(update={"name": name}))


def kept_text(path: Path, name: str) -> Texts | None:
    """The copy of the text that the recipe calls by this name; None without one, or of one that is damaged."""
    try:
        found = Texts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    whole = hashlib.sha256(json.dumps(found.documents).encode()).hexdigest() == found.fingerprint
    return found if whole and found.name == name else None
