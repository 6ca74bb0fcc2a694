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
    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = range(1, 5)
Tensor = lambda *values: values
get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
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


ANSWERED = """
def answered(name, flags, response):
    error = response[1].get("error")
    print(name, flags, *(error.args if error else []), sep=": ", flush=True)
def sender(name, cancelled=False):
    return SimpleNamespace(send=lambda response, flags: answered(name, flags, response), is_cancelled=lambda: cancelled)
"""


def test_each_fault_has_its_kind_of_error(tmp_path: Path) -> None:
    """By it a client knows whether to ask for something else, to give up, or to come again."""
    program = """
for fault in ("request", "engine", "busy", "stopping"):
    served._towards(sender(fault))(Answer("", 0, "error", "why", fault))
served._towards(sender("gone"))(Answer("", 0, "cancelled"))
served.finalize()
"""
    assert run(ANSWERED + program, tmp_path) == [
        "request: 1: why: 1",
        "engine: 1: why: 2",
        "busy: 1: why: 3",
        "stopping: 1: why: 3",
        "gone: 1: cancelled: 4",
    ]


def test_requests_are_read_and_those_that_cannot_be_are_answered_at_once(tmp_path: Path) -> None:
    program = """
import numpy as np
served._loop.submit = lambda ticket: print(
    ticket.request.text_input, ticket.request.stop, ticket.request.max_tokens, ticket.cancelled(), flush=True
)
def request(name, cancelled=False, parameters=lambda: "", **inputs):
    tensors = {each: SimpleNamespace(as_numpy=lambda it=values: np.array(it)) for each, values in inputs.items()}
    to = sender(name, cancelled)
    return SimpleNamespace(parameters=parameters, get_response_sender=lambda: to, inputs=tensors)
def raising(problem):
    raise problem
text = [[b"x"]]
served.execute([
    request("two", text_input=text, max_tokens=[[1, 2]]),
    request("bytes", text_input=[[b"a\\xff"]]),
    request("parameter", text_input=text, parameters=lambda: b"\\xff".decode()),
    request("much", text_input=text, max_tokens=[[0]]),
    request("broken", text_input=text, parameters=lambda: raising(ZeroDivisionError("by nought"))),
    request("good", text_input=text, max_tokens=[[7]], stop=[[b"a", b"b"]], parameters=lambda: '{"id": "mine"}'),
    request("left", cancelled=True, text_input=text, stop=[[b"a"]], parameters=lambda: '{"max_tokens": 3}'),
])
served.finalize()
"""
    found = run(ANSWERED + program, tmp_path)
    assert found[:3] == [
        "two: 1: input 'max_tokens': one value is expected, got 2: 1",
        "bytes: 1: input 'text_input': is not UTF-8 text (byte 1): 1",
        "parameter: 1: a request parameter is not UTF-8 text: 1",
    ]
    assert found[3].startswith("much: 1: input 'max_tokens'") and found[3].endswith(": 1")
    assert found[4].startswith("broken: 1: ") and found[4].endswith("by nought: 2")
    assert found[5:] == ["x ('a', 'b') 7 False", "x ('a',) 3 True"]
