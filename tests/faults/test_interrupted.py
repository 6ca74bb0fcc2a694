"""Ctrl-C at random moments: exit code 130 within two seconds, one line, no process left, the terminal as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import select
import signal
import subprocess
import termios
import time

import pytest

from tests.faults.harness import PROGRAM, STEPS, Done, Job, Running, Work, end_session, session_members

pytestmark = pytest.mark.faults
AT_MOST_S = 2.0
SEED = 18232
_draw = random.Random(SEED).random
SLOW = ("plan", "prune", "export-dense-fp32", "export-pruned-fp32", "build-ort-cpu-fp32-dense", "bench-ort-cpu-fp32")
WHEN = [(step, _draw()) for step in SLOW for _ in range(2)] + [(None, _draw()) for _ in range(18)]


def over_within(running: Running, seconds: float) -> float | None:
    """After how long a run was over; None for one that goes on after that many seconds."""
    began = time.perf_counter()
    while (passed_s := time.perf_counter() - began) < seconds:
        if running.poll() is not None:
            return passed_s
        time.sleep(min(0.02, seconds - passed_s))
    return None if running.poll() is None else seconds


@pytest.mark.parametrize(("step", "share"), WHEN, ids=[f"{step or 'anywhere'}-{share:.2f}" for step, share in WHEN])
def test_stops_at_once(workspace, undisturbed, record_property, step, share):
    whole, first = undisturbed
    record_property("fault", "Ctrl-C")
    if step is None:
        after_s = share * first[True].elapsed_s
    else:
        record = whole.run / "records" / f"{step}.json"
        after_s = share * float(re.findall(r'"elapsed_s": ([\d.e-]+)', record.read_text())[-1])
    for attempt in range(3):
        job = Job(workspace, f"interrupted-{step or 'anywhere'}-{share:.4f}-{attempt}")
        running = job.start(fresh=True)
        try:
            assert step is None or running.wait_for(f"> {step}: started"), running.said
            over_s = over_within(running, after_s)
            if over_s is None:
                done, gone_s, left = interrupted(running)
                break
            after_s = 0.95 * over_s  # the undisturbed run had less of the machine than this one
        finally:
            end_session(running.pid)
    else:
        pytest.skip("it was over before")
    record_property("seconds", round(gone_s, 3))
    record_property(
        "place", ([each for each in done.steps("started") if each not in done.steps("done")] or ["else"])[0]
    )
    if done.code == 0:  # the signal came when all was done
        return
    assert done.code == 130, (done.code, done.stderr)
    assert done.is_one_line and "finished steps are kept" in done.last, done.stderr
    assert not left
    assert gone_s < AT_MOST_S
    assert not job.run.exists() or not job.half_made(whole.artefacts())
    again = job.finish() if step == STEPS[-1] or share < 0.1 else None
    if again is not None:
        assert again.code == 0 and job.artefacts() == whole.artefacts()


def interrupted(running: Running) -> tuple[Done, float, list[int]]:
    """Ctrl-C: how it ended, the seconds until all of its processes were gone, and those that were not after ten."""
    began = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the whole foreground group hears it
    done = running.wait()
    while session_members(running.pid) and time.monotonic() - began < 10:
        time.sleep(0.01)
    return done, time.monotonic() - began, session_members(running.pid)


# Command -> the line after which it hears Ctrl-C, within a second; None: half-way.
MOMENTS = [
    ("sweep", "> plans: started"),
    ("sweep", "> drop-1: prune: started"),
    ("check", "> tiny, dropping 1 of the layers"),
    ("check", "> evaluate-manual-pruned: reused"),  # engines are measured then, in processes of their own
    ("generate", None),
]


@pytest.mark.parametrize(("command", "line"), MOMENTS)
def test_other_commands_stop_at_once(workspace, undisturbed, record_property, command, line):
    whole, _ = undisturbed
    record_property("fault", "Ctrl-C")
    engine = str(whole.run / "engines" / "ort-cpu-fp32" / "pruned")
    arguments = {
        "sweep": Work(command=("sweep", "--drop", "1..2")).arguments(f"sweep-{MOMENTS.index((command, line))}"),
        "check": ["check", str(whole.run), "--min-speedup", "0.1", "--budget", "60"],
        "generate": ["generate", engine, "--prompt", "The", "--max-tokens", "200"],
    }[command]
    ordinary_s = 0.0 if line else Running(arguments, workspace, None, fresh=True).wait().elapsed_s
    running = Running(arguments, workspace, None, fresh=True)
    try:
        assert line is None or running.wait_for(line), running.said
        time.sleep(_draw() if line else ordinary_s / 2)
        if running.poll() is not None:
            pytest.skip("it was over before")
        done, gone_s, left = interrupted(running)
    finally:
        end_session(running.pid)
    record_property("seconds", round(gone_s, 3))
    record_property("place", command)
    assert done.code == 130, (done.code, done.stderr)
    assert done.is_one_line and "finished steps are kept" in done.last, done.stderr
    assert not left
    assert gone_s < AT_MOST_S


@pytest.mark.parametrize("step", ["prune", "bench-ort-cpu-fp32"])
def test_the_terminal_is_as_it_was(workspace, undisturbed, record_property, step):
    """On a terminal of its own, by the key: progress bars hide the cursor, and echo must be on afterwards."""
    record_property("fault", "Ctrl-C on a terminal")
    job = Job(workspace, f"terminal-{step}")
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)

    def own_terminal() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*PROGRAM, *job.arguments], cwd=workspace, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal
    )
    said = b""
    try:
        said = _read_until(master, f"{step}: started".encode(), said)
        time.sleep(0.5 if step.startswith("bench") else 0.05)
        began = time.monotonic()
        os.write(master, b"\x03")
        said = _read_until(master, b"finished steps are kept", said)
        assert process.wait(10) == 130
        record_property("seconds", round(time.monotonic() - began, 3))
        assert termios.tcgetattr(slave) == before
        cursor = re.findall(rb"\x1b\[\?25([lh])", said)
        assert not cursor or cursor[-1] == b"h"
    finally:
        end_session(process.pid)
        process.wait()
        os.close(master)
        os.close(slave)


def _read_until(master: int, words: bytes, said: bytes) -> bytes:
    until = time.monotonic() + 120
    while words not in said:
        ready, _, _ = select.select([master], [], [], 1)
        assert time.monotonic() < until, said
        if ready:
            said += os.read(master, 65536)
    return said
