"""Odd values and valid ones with odd parts: what the tests of bad input draw from (hypothesis)."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

from trsp_deploy.recipe import Recipe

TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=40),
    st.sampled_from(
        [
            "",
            " ",
            "-",
            "null",
            "true",
            "25%",
            "a" * 5000,
            "é" * 300,
            "../../etc/passwd",
            "~root",
            "~nobody-here/x.txt",
            "%",
        ]
    ),
    st.sampled_from(["1e999", "nan", "1e309%", "25%%", "25 %", "٣%", "8,8", "1..", ":::", "-0", "٣", "0x10"]),
    st.sampled_from(["9" * 400, "9" * 5000, "1_000", "NaN", "inf", "\ud800", "a\nb", "\x1b[31m"]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, -0.0, float("inf"), float("nan")]),
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
YAML_SNIPPETS = st.sampled_from(
    [
        "2020-13-45",
        "!!python/object/apply:os.system ['true']",
        "!!timestamp 99",
        "!!binary '@'",
        "!!int x",
        "!!float _",
        "&a [*a]",
        "&a {b: *a}",
        "{? [1, 2] : 3}",
        "{[1]: 2}",
        "*nowhere",
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000 + "x",
        "'",
        "\t- x",
        "%YAML 9.9\n---\n",
        "a: 1\n---\nb: 2",
        "a: 1\na: 2",
        "<<: 3",
        "<<: [1, {a: b}]",
        "1:60:60:60",
        "0b2",
        "9" * 5000,
        "- &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"- &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)),
        "\ufeff",
        "\x00",
        '"a\\0b.txt"',
        "key: \x85",
        "&a {x: 1, y: 2}",
        "a: &a {x: 1}\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{','.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(9)),
        "1:" + "59:" * 20_000 + "59",
        "x" * 200_000,
    ]
)
BYTES = st.binary(max_size=200)


def mutated(values: Any) -> st.SearchStrategy[Any]:
    """A valid value with some of its parts replaced by odd ones, taken out, or joined by unknown ones."""
    places = list(paths(values))

    @st.composite
    def draw_one(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
        found = copy.deepcopy(values)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(places))
            what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it away
                _change(found, path, what, draw)
        return found

    return draw_one()


def paths(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items)[:30]:
        yield (*before, key)
        yield from paths(value, (*before, key))


def _change(values: Any, path: tuple[Any, ...], what: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    *parents, last = path
    for part in parents:
        values = values[part]
    if what == "remove":
        del values[last]
    elif what == "add" and isinstance(values, dict):
        values[draw(TEXTS)] = draw(ODD)
    else:
        values[last] = draw(ODD)


def garbled(text: str) -> st.SearchStrategy[bytes]:
    """A valid file's bytes, cut short or with some of them changed."""
    data = text.encode()

    @st.composite
    def draw_one(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
        found = bytearray(data)
        for _ in range(draw(st.integers(0, 6))):
            found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
        return bytes(found[: draw(st.sampled_from([len(found), len(found), draw(st.integers(0, len(found)))]))])

    return draw_one()


def as_file(values: Any) -> bytes:
    """JSON, as Python writes it: NaN, infinities and lone surrogates among it."""
    return json.dumps(values, default=str).encode("utf-8", "surrogatepass")


def yaml_file(values: Any) -> bytes:
    """YAML of what YAML can say."""
    try:
        return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):  # integers of thousands of digits, say
        return repr(values).encode("utf-8", "surrogatepass")


RECIPE = {**Recipe(model="tiny").model_dump(mode="json"), "engines": ["ort-cpu-fp32"]}
KEYS = st.sampled_from([".".join(map(str, path)) for path in paths(RECIPE)] + ["", ".", "a.b.c", "model.x", "bench..x"])
ASSIGNMENTS = st.one_of(
    st.tuples(KEYS, st.one_of(TEXTS, YAML_SNIPPETS, NUMBERS.map(str))).map("=".join), TEXTS, YAML_SNIPPETS
)
