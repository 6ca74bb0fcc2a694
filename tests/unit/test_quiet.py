"""Libraries keep to themselves, and leave logging as it was."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from trsp_deploy.tools.quiet import quiet_libraries


def test_what_a_library_makes_of_the_root_logger_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    with quiet_libraries():
        logging.basicConfig(level=logging.DEBUG)
        assert logging.root.handlers
    assert (logging.root.handlers, logging.root.level) == ([], level)


def test_quantising_leaves_logging_alone() -> None:
    code = (
        "import logging, onnx; from onnx import helper as h; from trsp_deploy.tools.graphs import quantize;"
        "graph = h.make_graph([], 'g', [], []); quantize._in_blocks(h.make_model(graph), 'MatMul', 8, 64);"
        "print(logging.root.handlers, logging.root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", str(logging.WARNING)] and done.stderr == ""
