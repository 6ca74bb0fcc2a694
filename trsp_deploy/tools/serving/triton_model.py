"""A model of Triton's python backend that owns an engine: text in, text out, streamed, many requests in one batch.

Copied to `<name>/1/model.py` of a model repository. Beside it lie `engine/`, `tokenizer.json`, `serving.json` (what
`trsp-deploy triton` was told) and `vendor/` (the modules of trsp_deploy that it imports).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
# Bytecode would be files that no manifest names; the backend's Python heeds no PYTHONDONTWRITEBYTECODE, and has written
# this file's own by now. A server that polls would take the folder's new time for a change, and load the model again at
# each look; an earlier time is none to it.
sys.dont_write_bytecode = True
shutil.rmtree(HERE / "__pycache__", ignore_errors=True)
with contextlib.suppress(OSError):  # a folder that is another's, or may not be written
    os.utime(HERE, ns=(time.time_ns(), Path(__file__).stat().st_mtime_ns))
sys.path.insert(0, str(HERE / "vendor"))

from trsp_deploy.errors import TrspError, named  # noqa: E402
from trsp_deploy.tools.runners.running_batch import Rotation  # noqa: E402
from trsp_deploy.tools.serving.engine import open_batch  # noqa: E402
from trsp_deploy.tools.serving.loop import MOST_WAITING, Answer, ServingLoop, Ticket  # noqa: E402
from trsp_deploy.tools.serving.requests import GenerationRequest, RequestError, parse  # noqa: E402
from trsp_deploy.tools.serving.text import read_tokenizer  # noqa: E402

WAITING = "max_waiting"  # of the config's parameters
# A request whose client has left is answered so much later. Before release 25.04 Triton's gRPC handler may crash or
# hang where a request ends while it is still busy with its cancellation (its pull requests 7840 and 8078). Not later
# still: a server told to stop while one waits whose HTTP connection is closed takes Triton's 30 s.
FAREWELL_S = 0.2
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The class that Triton's python backend creates and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine and start the loop; raises TritonModelException with one line."""
        settings = json.loads((HERE / "serving.json").read_text(encoding="utf-8"))
        try:
            rotations = [Rotation.model_validate(each) for each in settings["rotations"]]
            self._opened = open_batch(HERE / "engine", settings["max_batch"], settings["max_length"], rotations)
            batch = self._opened.__enter__()
            tokenizer = read_tokenizer(HERE / "tokenizer.json")
        except TrspError as problem:
            raise pb_utils.TritonModelException(f"{problem}{_advice(problem)}") from problem
        self._outbox = Outbox(_send)
        # Who left is told after what is queued for him: nothing may be sent behind a request's end, or beside it.
        self._farewells = Outbox(self._outbox.put, FAREWELL_S)
        parameters = json.loads(args["model_config"]).get("parameters", {})
        most_waiting = int(parameters.get(WAITING, {}).get("string_value", MOST_WAITING))
        self._loop = ServingLoop(
            batch,
            tokenizer,
            tuple(settings["end_tokens"]),
            settings["max_length"],
            most_waiting,
            settings.get("max_prompt"),  # of an engine that reads fewer tokens at once than a text may have
        )

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the loop; answers go out from its thread (decoupled)."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ticket = Ticket(parse(_inputs(request)), self._towards(sender), sender.is_cancelled)
            except TrspError as problem:
                _fail(sender, str(problem))
                continue
            except Exception as problem:  # whose words, left to the server, would be a traceback
                _fail(sender, named(problem), pb_utils.TritonError.INTERNAL)
                continue
            self._loop.submit(ticket)

    def finalize(self) -> None:
        """Stop the loop and close the engine."""
        self._loop.stop()
        self._farewells.close()  # first: they go into the other
        self._outbox.close()
        self._opened.__exit__(None, None, None)

    def _towards(self, sender: Any) -> Callable[[Answer], None]:
        """A function that takes answers to one client."""
        return lambda answer: (self._farewells if answer.finish == "cancelled" else self._outbox).put(sender, answer)


def _advice(problem: Exception) -> str:
    """For a package that the server's Python lacks, where the runner's own words name an extra of trsp_deploy."""
    missing = isinstance(problem.__cause__, ImportError)
    return "; here: the packages that the repository's Dockerfile installs" if missing else ""


def _inputs(request: Any) -> dict[str, object]:
    """A request's inputs by name as plain values; raises RequestError for text that is not UTF-8.

    /generate makes request parameters of what is no input of the model, and of what stands under "parameters".
    """
    try:
        values: dict[str, object] = json.loads(request.parameters() or "{}")
    except UnicodeDecodeError as problem:
        raise RequestError("a request parameter is not UTF-8 text") from problem
    values.pop("id", None)  # the client's own name for its request
    for name in GenerationRequest.model_fields:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        items = [_plain(name, item) for item in tensor.as_numpy().ravel().tolist()]
        if name == "stop":
            values[name] = tuple(items)
        elif len(items) != 1:
            raise RequestError(f"input '{name}': one value is expected, got {len(items)}")
        else:
            values[name] = items[0]
    return values


def _plain(name: str, item: object) -> object:
    if not isinstance(item, bytes):
        return item
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise RequestError(f"input '{name}': is not UTF-8 text (byte {problem.start})") from problem


class Outbox:
    """Answers on their way to the server, in order, by a thread of their own: handing one over takes the server half a
    millisecond or more, which the next step need not wait for.

    deliver: takes an answer to one client. delay_s: how long each waits here; none does once it closes.
    """

    def __init__(self, deliver: Callable[[Any, Answer], None], delay_s: float = 0.0) -> None:
        self._deliver = deliver
        self._delay_s = delay_s
        self._answers: queue.SimpleQueue[tuple[float, Any, Answer] | None] = queue.SimpleQueue()  # None: no more comes
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trsp-deploy-outbox", daemon=True)
        self._thread.start()

    def put(self, sender: Any, answer: Answer) -> None:
        """Take an answer to one client."""
        self._answers.put((time.monotonic() + self._delay_s, sender, answer))

    def close(self) -> None:
        """Return when everything is sent."""
        self._closing.set()
        self._answers.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._answers.get()) is not None:
            due, sender, answer = item
            self._closing.wait(max(0.0, due - time.monotonic()))
            try:
                self._deliver(sender, answer)
            except Exception as problem:  # a client that is gone must not take the others' answers with it
                pb_utils.Logger.log_error(f"an answer could not be sent: {problem}")


def _send(sender: Any, answer: Answer) -> None:
    if answer.finish == "error":
        errors = pb_utils.TritonError
        codes = {"request": errors.INVALID_ARG, "engine": errors.INTERNAL}  # busy, stopping: another server may be free
        _fail(sender, answer.error or "unknown", codes.get(answer.fault, errors.UNAVAILABLE))
    elif answer.finish == "cancelled":
        _fail(sender, "cancelled", pb_utils.TritonError.CANCELLED)
    else:
        outputs = [
            pb_utils.Tensor("text_output", np.array([answer.text.encode()], dtype=object)),
            pb_utils.Tensor("output_tokens", np.array([answer.tokens], dtype=np.int32)),
            pb_utils.Tensor("finish_reason", np.array([(answer.finish or "").encode()], dtype=object)),
        ]
        sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL if answer.finish else 0)


def _fail(sender: Any, message: str, code: Any = None) -> None:
    error = pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG if code is None else code)
    sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
