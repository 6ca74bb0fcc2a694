"""What each backend of engines has here and lacks, and what each engine spec can do: a part of `doctor`.

Apart from the rest because importing `runners` takes numpy, which may be what is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trsp_deploy.errors import EngineSpecError, EngineUnavailable
from trsp_deploy.recipe import Backend, EngineSpec
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.resources.dependencies import installed
from trsp_deploy.tools.resources.doctor import Finding
from trsp_deploy.tools.runners import BACKENDS, check_can_build, check_can_run
from trsp_deploy.tools.runners.ort_session import create_session
from trsp_deploy.tools.runners.requirements import cuda_devices, driver_version, load_package


def look_at_backends() -> Iterator[Finding]:
    """Their packages and the GPU."""
    yield from _onnxruntime()
    yield _backend_package("tensorrt")
    yield _backend_package("tensorrt-rtx")
    yield _gpu()


def _onnxruntime() -> Iterator[Finding]:
    subject = "onnxruntime"
    found = {name: installed(name) for name in ("onnxruntime", "onnxruntime-gpu")}
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


def look_at_engine(name: str) -> Finding:
    """What can be done here with a spec: its name, or a YAML file."""
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
