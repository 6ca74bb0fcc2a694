"""What this machine has, what it lacks, and the command that helps: `trsp-deploy doctor`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import trsp_deploy
from trsp_deploy import __version__
from trsp_deploy.errors import EngineSpecError, EngineUnavailable, one_line
from trsp_deploy.recipe import Backend, EngineSpec, Strict
from trsp_deploy.tools.exporters import optimum
from trsp_deploy.tools.host_memory import available_host_bytes
from trsp_deploy.tools.library import engine_names, load_engine_spec
from trsp_deploy.tools.runners import BACKENDS, check_can_build, check_can_run
from trsp_deploy.tools.runners.ort_session import create_session
from trsp_deploy.tools.runners.requirements import cuda_devices, driver_version, load_package

State = Literal["ok", "missing", "conflict", "warning"]

LOOKED_AT = ("torch", "transformers", "onnx", "onnxscript", "datasets")  # what else works the interpreter has shown
WITH_OPTIMUM = ("optimum", "optimum-onnx", "transformers")
ENOUGH_DISK = 10e9  # bytes: a 1B model dense and pruned, as checkpoint, ONNX and engine in fp16
ENOUGH_MEMORY = 4e9  # bytes: training and exporting a 135M model


class Finding(Strict):
    """One thing that was looked at. `install` is the command that would put it right, where one would."""

    subject: str
    state: State
    detail: str
    install: str | None = None


def diagnose(engines: Sequence[str] | None = None) -> list[Finding]:
    """Look at this toolkit, Python, packages, GPU, disk, memory, and at what each engine spec can do here.

    engines: names or YAML files of engine specs; None takes every one that comes with trsp_deploy.
    Raises nothing: whatever is missing or broken is a finding.
    """
    return [
        Finding(subject="trsp_deploy", state="ok", detail=f"{__version__} ({Path(trsp_deploy.__file__).parent})"),
        _python(),
        *(_package(distribution) for distribution in LOOKED_AT),
        _optimum(),
        _torch_device(),
        *_onnxruntime(),
        _backend_package("tensorrt"),
        _backend_package("tensorrt-rtx"),
        _gpu(),
        _disk(Path.cwd()),
        _memory(),
        *(_engine(name) for name in (engine_names() if engines is None else engines)),
    ]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding(subject="python", state="ok", detail=f"{platform.python_version()} ({sys.executable})")


def _optimum() -> Finding:
    """Optimum's exporter is optional; where it is, its last release holds transformers below 4.58."""
    subject = "exporter"
    if not optimum.installed():
        return Finding(
            subject=subject, state="ok", detail="torch's own (`pip install 'trsp_deploy[optimum]'` for Optimum's)"
        )
    findings = [_package(distribution, "optimum") for distribution in WITH_OPTIMUM]
    wrong = next((found for found in findings if found.state != "ok"), None)
    if wrong is None:
        versions = ", ".join(f"{found.subject} {found.detail}" for found in findings[:2])
        return Finding(subject=subject, state="ok", detail=f"Optimum's ({versions})")
    detail = f"Optimum's does not fit: {wrong.subject} {wrong.detail}"
    return Finding(subject=subject, state="conflict", detail=detail, install="pip install 'trsp_deploy[optimum]'")


def _package(distribution: str, extra: str = "") -> Finding:
    wanted = _wanted(distribution, extra)
    spelled = ",".join(sorted(map(str, wanted), reverse=True))  # >= before <
    install = f"pip install '{distribution}{spelled}'"
    version = _installed(distribution)
    if version is None:
        return Finding(subject=distribution, state="missing", detail="not installed", install=install)
    if not wanted.contains(version, prereleases=True):
        detail = f"{version}; works with {spelled}"
        return Finding(subject=distribution, state="conflict", detail=detail, install=install)
    return Finding(subject=distribution, state="ok", detail=version)


def _wanted(distribution: str, extra: str) -> SpecifierSet:
    """Versions that trsp_deploy's own metadata asks for, with an extra too; any where it is not installed itself."""
    found = SpecifierSet()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires("trsp_deploy") or ():
            asked = Requirement(text)
            if asked.name == distribution and (asked.marker is None or asked.marker.evaluate({"extra": extra})):
                found &= asked.specifier
    return found


