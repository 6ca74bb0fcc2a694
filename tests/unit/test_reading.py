"""Files and texts of users, any of which may be anything."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trsp_deploy.errors import RecipeError
from trsp_deploy.reading import LONGEST_YAML, load_json, load_yaml, read_json, read_text, read_yaml, user_path

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
        ("1:" + "59:" * 20_000 + "59", "more than 64 bits"),
    ],
    ids=["merges", "long", "deep", "itself", "sexagesimal"],
)
def test_yaml_is_read_within_bounds(text: str, words: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        load_yaml(text)
    assert time.perf_counter() - began < 5


def test_json_that_is_nested_too_deeply() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000)


def test_home_of_nobody_is_a_name_like_any_other() -> None:
    assert user_path("~nobody-is-called-this/x") == Path("~nobody-is-called-this/x")
    assert user_path("~/x") == Path.home() / "x"
