"""What the machine did while something was measured: own processes apart from all others."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from trsp_deploy.tools.measuring.telemetry import HOST_CORES, Recorder

SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> list[str]:
    """A command that keeps one core busy."""
    return [sys.executable, "-c", SPIN.format(seconds)]


@pytest.mark.alone
def test_own_processes_are_none_of_the_others() -> None:
    """Those that run on and those that have ended, and this one."""
    with Recorder() as recorder:
        subprocess.run(spin(1.2), check=True)
        with subprocess.Popen(spin(1.5)):
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                pass
    taken = recorder.samples
    assert len(taken) >= 2
    busy = sum(sample.busy_share for sample in taken) * HOST_CORES
    others = sum(sample.others_share or 0.0 for sample in taken) * HOST_CORES
    assert busy > 1.5 and others < busy / 3, taken


@pytest.mark.alone
def test_what_another_process_takes_is_counted() -> None:
    # Its parent ends at once, so that it is no child of ours.
    start = f"subprocess.Popen([sys.executable, '-c', {SPIN.format(20)!r}], stdout=subprocess.DEVNULL)"
    orphan = [sys.executable, "-c", f"import subprocess, sys\nprint({start}.pid)"]
    pid = int(subprocess.run(orphan, check=True, stdout=subprocess.PIPE, text=True).stdout)
    try:
        with Recorder() as recorder:
            time.sleep(3.2)
    finally:
        psutil.Process(pid).kill()
    others = [(sample.others_share or 0.0) * HOST_CORES for sample in recorder.samples]
    assert len(others) >= 3 and min(others) > 0.5, recorder.samples
