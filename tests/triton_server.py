"""A real tritonserver without Docker: the one inside nvidia-pytriton, in `.venv-triton` (`make .venv-triton/.ready`).

with TritonServer(repository) as server:
    server.generate("pruned", text_input="Hello", max_tokens=8)
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from trsp_deploy.tools.triton_server import process as triton_server

ENVIRONMENT = Path(os.environ.get(triton_server.VARIABLE, ".venv-triton")).absolute()


def why_not() -> str | None:
    """Why no server can be started here; None where one can."""
    if not (ENVIRONMENT / ".ready").exists():
        return f"no tritonserver in {ENVIRONMENT.name}: make .venv-triton/.ready"
    return None


def client(script: str, *arguments: object, stdin: object = None) -> Any:
    """Run a script of tests/triton_clients in the server's environment, which has tritonclient; JSON in and out."""
    path = Path(__file__).parent / "triton_clients" / script
    command = [str(ENVIRONMENT / "bin" / "python"), str(path), *map(str, arguments)]
    done = subprocess.run(command, input=json.dumps(stdin), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# Added to a served model: SIGUSR1 has it write down where its threads are.
TELLS_WHERE_IT_IS = """
import faulthandler, os, signal

THREADS = (HERE / f"threads-{os.getpid()}").open("w")
faulthandler.register(signal.SIGUSR1, file=THREADS)
"""


def stuck_in_triton(model: psutil.Process) -> str | None:
    """The thread that is handing Triton an answer, of a model to which TELLS_WHERE_IT_IS was added; None without one.

    Means what it is called where nothing is to be sent: when nobody has had an answer for a minute.
    """
    file = next(Path(part).parent for part in model.cmdline() if part.endswith("/model.py")) / f"threads-{model.pid}"
    model.send_signal(signal.SIGUSR1)
    time.sleep(1)
    threads = file.read_text().split("\n\n")
    return next((thread for thread in threads if re.search(r"^.*\n  File .* in _send\n", thread)), None)


class TritonServer:
    """A server on free loopback ports for the length of a `with` block; of ENVIRONMENT where no other one is given."""

    def __init__(self, repository: Path, *options: str, installation: triton_server.Installation | None = None) -> None:
        self._repository = repository
        self._options = options
        self._installation = installation

    def __enter__(self) -> Self:
        installation = self._installation or triton_server.find_installation(ENVIRONMENT)
        self.server = triton_server.start(self._repository, installation, options=self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        triton_server.stop(self._repository)

    @property
    def http(self) -> str:
        """Address."""
        return f"127.0.0.1:{self.server.http}"

    @property
    def grpc(self) -> str:
        """Address."""
        return f"127.0.0.1:{self.server.grpc}"

    def lost(self) -> str | None:
        """How Triton's own code ended it, or hangs; None where it did not. The models run in processes of their own.

        TELLS_WHERE_IT_IS is in each of them.
        """
        # Of this one, too, it may only be the process that hangs: in the signal's handler, where the heap is broken.
        ended = re.search(r"^Signal \((6|11)\) received", Path(self.server.log).read_text(), re.MULTILINE)
        if ended is not None:
            return ended.group()
        models = psutil.Process(self.server.pid).children(recursive=True)
        return next(filter(None, map(stuck_in_triton, models)), None)

    def metric(self, name: str, **labels: str) -> float:
        """One of the server's metrics."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.metrics}/metrics", timeout=10) as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(f"{name}{{") and all(each in line for each in wanted):
                    return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def generate(self, model: str, **inputs: Any) -> dict[str, Any]:
        """One answer through /generate: the outputs, or {"error": ...}."""
        answer: dict[str, Any] = json.loads(self.post(model, json.dumps(inputs).encode()))
        return answer

    def stream(self, model: str, **inputs: Any) -> Generator[dict[str, Any], None, None]:
        """The pieces of one answer through /generate_stream; closing it closes the connection."""
        with self._open(f"{model}/generate_stream", json.dumps(inputs).encode()) as reply:
            for line in reply:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def post(self, model: str, body: bytes) -> bytes:
        """What /generate answers to a body, an error or not."""
        with self.ask(model, body) as reply:
            answer: bytes = reply.read()
        return answer

    def ask(self, model: str, body: bytes) -> Any:
        """The reply of /generate to a body, with its status."""
        return self._open(f"{model}/generate", body)

    def _open(self, path: str, body: bytes) -> Any:
        request = urllib.request.Request(
            f"http://{self.http}/v2/models/{path}", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as problem:  # an error is an answer too
            return problem
