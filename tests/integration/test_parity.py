"""Parity with PyTorch of engines that take texts one at a time, and of those that only seem right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.exported import Made, onnx_of
from trsp_deploy.errors import EngineUnavailable, ParityError, ShapeUnavailable
from trsp_deploy.stages import parity
from trsp_deploy.tools.runners.ort import OrtRunner

PROMPTS = [[5, 9, 200, 17, 40], [30, 31, 7, 8, 90, 12, 55, 60, 61]]


class OfOneText(OrtRunner):
    """As an engine whose only profile is of a batch of 1."""

    def prefill(self, input_ids: np.ndarray, *rest: Any, **options: Any) -> np.ndarray:
        if len(input_ids) > 1:
            raise ShapeUnavailable(f"no profile covers input_ids {input_ids.shape}")
        return super().prefill(input_ids, *rest, **options)


@pytest.mark.parametrize("runner", ["one text at a time", "no padding", "any batch"])
def test_texts_are_read_one_by_one_where_an_engine_takes_them_so(runner: str, exported: Made) -> None:
    made = exported("llama")
    reference = parity.make_reference(made / "model", PROMPTS)
    kind = OfOneText if runner == "one text at a time" else OrtRunner
    with kind(onnx_of(made), padding=runner != "no padding") as engine:
        found = parity.check_parity(reference, engine, "e", "dense", "fp32")
    assert found.passed and found.tokens_equal == found.tokens_compared == sum(map(len, PROMPTS)) + 2 * 12


class BreaksOff(OrtRunner):
    """As an engine that takes several texts and stops in their third step."""

    steps = 0

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        self.steps += 1
        if len(input_ids) > 1 and self.steps == 3:
            raise EngineUnavailable("TensorRT: stopped in engine: an illegal memory access")
        return super().decode(input_ids)


def test_an_engine_that_breaks_off_is_not_read_one_by_one(exported: Made) -> None:
    """It passed, and what it computes of several texts was compared with nothing."""
    reference = parity.make_reference(exported("llama") / "model", PROMPTS)
    with (
        BreaksOff(onnx_of(exported("llama"))) as engine,
        pytest.raises(EngineUnavailable, match="an illegal memory access"),
    ):
        parity.check_parity(reference, engine, "e", "dense", "fp32")


def test_one_by_one_finds_another_model_too(exported: Made) -> None:
    reference = parity.make_reference(exported("llama") / "model", PROMPTS)
    with (
        OfOneText(onnx_of(exported("llama", dropped=(1, 2)))) as engine,
        pytest.raises(ParityError, match="standard deviations from PyTorch's"),
    ):
        parity.check_parity(reference, engine, "e", "dense", "fp32")


def test_an_engine_that_takes_no_text_says_why(exported: Made) -> None:
    reference = parity.make_reference(exported("llama") / "model", PROMPTS)
    with OrtRunner(onnx_of(exported("llama"))) as engine:
        engine._longest = 12
        with pytest.raises(EngineUnavailable, match="holds for texts of up to 12 tokens"):
            parity.check_parity(reference, engine, "e", "dense", "fp32")
