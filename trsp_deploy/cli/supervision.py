"""A command line as two processes: one works, and the other only waits and sees to how it ends.

Python hears of Ctrl-C between two bytecodes. Native code keeps it from there for as long as a large graph takes to be
optimised, a library may swallow the KeyboardInterrupt, and a process that takes too much memory is killed without a
word. The process that waits can always give the terminal back, say a line and return an exit code. It may end the other
by SIGKILL, which loses nothing: files appear whole or not at all (`artifacts.writing`).

SIGTERM (`timeout`, Slurm, a cancelled CI job) and SIGHUP (a terminal that is closed) are heard as Ctrl-C is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

from trsp_deploy.errors import ProcessEnded
from trsp_deploy.tools.prctl import adopt_orphans, end_with_parent

GRACE_S = 1.0  # for the working process, to end by itself after Ctrl-C
LONGEST_S = 3600.0  # to wait for a signal at a time

SHOW_CURSOR = b"\x1b[?25h"
CAUSES = {
    signal.SIGKILL: "out of memory, or killed by hand",
    signal.SIGTERM: "asked to end",
    signal.SIGXCPU: "out of CPU time (`ulimit -t`)",
}

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_heard: int | None = None  # the signal by which this process was asked to end


def asked_to_end() -> int | None:
    """The signal by which this process was asked to end, if it was; errors may be what came of that."""
    return _heard


def supervised(work: Callable[[], int]) -> int:
    """The exit code of `work`, done in a process of its own that ends with this one.

    Call it before there are threads. It returns in both processes, with the same code. Raises KeyboardInterrupt in the
    one that waits when the other had to be killed after one of ENDINGS, and ProcessEnded when a signal ended it.
    """
    terminal = _terminal()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Ignored is SIGINT in the background of a shell script, and SIGHUP under nohup.
    endings = {number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN}
    awaited = {signal.SIGCHLD, *endings}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        end_with_parent()
        for number in endings:
            signal.signal(number, _stop)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    adopt_orphans()
    code = _end_of(child, awaited)
    asked = _heard is not None
    # An interrupted process may not have stopped what it had started.
    if code < 0 or (asked and code) or code - 128 in ENDINGS:
        _kill_descendants()
    if asked or code < 0:
        _give_back(terminal)
    if code < 0:
        if asked:
            raise KeyboardInterrupt
        name = signal.Signals(-code).name
        cause = CAUSES.get(signal.Signals(-code), "native code failed, as some does when memory runs out")
        raise ProcessEnded(f"ended by {name}: {cause}; finished steps are kept, and the same command goes on", -code)
    return code


def _stop(number: int, _: object) -> None:
    """The working process's answer to one of ENDINGS, once: a second one must not interrupt the clean-up."""
    global _heard
    _heard = number
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    sys.unraisablehook = lambda _: None  # what is caught in the middle needs no traceback
    raise KeyboardInterrupt


def _end_of(child: int, awaited: set[signal.Signals]) -> int:
    """Wait for a process, pass the first of ENDINGS on, which may have come to this one alone, and kill it where that
    has no effect.

    Returns its exit code, or the negative number of the signal that ended it.
    """
    global _heard
    until: float | None = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        left = LONGEST_S if until is None else max(0.0, until - time.monotonic())
        came = signal.sigtimedwait(awaited, left)
        if came is None and until is None:
            continue
        if came is None:
            _send(child, signal.SIGKILL)
            until = None
        elif came.si_signo in ENDINGS and _heard is None:
            _heard, until = came.si_signo, time.monotonic() + GRACE_S
            _send(child, came.si_signo)


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _kill_descendants() -> None:
    """Kill what the working process left, such as a tritonserver: this process's children now."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _terminal() -> list[Any] | None:
    """The settings of the terminal on stdin; None without one."""
    try:
        return termios.tcgetattr(0)
    except termios.error:
        return None


def _in_background() -> bool:
    """Whether a shell runs this beside something else: a process that sets the terminal from there is stopped."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:  # stdin is not the terminal that controls this process
        return False


def _give_back(terminal: list[Any] | None) -> None:
    """Restore echo and cursor: a progress bar hides the cursor."""
    with contextlib.suppress(termios.error, OSError):  # it was closed
        if terminal is not None and not _in_background():
            termios.tcsetattr(0, termios.TCSANOW, terminal)
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
