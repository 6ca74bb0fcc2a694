"""Engines: which backends there are, whether one can be built or run here, and how to open one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import Backend, EngineSpec
from trsp_deploy.tools.runners import ort, ort_build, ort_session, trt, trt_build
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.freshness import check_fresh
from trsp_deploy.tools.runners.manifest import BuiltEngine, EngineManifest, bound_to, check_manifest, read_manifest
from trsp_deploy.tools.runners.requirements import PACKAGES, Package, package_version, release_torch_memory

__all__ = [
    "BACKENDS",
    "BackendSupport",
    "BuiltEngine",
    "EngineManifest",
    "EngineUnavailable",
    "Runner",
    "bound_to",
    "check_can_build",
    "check_can_run",
    "check_fresh",
    "device_of",
    "open_engine",
    "read_manifest",
]


@dataclass(frozen=True)
class BackendSupport:
    """What the toolkit can do with one backend. The checks raise EngineUnavailable with a one-line reason."""

    package: Package  # with the command that installs it
    check_build: Callable[[EngineSpec], None]
    check_run: Callable[[EngineSpec], None]
    # ONNX file, spec, folder to write into, calibration tokens (batch, sequence) or None
    build: Callable[[Path, EngineSpec, Path, np.ndarray | None], BuiltEngine]
    open: Callable[[Path, EngineManifest], Runner]


BACKENDS: dict[Backend, BackendSupport] = {
    "onnxruntime-cpu": BackendSupport(
        package=PACKAGES["onnxruntime-cpu"],
        check_build=ort_session.check_cpu,
        check_run=ort_session.check_cpu,
        build=ort_build.build_cpu,
        open=ort.open_engine,
    ),
    "onnxruntime-cuda": BackendSupport(
        package=PACKAGES["onnxruntime-cuda"],
        check_build=ort_session.check_cuda,
        check_run=ort_session.check_cuda,
        build=ort_build.build_cuda,
        open=ort.open_engine,
    ),
    "tensorrt": BackendSupport(
        package=PACKAGES["tensorrt"],
        check_build=trt_build.check_build,
        check_run=trt.check_run,
        build=trt_build.build,
        open=trt.open_engine,
    ),
    "tensorrt-rtx": BackendSupport(
        package=PACKAGES["tensorrt-rtx"],
        check_build=trt_build.check_build,
        check_run=trt.check_run,
        build=trt_build.build,
        open=trt.open_engine,
    ),
}


def check_can_build(spec: EngineSpec) -> None:
    """Raise EngineUnavailable, with the reason and the command that helps, unless this machine can build the engine."""
    BACKENDS[spec.backend].check_build(spec)


def check_can_run(spec: EngineSpec) -> None:
    """Raise EngineUnavailable, with the reason and the command that helps, unless this machine can run such engines."""
    BACKENDS[spec.backend].check_run(spec)


def device_of(spec: EngineSpec) -> Literal["cpu", "cuda"]:
    """Device that a backend's engines run on."""
    return "cpu" if spec.backend == "onnxruntime-cpu" else "cuda"


def open_engine(folder: Path) -> Runner:
    """A runner for the engine in `folder`; nothing is loaded until it is entered.

    Raises EngineUnavailable when the folder holds no engine, when a file is not the one that was built, when the
    backend's version is not the one that built it, or when another model, graph or spec lies where it was built from.
    """
    manifest = read_manifest(folder)
    check_fresh(folder, manifest)
    check_manifest(folder, manifest, package_version(manifest.spec.backend), bound_to(manifest.spec))
    release_torch_memory()
    return BACKENDS[manifest.spec.backend].open(folder, manifest)
