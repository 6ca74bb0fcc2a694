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
    # torch knows the GPUs that this process can use; without torch loaded there is nothing to say.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
