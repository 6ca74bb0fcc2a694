"""What this machine has, what it lacks, and the command that helps: `trsp-deploy doctor`."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import trsp_deploy
from trsp_deploy import __version__
from trsp_deploy.errors import one_line
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.host_memory import available_host_bytes
from trsp_deploy.tools.library import engine_names
from trsp_deploy.tools.resources.dependencies import (
    HALF_REMOVED,
    half_removed,
    install_command,
    installed,
    reinstall_command,
    requirements,
)

State = Literal["ok", "missing", "conflict", "warning"]

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
        *_packages(),
        _optimum(),
        _torch_device(),
        _disk(Path.cwd()),
        _memory(),
        *_engines(engine_names() if engines is None else engines),
    ]


def _python() -> Finding:
    return Finding(subject="python", state="ok", detail=f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    """What trsp_deploy cannot do without: a finding for each that is wrong, and one for all the others."""
    asked = requirements()
    if not asked:
        detail = "not looked at: trsp_deploy itself is not installed, so nothing says which it asks for"
        yield Finding(subject="packages", state="warning", detail=detail)
        return
    findings = [_required(distribution, versions) for distribution, versions in asked.items()]
    yield from (found for found in findings if found.state != "ok")
    fine = ", ".join(f"{found.subject} {found.detail}" for found in findings if found.state == "ok")
    unknown = any(found.subject == "packaging" and found.state == "missing" for found in findings)
    unsure = "; whether these versions fit is not known without packaging" if unknown else ""
    yield Finding(subject="packages", state="ok", detail=f"{fine}{unsure}")


def _optimum() -> Finding:
    """Optimum's exporter is optional; where it is, its last release holds transformers below 4.58."""
    subject = "exporter"
    if installed("optimum-onnx") is None:
        return Finding(
            subject=subject, state="ok", detail="torch's own (`pip install 'trsp_deploy[optimum]'` for Optimum's)"
        )
    asked = requirements("optimum")
    findings = [_package(distribution, asked.get(distribution, "")) for distribution in WITH_OPTIMUM]
    wrong = next((found for found in findings if found.state != "ok"), None)
    if wrong is None:
        versions = ", ".join(f"{found.subject} {found.detail}" for found in findings[:2])
        return Finding(subject=subject, state="ok", detail=f"Optimum's ({versions})")
    detail = f"Optimum's does not fit: {wrong.subject} {wrong.detail}"
    return Finding(subject=subject, state="conflict", detail=detail, install="pip install 'trsp_deploy[optimum]'")


def _required(distribution: str, versions: str) -> Finding:
    """One of the packages that trsp_deploy cannot do without."""
    if half_removed(distribution):
        install = reinstall_command(distribution, versions)
        return Finding(subject=distribution, state="missing", detail=HALF_REMOVED, install=install)
    return _package(distribution, versions)


def _package(distribution: str, versions: str) -> Finding:
    install = install_command(distribution, versions)
    version = installed(distribution)
    if version is None:
        return Finding(subject=distribution, state="missing", detail="not installed", install=install)
    if not _fits(version, versions):
        detail = f"{version}; works with {versions}"
        return Finding(subject=distribution, state="conflict", detail=detail, install=install)
    return Finding(subject=distribution, state="ok", detail=version)


def _fits(version: str, versions: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:  # a finding of its own
        return True
    return SpecifierSet(versions).contains(version, prereleases=True)


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


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free >= ENOUGH_DISK else "warning"
    return Finding(subject="disk", state=state, detail=f"{free / 1e9:.1f} GB free in {folder}")


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = available_host_bytes()  # of a container too
    if available is None:
        detail = f"{total / 1e9:.1f} GB; how much of it is available is not known without /proc"
        return Finding(subject="memory", state="warning", detail=detail)
    state: State = "ok" if available >= ENOUGH_MEMORY else "warning"
    return Finding(subject="memory", state=state, detail=f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available")


def _engines(names: Sequence[str]) -> Iterator[Finding]:
    """What backends and engine specs find here, once numpy is there to ask them."""
    try:
        from trsp_deploy.tools.resources.backends import look_at_backends, look_at_engine
    except ImportError as problem:
        detail = f"not looked at: a package that they need does not load ({one_line(problem)})"
        yield Finding(subject="engines", state="missing", detail=detail)
        return
    yield from look_at_backends()
    yield from map(look_at_engine, names)
