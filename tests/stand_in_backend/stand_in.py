"""What Triton's onnxruntime backend does with a model, as far as these tests go: runs in the server, over its C API.

As the stock backend (onnxruntime.cc): one session an instance with ONNX Runtime's defaults, outputs in memory of their
own, and every output that is a state copied into the server's buffer for it.
"""

from __future__ import annotations

import ctypes
import json
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

DTYPES = {9: np.dtype("int64"), 10: np.dtype("float16"), 11: np.dtype("float32")}  # TRITONSERVER_DataType
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
INTERNAL, FINAL, ALL = c_int(1), c_uint32(1), c_uint32(1)  # an error's code, and flags of a response and a release
Call = ctypes.CFUNCTYPE(c_void_p, c_void_p, POINTER(c_void_p), c_uint32)

api = ctypes.CDLL(None)
api.TRITONSERVER_ErrorMessage.restype = c_char_p
sessions: dict[int, tuple[onnxruntime.InferenceSession, set[str]]] = {}  # instance -> session, names of states


def call(name: str, *arguments: Any) -> None:
    """Call the server; raises RuntimeError with what it says is wrong."""
    function = getattr(api, name)
    function.restype = c_void_p
    error = function(*arguments)
    if error:
        raise RuntimeError(api.TRITONSERVER_ErrorMessage(c_void_p(error)).decode())


def error_of(problem: Exception) -> c_void_p:
    api.TRITONSERVER_ErrorNew.restype = c_void_p
    return c_void_p(api.TRITONSERVER_ErrorNew(INTERNAL, str(problem).encode()))


def open_session(instance: int) -> None:
    model, version, message = c_void_p(), c_uint64(), c_void_p()
    kind, location, text, size = c_int(), c_char_p(), c_char_p(), ctypes.c_size_t()
    call("TRITONBACKEND_ModelInstanceModel", c_void_p(instance), byref(model))
    call("TRITONBACKEND_ModelRepository", model, byref(kind), byref(location))
    call("TRITONBACKEND_ModelVersion", model, byref(version))
    call("TRITONBACKEND_ModelConfig", model, c_uint32(1), byref(message))
    call("TRITONSERVER_MessageSerializeToJson", message, byref(text), byref(size))
    assert text.value is not None and location.value is not None
    config = json.loads(text.value[: size.value])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = Path(location.value.decode()) / str(version.value) / (config["default_model_filename"] or "model.onnx")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    states = config.get("sequence_batching", {}).get("state", [])
    expected, found = len(config["input"]) + len(states), len(session.get_inputs())
    if expected != found:
        raise RuntimeError(f"configuration expects {expected} inputs, model provides {found}")
    sessions[instance] = session, {state["output_name"] for state in states}


def inputs_of(request: c_void_p) -> dict[str, np.ndarray]:
    """The request's tensors, and the state's that the server puts beside them."""
    count, found = c_uint32(), {}
    call("TRITONBACKEND_RequestInputCount", request, byref(count))
    for index in range(count.value):
        tensor, name, dtype, shape = c_void_p(), c_char_p(), c_int(), POINTER(c_int64)()
        dims, size, buffers = c_uint32(), c_uint64(), c_uint32()
        call("TRITONBACKEND_RequestInputByIndex", request, c_uint32(index), byref(tensor))
        into = (byref(each) for each in (name, dtype, shape, dims, size, buffers))
        call("TRITONBACKEND_InputProperties", tensor, *into)
        data = b"".join(read(tensor, number) for number in range(buffers.value))
        assert name.value is not None and len(data) == size.value
        array = np.frombuffer(data, DTYPES[dtype.value])
        found[name.value.decode()] = array.reshape([shape[axis] for axis in range(dims.value)])
    return found


def read(tensor: c_void_p, number: int) -> bytes:
    buffer, size, memory, device = c_void_p(), c_uint64(), c_int(), c_int64()
    into = (byref(each) for each in (buffer, size, memory, device))
    call("TRITONBACKEND_InputBuffer", tensor, c_uint32(number), *into)
    return ctypes.string_at(buffer, size.value)


def write(what: str, owner: c_void_p, name: str, array: np.ndarray) -> c_void_p:
    """Make a `TRITONBACKEND_State` of a request, or an `Output` of a response, and fill its buffer."""
    made, buffer, memory, device = c_void_p(), c_void_p(), c_int(), c_int64()
    form = (c_char_p(name.encode()), c_int(NUMBERS[array.dtype]), (c_int64 * array.ndim)(*array.shape))
    if what == "State":
        call("TRITONBACKEND_StateNew", byref(made), owner, *form, c_uint32(array.ndim))
    else:
        call("TRITONBACKEND_ResponseOutput", owner, byref(made), *form, c_uint32(array.ndim))
    call(f"TRITONBACKEND_{what}Buffer", made, byref(buffer), c_uint64(array.nbytes), byref(memory), byref(device))
    ctypes.memmove(buffer, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return made


def answer(instance: int, request: c_void_p, response: c_void_p) -> None:
    session, states = sessions[instance]
    names = [output.name for output in session.get_outputs()]
    for name, array in zip(names, session.run(names, inputs_of(request)), strict=True):
        if name in states:
            call("TRITONBACKEND_StateUpdate", write("State", request, name, array))
        else:
            write("Output", response, name, array)


@Call
def initialize(instance: int, _requests: Any, _count: int) -> int | None:
    try:
        open_session(instance)
    except Exception as problem:
        return error_of(problem).value
    return None


@Call
def execute(instance: int, requests: Any, count: int) -> None:
    for number in range(count):
        request, response, error = c_void_p(requests[number]), c_void_p(), None
        call("TRITONBACKEND_ResponseNew", byref(response), request)
        try:
            answer(instance, request, response)
        except Exception as problem:
            error = error_of(problem)
        call("TRITONBACKEND_ResponseSend", response, FINAL, error)
        call("TRITONBACKEND_RequestRelease", request, ALL)


@Call
def finalize(instance: int, _requests: Any, _count: int) -> None:
    sessions.pop(instance, None)


ctypes.CDLL(str(Path(__file__).with_name("libtriton_onnxruntime.so"))).stand_in_register(initialize, execute, finalize)
