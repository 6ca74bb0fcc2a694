"""Where and with what an artefact is made."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from trsp_deploy import __version__
from trsp_deploy.recipe import Strict

PACKAGES = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxslim",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "datasets",
    "numpy",
)


class Provenance(Strict):
    """Where and with what an artefact was made."""

    trsp_deploy: str
    python: str
    packages: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]


@functools.cache
def provenance() -> Provenance:
    """Versions and hardware of this process."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Provenance(
        trsp_deploy=__version__,
        python=platform.python_version(),
        packages=versions,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpu_names(),
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> tuple[str, ...]:
    """Of those that this process can use: torch's names where it knows some, else the driver's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        named = {pynvml.nvmlDeviceGetUUID(handle): pynvml.nvmlDeviceGetName(handle) for handle in handles}
    except pynvml.NVMLError:  # no driver
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(named.values())
    numbered = dict(zip(map(str, range(len(named))), named.values(), strict=True)) | named
    return tuple(numbered[each] for each in visible.split(",") if each in numbered)
