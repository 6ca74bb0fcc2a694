"""The parent's end of a measuring process (`bench_worker.py`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trsp_deploy.artifacts.fingerprints import known_files
from trsp_deploy.errors import EngineUnavailable


class Worker:
    """A measuring process around one engine folder or ONNX file, for the length of a `with` block.

    command: another program that speaks the same lines, to measure what is not an engine.
    environment: variables on top of this process's own.
    The process starts with the object and loads the engine when entered, or told to: several can start side by side.
    """

    def __init__(self, engine: Path, command: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._engine = engine
        # No pipe: nothing reads it during a block, and a full one would stop the worker.
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command or (*_python(), "-m", "trsp_deploy.tools.measuring.bench_worker", str(engine)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        try:
            self.load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self) -> float:
        """Load the engine; returns the seconds that took. What this process has read of its files is not read again."""
        return float(self.ask({"known": known_files()})["load_s"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def pause(self) -> None:
        """Stop the process, spinning threads among it, until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._process.send_signal(signal.SIGCONT)

    def block(self, prompt: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Run one block; returns the keys of `results.Block`, peak_rss_bytes and gpu_bytes."""
        return self.ask({"prompt": prompt, "new_tokens": new_tokens})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer to it; raises EngineUnavailable when there is none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as problem:
            raise self._died() from problem
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineUnavailable(reply["error"])
        return reply

    def _died(self) -> EngineUnavailable:
        code = self._process.wait()
        self._said.seek(0)
        last = self._said.read().strip().splitlines()[-1:] or ["it said nothing"]
        return EngineUnavailable(f"{self._engine}: the measuring process died with code {code} ({last[0]})")


def _python() -> list[str]:
    """Python that takes no module from the working directory, a model's own folder perhaps, unless this one does."""
    return [sys.executable, *([] if {"", str(Path.cwd())} & set(sys.path) else ["-P"])]
