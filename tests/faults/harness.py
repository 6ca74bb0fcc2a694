"""One small `prune-and-build` as a process of its own, that can be hurt, and what an undisturbed one leaves.

job = Job(workspace, "run")
process = job.start()
job.kill(process)
done = job.finish()          # the same command again
assert not job.damaged()
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trsp_deploy.artifacts import StepRecord, fingerprint

SETTINGS = (
    "calibration.context_length=32",
    "calibration.max_windows=8",
    "calibration.validation_windows=2",
    "plan.steps=1",
    "plan.candidates=1",
    "transfer.steps=2",
    "evaluate.context_length=32",
    "evaluate.max_tokens=128",
    "bench.prompt_tokens=8",
    "bench.new_tokens=2",
    "bench.budget_s=1",
    "bench.replicates=2",
    "bench.control=false",
    "checkpoint_s=0",  # one after every step of a training: as many moments as there can be
)
STEPS = (
    "dense",
    "plan",
    "prune",
    "export-dense-fp32",
    "export-pruned-fp32",
    "parity-onnx-dense-fp32",
    "parity-onnx-pruned-fp32",
    "build-ort-cpu-fp32-dense",
    "build-ort-cpu-fp32-pruned",
    "parity-ort-cpu-fp32-dense-fp32",
    "parity-ort-cpu-fp32-pruned-fp32",
    "bench-ort-cpu-fp32",
    "evaluate-manual-dense",
    "evaluate-manual-pruned",
    "evaluate-ort-cpu-fp32-manual-dense",
    "evaluate-ort-cpu-fp32-manual-pruned",
)
# What carries times, or the fingerprint of something that does (MANIFEST.json has the records'), differs from run to
# run; all the rest must not.
TIMED = ("records/", "report.", "MANIFEST.json", "checkpoints/", ".lock", ".place")
DEADLINE_S = 1800  # where others share the machine a run may stand still for long
PROGRAM = (sys.executable, "-c", "from trsp_deploy.cli import main; main()")


@dataclass(frozen=True)
class Done:
    """A command line that has ended."""

    code: int
    stderr: str
    elapsed_s: float = 0.0

    def steps(self, state: str) -> list[str]:
        """The steps that were announced with this state: "reused", "started" or "done"."""
        said = (line[2:].partition(": ") for line in self.stderr.splitlines() if line.startswith("> "))
        return [step for step, _, what in said if step in STEPS and what.startswith(state)]

    @property
    def last(self) -> str:
        """The line that a user looks at."""
        return (self.stderr.strip().splitlines() or [""])[-1]

    @property
    def is_one_line(self) -> bool:
        """Whether it ended with a line for people, and no traceback."""
        return self.code != 0 and self.last.startswith("error: ") and "Traceback" not in self.stderr


class Running:
    """A command line that has not: a fresh process, or a fork of `zygote.py`, which has its imports done."""

    def __init__(self, arguments: list[str], cwd: Path, before: Callable[[], None] | None, fresh: bool) -> None:
        folder = Path(tempfile.mkdtemp(prefix="command-", dir=cwd))
        self.began = time.monotonic()
        self._stderr, self._status = folder / "stderr", folder / "status"
        self._process: subprocess.Popen[bytes] | None = None
        if fresh:
            with self._stderr.open("wb") as said:
                self._process = subprocess.Popen(
                    [*PROGRAM, *arguments],
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                    preexec_fn=lambda: _begin(before),
                )
            self.pid = self._process.pid
            return
        request = {"arguments": arguments, "cwd": str(cwd), "stderr": str(self._stderr), "status": str(self._status)}
        stdin = zygote().stdin
        assert stdin is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        while not self._numbers():
            time.sleep(0.002)
        self.began = time.monotonic()
        self.pid = self._numbers()[0]

    def _numbers(self) -> list[int]:
        text = self._status.read_text() if self._status.exists() else ""
        return [int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def said(self) -> str:
        """All that it said so far on stderr."""
        return self._stderr.read_text(errors="replace") if self._stderr.exists() else ""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self._process is not None:
            return self._process.poll()
        return next(iter(self._numbers()[1:]), None)

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone."""
        os.kill(self.pid, number)

    def wait_for(self, line: str) -> bool:
        """Wait until it said this line; False where it ended without."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            ended = self.poll() is not None
            if f"{line}\n" in self.said:
                return True
            if ended:
                return False
            time.sleep(0.002)
        raise TimeoutError(self.said)

    def wait(self) -> Done:
        """Wait for its end."""
        until = time.monotonic() + DEADLINE_S
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise TimeoutError(self.said)
            time.sleep(0.002)
        return Done(code, self.said, time.monotonic() - self.began)


def _begin(before: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # these tests may be in a shell's background, where it is ignored
    if before is not None:
        before()


@functools.cache
def zygote() -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one, which holds its stdin."""
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-m", "tests.faults.zygote"], cwd=root, stdin=subprocess.PIPE, text=True)


