"""ONNX Runtime's CUDA sessions without a GPU: the stream that they are given, and what CUDA events say of it.

A stand-in for the driver keeps account of its handles and takes the host's time; the session is one on the CPU.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.exported import Made, onnx_of
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.stages import parity
from trsp_deploy.tools.measuring.bench_worker import measure_block
from trsp_deploy.tools.runners import ort, ort_session
from trsp_deploy.tools.runners.ort import OrtRunner

PROMPTS = [[5, 9, 200, 17], [30, 31, 7, 8, 90, 12, 55, 60, 61]]
MADE = ("cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate")
GIVEN_BACK = ("cuDevicePrimaryCtxRelease_v2", "cuStreamDestroy_v2", "cuEventDestroy_v2")


class Cuda:
    """libcuda; `refuses` names a function that fails, `lacks` one that is not there."""

    def __init__(self) -> None:
        self.refuses = self.lacks = ""
        self.called: list[str] = []
        self.stream: int | None = None
        self.recorded: dict[int, float] = {}  # event -> when
        self.watch: Callable[[str], None] = lambda name: None

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == self.lacks:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.watch(name)
            if name == self.refuses:
                return 999
            self.called.append(name)
            if name in MADE:
                arguments[0]._obj.value = len(self.called) << 40  # a handle has 64 bits
            if name == "cuStreamCreate":
                self.stream = arguments[0]._obj.value
            if name == "cuEventRecord":
                assert arguments[1].value == self.stream
                self.recorded[arguments[0].value] = time.perf_counter()
            if name == "cuEventElapsedTime":
                began, ended = (self.recorded[event.value] for event in arguments[1:])
                arguments[0]._obj.value = 1e3 * (ended - began)
            return 0

        return call

    @property
    def held(self) -> int:
        """Handles that are not given back."""
        return sum(map(MADE.__contains__, self.called)) - sum(map(GIVEN_BACK.__contains__, self.called))


@pytest.fixture
def settings() -> list[dict[str, str]]:
    """The provider options of every session."""
    return []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, settings: list[dict[str, str]]) -> Cuda:
    driver, library = Cuda(), ctypes.CDLL

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, *args: Any, provider_options: Sequence[dict[str, str]] = (), **others: Any) -> None:
            settings.extend(provider_options)
            super().__init__(*args, **others)

    monkeypatch.setattr(ctypes, "CDLL", lambda name, *args: driver if name == "libcuda.so.1" else library(name, *args))
    monkeypatch.setattr(ort_session, "_prepare_cuda", lambda package: "")
    monkeypatch.setitem(ort_session.PROVIDERS, "onnxruntime-cuda", "CPUExecutionProvider")
    monkeypatch.setitem(ort.DEVICES, "onnxruntime-cuda", "cpu")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return driver


def test_events_time_what_the_session_does_on_its_stream(
    exported: Made, cuda: Cuda, settings: list[dict[str, str]]
) -> None:
    source = exported("llama")
    reference = parity.make_reference(source / "model", PROMPTS)
    with OrtRunner(onnx_of(source), backend="onnxruntime-cuda") as runner:
        assert settings == [{"use_tf32": "0", "user_compute_stream": str(cuda.stream)}]
        assert parity.check_parity(reference, runner, "ort-cuda", "dense", "fp32").max_error < 1e-4
        block = measure_block(runner, PROMPTS[:1], 3)
        assert 0 < block["device_prefill_s"] < block["prefill_s"]
        on_it, all_in_all = np.array(block["device_decode_s"]), np.array(block["decode_s"])
        assert on_it.shape == (3,) and (on_it > 0).all() and (on_it < all_in_all).all()
        assert cuda.held == 4

        def after_the_session(name: str) -> None:
            assert runner._session is runner._binding is None, name

        cuda.watch = after_the_session
    assert cuda.held == 0


@pytest.mark.parametrize("refuses", ["cuInit", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate"])
def test_without_a_stream_of_ours_a_session_has_its_own(
    refuses: str, exported: Made, cuda: Cuda, settings: list[dict[str, str]]
) -> None:
    cuda.refuses = refuses
    with OrtRunner(onnx_of(exported("opt")), backend="onnxruntime-cuda") as runner:
        assert settings == [{"use_tf32": "0"}]
        assert measure_block(runner, PROMPTS[:1], 1).keys() == {"prefill_s", "decode_s", "total_s"}


@pytest.mark.parametrize("refuses", ["cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"])
def test_events_that_fail_take_no_text_along(refuses: str, exported: Made, cuda: Cuda) -> None:
    ids = np.array(PROMPTS[:1])
    with OrtRunner(onnx_of(exported("opt")), backend="onnxruntime-cuda") as runner:
        expected = runner.prefill(ids, np.ones_like(ids))
        assert runner.device_s is not None
        cuda.refuses = refuses
        np.testing.assert_array_equal(runner.prefill(ids, np.ones_like(ids)), expected)
        assert runner.device_s is None


def test_a_driver_that_lacks_a_function_is_no_clock(exported: Made, cuda: Cuda) -> None:
    cuda.lacks = "cuDevicePrimaryCtxRetain"
    with OrtRunner(onnx_of(exported("opt")), backend="onnxruntime-cuda") as runner:
        assert runner._clock is None


def test_a_session_that_does_not_open_leaves_nothing_on_the_gpu(cuda: Cuda, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="cannot load"), OrtRunner(tmp_path / "x", backend="onnxruntime-cuda"):
        raise AssertionError("there is no such file")
    assert cuda.called and cuda.held == 0
