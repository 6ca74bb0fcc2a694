"""What a step is told now against what its record says that it was told: in words, so that a redone step says why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from trsp_deploy.errors import shown

SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST_SHOWN = 60  # characters of a value; longer ones help nobody in a line
ABSENT = object()


def defaults(schema: type[BaseModel]) -> dict[str, Any]:
    """What each field is where nobody sets it, as JSON has it; fields without a default are left out."""
    return schema.model_construct().model_dump(mode="json")


def changed_settings(
    recorded: Mapping[str, Any], now: Mapping[str, Any], schema: type[BaseModel] | None = None
) -> list[str]:
    """Which settings are others than they were, a few words each.

    schema: what the settings are fields of. A record from before one of them was there was made as by its default, so
    that an update of the toolkit leaves finished work finished; where a new setting's default does otherwise than the
    code before it, the records' `FORMAT` is raised.
    """
    return list(_changed("", recorded, now, {} if schema is None else defaults(schema)))


def changed_inputs(recorded: Mapping[str, str], now: Mapping[str, str | None]) -> list[str]:
    """Which inputs are others than they were, or are there or not; what is still to be made (None) is another."""
    return [
        _told(name, recorded.get(name, ABSENT), now.get(name, ABSENT))
        for name in _names(recorded, now)
        if recorded.get(name, ABSENT) != now.get(name, ABSENT)
    ]


def _changed(name: str, recorded: Any, now: Any, default: Any) -> Iterator[str]:
    if not (isinstance(recorded, Mapping) and isinstance(now, Mapping)):
        if recorded != now:
            yield _told(name, recorded, now)
        return
    known = default if isinstance(default, Mapping) else {}
    for key in _names(recorded, now):
        default = known.get(key, ABSENT)
        inner = f"{name}.{key}" if name else key
        yield from _changed(inner, recorded.get(key, default), now.get(key, ABSENT), default)


def _names(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [*now, *(name for name in recorded if name not in now)]


def _told(name: str, before: Any, now: Any) -> str:
    if now is ABSENT:
        return f"{name} is gone"
    if before is ABSENT:
        return f"{name} is new"
    if _says_nothing(before) or _says_nothing(now):
        return f"{name} is another"
    return f"{name} is {shown(now)}, was {shown(before)}"


def _says_nothing(value: Any) -> bool:
    return SHA256.fullmatch(str(value)) is not None or len(str(value)) > LONGEST_SHOWN or isinstance(value, Mapping)
