"""What the machine did while something was measured: own processes apart from all others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trsp_deploy.tools.measuring import telemetry
from trsp_deploy.tools.measuring.telemetry import Recorder

SPIN = "import time\nend = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


def spin(seconds: float) -> list[str]:
    """A command that keeps one core busy."""
    return [sys.executable, "-c", SPIN.format(seconds)]


@pytest.fixture
def quiet() -> None:
    """A machine on which nothing else runs: who would be counted beside what a test starts itself."""
    busy = psutil.cpu_percent(interval=1) / 100 * (psutil.cpu_count() or 1)
    if busy > 0.3:
        pytest.skip(f"the machine is too busy to count others on: {busy:.1f} cores before the test")


@pytest.mark.alone
@pytest.mark.usefixtures("quiet")
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
    busy = sum(sample.busy_share for sample in taken) * psutil.cpu_count()
    others = sum(sample.others_cores or 0.0 for sample in taken)
    assert busy > 1.5 and others < busy / 3, taken


def test_a_worker_that_ends_while_the_driver_lists_it_is_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    class Driver:
        NVMLError, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = OSError, 0, 1, 0

        def nvmlDeviceGetComputeRunningProcesses(self, _: object) -> list[types.SimpleNamespace]:
            listed = [types.SimpleNamespace(pid=number) for number in (os.getpid(), worker.pid)]
            worker.communicate(b"\n")
            return listed

        def nvmlDeviceGetMemoryInfo(self, _: object) -> types.SimpleNamespace:
            return types.SimpleNamespace(used=1)

        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *_: 0

    monkeypatch.setattr(telemetry, "_nvml", lambda: (Driver(), None))
    sample = telemetry._gpu()
    assert sample is not None and sample.other_processes == 0 and worker.returncode == 0


def test_cores_are_counted_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With core 1 offline, the third line was taken for core 2's, and nobody was seen to be at work on core 3."""
    stat, second = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    rows = {"cpu": 70, "cpu0": 10, "cpu2": 20, "cpu3": 40}
    stat.write_text("".join(f"{name} {n * second} 0 0 9 9 0 0 0 5 0\n" for name, n in rows.items()) + "intr 1 2\n")
    monkeypatch.setattr(telemetry, "_own_s", lambda: 1.0)
    for allowed, others_s in (({0, 2, 3}, 69.0), ({2}, 19.0), ({0, 12}, None)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert telemetry._others_s(stat) == others_s


@contextlib.contextmanager
def neighbour(core: int) -> Iterator[None]:
    """A process that is no child of ours and keeps a core busy."""
    spinning = f"import os\nos.sched_setaffinity(0, [{core}])\n{SPIN.format(20)}"
    # Its parent ends at once.
    start = f"subprocess.Popen([sys.executable, '-c', {spinning!r}], stdout=subprocess.DEVNULL)"
    orphan = [sys.executable, "-c", f"import subprocess, sys\nprint({start}.pid)"]
    process = psutil.Process(int(subprocess.run(orphan, check=True, stdout=subprocess.PIPE, text=True).stdout))
    try:
        yield
    finally:
        process.kill()


@pytest.mark.alone
@pytest.mark.usefixtures("quiet")
def test_what_another_process_takes_of_our_cores_is_counted() -> None:
    allowed = os.sched_getaffinity(0)
    core, *others = allowed
    taken = {}
    try:
        for ours in (core, *others[:1]):  # where the neighbour is, and elsewhere
            os.sched_setaffinity(0, [ours])
            with neighbour(core), Recorder() as recorder:
                time.sleep(2.5)
            taken[ours] = [sample.others_cores or 0.0 for sample in recorder.samples]
    finally:
        os.sched_setaffinity(0, allowed)
    assert taken[core] and min(taken[core]) > 0.5, taken
    assert all(min(found) < 0.5 for ours, found in taken.items() if ours != core), taken
