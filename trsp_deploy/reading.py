"""Reads what users wrote: files, YAML, JSON and records of it, any of which may be anything.

Whatever comes ends soon; what is wrong with it is one line, which names the key, its source and what is valid.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import types
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml

from trsp_deploy.errors import TrspError, UserError, nearest, one_line, shown

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Record = TypeVar("Record", bound="BaseModel")

LONGEST_INTEGER = 64  # bits
LONGEST_YAML = 100_000  # characters; the longest recipe that ships has 2,000
DEEPEST, MOST_VALUES = 40, 100_000  # of a YAML text
NUMBERS = {  # YAML's tags, and what is one
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|(?i:[-+]?\.inf|\.nan)$"
    ),
}
DAMAGED = "written by another version of trsp_deploy, or damaged"  # a verdict of `read_record`


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


def read_text(path: Path, error: type[TrspError], said: str | None = None) -> str:
    """The text of a file, without a byte order mark; raises `error` with one line where there is none.

    said: how to call the file in that line. A pipe or device is refused: it may never end.
    """
    with _reading(path, error, said or str(path)):
        return path.read_text(encoding="utf-8-sig")


@contextlib.contextmanager
def _reading(path: Path, error: type[TrspError], said: str) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():
            raise error(f"{said}: is {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")
        yield
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
        raise error(f"{path}: not valid YAML ({one_line(problem)})") from problem
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


def read_record(
    path: Path, kind: type[Record], error: type[TrspError], verdict: str | None = None, remedy: str | None = None
) -> Record:
    """Read a JSON file as a record, or raise `error` with one line that says what is wrong.

    verdict: what a file is that is no such record, where a program wrote it; what is wrong then stands in brackets.
    remedy: what helps.
    """
    from pydantic import ValidationError  # which `trsp-deploy --help` does without

    with _reading(path, error, str(path)):
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return kind.model_validate_json(content)
    except ValidationError as problem:
        reason = what_is_wrong(problem, kind)
        line = f"{path}: {verdict} ({reason})" if verdict else f"{path}: {reason}"
        raise error(f"{line}; {remedy}" if remedy else line) from problem


def what_is_wrong(problem: ValidationError, kind: type[BaseModel], noun: str = "key") -> str:
    """The first thing that keeps values from being a record of this kind: where it is, what is valid, what is there.

    noun: what its reader calls a field. An unknown key comes before all else: where one is misspelt, it is missing too.
    """
    wrong = problem.errors(include_url=False)
    first = next((each for each in wrong if each["type"] == "extra_forbidden"), wrong[0])
    place, value, message = first["loc"], first["input"], one_line(first["msg"])
    where = shown(".".join(str(part) for part in place if part != "[key]"))[1:-1]
    match first["type"]:
        case "json_invalid":
            return f"is not valid JSON ({first['ctx']['error']})"
        case "extra_forbidden":
            valid = _fields_at(kind, place[:-1])
            hint = nearest(str(place[-1]), valid) or (f"; valid: {', '.join(sorted(valid))}" if valid else "")
            return f"unknown key '{where}'{hint}".replace("key", noun, 1)  # whole, as docs/troubleshooting.md quotes it
        case "missing":
            return f"{noun} '{where}' is missing"
        case "model_type" if not place:
            return f"holds a {type(value).__name__}, expected an object"
        case "model_type":
            message = "should be a mapping of keys to values"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    message = f"{message[0].lower()}{message[1:]}"
    if place and not isinstance(value, dict) and ", got " not in message:
        message = f"{message}, got {shown(value)}"
    return f"{noun} '{where}': {message}" if place else message  # a check of the whole says itself what it is about


def _fields_at(annotation: Any, path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the record that a place of pydantic's errors leads to; none where it is no record."""
    fields, origin, inner = getattr(annotation, "model_fields", None), get_origin(annotation), get_args(annotation)
    if fields is not None:
        if not path:
            return list(fields)
        return _fields_at(fields[path[0]].annotation, path[1:]) if path[0] in fields else []
    if origin is Annotated:
        return _fields_at(inner[0], path)
    if origin in (Union, types.UnionType):
        kinds = [each for each in inner if each is not types.NoneType]
        if len(kinds) == 1:
            return _fields_at(kinds[0], path)
        # Of several the place names the one that was tried.
        named = (each for each in kinds if path and getattr(each, "__name__", None) == path[0])
        return next((_fields_at(each, path[1:]) for each in named), [])
    if origin in (tuple, list, dict) and path:
        return _fields_at(inner[1 if origin is dict else 0], path[1:])  # records stand in sequences of one kind
    return []


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
    """YAML 1.1 without what nobody means: merge keys, a key that stands twice, numbers in base 8 (010) or 60 (1:30)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys are refused: ten lines of them can come to more than fits into memory."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (`<<`) are not read", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    said = f"the key {shown(key.value)} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add((key.tag, key.value))
        super().flatten_mapping(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


def _bounded(value: Any) -> Any:
    """The value again; aliases can make a few lines of YAML contain themselves, or more than fits into memory."""
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
