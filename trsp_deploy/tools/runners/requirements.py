"""What each backend needs of this machine: a package, and for most a CUDA device.

A model repository carries this module into a server's Python, which has neither torch nor pynvml: the driver's
libraries are asked through ctypes. Elsewhere `artifacts/nvml.py` knows the GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from trsp_deploy.errors import EngineUnavailable, one_line
from trsp_deploy.recipe import Backend


@dataclass(frozen=True)
class Package:
    """A backend's Python package."""

    distribution: str
    module: str
    install: str  # command that installs it


INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES: dict[Backend, Package] = {
    "onnxruntime-cpu": Package("onnxruntime", "onnxruntime", "pip install 'trsp_deploy[cpu]'"),
    # The two ONNX Runtime packages write into one folder, so the CPU one has to leave first.
    "onnxruntime-cuda": Package(
        "onnxruntime-gpu", "onnxruntime", "pip uninstall -y onnxruntime && pip install 'trsp_deploy[gpu]'"
    ),
    "tensorrt": Package("tensorrt", "tensorrt", "pip install 'trsp_deploy[tensorrt]'"),
    "tensorrt-rtx": Package("tensorrt-rtx", "tensorrt_rtx", "pip install 'trsp_deploy[rtx]'"),
}


@dataclass(frozen=True)
class CudaDevice:
    """A GPU that this process may use."""

    name: str
    compute_capability: str  # such as "sm89"
    memory_bytes: int


def load_package(backend: Backend) -> ModuleType:
    """Import a backend's package; raises EngineUnavailable with the command that installs it."""
    package = PACKAGES[backend]
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as problem:
        raise EngineUnavailable(f"{package.distribution} is not installed: {package.install}") from problem
    except (ImportError, OSError) as problem:
        # Installed, but a shared library that it links to is not there.
        raise EngineUnavailable(
            f"{package.distribution} does not load ({one_line(problem)}); reinstall it: {_reinstall(package)}"
        ) from problem
    # Two packages that share a folder leave it half empty when one is uninstalled; it still imports.
    if not hasattr(module, "__version__"):
        raise EngineUnavailable(f"{package.distribution} is damaged; reinstall it: {_reinstall(package)}")
    return module


def _reinstall(package: Package) -> str:
    # `--force-reinstall` would ask the index for trsp_deploy itself, which came from a checkout.
    return f"pip uninstall -y {package.distribution} && {package.install}"


def package_version(backend: Backend) -> str:
    """Version of a backend's package; raises EngineUnavailable when it does not import."""
    return str(load_package(backend).__version__)


def adds_int8_exactly() -> bool:
    """Whether the CPU's int8 products have the sums that they should.

    On x86 without VNNI ONNX Runtime adds neighbouring products of a u8 and an s8 in 16 bits (`vpmaddubsw`), where 2 x
    255 x 127 overflows; weights of 7 bits do not (microsoft/onnxruntime#12088 describes it).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool({"avx512_vnni", "avx_vnni"} & set(instruction_sets()))


def instruction_sets() -> tuple[str, ...]:
    """What this x86 processor multiplies with; processors of one name ("AMD EPYC") differ in it. Empty elsewhere."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return tuple(name for name in INSTRUCTION_SETS if name in flags)


def release_torch_memory() -> None:
    """Give back what torch keeps of the GPU for tensors to come: ONNX Runtime and TensorRT allocate beside it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        with contextlib.suppress(RuntimeError):  # an error of CUDA stays to the process's end; who computes tells of it
            torch.cuda.empty_cache()


def cuda_devices() -> list[CudaDevice]:
    """GPUs that the driver shows this process, at least one, asked of the driver itself: no package is needed.

    Raises EngineUnavailable with "no CUDA device: ..." and the reason. Like every CUDA start-up, this must not
    come before a fork whose child uses CUDA.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        raise EngineUnavailable("no CUDA device: the NVIDIA driver is not installed (libcuda.so.1)") from problem
    status = driver.cuInit(0)
    if status != 0:
        raise EngineUnavailable(f"no CUDA device: the NVIDIA driver answers '{_status_text(driver, status)}'")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        raise EngineUnavailable("no CUDA device: the NVIDIA driver shows none to this process (CUDA_VISIBLE_DEVICES?)")
    return [_device(driver, index) for index in range(count.value)]


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as "580.65.06"; None where its management library does not say."""
    text = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2() != 0 or library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return None
    return text.value.decode()


def _device(driver: ctypes.CDLL, index: int) -> CudaDevice:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory = ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)  # COMPUTE_CAPABILITY_MINOR
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return CudaDevice(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", memory.value)


def _status_text(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"
