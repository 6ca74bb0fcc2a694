"""Which NVIDIA GPUs this process may use, asked of the driver's management library (NVML). No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """One GPU, or a slice of one (MIG)."""

    handle: Any  # pynvml's
    uuid: str  # "GPU-" or "MIG-" and five groups of hexadecimal digits
    name: str


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA would show this process, its device 0 first; none without a driver.

    NVML lists every GPU of the machine by bus, CUDA those of CUDA_VISIBLE_DEVICES and the fastest first (unless
    CUDA_DEVICE_ORDER says otherwise), and of a GPU in slices (MIG) a slice, named or not. So where there are several
    or slices CUDA itself is asked. Like every CUDA start-up, that must not come before a fork whose child uses CUDA.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = tuple(map(_gpu, _handles()))
    except pynvml.NVMLError:
        return ()
    asked = os.environ.get(VISIBLE)
    if (len(gpus) > 1 or any(map(_in_slices, gpus))) and "MIG-" not in (asked or ""):
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        with contextlib.suppress(pynvml.NVMLError):
            shown = [by_uuid.get(f"GPU-{each}") or _slice(f"MIG-{each}") for each in _shown_by_cuda()]
            if shown:
                return tuple(shown)
    return gpus if asked is None else tuple(_named(asked, gpus))


def _handles() -> Iterator[Any]:
    """Of the GPUs that this process may talk to; NVML counts the others too, and CUDA does not (Slurm's cgroups)."""
    import pynvml

    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError_NoPermission):
            yield pynvml.nvmlDeviceGetHandleByIndex(index)


def driver_version() -> str | None:
    """Version of the driver, such as "580.65.06"; None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _gpu(handle: Any) -> Gpu:
    import pynvml

    return Gpu(handle, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))


def _in_slices(gpu: Gpu) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetMigMode(gpu.handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except pynvml.NVMLError:  # most cards have no such mode
        return False


def _slice(name: str) -> Gpu:
    import pynvml

    return _gpu(pynvml.nvmlDeviceGetHandleByUUID(name))


def _named(asked: str, gpus: Sequence[Gpu]) -> Iterator[Gpu]:
    """What CUDA_VISIBLE_DEVICES names: numbers, or beginnings of UUIDs; as in CUDA, nothing behind the first misfit."""
    import pynvml

    for entry in map(str.strip, asked.split(",")):
        if entry.startswith("MIG-"):
            try:
                yield _slice(entry)
            except pynvml.NVMLError:
                return
            continue
        if entry.isdecimal():
            found = gpus[int(entry) : int(entry) + 1]
        else:
            found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(found) != 1:
            return
        yield found[0]


def _shown_by_cuda() -> list[str]:
    """UUIDs of the GPUs or slices that CUDA shows this process, in its order; empty where it does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    # The second says a slice's own and not its GPU's; drivers before CUDA 11.4 have the first alone.
    uuid_of = getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)
    count, device, raw = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        if uuid_of(ctypes.byref(raw), device) != 0:
            return []
        found.append(str(uuid.UUID(bytes=bytes(raw))))
    return found
