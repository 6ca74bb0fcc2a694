"""A command line that does not end by itself: the process that waits ends it, says a line, and leaves nothing."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.alone  # the process that works has one second to end by itself
AT_MOST_S = 2.0
# What the working process does in the place of a command; "ready" says that it has begun.
WORK = """
import ctypes, os, signal, subprocess, sys, time, tty
from pathlib import Path
import trsp_deploy.cli as cli

def work(arguments):
    {body}
    return 0

def ready():
    Path("ready").write_text(str(os.getpid()))

cli.run = work
cli.main()
"""
# A mutex locked twice: no signal gets through, and the interpreter's lock is kept, as by ONNX Runtime's optimiser.
NATIVE = "ready(); lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, bytes(64); lock(mutex); lock(mutex)"
SWALLOWED = """ready()
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass"""
SERVER = """server = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path("server").write_text(str(server.pid))
    """
KEPT = "error: interrupted; finished steps are kept, and the same command goes on from there"


def program(body: str) -> list[str]:
    return [sys.executable, "-c", WORK.format(body=body)]


def hear() -> None:
    """In a shell's background and under nohup the tests' own process has some of them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_until_ready(folder: Path, process: subprocess.Popen[str]) -> int:
    """The process id of the one that works."""
    until = time.monotonic() + 60
    while not (folder / "ready").is_file() or not (folder / "ready").read_text():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    return int((folder / "ready").read_text())


def start(folder: Path, body: str) -> tuple[subprocess.Popen[str], int]:
    """The program once its work has begun, and the process id of the one that works."""
    process = subprocess.Popen(
        program(body), cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear
    )
    return process, wait_until_ready(folder, process)


def gone(pid: int, within_s: float = 5) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("to_all", [True, False], ids=["by the key", "to one process"])
@pytest.mark.parametrize("body", [NATIVE, SWALLOWED], ids=["native code", "a library that swallows it"])
def test_ctrl_c_is_heard(tmp_path, body, to_all):
    process, working = start(tmp_path, body)
    began = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < AT_MOST_S
    assert process.returncode == 130 and said.splitlines() == [KEPT]
    assert gone(working, 0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("then", [NATIVE, "ready(); time.sleep(60)"], ids=["killed", "interrupted"])
def test_a_cancelled_job_and_a_closed_terminal_are_heard_likewise(tmp_path, number, then):
    process, working = start(tmp_path, SERVER + then)
    server = int((tmp_path / "server").read_text())
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and said.splitlines() == [KEPT]
    assert gone(working) and gone(server)


@pytest.mark.parametrize("then", [NATIVE, "ready(); time.sleep(60)"], ids=["killed", "interrupted"])
def test_a_terminal_that_is_gone_keeps_the_code_of_its_signal(tmp_path, then):
    """Nothing can be said there any more, and nothing given back."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        program(then),
        cwd=tmp_path,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        text=True,
        start_new_session=True,
        preexec_fn=hear,
    )
    os.close(slave)
    try:
        wait_until_ready(tmp_path, process)
        os.close(master)
        process.send_signal(signal.SIGHUP)
        assert process.wait(10) == 128 + signal.SIGHUP
    finally:
        process.kill()


def test_nohup_stays_nohup(tmp_path):
    body = "os.killpg(0, signal.SIGHUP); time.sleep(0.2)"
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), "start_new_session": True}
    assert subprocess.run(program(body), cwd=tmp_path, **ignored).returncode == 0


def test_who_works_cleans_up_first(tmp_path):
    """In Python's own time: `finally` blocks run, and a second Ctrl-C does not interrupt them."""
    body = "ready()\n    try: time.sleep(60)\n    finally: time.sleep(0.3); Path('cleaned').touch()"
    process, _ = start(tmp_path, body)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and (tmp_path / "cleaned").exists() and said.splitlines()[-1] == KEPT


def test_background_jobs_do_not_hear_the_key(tmp_path):
    """A shell starts a script's `command &` with the signal ignored; it stays so."""
    body = "os.killpg(0, signal.SIGINT); time.sleep(0.2)"
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "start_new_session": True}
    assert subprocess.run(program(body), cwd=tmp_path, **ignored).returncode == 0


@pytest.mark.parametrize("then", [NATIVE, "ready(); time.sleep(60)"], ids=["killed", "interrupted"])
def test_servers_that_were_started_are_gone_too(tmp_path, then):
    process, _ = start(tmp_path, SERVER + then)
    server = int((tmp_path / "server").read_text())
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert gone(server)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_end_by_a_signal_is_a_line(tmp_path, number):
    """Of the kernel's, for want of memory, and of native code."""
    process, working = start(tmp_path, "ready(); time.sleep(60)")
    os.kill(working, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    (line,) = said.splitlines()
    assert (
        line.startswith(f"error: ended by {number.name}: ") and "memory" in line and "finished steps are kept" in line
    )


def test_nobody_works_on_when_the_other_is_killed(tmp_path):
    process, working = start(tmp_path, NATIVE)
    process.kill()
    process.communicate(timeout=60)
    assert gone(working)


@pytest.mark.parametrize(("body", "code"), [("return 3", 3), ("sys.exit(4)", 4), ("raise KeyboardInterrupt", 130)])
def test_exit_codes_pass_through(tmp_path, body, code):
    assert subprocess.run(program(body), cwd=tmp_path, stderr=subprocess.DEVNULL).returncode == code


@pytest.mark.parametrize("then", ["return 0", "sys.exit()", "sys.exit(0)"])
def test_a_process_that_finished_does_not_wait_for_its_libraries(tmp_path, then):
    """What a native thread does while the interpreter is finalised can abort the process."""
    body = """import __main__, atexit
    class Library:
        def __del__(self, touch=Path("unloaded").touch): touch()
    __main__.kept = Library()
    atexit.register(lambda: Path("registered").touch())
    print("written", end="")
    """
    done = subprocess.run(program(body + then), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "written"
    assert (tmp_path / "registered").exists() and not (tmp_path / "unloaded").exists()


def test_terminal_is_given_back(tmp_path):
    """Native code that is ended by force leaves echo off and the cursor hidden."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    body = f"os.write(2, b'\\x1b[?25l'); tty.setraw(0); {NATIVE}"
    process = subprocess.Popen(
        program(body), cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, text=True, preexec_fn=hear
    )
    try:
        wait_until_ready(tmp_path, process)
        assert termios.tcgetattr(slave) != before
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert termios.tcgetattr(slave) == before
        said = os.read(master, 65536)
        assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l") >= 0
    finally:
        process.kill()
        os.close(master)
        os.close(slave)
