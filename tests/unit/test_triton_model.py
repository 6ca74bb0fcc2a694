"""The model file that Triton's python backend loads, over a stand-in for what that backend gives it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from trsp_deploy.tools.model_repository.vendor import model_file, vendor

UTILS = """
InferenceResponse = lambda *values, **more: (values, more)
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
class TritonError(Exception):
    INVALID_ARG = INTERNAL = UNAVAILABLE = CANCELLED = 0
Tensor = lambda *values: values
class Logger:
    log_error = print
"""
SERVED = """
import contextlib, sys, time
from types import SimpleNamespace
sys.path += sys.argv[1:]
import model
from model import Answer
model.open_batch = lambda *_: contextlib.nullcontext()
model.read_tokenizer = lambda _: None
model.ServingLoop = lambda *_: SimpleNamespace(stop=lambda: None)
served = model.TritonPythonModel()
served.initialize({"model_config": "{}"})
"""


def run(program: str, folder: Path) -> list[str]:
    """Lines that a program prints which has `served`, a model without an engine or a loop."""
    vendor(folder / "vendor")
    shutil.copy(model_file(), folder / "model.py")
    (folder / "serving.json").write_text('{"rotations": [], "max_batch": 1, "max_length": 8, "end_tokens": []}')
    (folder / "triton_python_backend_utils.py").write_text(UTILS)
    command = [sys.executable, "-I", "-c", SERVED + program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_who_left_is_told_after_the_pieces_that_are_queued_for_him(tmp_path: Path) -> None:
    """The server may refuse what is sent behind a request's end, or fall over what is sent beside it."""
    program = """
slow = SimpleNamespace(send=lambda response, flags: time.sleep(model.FAREWELL_S + 0.5))
left = SimpleNamespace(send=lambda response, flags: print(flags, flush=True))
served._towards(slow)(Answer("a", 1))
served._towards(left)(Answer("b", 1))
served._towards(left)(Answer("", 1, "cancelled"))
time.sleep(model.FAREWELL_S + 0.2)
served.finalize()
"""
    assert run(program, tmp_path) == ["0", "1"]


def test_a_server_that_stops_tells_who_left_at_once(tmp_path: Path) -> None:
    program = """
model.FAREWELL_S = 60
served.initialize({"model_config": "{}"})
left = SimpleNamespace(send=lambda response, flags: print(flags, flush=True))
served._towards(left)(Answer("b", 1))
served._towards(left)(Answer("", 1, "cancelled"))
began_s = time.monotonic()
served.finalize()
print(time.monotonic() - began_s < 30)
"""
    assert run(program, tmp_path) == ["0", "1", "True"]
