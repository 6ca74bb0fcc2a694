"""Loads what a run loads, and then turns into command lines by forking: each saves the seconds that imports take.

    python -m tests.faults.zygote          # reads lines {"arguments": [...], "cwd": ..., "stderr": ..., "status": ...}

Has one thread and runs nothing itself, so that a fork is as good as a fresh process. A command line is the leader of a
session of its own; its process id, and when it has ended its exit code, are the lines of the file `status`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

PRELOADED = (
    "trsp_deploy.pipeline",
    "trsp_deploy.cli.tables",
    "trsp_deploy.tools.reports.html",
    "optimum.exporters.onnx",
    "onnxslim",
    "onnxruntime",
    "onnx_ir",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "transformers.models.llama.modeling_llama",
)


def main() -> None:
    """Serve until stdin ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries those that wait for the command lines
    while line := sys.stdin.readline():
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(**json.loads(line))


def _watch(arguments: list[str], cwd: str, stderr: str, status: str) -> None:
    pid = os.fork()
    if pid == 0:
        _become(arguments, cwd, stderr)
    _note(status, pid)
    _, ended = os.waitpid(pid, 0)
    _note(status, os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _become(arguments: list[str], cwd: str, stderr: str) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(cwd)
        null, said = os.open(os.devnull, os.O_RDWR), os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for old, new in ((null, 0), (null, 1), (said, 2)):
            os.dup2(old, new)
        from trsp_deploy import cli

        code = cli.run(arguments)
        sys.stderr.flush()
    finally:
        os._exit(code)


def _note(status: str, number: int) -> None:
    with open(status, "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(f"{number}\n")


if __name__ == "__main__":
    main()
