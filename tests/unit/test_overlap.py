"""What an evaluation text shares with the calibration text is found, and what anyone writes is not taken for it."""

from __future__ import annotations

import pytest

from trsp_deploy.tools.sources.overlap import COMMON, overlap, overlap_note
from trsp_deploy.tools.sources.texts import Texts


def texts(*documents: str) -> Texts:
    return Texts(name="mine.txt", origin="here", documents=documents, fingerprint="0")


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{number}" for number in range(count))


@pytest.mark.parametrize(
    "held_out", [(words("a", 50),), ("short", "three more words"), (words("a", 20), words("b", 13))]
)
def test_the_calibration_text_itself_is_found_whole(held_out: tuple[str, ...]) -> None:
    assert overlap(texts(*held_out), [texts(words("c", 40)), texts(*held_out)]) == 1
    assert overlap(texts(*held_out), [texts(*held_out * (COMMON + 1))]) == 1, "however often it is in there"
    assert overlap(texts(*held_out), [texts(words("c", 40))]) == overlap(texts(*held_out), []) == 0


def test_a_part_is_found_whatever_case_lines_and_punctuation_are() -> None:
    shared, own = words("a", 37), words("b", 37)  # 25 sequences of 13 words each
    other = shared.upper().replace(" ", ",\n", 9)
    assert overlap(texts(own, shared), [texts(f"Before it. {other}! And behind it.")]) == 0.5
    assert overlap(texts(own, shared), [texts(words("a", 12))]) == 0, "fewer words than a sequence has"
    assert overlap(texts(own, shared), [texts(words("a", 14))]) == pytest.approx(2 / 50)


def test_what_many_documents_have_is_no_overlap() -> None:
    """As a chat template's system prompt, which stands in every document of its texts."""
    prompt = words("system", 20)
    chats = [f"{prompt} {words(f'user{number}n', 30)}" for number in range(2 * COMMON)]
    held_out = texts(f"{prompt} {words('other', 30)}", chats[0])
    many, few = overlap(held_out, [texts(*chats)]), overlap(held_out, [texts(*chats[:COMMON])])
    of_prompt, with_own = 8, 30  # sequences of the prompt alone, and those that end in a document's own words
    assert many == pytest.approx(with_own / (2 * with_own))
    assert few == pytest.approx((of_prompt + with_own) / (of_prompt + 2 * with_own))


def test_texts_without_a_word_share_nothing() -> None:
    assert overlap(texts("...", ""), [texts("...", "")]) == 0


def test_a_percent_and_more_is_told() -> None:
    assert overlap_note("mine", None) == overlap_note("mine", 0.0) == overlap_note("mine", 0.0099) == ""
    told = "evaluation 'mine': 1.2% of it stands in the calibration text, and flatters what learned from it"
    assert overlap_note("mine", 0.012) == told