def _torch_device() -> Finding:
    subject = "torch device"
    try:
        torch = importlib.import_module("torch")
        cuda = torch.version.cuda
    except (ImportError, OSError, AttributeError) as problem:
        return Finding(subject=subject, state="missing", detail=f"torch does not load ({one_line(problem)})")
    if cuda is None:
        return Finding(subject=subject, state="ok", detail="CPU build: planning and transfer run on the CPU")
    if not torch.cuda.is_available():
        return Finding(subject=subject, state="warning", detail=f"built for CUDA {cuda}, but it can use no GPU here")
    return Finding(subject=subject, state="ok", detail=f"CUDA {cuda} on {torch.cuda.get_device_name(0)}")


def _onnxruntime() -> Iterator[Finding]:
    subject = "onnxruntime"
    found = {name: _installed(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    names = " and ".join(f"{name} {version}" for name, version in found.items() if version)
    if all(found.values()):
        # They share one folder: the last one installed wins, and uninstalling either breaks the other.
        yield Finding(
            subject=subject,
            state="conflict",
            detail=f"{names} overwrite each other; keep one (for the CPU: trsp_deploy[cpu])",
            install="pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'trsp_deploy[gpu]'",
        )
    try:
        ort = load_package("onnxruntime-cpu")
    except EngineUnavailable as problem:
        install = BACKENDS["onnxruntime-cpu"].package.install
        yield Finding(subject=subject, state="missing", detail=str(problem), install=install)
        return
    if not all(found.values()):
        yield Finding(subject=subject, state="ok", detail=names or f"{ort.__version__}, not installed by pip")
    compiled = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
    yield Finding(subject="onnxruntime compiled in", state="ok", detail=", ".join(compiled))
    if "CUDA" in compiled:
        yield _cuda_provider()


def _cuda_provider() -> Finding:
    subject = "onnxruntime CUDA"
    try:
        cuda_devices()
        with tempfile.TemporaryDirectory() as folder:
            # Only a session shows whether a provider that was compiled in can run.
            create_session(_smallest_model(Path(folder)), "onnxruntime-cuda")
    except ModuleNotFoundError as problem:
        return Finding(subject=subject, state="warning", detail=f"not tried: {problem}")
    except EngineUnavailable as problem:
        return Finding(subject=subject, state="warning", detail=str(problem))
    return Finding(subject=subject, state="ok", detail="a session runs on the GPU")


def _smallest_model(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", ends[:1], ends[1:])
    path = folder / "smallest.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def _backend_package(backend: Backend) -> Finding:
    package = BACKENDS[backend].package
    try:
        version = load_package(backend).__version__
    except EngineUnavailable as problem:
        return Finding(subject=package.distribution, state="missing", detail=str(problem), install=package.install)
    return Finding(subject=package.distribution, state="ok", detail=version)


def _gpu() -> Finding:
    try:
        devices = cuda_devices()
    except EngineUnavailable as problem:
        return Finding(subject="gpu", state="missing", detail=str(problem))
    names = "; ".join(f"{d.name} ({d.compute_capability}, {d.memory_bytes / 2**30:.0f} GiB)" for d in devices)
    return Finding(subject="gpu", state="ok", detail=f"{names}; driver {driver_version() or 'unknown'}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free >= ENOUGH_DISK else "warning"
    return Finding(subject="disk", state=state, detail=f"{free / 1e9:.1f} GB free in {folder}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total, within_limits = memory.total, available_host_bytes()  # of a container too
    available = memory.available if within_limits is None else within_limits
    state: State = "ok" if available >= ENOUGH_MEMORY else "warning"
    return Finding(subject="memory", state=state, detail=f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available")


def _engine(name: str) -> Finding:
    subject = f"engine {Path(name).stem}"
    try:
        spec = load_engine_spec(name)
    except EngineSpecError as problem:
        return Finding(subject=subject, state="conflict", detail=str(problem))
    install = BACKENDS[spec.backend].package.install
    refusals = {"built": _refusal(check_can_build, spec), "run": _refusal(check_can_run, spec)}
    reasons = [f"cannot be {verb} here: {reason}" for verb, reason in refusals.items() if reason]
    if not reasons:
        return Finding(subject=subject, state="ok", detail="can be built and run here")
    if refusals["built"] == refusals["run"]:
        reasons = [f"cannot be built or run here: {refusals['run']}"]
    elif not refusals["built"]:
        reasons.insert(0, "can be built here")
    return Finding(
        subject=subject,
        state="missing" if refusals["built"] else "warning",
        detail="; ".join(reasons),
        install=install if any(install in reason for reason in reasons) else None,
    )


def _refusal(check: Callable[[EngineSpec], None], spec: EngineSpec) -> str:
    try:
        check(spec)
    except (EngineUnavailable, EngineSpecError) as problem:
        return str(problem)
    return ""
