"""A stand-in for Triton's onnxruntime backend, which nvidia-pytriton's server lacks: over the onnxruntime wheel.

The server's core, its sequence batching and its implicit state are real; the stock backend itself is not there.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

from tests.triton_server import ENVIRONMENT
from trsp_deploy.tools.triton_server.process import Installation, find_installation

HERE = Path(__file__).parent
NAME = "onnxruntime"


def why_not() -> str | None:
    """Why the backend cannot be built here; None where it can."""
    return None if shutil.which("cc") else "no C compiler (cc), which builds a backend for the tests' server"


def with_stand_in(backends: Path) -> tuple[Installation, str]:
    """The tests' server, and the option that gives it this backend beside its own.

    backends: a folder to be made, for both.
    """
    found = find_installation(ENVIRONMENT)
    assert found.backends is not None and found.stub is not None
    shutil.copytree(found.backends, backends / "python")
    shutil.copy2(found.stub, backends / "python")
    _build(backends / NAME)
    return dataclasses.replace(found, backends=None), f"--backend-directory={backends}"


def _build(folder: Path) -> None:
    folder.mkdir()
    shutil.copy2(HERE / "stand_in.py", folder)
    python = ENVIRONMENT / "bin" / "python"
    code = "import sysconfig as s; print(s.get_config_var('LIBDIR'), s.get_config_var('INSTSONAME'), sep='/')"
    library = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    names = [f'-DPYTHON_LIBRARY="{library}"', f'-DPYTHON_PROGRAM=L"{python}"', f'-DFOLDER="{folder}"']
    out = folder / f"libtriton_{NAME}.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", *names, "-o", out, HERE / "backend.c"], check=True)
