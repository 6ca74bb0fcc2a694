"""What else the machine does while engines are measured: load, clocks, heat, and other processes on it.

Nothing is changed: clocks are recorded, not locked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import psutil

from trsp_deploy.artifacts.nvml import visible_gpus
from trsp_deploy.results import GpuTelemetry, Telemetry

EVERY_S = 1.0
# Of a core's counts in /proc/stat: user (guests' among it), nice, system, irq, softirq, steal; not idle and iowait.
WORKED = (0, 1, 2, 5, 6, 7)
# NVML's bits of the reasons to run below the wanted clocks (nvml.h, nvmlClocksEventReasons); idleness is none of them.
THROTTLES = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}


class Recorder:
    """Samples of the machine, one per second, for the length of a `with` block; they are in `samples`."""

    def __init__(self) -> None:
        self.samples: list[Telemetry] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def now_s(self) -> float:
        """Seconds since the block was entered."""
        return time.perf_counter() - self._began

    def _record(self) -> None:
        psutil.cpu_times_percent()  # the next call of this thread tells what happened since this one
        others_s, at_s = _others_s(), self.now_s
        while not self._stopped.wait(EVERY_S):
            before_s, before_at_s = others_s, at_s
            others_s, at_s = _others_s(), self.now_s
            others_cores = None
            if before_s is not None and others_s is not None:
                others_cores = max(0.0, (others_s - before_s) / (at_s - before_at_s))
            self.samples.append(_sample(at_s, others_cores))


def _others_s(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that the cores which this process may run on have worked for others, the hypervisor among them.

    By the cores' numbers, which psutil leaves out: where one is offline, those behind it are not at their number's
    place. None where one of ours is not listed, as in a container that shows cores of its own numbering.
    """
    listed = (line.split() for line in stat.read_text().splitlines() if line.startswith("cpu"))
    ticks = {name: sum(int(counts[place]) for place in WORKED) for name, *counts in listed}
    allowed = [ticks.get(f"cpu{number}") for number in os.sched_getaffinity(0)]
    worked = [each for each in allowed if each is not None]
    return sum(worked) / os.sysconf("SC_CLK_TCK") - _own_s() if len(worked) == len(allowed) else None


def _own_s() -> float:
    """Processor seconds of this process and of all that it started, those that have ended among them."""
    found, here = 0.0, psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile: its parent's times have it
            times = process.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found


def _sample(at_s: float, others_cores: float | None) -> Telemetry:
    """The machine now; shares are of all cores' time since the last call."""
    times = psutil.cpu_times_percent()
    frequency = None
    with contextlib.suppress(OSError, NotImplementedError, RuntimeError):  # some virtual machines have none
        frequency = psutil.cpu_freq()
    return Telemetry(
        at_s=at_s,
        load=os.getloadavg()[0],
        busy_share=1 - times.idle / 100,
        steal_share=getattr(times, "steal", 0.0) / 100,
        others_cores=others_cores,
        mhz=None if frequency is None else frequency.current,
        gpu=_gpu(),
    )


@functools.cache
def _nvml() -> tuple[ModuleType, Any] | None:
    """NVIDIA's management library and the first GPU, or slice, that this process may use; None without one."""
    import pynvml

    gpus = visible_gpus()
    return (pynvml, gpus[0].handle) if gpus else None


def _gpu() -> GpuTelemetry | None:
    found = _nvml()
    if found is None:
        return None
    nvml, gpu = found
    try:
        card = _whole(nvml, gpu)  # what a slice has of its own is memory and processes
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(card)
        before = _ours()  # a worker may end while the driver lists it
        listed = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
        return GpuTelemetry(
            sm_mhz=nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            memory_mhz=nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            power_w=nvml.nvmlDeviceGetPowerUsage(card) / 1000,
            temperature_c=nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=tuple(name for bit, name in THROTTLES.items() if reasons & bit),
            other_processes=_others(listed, before | _ours()),
            used_bytes=nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        )
    except nvml.NVMLError:  # a driver that does not tell all of it, as in some virtual GPUs
        return None


def _whole(nvml: ModuleType, gpu: Any) -> Any:
    """The GPU that a slice (MIG) is of; any other as it is."""
    try:
        sliced = nvml.nvmlDeviceIsMigDeviceHandle(gpu)
    except nvml.NVMLError:  # a card that has no slices may refuse the question
        return gpu
    return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu) if sliced else gpu


def _ours() -> set[int]:
    """The numbers of this process and of all that it started."""
    return {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}


def _others(listed: set[int], ours: set[int]) -> int:
    """How many of the processes on a GPU are none of ours, as far as their numbers tell.

    In a container the driver may list the host's numbers, none of which is ours: then as many as we are may be us.
    """
    return len(listed - ours) if listed & ours else max(0, len(listed) - len(ours))


def gpu_memory_own() -> int | None:
    """Bytes that this process uses on the GPU; None without one, and where the driver does not tell (containers)."""

    def own(nvml: ModuleType, gpu: Any) -> int | None:
        listed = {each.pid: each.usedGpuMemory for each in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
        return listed.get(os.getpid())

    return _asked(own)


def gpu_memory_used() -> int | None:
    """Bytes that all processes together use on the GPU; None without one."""
    return _asked(lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).used))


def gpu_memory_free() -> int | None:
    """Bytes that no process uses on the GPU; None without one."""
    return _asked(lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).free))


def _asked(ask: Callable[[ModuleType, Any], int | None]) -> int | None:
    """What the driver answers about the GPU; None where there is none, or it does not tell."""
    found = _nvml()
    if found is None:
        return None
    nvml, gpu = found
    try:
        return ask(nvml, gpu)
    except nvml.NVMLError:
        return None