class Job:
    """A run folder and the command line that makes it."""

    def __init__(self, workspace: Path, out: str | Path) -> None:
        self.workspace = workspace
        self.run = workspace / out
        options = ["--model", "tiny", "--drop", "1", "--calibration", "train.txt", "--eval", "manual=test.txt"]
        options += ["--engine", "ort-cpu-fp32", "--out", str(out)]
        self.arguments = ["prune-and-build", *options, *(part for pair in SETTINGS for part in ("--set", pair))]

    def start(self, before: Callable[[], None] | None = None, fresh: bool = False) -> Running:
        """Begin, as the leader of a session of its own.

        fresh: a new process, imports and all, instead of a fork; so it is with `before`, which runs in it
        before the program does.
        """
        return Running(self.arguments, self.workspace, before, fresh or before is not None)

    def finish(self, before: Callable[[], None] | None = None, fresh: bool = False) -> Done:
        """Run the command line to its end."""
        return self.start(before, fresh).wait()

    def finished(self) -> set[str]:
        """Steps whose record is there and whole."""
        found = set()
        for path in (self.run / "records").glob("*.json"):
            found.add(StepRecord.model_validate_json(path.read_bytes()).step)
        return found

    def artefacts(self) -> dict[str, str]:
        """Every file that is the same in each run -> SHA-256: weights, plan, graphs, engines, tokenizers, recipe."""
        found = {}
        for path in sorted(self.run.rglob("*")):
            name = path.relative_to(self.run).as_posix()
            if path.is_file() and not _aside(name) and not name.startswith(TIMED) and path.name != "manifest.json":
                found[name] = fingerprint(path)
        return found

    def half_made(self, whole: dict[str, str]) -> list[str]:
        """What stands under its own name and is not as the undisturbed run left it; `whole`: its artefacts."""
        found = self.artefacts()
        wrong = [name for name, sha256 in found.items() if whole.get(name) != sha256]
        for name in whole:  # a folder that is there has all of its files
            parent = (self.run / name).parent
            if parent != self.run and parent.is_dir() and name not in found:
                wrong.append(name)
        for path in [
            *(self.run / "records").glob("*.json"),
            *self.run.rglob("manifest.json"),
            *self.run.glob("*.json"),
        ]:
            if not _aside(path.relative_to(self.run).as_posix()) and not _is_json(path):
                wrong.append(path.name)
        return wrong

    def leftovers(self) -> list[str]:
        """Files and folders that no finished run may hold."""
        names = (path.relative_to(self.run).as_posix() for path in self.run.rglob("*"))
        return [name for name in names if _aside(name) or name.startswith("checkpoints")]


def run_in(workspace: Path, arguments: list[str]) -> Done:
    """Another command line, to its end."""
    return Running(arguments, workspace, None, fresh=False).wait()


def _aside(name: str) -> bool:
    return any(part.startswith(".") and part not in (".lock", ".place") for part in name.split("/"))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def session_members(leader: int) -> list[int]:
    """Processes of the session that `leader` began, itself among them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def end_session(leader: int) -> None:
    """Leave nothing behind, whatever became of a test."""
    until = time.monotonic() + DEADLINE_S
    while members := session_members(leader):
        assert time.monotonic() < until, members
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
