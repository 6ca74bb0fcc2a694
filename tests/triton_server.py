"""A real tritonserver without Docker: the one inside nvidia-pytriton, in `.venv-triton` (`make .venv-triton/.ready`).

with TritonServer(repository, folder) as server:
    server.generate("pruned", text_input="Hello", max_tokens=8)
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ENVIRONMENT = Path(os.environ.get("TRSP_DEPLOY_TRITON", ".venv-triton")).absolute()
READY_S = 60.0


def why_not() -> str | None:
    """Why no server can be started here; None where one can."""
    if not (ENVIRONMENT / ".ready").exists():
        return f"no tritonserver in {ENVIRONMENT.name}: make .venv-triton/.ready"
    return None


class TritonServer:
    """A server on free loopback ports for the length of a `with` block.

    repository: the model repository. folder: for its backend and its log.
    """

    def __init__(self, repository: Path, folder: Path, *options: str) -> None:
        self._repository = repository
        self._folder = folder
        self._options = options

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        site = next((ENVIRONMENT / "lib").glob("python3*/site-packages"))
        home = site / "pytriton" / "tritonserver"
        backends = self._python_backend(home, site.parent.name.removeprefix("python"))
        self.http, grpc, metrics = (_free_port() for _ in range(3))
        python = ENVIRONMENT / "bin" / "python"
        code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        libraries = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        environment = {
            **os.environ,
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            # The running Python's own library first: the stub would load another one.
            "LD_LIBRARY_PATH": f"{libraries}:{site / 'nvidia_pytriton.libs'}:{home / 'lib'}",
        }
        command = [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={self._repository}",
            f"--backend-directory={backends}",
            *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
            f"--http-port={self.http}",
            f"--grpc-port={grpc}",
            f"--metrics-port={metrics}",
            *self._options,
        ]
        self.log = self._folder / "server.log"
        self._file = self.log.open("w")
        self._process = subprocess.Popen(command, env=environment, stdout=self._file, stderr=self._file)
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.close()

    def _python_backend(self, home: Path, python: str) -> Path:
        """A backend folder with the stub for the environment's Python."""
        backends = self._folder / "backends"
        if not backends.exists():
            shutil.copytree(home / "backends" / "python", backends / "python")
            stub = next((home / "python_backend_stubs").glob(f"{python}*/triton_python_backend_stub"))
            shutil.copy2(stub, backends / "python")
        return backends

    def _wait(self) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self._process.returncode}:\n{self._tail()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"tritonserver is not ready after {READY_S:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-100:])

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def generate(self, model: str, **inputs: Any) -> dict[str, Any]:
        """One answer through /generate: the outputs, or {"error": ...}."""
        with self._post(f"{model}/generate", inputs) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def stream(self, model: str, **inputs: Any) -> Iterator[dict[str, Any]]:
        """The pieces of one answer through /generate_stream."""
        with self._post(f"{model}/generate_stream", inputs) as reply:
            for line in reply:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def _post(self, path: str, inputs: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/v2/models/{path}",
            data=json.dumps(inputs).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as problem:  # an error is an answer too
            return problem


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
