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
import re
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
# What PLAIN lacks: other closed forms and precisions, text by the dense model, TensorRT-RTX, zero-shot tasks.
WIDE_SETTINGS = (
    *SETTINGS,
    "plan.method=sleb",
    "transfer.form=anneal",
    "calibration.self_generated=0.5",
    "evaluate.tasks=[piqa]",
    "evaluate.task_items=4",
)
WIDE_STEPS = (
    "dense",
    "plan",
    "self-generated",
    "prune",
    "export-dense-fp32",
    "export-pruned-fp32",
    "export-dense-fp16",
    "export-pruned-fp16",
    "parity-onnx-dense-fp32",
    "parity-onnx-pruned-fp32",
    "parity-onnx-dense-fp16",
    "parity-onnx-pruned-fp16",
    "build-ort-cpu-int8-dense",
    "build-ort-cpu-int8-pruned",
    "build-ort-cpu-int4-accurate-dense",
    "build-ort-cpu-int4-accurate-pruned",
    "build-tensorrt-rtx-fp16-dense",
    "build-tensorrt-rtx-fp16-pruned",
    "parity-ort-cpu-int8-dense-int8",
    "parity-ort-cpu-int8-pruned-int8",
    "parity-ort-cpu-int4-accurate-dense-int4",
    "parity-ort-cpu-int4-accurate-pruned-int4",
    "bench-ort-cpu-int8",
    "bench-ort-cpu-int4-accurate",
    "evaluate-manual-dense",
    "evaluate-manual-pruned",
    "evaluate-ort-cpu-int8-manual-dense",
    "evaluate-ort-cpu-int8-manual-pruned",
    "zero-shot-ort-cpu-int8-dense",
    "zero-shot-ort-cpu-int8-pruned",
    "evaluate-ort-cpu-int4-accurate-manual-dense",
    "evaluate-ort-cpu-int4-accurate-manual-pruned",
    "zero-shot-ort-cpu-int4-accurate-dense",
    "zero-shot-ort-cpu-int4-accurate-pruned",
)
WIDE_ENGINES = ("ort-cpu-int8", "ort-cpu-int4-accurate", "tensorrt-rtx-fp16")
# What carries times, or the fingerprint of something that does (MANIFEST.json has the records'), differs from run to
# run; all the rest must not.
TIMED = ("records/", "report.", "sweep.", "MANIFEST.json", "checkpoints/", ".lock", ".place")
# What TensorRT's compiler writes differs with the timings that it takes.
COMPILED = re.compile(r"engines/tensorrt[^/]*/[^/]+/(model\.engine|build\.log)")
DEADLINE_S = 1800  # where others share the machine a run may stand still for long
PROGRAM = (sys.executable, "-c", "from trsp_deploy.cli import main; main()")


@dataclass(frozen=True)
class Work:
    """What a job is asked for."""

    engines: tuple[str, ...] = ("ort-cpu-fp32",)
    settings: tuple[str, ...] = SETTINGS
    command: tuple[str, ...] = ("prune-and-build", "--drop", "1")

    def arguments(self, out: str | Path) -> list[str]:
        """The command line, in a workspace."""
        options = ["--model", "tiny", "--calibration", "train.txt", "--eval", "manual=test.txt", "--out", str(out)]
        options += [part for name in self.engines for part in ("--engine", name)]
        return [*self.command, *options, *(part for pair in self.settings for part in ("--set", pair))]


PLAIN = Work()
WIDE = Work(WIDE_ENGINES, WIDE_SETTINGS)
SWEEP = Work(command=("sweep", "--drop", "1,2"))


@dataclass(frozen=True)
class Done:
    """A command line that has ended."""

    code: int
    stderr: str
    elapsed_s: float = 0.0

    def steps(self, state: str) -> list[str]:
        """The steps that were announced with this state: "reused", "started" or "done"."""
        said = (line[2:].rpartition(": ") for line in self.stderr.splitlines() if line.startswith("> "))
        return [step for step, _, what in said if what.startswith(state)]

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

    def __init__(self, workspace: Path, out: str | Path, work: Work = PLAIN) -> None:
        self.workspace = workspace
        self.run = workspace / out
        self.arguments = work.arguments(out)

    def start(self, before: Callable[[], None] | None = None, fresh: bool = False) -> Running:
        """Begin, as the leader of a session of its own.

        fresh: a new process, imports and all, instead of a fork; so it is with `before`, which runs in it
        before the program does.
        """
        return Running(self.arguments, self.workspace, before, fresh or before is not None)

    def finish(self, before: Callable[[], None] | None = None, fresh: bool = False) -> Done:
        """Run the command line to its end."""
        return self.start(before, fresh).wait()

    @property
    def folders(self) -> dict[str, Path]:
        """The run folder, and those of a sweep within it, by what is announced before their steps."""
        return {"": self.run} | {f"{folder.name}: ": folder for folder in sorted(self.run.glob("drop-*"))}

    def finished(self) -> set[str]:
        """Steps whose record is there and whole."""
        return {
            said + StepRecord.model_validate_json(path.read_bytes()).step
            for said, folder in self.folders.items()
            for path in (folder / "records").glob("*.json")
        }

    def _own_names(self) -> list[tuple[Path, str]]:
        """Everything in the run folders, and its name within the one that it is of."""
        inner = list(self.folders.values())[1:]
        found = []
        for path in sorted(self.run.rglob("*")):
            folder = next((each for each in inner if each in path.parents), self.run)
            found.append((path, path.relative_to(folder).as_posix()))
        return found

    def artefacts(self) -> dict[str, str]:
        """Every file that is the same in each run -> SHA-256: weights, plan, graphs, engines, tokenizers, recipe."""
        return {
            path.relative_to(self.run).as_posix(): fingerprint(path)
            for path, name in self._own_names()
            if path.is_file() and not (_aside(name) or name.startswith(TIMED) or path.name == "manifest.json")
            if not COMPILED.fullmatch(name)
        }

    def half_made(self, whole: dict[str, str]) -> list[str]:
        """What stands under its own name and is not as the undisturbed run left it; `whole`: its artefacts."""
        found = self.artefacts()
        wrong = [name for name, sha256 in found.items() if whole.get(name) != sha256]
        for name in whole:  # a folder that is there has all of its files
            parent = (self.run / name).parent
            if parent not in self.folders.values() and parent.is_dir() and name not in found:
                wrong.append(name)
        for path, name in self._own_names():
            ours = name.startswith("records/") or "/" not in name or path.name == "manifest.json"
            if path.suffix == ".json" and ours and not _aside(name) and not _is_json(path):
                wrong.append(name)
        return wrong

    def leftovers(self) -> list[str]:
        """Files and folders that no finished run may hold."""
        return [name for _, name in self._own_names() if _aside(name) or name.startswith("checkpoints")]


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
