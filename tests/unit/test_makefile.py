"""Rules of the Makefile that have to go on where a machine lacks something."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PYTHON = """#!/bin/sh
mkdir -p .venv-gpu/bin
printf '#!/bin/sh\\ncase "$*" in *%s*) exit 1;; *) echo "$*" >> installed;; esac\\n' > .venv-gpu/bin/pip
chmod +x .venv-gpu/bin/pip
"""


@pytest.mark.parametrize(
    ("lacking", "there"),
    [("tensorrt", ["[optimum,gpu,dev]", "[rtx]"]), ("rtx", ["[optimum,gpu,dev]", "[tensorrt]"]), ("optimum", None)],
)
def test_a_gpu_is_tested_without_what_this_machine_cannot_install(
    lacking: str, there: list[str] | None, tmp_path: Path
) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(PYTHON % lacking)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", ".venv-gpu/.ready", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (there is not None), done.stderr
    assert (tmp_path / ".venv-gpu" / ".ready").exists() == (there is not None)
    if there is not None:
        installed = (tmp_path / "installed").read_text().splitlines()
        assert [line.rpartition(" .")[2] for line in installed] == there


def test_a_python_that_is_too_old_makes_no_environment(tmp_path: Path) -> None:
    """It would stay in the environment: a second call with a newer one leaves `bin/python` as it is."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $2"\n'
        'touch "$3"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", ".venv/.ready", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    assert "Python 3.10 is too old" in done.stderr and "PYTHON=python3.12" in done.stderr


def test_cleaning_takes_no_runs(tmp_path: Path) -> None:
    """Days of training, beside what is made again in minutes."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(MAKEFILE, tmp_path)
    for folder in ("runs/mine", "dist", ".venv"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "runs"]


@pytest.mark.parametrize(("failing", "fails"), [("nothing", False), ("pytest", True), ("benchmarks.gpu", True)])
def test_a_gpu_is_measured_after_a_test_has_failed(failing: str, fails: bool, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shutil.copy(MAKEFILE, tmp_path)
    python = tmp_path / ".venv-gpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$2" >> called\n[ "$2" != {failing} ]\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "gpu", "-o", ".venv-gpu/.ready"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "called").read_text().split() == ["pytest", "benchmarks.gpu"], done.stderr
    assert (done.returncode != 0) == fails
