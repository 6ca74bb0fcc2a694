"""`doctor` finds what is missing, and works when anything is."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from trsp_deploy import __version__
from trsp_deploy.tools.library import engine_names
from trsp_deploy.tools.resources import backends, doctor
from trsp_deploy.tools.resources.dependencies import requirements
from trsp_deploy.tools.resources.doctor import Finding, diagnose
from trsp_deploy.tools.runners.requirements import CudaDevice

# Starts a command line in a Python that lacks distributions: their modules are not found, nor what pip wrote of them.
WITHOUT = """
import importlib.metadata as metadata, sys
from importlib.machinery import PathFinder

absent = sys.argv[1].split(",")
modules = {
    module for module, those in metadata.packages_distributions().items()
    if any(metadata.Prepared.normalize(each).replace("_", "-") in absent for each in those)
}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in modules else super().find_spec(name, path, target)

def from_name(cls, name, found=metadata.Distribution.from_name.__func__):
    if name in absent:
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
metadata.Distribution.from_name = classmethod(from_name)
del sys.argv[1]
from trsp_deploy.cli import main
main()
"""
# The same with all that pip wrote of them: half removed.
HALF_REMOVED = WITHOUT.replace("metadata.Distribution.from_name = classmethod(from_name)\n", "")
OF_THE_COMMAND_LINE = ("pydantic", "pyyaml", "rich", "typer")


def call_without(absent: list[str], *arguments: str, code: str = WITHOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, ",".join(absent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    nothing = dict.fromkeys(["onnxruntime_gpu", "onnxruntime", *(name.replace("-", "_") for name in requirements())])
    pretend_installed(monkeypatch, **nothing)
    for module in ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    findings = by_subject(diagnose())
    for subject in ("torch", "transformers", "torch device", "onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert findings[subject].state == "missing"
    assert findings["onnxruntime"].install == "pip install 'trsp_deploy[cpu]'"
    assert findings["engine ort-cpu-fp32"].state == "missing"
    assert findings["engine ort-cpu-fp32"].install == "pip install 'trsp_deploy[cpu]'"


def test_every_package_may_be_absent_that_the_command_line_can_start_without() -> None:
    """Each is named with the command that installs it, all in one go."""
    absent = [name for name in requirements() if name not in OF_THE_COMMAND_LINE]
    done = call_without(absent, "doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    for name in absent:
        assert findings[name]["state"] == "missing"
        assert findings[name]["install"] == f"pip install '{name}{requirements()[name]}'"
    assert findings["packages"]["state"] == "ok"
    assert findings["packages"]["detail"].endswith("; whether these versions fit is not known without packaging")
    assert findings["engines"]["detail"].startswith("not looked at: a package that they need does not load (No module")


def test_a_package_that_is_half_removed_is_not_called_installed() -> None:
    """Its metadata is there and its module is not: pip would not install it again unless it is told to."""
    absent = ["torch", "packaging", "nvidia-ml-py"]
    done = call_without(absent, "doctor", "--json", code=HALF_REMOVED)
    assert (done.returncode, done.stderr) == (0, "")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    for name in absent:
        assert findings[name]["state"] == "missing"
        assert findings[name]["detail"] == "half removed: pip has it for installed, and its module is not there"
        assert findings[name]["install"] == f"pip install --force-reinstall --no-deps '{name}{requirements()[name]}'"
    assert findings["packages"]["detail"].endswith("; whether these versions fit is not known without packaging")
    (line,) = call_without(["pyyaml"], "doctor", code=HALF_REMOVED).stderr.splitlines()
    assert line == (
        "error: the package pyyaml is half removed: pip has it for installed, and its module is not there, without "
        f"which this command does not work: pip install --force-reinstall --no-deps 'pyyaml{requirements()['pyyaml']}'"
    )


@pytest.mark.parametrize("name", OF_THE_COMMAND_LINE)
def test_a_package_that_the_command_line_needs_is_named(name: str) -> None:
    done = call_without([name], "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: the package {name} is not installed, without which this command does not work: "
        f"pip install '{name}{requirements()[name]}'\n"
    )


def test_packages_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = [
        f"{each}; extra == '{extra}'" for extra, those in project["optional-dependencies"].items() for each in those
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: [*project["dependencies"], *extras])
    stated = requirements()
    assert [f"{name}{versions}" for name, versions in stated.items()] == project["dependencies"]
    assert requirements("optimum")["transformers"] == ">=4.57,<6,<4.58"
    assert requirements("gpu") == {**stated, "onnxruntime-gpu": ">=1.31,<1.33"}

    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    assert by_subject(diagnose([]))["packages"].detail == (
        "not looked at: trsp_deploy itself is not installed, so nothing says which it asks for"
    )


def test_packages_that_are_fine_are_one_finding() -> None:
    findings = by_subject(diagnose([]))
    told = findings["packages"].detail.split(", ")
    wrong = [name for name in requirements() if name in findings]
    assert [each.split()[0] for each in told] == [name for name in requirements() if name not in wrong]


@pytest.mark.parametrize("driver", ["580.65.06", None])
def test_a_gpu_with_its_driver(monkeypatch: pytest.MonkeyPatch, driver: str | None) -> None:
    monkeypatch.setattr(backends, "cuda_devices", lambda: [CudaDevice("Card", "sm89", 24 * 2**30)])
    monkeypatch.setattr(backends, "driver_version", lambda: driver)
    assert backends._gpu().detail == f"Card (sm89, 24 GiB); driver {driver or 'unknown'}"


def test_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: 10**9)
    memory = by_subject(diagnose([]))["memory"]
    assert memory.state == "warning" and memory.detail.startswith("1.0 of ")
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: None)
    assert by_subject(diagnose([]))["memory"].detail.endswith("how much of it is available is not known without /proc")


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
    findings = by_subject(diagnose([]))
    if state == "ok":
        assert f"transformers {version}" in findings["packages"].detail and "transformers" not in findings
    else:
        assert findings["transformers"].state == state
        assert findings["transformers"].install == "pip install 'transformers>=4.57,<6'"


def test_local_version_label_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, torch="2.13.0+cu130")
    assert "torch 2.13.0+cu130" in by_subject(diagnose([]))["packages"].detail


def test_broken_spec_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: d\nbackend: onnxruntime-cpu\nprecision: fp32\nthreds: 2\n")
    finding = diagnose([str(path)])[-1]
    assert (finding.subject, finding.state) == ("engine mine", "conflict")
    assert "unknown key 'threds'; did you mean 'threads'?" in finding.detail


def test_smallest_model_loads_in_onnxruntime(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'trsp_deploy[cpu]'")
    path = backends._smallest_model(tmp_path)
    assert ort.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].name == "x"
