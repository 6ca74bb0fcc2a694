"""ONNX Runtime's sessions: denormal numbers are zero in them alone, and a provider that fails is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.runners.ort_session import create_session

IN_A_PROCESS = """
import sys, threading
from pathlib import Path
import numpy as np
from trsp_deploy.tools.runners.denormals import as_zero
from trsp_deploy.tools.runners.ort_session import create_session

small = np.full(3, 1e-20, np.float32)

def shown():
    inside = session.run(None, {"x": small})[0].max()
    print(float(small[0] * small[0]) > 0, float(inside) > 0)

for _ in range(2):
    session = create_session(Path(sys.argv[1]), "onnxruntime-cpu", 1)
    shown()
with as_zero():
    shown()
shown()

def elsewhere():
    shown()
    with as_zero():
        shown()

thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
"""


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """A graph whose output is the square of each of three inputs."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "g", [x], [y])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_denormal_numbers_are_zero_while_an_engine_runs_and_no_longer(squares: Path) -> None:
    """In a process of its own: ONNX Runtime sets the thread of a process's first session, once."""
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, squares], capture_output=True, text=True, check=True)
    there, zero = "True True", "False False"
    assert done.stdout.splitlines() == [there, there, zero, there, there, zero], done.stderr


def test_a_provider_that_fails_is_an_error_and_nothing_runs_elsewhere(
    squares: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made: list[object] = []

    def full(session: onnxruntime.InferenceSession, providers: object, *_: object) -> None:
        made.append(providers)
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", full)
    with pytest.raises(EngineUnavailable, match=r"cannot load .*model\.onnx: CUDA failure 2: out of memory"):
        create_session(squares, "onnxruntime-cpu", 1)
    assert len(made) == 1 and capfd.readouterr().out == ""
