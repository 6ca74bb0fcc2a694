"""Where and with what an artefact is made."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from trsp_deploy import __version__
from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.artifacts.nvml import driver_version, visible_gpus
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
    "lm-eval",
)
CPUINFO = Path("/proc/cpuinfo")
ARM_NUMBERS = ("implementer", "part", "variant", "revision")  # "CPU architecture" is the part's
LATER = ("lm-eval",)  # of PACKAGES; provenance that knows no time was made before they were looked up


class Provenance(Strict):
    """Where and with what an artefact was made."""

    trsp_deploy: str
    python: str
    packages: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    driver: str | None = None  # of the GPUs; None without one, and in files that are older than this key
    time: str | None = None  # UTC, such as 2026-11-28T09:30:00Z; None in files that are older than this key

    def differences(self, now: Provenance) -> dict[str, tuple[str, str]]:
        """What is another one now: its name, as it was and as it is. Times are not compared."""
        older = self.time is None
        names = [name for name in PACKAGES if not (older and name in LATER)]
        pairs = {
            "trsp_deploy": (self.trsp_deploy, now.trsp_deploy),
            "Python": (self.python, now.python),
            **{name: (self.packages.get(name, "absent"), now.packages.get(name, "absent")) for name in names},
            "processor": (self.cpu, now.cpu),
            "cores": (str(self.cores), str(now.cores)),
            "GPU": (", ".join(self.gpus) or "none", ", ".join(now.gpus) or "none"),
            "driver": (now.driver if older else self.driver, now.driver),
        }
        return {name: (was or "none", is_ or "none") for name, (was, is_) in pairs.items() if was != is_}


def provenance() -> Provenance:
    """Versions and hardware of this process, and what time it is."""
    now = datetime.datetime.now(datetime.UTC)
    return _here().model_copy(update={"time": now.isoformat(timespec="seconds").replace("+00:00", "Z")})


@functools.cache
def _here() -> Provenance:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = _gpu_names()
    return Provenance(
        trsp_deploy=__version__,
        python=platform.python_version(),
        packages=versions,
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        driver=driver_version() if gpus else None,
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        if kinds := _arm_cores(lines):
            return f"{platform.machine()} {' and '.join(kinds)}"
    return platform.processor() or platform.machine()


def _arm_cores(lines: Iterable[str]) -> list[str]:
    """Each kind of core once, of which a big.LITTLE processor has two, by the numbers that ARM's cpuinfo has in place
    of a name; the machine's own, such as aarch64, is that of all of them."""
    cores: list[dict[str, str]] = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "processor":
            cores.append({})
        elif cores and (name := key.strip().removeprefix("CPU ")) in ARM_NUMBERS:
            cores[-1][name] = value.strip()
    kinds = (", ".join(f"{name} {core[name]}" for name in ARM_NUMBERS if name in core) for core in cores)
    return [kind for kind in dict.fromkeys(kinds) if kind]


def _gpu_names() -> tuple[str, ...]:
    """Of those that this process can use: torch's names where it knows some, else the driver's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return tuple(gpu.name for gpu in visible_gpus())
