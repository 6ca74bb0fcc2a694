"""Tokens are drawn as by the plain definition, which ranks the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import RepetitionPenaltyLogitsProcessor

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.runners.generation import COLDEST, Sampling, choose, penalised, prompt_tokens

VOCABULARY = 700
DRAWS = 3_000


def by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probability of each token: softmax, then the top_k largest, then the fewest of those that hold top_p."""
    shares = np.exp(logits.astype(np.float64) / sampling.temperature)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    if sampling.top_k:
        shares[order[sampling.top_k :]] = 0
        shares /= shares.sum()
    before = shares[order].cumsum() - shares[order]
    shares[order[before >= sampling.top_p]] = 0
    return shares / shares.sum()


class Evenly:
    """Draws that are spread evenly over [0, 1) in place of a generator."""

    def random(self, count: int) -> np.ndarray:
        return (np.arange(count) + 0.5) / count


def drawn(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The share of the draws that each token gets."""
    rows = np.broadcast_to(logits, (DRAWS, len(logits)))
    return np.bincount(choose(rows, sampling, Evenly()), minlength=len(logits)) / DRAWS  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.05, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "cuts",
    [{}, {"top_k": 1}, {"top_k": 50}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.7}],
    ids=str,
)
def test_shares_are_those_of_the_definition(cuts: dict[str, float], spread: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(VOCABULARY) * spread).astype(np.float32)
    sampling = Sampling.model_validate({"temperature": 0.8, **cuts})
    found, wanted = drawn(logits, sampling), by_definition(logits, sampling)
    assert not found[wanted == 0].any()
    np.testing.assert_allclose(found, wanted, atol=1.5 / DRAWS)


def test_of_equal_tokens_the_first_are_taken() -> None:
    assert set(np.flatnonzero(drawn(np.zeros(500, np.float32), Sampling(temperature=1.0, top_k=3)))) == {0, 1, 2}


@pytest.mark.parametrize("cuts", [{}, {"top_k": 4}, {"top_p": 0.99}], ids=str)
def test_what_cannot_come_never_comes(cuts: dict[str, float]) -> None:
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf], dtype=np.float32)
    last = type("Last", (), {"random": lambda self, count: np.full(count, np.nextafter(1.0, 0))})()
    for draws in (Evenly(), last):
        tokens = choose(logits[None].repeat(9, axis=0), Sampling.model_validate({"temperature": 1, **cuts}), draws)
        assert set(tokens) <= {1, 2}


@pytest.mark.parametrize("temperature", [COLDEST / 10, 1e-300])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert drawn(np.array([1.0, 3.0, 2.999], np.float32), Sampling(temperature=temperature))[1] == 1


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("broken", [[1.0, np.nan, 2.0], [1.0, np.inf, 2.0], [-np.inf] * 3], ids=str)
def test_what_is_no_number_is_said_and_not_chosen_from(broken: list[float], temperature: float) -> None:
    rows = np.array([[0.0, 1.0, 2.0], broken], dtype=np.float32)
    with pytest.raises(EngineUnavailable, match="logits that are no numbers"):
        choose(rows, Sampling(temperature=temperature), np.random.default_rng(0))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 50.0])
def test_what_is_there_is_less_likely_as_in_transformers(penalty: float) -> None:
    generator = np.random.default_rng(0)
    logits = (generator.standard_normal(VOCABULARY) * 3).astype(np.float32)
    logits[:2] = 0, -np.inf
    tokens = [0, 1, *generator.integers(0, VOCABULARY, 100).tolist(), 0]  # some of them more than once
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), torch.tensor(logits[None]))
    np.testing.assert_array_equal(penalised(logits, tokens, penalty), wanted[0].numpy())


@pytest.mark.parametrize(
    "wrong", [{"top_k": -5}, {"top_p": 1.5}, {"top_p": 0}, {"temperature": -1}, {"seed": -1}], ids=str
)
def test_what_cannot_be_chosen_by_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError) as caught:
        Sampling.model_validate(wrong)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(wrong)]


@pytest.mark.parametrize(
    ("tokens", "added", "kept"),
    [
        ([1, 5, 6, 2], [1, 0, 0, 1], [1, 5, 6]),
        ([1, 1, 5, 6], [1, 0, 0, 0], [1, 5, 6]),  # the second BOS is of the text
        ([1, 1, 1, 5], [1, 0, 0, 0], [1, 1, 5]),  # which says it twice
        ([3, 4, 3, 4, 5], [1, 1, 0, 0, 0], [3, 4, 5]),
        ([3, 4, 4, 3, 5], [1, 1, 0, 0, 0], [3, 4, 4, 3, 5]),
        ([5, 5, 6], [0, 0, 0], [5, 5, 6]),
        ([1, 2], [1, 1], [1]),  # of no text
        ([], [], []),
    ],
)
def test_a_prompt_is_its_text_after_one_begin_and_before_no_end(
    tokens: list[int], added: list[int], kept: list[int]
) -> None:
    assert prompt_tokens(tokens, added) == kept
