"""Files and texts of users, any of which may be anything."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from trsp_deploy.errors import EngineUnavailable, RecipeError
from trsp_deploy.reading import (
    LONGEST_YAML,
    load_json,
    load_yaml,
    read_json,
    read_record,
    read_text,
    read_yaml,
    user_path,
    what_is_wrong,
)
from trsp_deploy.recipe import Strict

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{','.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(9)
)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        for read in (read_text, read_yaml, read_json):
            with pytest.raises(RecipeError, match=f"^{path}: is a pipe or device, expected a file$"):
                read(path, RecipeError)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"caf\xe9", "is not UTF-8 text (byte 3)"), (b"[]", "holds a list, expected an object")],
)
def test_the_line_names_the_file_as_it_is_told(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_json(path, RecipeError, "--against x")
    assert str(caught.value) == f"--against x: {words}"


def test_a_name_with_a_nul_is_no_file() -> None:
    with pytest.raises(RecipeError, match="null byte"):
        read_text(Path("a\0b"), RecipeError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MERGES, "merge keys"),
        ("x" * (LONGEST_YAML + 1), "at most 100,000 are read"),
        ("[" * 5000, "nested too deeply"),
        ("&a [*a]", "nested deeper than 40"),
        ("9" * 100, "more than 64 bits"),
        ("9" * 5000, "digits"),
        ("a: {x: 1, y: 2, x: 3}", "the key 'x' stands twice"),
    ],
    ids=["merges", "long", "deep", "itself", "large", "larger", "twice"],
)
def test_yaml_is_read_within_bounds(text: str, words: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        load_yaml(text)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),  # a setting of 10, not of 8
        ("1:30", "1:30"),  # no number, and not 90
        ("0x10", "0x10"),
        ("-12", -12),
        ("1_000", 1000),
        ("1.5e-4", 1.5e-4),
        ("1.0e-05", 1e-5),  # as PyYAML writes one
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("'8'", "8"),
    ],
)
def test_numbers_are_what_people_mean(text: str, value: object) -> None:
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


def test_json_that_is_nested_too_deeply() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000)


def test_home_of_nobody_is_a_name_like_any_other() -> None:
    assert user_path("~nobody-is-called-this/x") == Path("~nobody-is-called-this/x")
    assert user_path("~/x") == Path.home() / "x"


# -- records -----------------------------------------------------------------------------------------------------------


class Leaf(Strict):
    size: Annotated[int, Field(ge=1)] = 1
    kind: Literal["oak", "elm"] = "oak"


class Bud(Strict):
    weight: float


class Tree(Strict):
    """A record with records wherever a record may have some."""

    name: str
    leaf: Leaf = Leaf()
    maybe: Leaf | None = None
    some: tuple[Leaf, ...] = ()
    by_name: dict[str, Annotated[Leaf, Field()]] = Field(default_factory=dict)
    either: Leaf | Bud = Leaf()

    @model_validator(mode="after")
    def _is_no_bush(self) -> Tree:
        if self.name == "bush":
            raise ValueError("A bush is no tree")
        return self


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "key 'name' is missing"),
        ({"nam": "x"}, "unknown key 'nam'; did you mean 'name'?"),
        ({"name": "x", "zz": 1}, "unknown key 'zz'; valid: by_name, either, leaf, maybe, name, some"),
        ({"name": "x", "leaf": {"siz": 1}}, "unknown key 'leaf.siz'; did you mean 'size'?"),
        ({"name": "x", "maybe": {"siz": 1}}, "unknown key 'maybe.siz'; did you mean 'size'?"),
        ({"name": "x", "some": [{}, {"zz": 1}]}, "unknown key 'some.1.zz'; valid: kind, size"),
        ({"name": "x", "by_name": {"size": {"zz": 1}}}, "unknown key 'by_name.size.zz'; valid: kind, size"),
        ({"name": "x", "either": {"siz": 1}}, "unknown key 'either.Leaf.siz'; did you mean 'size'?"),
        ({"name": "x", "leaf": {"size": 0}}, "key 'leaf.size': should be greater than or equal to 1, got 0"),
        ({"name": "x", "leaf": {"kind": "elk"}}, "key 'leaf.kind': should be 'oak' or 'elm', got 'elk'"),
        ({"name": "x", "leaf": 3}, "key 'leaf': should be a mapping of keys to values, got 3"),
        ({"name": {"a": 1}}, "key 'name': should be a valid string"),
        ({"name": "bush"}, "a bush is no tree"),
        ([], "holds a list, expected an object"),
    ],
)
def test_what_is_wrong_with_a_record_is_a_line(values: object, line: str) -> None:
    for validate in (Tree.model_validate, lambda values: Tree.model_validate_json(json.dumps(values))):
        with pytest.raises(ValidationError) as caught:
            validate(values)
        assert what_is_wrong(caught.value, Tree) == line
        assert what_is_wrong(caught.value, Tree, "input") == line.replace("key ", "input ", 1)


def test_a_line_stays_short_whatever_stands_there() -> None:
    for values in (
        {"name": [["x" * 9_999] * 99] * 99},
        {"x" * 9_999: 1},
        {"name": "x", "leaf": {"size": "1\n" * 9_999}},
    ):
        with pytest.raises(ValidationError) as caught:
            Tree.model_validate(values)
        line = what_is_wrong(caught.value, Tree)
        assert len(line) < 10_000 and "\n" not in line


def test_a_record_is_read_from_its_file_or_the_line_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"

    def said(content: str | bytes | None, *words: str) -> str:
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(EngineUnavailable) as caught:
            read_record(path, Tree, EngineUnavailable, *words)
        return str(caught.value).removeprefix(f"{path}: ")

    assert said(None) == "no such file"
    assert said("{").startswith("is not valid JSON (EOF while parsing")
    assert said("{}") == "key 'name' is missing"
    assert said("{}", "is no tree") == "is no tree (key 'name' is missing)"
    assert said("{}", "is no tree", "plant it") == "is no tree (key 'name' is missing); plant it"
    assert said(b'{"name": "caf\xe9"}', "is no tree", "plant it").endswith("); plant it"), "not UTF-8 is damage too"
    path.write_text('{"name": "x"}', encoding="utf-8-sig")
    assert read_record(path, Tree, EngineUnavailable) == Tree(name="x")
