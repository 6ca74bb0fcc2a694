"""Reads what users wrote: files, YAML and JSON, any of which may be anything. Whatever comes ends soon, in one line."""

from __future__ import annotations

import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from trsp_deploy.errors import UserError

LONGEST_INTEGER = 64  # bits
LONGEST_YAML = 100_000  # characters; the longest recipe that ships has 2,000
DEEPEST, MOST_VALUES = 40, 100_000  # of a YAML text


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` is the home folder, also that of nobody, of whom pathlib would raise."""
    return Path(os.path.expanduser(text))  # noqa: PTH111


def is_utf8(text: str) -> bool:
    """Whether a string can be written as UTF-8: a name of other bytes, or half of a surrogate pair in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, error: type[UserError], said: str | None = None) -> str:
    """The text of a file, without a byte order mark; raises `error` with one line where there is none.

    said: how to call the file in that line. A pipe or device is refused: it may never end.
    """
    said = said or str(path)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{said}: is {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as problem:
        raise error(f"{said}: no such file") from problem
    except OSError as problem:
        raise error(f"{said}: cannot be read ({problem.strerror})") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{said}: is not UTF-8 text (byte {problem.start})") from problem
    except ValueError as problem:  # a NUL in its name
        raise error(f"{said}: cannot be the name of a file ({problem})") from problem


def read_yaml(path: Path, error: type[UserError]) -> dict[str, Any]:
    """Read a YAML mapping from a file, or raise `error` with one line that says what is wrong."""
    try:
        values = load_yaml(read_text(path, error))
    except ValueError as problem:
        first_line = " ".join(str(problem).split())
        raise error(f"{path}: not valid YAML ({first_line})") from problem
    if not isinstance(values, dict):
        raise error(f"{path}: holds a {type(values).__name__}, expected a mapping of keys to values")
    return values


def read_json(path: Path, error: type[UserError], said: str | None = None) -> dict[str, Any]:
    """Read a JSON object from a file, or raise `error` with one line that says what is wrong; `said` as above."""
    said = said or str(path)
    try:
        values = load_json(read_text(path, error, said))
    except ValueError as problem:
        raise error(f"{said}: is not valid JSON ({problem})") from problem
    if not isinstance(values, dict):
        raise error(f"{said}: holds a {type(values).__name__}, expected an object")
    return values


def load_yaml(text: str) -> Any:
    """What a YAML text says; raises ValueError for every text that says nothing that can be used."""
    if len(text) > LONGEST_YAML:
        raise ValueError(f"{len(text):,} characters, at most {LONGEST_YAML:,} are read")
    if _open_brackets(text) > DEEPEST:  # PyYAML takes more than a minute for 3,000 of them before it gives up
        raise ValueError("nested too deeply")
    try:
        return _bounded(yaml.load(text, _Loader))
    except (yaml.YAMLError, ArithmeticError, TypeError, LookupError, AttributeError) as problem:
        raise ValueError(str(problem)) from problem
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem


def load_json(text: str) -> Any:
    """What a JSON text says; raises ValueError also where it is nested so deeply that Python gives up."""
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem


def _open_brackets(text: str) -> int:
    """How many brackets are open at most, those in quotes and comments among them."""
    steps = ((character in "[{") - (character in "]}") for character in text)
    return max(accumulate(steps), default=0)


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys: ten lines of them can come to more than fits into memory, and no recipe needs any."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (`<<`) are not read", key.start_mark)
        super().flatten_mapping(node)


def _bounded(value: Any) -> Any:
    """The value again; aliases can make a few lines of YAML contain themselves, or more than fits into memory, and
    sexagesimal numbers (1:59:59) need no digits."""
    left, seen = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST_VALUES:
            raise ValueError(f"nested deeper than {DEEPEST}, or more than {MOST_VALUES} values")
        if isinstance(item, int) and item.bit_length() > LONGEST_INTEGER:  # Python would not even print it
            raise ValueError(f"holds a number of more than {LONGEST_INTEGER} bits")
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else ()
        left += [(each, depth + 1) for each in inner]
    return value
