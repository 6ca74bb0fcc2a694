"""`doctor` finds what is missing, and works when anything is."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from trsp_deploy import __version__
from trsp_deploy.tools.library import engine_names
from trsp_deploy.tools.resources import doctor
from trsp_deploy.tools.resources.doctor import Finding, diagnose
from trsp_deploy.tools.runners.requirements import CudaDevice


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), "unchanged")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "unchanged" else found

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)


def test_this_machine() -> None:
    findings = by_subject(diagnose())
    assert findings["trsp_deploy"].detail.startswith(f"{__version__} (") and findings["python"].state == "ok"
    assert findings["onnxruntime"].state == "ok"
    assert "GB free" in findings["disk"].detail
    assert "GB available" in findings["memory"].detail
    assert findings["engine ort-cpu-fp32"] == Finding(
        subject="engine ort-cpu-fp32", state="ok", detail="can be built and run here"
    )
    assert {f"engine {name}" for name in engine_names()} <= findings.keys()
    assert all("\n" not in finding.detail for finding in findings.values())


def test_works_with_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = dict.fromkeys(["onnxruntime_gpu", "onnxruntime", *(name.replace("-", "_") for name in doctor.LOOKED_AT)])
    pretend_installed(monkeypatch, **nothing)
    for module in ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    findings = by_subject(diagnose())
    for subject in ("torch", "transformers", "torch device", "onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert findings[subject].state == "missing"
    assert findings["onnxruntime"].install == "pip install 'trsp_deploy[cpu]'"
    assert findings["engine ort-cpu-fp32"].state == "missing"
    assert findings["engine ort-cpu-fp32"].install == "pip install 'trsp_deploy[cpu]'"


@pytest.mark.parametrize("driver", ["580.65.06", None])
def test_a_gpu_with_its_driver(monkeypatch: pytest.MonkeyPatch, driver: str | None) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", lambda: [CudaDevice("Card", "sm89", 24 * 2**30)])
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    assert doctor._gpu().detail == f"Card (sm89, 24 GiB); driver {driver or 'unknown'}"


def test_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: 10**9)
    memory = by_subject(diagnose())["memory"]
    assert memory.state == "warning" and memory.detail.startswith("1.0 of ")


def test_two_onnxruntimes_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    finding = by_subject(diagnose([]))["onnxruntime"]
    assert finding.state == "conflict"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 overwrite each other" in finding.detail
    assert finding.install is not None
    assert finding.install.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


@pytest.mark.parametrize(
    ("version", "state"), [("4.57.6", "ok"), ("5.24.0", "ok"), ("6.0.0rc1", "conflict"), ("4.9", "conflict")]
)
def test_ranges(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    pretend_installed(monkeypatch, transformers=version)
    finding = by_subject(diagnose([]))["transformers"]
    assert finding.state == state
    assert finding.install == (None if state == "ok" else "pip install 'transformers>=4.57,<6'")


def test_local_version_label_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, torch="2.13.0+cu130")
    assert by_subject(diagnose([]))["torch"].state == "ok"


def test_broken_spec_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\nbackend: onnxruntime-cpu\nprecision: fp32\nthreds: 2\n")
    finding = diagnose([str(path)])[-1]
    assert (finding.subject, finding.state) == ("engine mine", "conflict")
    assert "unknown key 'threds'; did you mean 'threads'?" in finding.detail


def test_smallest_model_loads_in_onnxruntime(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'trsp_deploy[cpu]'")
    path = doctor._smallest_model(tmp_path)
    assert ort.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name == "x"
