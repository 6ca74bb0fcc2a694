"""Libraries keep to themselves, and leave logging as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.doc_lines import ROOT
from trsp_deploy.tools.model_repository.vendor import vendor
from trsp_deploy.tools.quiet import quiet_libraries


def test_what_a_library_makes_of_the_root_logger_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    with quiet_libraries():
        logging.basicConfig(level=logging.DEBUG)
        assert logging.root.handlers
    assert (logging.root.handlers, logging.root.level) == ([], level)


def test_threads_side_by_side_leave_stdout_and_logging_as_they_were() -> None:
    """The first to enter is the first to leave: the other one restored what it had found, which was stderr."""
    stdout, disabled, filters = sys.stdout, logging.root.manager.disable, list(warnings.filters)
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with quiet_libraries():
            entered.set()
            left.wait(60)
            assert sys.stdout is sys.stderr

    with ThreadPoolExecutor(1) as other:
        with quiet_libraries():
            done = other.submit(second)
            assert entered.wait(60)
        assert sys.stdout is sys.stderr  # the other thread's library prints yet
        left.set()
        done.result()
    assert sys.stdout is stdout
    assert (logging.root.manager.disable, list(warnings.filters)) == (disabled, filters)


@BREADTH
def test_quantising_leaves_logging_alone() -> None:
    code = (
        "import logging, onnx; from onnx import helper as h; from trsp_deploy.tools.graphs import quantize;"
        "graph = h.make_graph([], 'g', [], []); quantize._in_blocks(h.make_model(graph), 'MatMul', 8, 64);"
        "print(logging.root.handlers, logging.root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", str(logging.WARNING)] and done.stderr == ""


@pytest.mark.parametrize("carried", [False, True])
def test_onnx_runtime_reports_to_nobody(carried: bool, tmp_path: Path) -> None:
    """1.32 does, from its import on, by an identifier that it leaves in the home folder."""
    home, place = tmp_path / "home", tmp_path / "vendor"
    vendor(place)
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", "import trsp_deploy, onnxruntime; print(trsp_deploy.__file__)"],
        cwd=place if carried else ROOT,
        env={**environment, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(place if carried else ROOT))
    assert list(home.rglob("*")) == []
