"""Settings of a spec, as TensorRT's builder gets them: TensorRT-RTX's own where it keeps them, else a stand-in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.exported import Made, onnx_of
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import trt_build
from trsp_deploy.tools.runners.requirements import CudaDevice
from trsp_deploy.tools.runners.trt_log import logger

CARD = CudaDevice(name="NVIDIA L4", compute_capability="sm89", memory_bytes=2**34)
TIMINGS = "tensorrt-10.15.1-sm89-NVIDIA-L4.bin"


def spec_of(name: str, **changes: object) -> EngineSpec:
    return EngineSpec.model_validate({**load_engine_spec(name).model_dump(), **changes})


def test_flags_and_limits_reach_the_builder() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    builder = rtx.Builder(logger(rtx))

    def configured(**changes: object) -> tuple[bool, bool, float]:
        """Whether weights stream, whether fp32 products are rounded, GiB of scratch memory."""
        config = trt_build._configure(rtx, builder, spec_of("tensorrt-rtx-fp16", **changes))
        assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
        streams, rounds = (config.get_flag(getattr(rtx.BuilderFlag, name)) for name in ("WEIGHT_STREAMING", "TF32"))
        return streams, rounds, config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) / 2**30

    streams, rounds, usual = configured()
    assert not streams and rounds
    assert configured(weight_streaming_gib=1.0) == (True, True, usual)
    assert configured(precision="fp32") == (False, False, usual)
    assert usual != 0.5 and configured(workspace_gib=0.5) == (False, True, 0.5)


@pytest.mark.parametrize(
    ("setting", "level"),
    [("none", None), ("ampere-plus", "AMPERE_PLUS"), ("same-compute-capability", "SAME_COMPUTE_CAPABILITY")],
)
def test_hardware_compatibility_reaches_the_builder(setting: str, level: str | None) -> None:
    """TensorRT-RTX has the level and ignores it."""
    levels = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS", SAME_COMPUTE_CAPABILITY="SAME_COMPUTE_CAPABILITY")
    trt: Any = SimpleNamespace(ProfilingVerbosity=SimpleNamespace(DETAILED=2), HardwareCompatibilityLevel=levels)
    builder = SimpleNamespace(create_builder_config=SimpleNamespace)
    config = trt_build._configure(trt, builder, spec_of("tensorrt-fp16", hardware_compatibility=setting))
    assert getattr(config, "hardware_compatibility_level", None) == level


class Config:
    """A builder's config that refuses one timing cache, as TensorRT does with one of another version; of `no cache` it
    makes none."""

    def __init__(self, refused: bytes = b"of another") -> None:
        self.refused = refused
        self.made: list[bytes] = []
        self.taken: bytes | None = None

    def create_timing_cache(self, blob: bytes) -> bytes | None:
        self.made.append(blob)
        return None if blob == b"no cache" else blob

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, bytes) and not ignore_mismatch
        if cache == self.refused:
            return False
        self.taken = cache
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: bytearray(b"learnt"))


class Said:
    """A logger of TensorRT's."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, severity: object, line: str) -> None:
        self.lines.append(line)


TRT: Any = SimpleNamespace(__version__="10.15.1", ILogger=SimpleNamespace(WARNING="warning"))


@pytest.fixture
def timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of one GPU's timings, which is not there yet."""
    monkeypatch.setattr(trt_build, "home", lambda: tmp_path)
    monkeypatch.setattr(trt_build, "cuda_devices", lambda: [CARD])
    monkeypatch.setattr(trt_build, "load_package", lambda backend: TRT)
    (tmp_path / "timing-caches").mkdir()
    return tmp_path / "timing-caches" / TIMINGS


@pytest.mark.parametrize(
    ("kept", "taken"),
    [(None, b""), (b"of this version", b"of this version"), (b"of another", b""), (b"no cache", b"")],
)
def test_timings_of_earlier_builds_are_used(kept: bytes | None, taken: bytes, timings: Path) -> None:
    if kept is not None:
        timings.write_bytes(hashlib.sha256(kept).digest() + kept)
    config, log = Config(), Said()
    assert trt_build._use_timings(config, load_engine_spec("tensorrt-fp16"), log) == timings
    assert config.taken == taken and not log.lines
    assert trt_build._use_timings(Config(b""), load_engine_spec("tensorrt-rtx-fp16"), log) is None


@pytest.mark.parametrize("damage", [lambda kept: kept[:-1], lambda kept: kept[32:], lambda kept: b"\0" * len(kept)])
def test_damaged_timings_never_reach_tensorrt_and_are_replaced(damage: Any, timings: Path) -> None:
    """Cut short, as an older version wrote them (without a digest), and overwritten."""
    trt_build._keep_timings(TRT, Config(), timings, Said())
    timings.write_bytes(damage(timings.read_bytes()))
    config, log = Config(), Said()
    assert trt_build._use_timings(config, load_engine_spec("tensorrt-fp16"), log) == timings
    assert set(config.made) == {b""} and config.taken == b""
    assert log.lines == [f"timings of earlier builds are not used: {timings} is damaged, or has no SHA-256"]
    trt_build._keep_timings(TRT, config, timings, log)
    again = Config()
    assert trt_build._use_timings(again, load_engine_spec("tensorrt-fp16"), log) == timings
    assert again.taken == b"learnt" and len(log.lines) == 1


def test_where_no_timings_are_taken_none_are_kept(timings: Path) -> None:
    assert trt_build._use_timings(Config(b""), load_engine_spec("tensorrt-fp16"), Said()) is None


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_build_leaves_its_timings(exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By TensorRT-RTX's compiler in the place of TensorRT's; its timing cache is there and holds nothing."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    monkeypatch.setattr(trt_build, "home", lambda: tmp_path)
    monkeypatch.setattr(trt_build, "cuda_devices", lambda: [CARD])
    monkeypatch.setattr(trt_build, "load_package", lambda backend: rtx)
    few = {"min": 1, "opt": 1, "max": 4}
    profiles = [{"batch": few, "sequence": few, "past": few}]
    (tmp_path / "engine").mkdir()
    spec = spec_of("tensorrt-fp16", profiles=profiles, fuse=False)
    trt_build.build(onnx_of(exported("llama-wide", "fp16"), "fp16"), spec, tmp_path / "engine", None)
    (file,) = (tmp_path / "timing-caches").iterdir()
    assert file.name == f"tensorrt-{rtx.__version__}-sm89-NVIDIA-L4.bin" and file.stat().st_size
