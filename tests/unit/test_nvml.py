"""Which GPUs a process may use, by a made-up driver of three."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from trsp_deploy.artifacts import nvml, provenance
from trsp_deploy.artifacts.nvml import driver_version, visible_gpus
from trsp_deploy.artifacts.provenance import _here
from trsp_deploy.tools.measuring import telemetry

UUIDS = [f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in ("a", "b", "c")]  # in the order of the bus
SLICE = "MIG-dddddddd-0000-0000-0000-000000000000"


class Driver(ModuleType):
    """pynvml, whose handles are the UUIDs."""

    class NVMLError(Exception):
        """Of the driver."""

    class NVMLError_NoPermission(NVMLError):
        """A GPU of somebody else's."""

    forbidden: tuple[int, ...] = ()

    def __init__(self, uuids: list[str]) -> None:
        super().__init__("pynvml")
        self.uuids = uuids

    def nvmlInit(self) -> None:
        if not self.uuids:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index in self.forbidden:
            raise self.NVMLError_NoPermission("insufficient permissions")
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != SLICE:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"card {handle[4]}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(UUIDS))
    monkeypatch.setattr(nvml, "_shown_by_cuda", list)  # it does not say
    monkeypatch.delenv(nvml.VISIBLE, raising=False)
    telemetry._nvml.cache_clear()
    _here.cache_clear()
    yield
    telemetry._nvml.cache_clear()
    _here.cache_clear()


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, "abc"),
        ("", ""),
        ("-1", ""),
        ("2,0", "ca"),
        (" 1 , 2", "bc"),
        ("1,7,0", "b"),  # CUDA too ends at the first that it does not know
        ("GPU-b", "b"),
        (f"{UUIDS[2]},0", "ca"),
        ("GPU-", ""),  # not one
        (f"{SLICE},1", "db"),
        ("MIG-none,1", ""),
    ],
)
def test_what_the_variable_names(monkeypatch: pytest.MonkeyPatch, asked: str | None, seen: str) -> None:
    if asked is not None:
        monkeypatch.setenv(nvml.VISIBLE, asked)
    assert [gpu.name for gpu in visible_gpus()] == [f"card {name}" for name in seen]


def test_cudas_order_goes_before_the_buss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unlike cards CUDA counts the fastest first, and its number 0 is what engines run on."""
    monkeypatch.setenv(nvml.VISIBLE, "0,2")  # CUDA's numbers, not the bus's
    monkeypatch.setattr(nvml, "_shown_by_cuda", lambda: [UUIDS[1], UUIDS[0]])
    assert [gpu.uuid for gpu in visible_gpus()] == [UUIDS[1], UUIDS[0]]
    found = telemetry._nvml()
    assert found is not None and found[1] == UUIDS[1]


def test_gpus_that_this_process_may_not_talk_to_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts them (nvmlDeviceGetCount_v2), CUDA does not: its number 0 is the first of the others."""
    monkeypatch.setattr(Driver, "forbidden", (0, 2))
    for asked in (None, "0"):
        if asked is not None:
            monkeypatch.setenv(nvml.VISIBLE, asked)
        assert [gpu.name for gpu in visible_gpus()] == ["card b"]


class Cuda:
    """libcuda of two devices."""

    UUIDS = (uuid.uuid4(), uuid.uuid4())

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.UUIDS)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetUuid(self, raw: Any, device: Any) -> int:
        raw._obj[:] = self.UUIDS[device.value].bytes
        return 0


def test_cuda_names_its_devices_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `_shown_by_cuda`
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Cuda())
    assert nvml._shown_by_cuda() == [f"GPU-{each}" for each in Cuda.UUIDS]
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Cuda(status=100))  # no device
    assert nvml._shown_by_cuda() == []


def test_records_and_telemetry_agree_that_a_hidden_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvml.VISIBLE, "")
    monkeypatch.setitem(sys.modules, "torch", None)  # it may have seen a GPU before
    assert provenance().gpus == () and provenance().driver is None
    assert telemetry._gpu() is None and telemetry.gpu_memory_used() is None


def test_no_driver_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([]))
    assert visible_gpus() == () and driver_version() is None


def test_records_name_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert provenance().driver == "580.1"
