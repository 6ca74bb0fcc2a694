"""Which GPUs a process may use, by a made-up driver of three."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trsp_deploy.artifacts import nvml, provenance
from trsp_deploy.artifacts.nvml import driver_version, visible_gpus
from trsp_deploy.artifacts.provenance import _here
from trsp_deploy.tools.measuring import telemetry

UUIDS = [f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in ("a", "b", "c")]  # in the order of the bus
SLICE = "MIG-dddddddd-0000-0000-0000-000000000000"
WHOLE, PART = 80 << 30, 10 << 30  # bytes of a GPU, and of its slice


class Driver(ModuleType):
    """pynvml, whose handles are the UUIDs."""

    class NVMLError(Exception):
        """Of the driver."""

    class NVMLError_NoPermission(NVMLError):
        """A GPU of somebody else's."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 2, 0
    forbidden: tuple[int, ...] = ()
    in_slices = ""  # the UUID of a GPU whose slice SLICE is

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

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if not self.in_slices:
            raise self.NVMLError("not supported")
        return int(handle == self.in_slices), 0

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:
        if not self.in_slices:
            raise self.NVMLError("not supported")
        return handle == SLICE

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return self.in_slices

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        if handle == self.in_slices:  # it tells of all slices together, and in a container nobody
            raise self.NVMLError("insufficient permissions")
        total = PART if handle == SLICE else WHOLE
        return SimpleNamespace(used=1, free=total - 1)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        return self._of_a_card(handle)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._of_a_card(handle)

    def nvmlDeviceGetTemperature(self, handle: str, which: int) -> int:
        return self._of_a_card(handle)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._of_a_card(handle)

    def _of_a_card(self, handle: str) -> int:
        if handle == SLICE:
            raise self.NVMLError("not supported")
        return 0

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
    monkeypatch.setattr(nvml, "_shown_by_cuda", lambda: [UUIDS[1][4:], UUIDS[0][4:]])
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


@pytest.mark.parametrize("asked", [None, "0"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_slice_is_its_own_and_not_its_gpus(monkeypatch: pytest.MonkeyPatch, asked: str | None, count: int) -> None:
    """As in a container that was given one: no variable names it, and CUDA shows nothing else."""
    monkeypatch.setitem(sys.modules, "pynvml", Driver(UUIDS[:count]))
    monkeypatch.setattr(Driver, "in_slices", UUIDS[0])
    monkeypatch.setattr(nvml, "_shown_by_cuda", lambda: [SLICE[4:]])
    if asked is not None:
        monkeypatch.setenv(nvml.VISIBLE, asked)
    assert [gpu.name for gpu in visible_gpus()] == ["card d"]
    assert telemetry.gpu_memory_free() == PART - 1
    assert telemetry._gpu() is not None, "with the card's clocks"
    telemetry._nvml.cache_clear()
    monkeypatch.setattr(nvml, "_shown_by_cuda", lambda: ["no such"])
    assert visible_gpus()[0].name == "card a", "where NVML does not know what CUDA shows"


class Cuda:
    """libcuda of two devices, the first of them a slice."""

    UUIDS = (uuid.uuid4(), uuid.uuid4())
    SLICE = uuid.uuid4()

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


class LaterCuda(Cuda):
    """That of a driver since CUDA 11.4."""

    def cuDeviceGetUuid_v2(self, raw: Any, device: Any) -> int:
        raw._obj[:] = (self.SLICE, self.UUIDS[1])[device.value].bytes
        return 0


def test_cuda_names_its_devices_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `_shown_by_cuda`
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Cuda())
    assert nvml._shown_by_cuda() == [str(each) for each in Cuda.UUIDS]
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: LaterCuda())
    assert nvml._shown_by_cuda() == [str(Cuda.SLICE), str(Cuda.UUIDS[1])]
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Cuda(status=100))  # no device
    assert nvml._shown_by_cuda() == []


def test_records_and_telemetry_agree_that_a_hidden_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvml.VISIBLE, "")
    monkeypatch.setitem(sys.modules, "torch", None)  # it may have seen a GPU before
    assert provenance().gpus == () and provenance().driver is None
    assert telemetry._gpu() is None and telemetry.gpu_memory_used() is None


def test_a_card_without_slices_is_watched_too() -> None:
    watched = telemetry._gpu()
    assert watched is not None and (watched.power_w, watched.used_bytes) == (0.0, 1)


def test_no_driver_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([]))
    assert visible_gpus() == () and driver_version() is None


def test_records_name_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert provenance().driver == "580.1"
