"""Several calibration texts as one."""

from __future__ import annotations

import pytest
import torch

from trsp_deploy.errors import RecipeError, TextError
from trsp_deploy.recipe import read_recipe
from trsp_deploy.tools.sources.mixture import equal_parts, joined, mix_windows
from trsp_deploy.tools.sources.texts import Texts, split_windows


def windows(count: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + 2 * count).view(count, 2)


def text(name: str, *documents: str, origin: str = "") -> Texts:
    return Texts(name=name, origin=origin or name, documents=documents, fingerprint="|".join(documents))


@pytest.mark.parametrize(
    "wanted, there, counts",
    [
        (8, [9, 9], [4, 4]),
        (9, [9, 9], [4, 5]),
        (8, [2, 9], [2, 6]),  # the other makes up for it
        (8, [9, 1, 3], [4, 1, 3]),
        (100, [2, 9, 3], [2, 9, 3]),
        (1, [5, 5, 5], [0, 0, 1]),
    ],
)
def test_equal_parts(wanted, there, counts):
    assert equal_parts(wanted, there) == counts


def test_windows_are_of_each_text_in_random_order():
    first, second, third = windows(40, 0), windows(40, 1000), windows(4, 2000)
    train, validation = mix_windows([first, second, third], 23, 6, seed=0)
    of = [int((train[:, 0] // 1000 == which).sum()) for which in range(3)]
    assert of == [10, 10, 3]
    assert validation.tolist() == [*first[-2:].tolist(), *second[-2:].tolist(), *third[-1:].tolist()]
    assert train[:, 0].diff().lt(0).any(), "not one text after the other"
    again, _ = mix_windows([first, second, third], 23, 6, seed=0)
    other, _ = mix_windows([first, second, third], 23, 6, seed=1)
    assert torch.equal(train, again) and not torch.equal(train, other)
    assert not set(map(tuple, train.tolist())) & set(map(tuple, validation.tolist()))


def test_each_text_judges_however_few_windows_are_held_out():
    _, validation = mix_windows([windows(9, 0), windows(9, 1000), windows(9, 2000)], 9, 1, seed=0)
    assert (validation[:, 0] // 1000).tolist() == [0, 1, 2]


def test_one_text_is_what_it_was():
    one = windows(40, 0)
    for mixed, plain in zip(mix_windows([one], 16, 4, 3), split_windows(one, 16, 4, 3), strict=True):
        assert torch.equal(mixed, plain)
    alone = text("a", "one", origin="/home/me/a.txt")
    assert joined([alone]) is alone


def test_joined_texts_name_no_place():
    found = joined([text("wiki", "one", origin="package 1.0"), text("~/b.txt", "two", origin="/home/me/b.txt")])
    assert (found.name, found.origin, found.documents) == ("wiki + ~/b.txt", "package 1.0 + b.txt", ("one", "two"))
    other_way = joined([text("~/b.txt", "two"), text("wiki", "one")])
    assert found.fingerprint != other_way.fingerprint  # windows are drawn from them in this order


def test_the_same_documents_under_two_names():
    with pytest.raises(TextError, match=r"--calibration 'b': holds the same documents as 'a'; each text counts once"):
        joined([text("a", "one"), text("b", "one")])


def test_a_recipe_names_one_text_or_several():
    one = read_recipe({"model": "m", "calibration": {"texts": "/home/me/a.txt"}}, "x")
    assert one == read_recipe({"model": "m", "calibration": {"texts": ["/home/me/a.txt"]}}, "x")
    assert one.model_dump(mode="json")["calibration"]["texts"] == "/home/me/a.txt"
    two = read_recipe({"model": "m", "calibration": {"texts": ["wiki-demo", "/home/me/a.txt"]}}, "x")
    assert two.model_dump(mode="json")["calibration"]["texts"] == ["wiki-demo", "/home/me/a.txt"]
    assert two.public.calibration.name == "wiki-demo + a.txt"


@pytest.mark.parametrize(
    "calibration, line",
    [
        ({"texts": []}, "key 'calibration.texts': tuple should have at least 1 item"),
        ({"texts": ["a", "b", "a"]}, "key 'calibration.texts': 'a' stands twice"),
        ({"texts": ["a", 5]}, "key 'calibration.texts.1': should be a valid string, got 5"),
        ({"texts": ["a", "b"], "max_windows": 1}, "max_windows 1 for 2 texts; each needs one at least"),
        ({"texts": ["a", "https://me:secret@host/x"]}, "holds what looks like a password or token"),
    ],
)
def test_texts_that_are_none(calibration, line):
    with pytest.raises(RecipeError) as caught:
        read_recipe({"model": "m", "calibration": calibration}, "x.yaml")
    assert line in str(caught.value) and "secret" not in str(caught.value)
