"""`kill -9` at random moments: in every step, and anywhere from the first import to the end; then the same command."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.harness import STEPS, SWEEP, WIDE, WIDE_STEPS, Done, Job, Running, end_session
from trsp_deploy.tools.delivery.verification import verify

pytestmark = pytest.mark.faults
MOMENTS = 40
SEED = 20250525
# A step and how far into it, or how far into the whole: from its first import, or from where the libraries are loaded.
_draw = random.Random(SEED).random
WHEN = [(step, _draw()) for step in STEPS]
WHEN += [("anywhere, fresh", _draw()) for _ in range(8)]
WHEN += [("anywhere", _draw()) for _ in range(MOMENTS - len(WHEN))]
# Of steps that come in pairs, dense and pruned, one.
WIDE_WHEN = [(step, _draw()) for step in [step for step in WIDE_STEPS if step not in STEPS][::2]]
SWEEP_WHEN = [_draw() for _ in range(4)]


@pytest.mark.parametrize(("step", "share"), WHEN, ids=[f"{step}-{share:.2f}" for step, share in WHEN])
def test_killed_run_goes_on(workspace, undisturbed, record_property, step, share):
    whole, first = undisturbed
    job = Job(workspace, f"killed-{step}-{share:.4f}")
    if step.startswith("anywhere"):
        fresh = step.endswith("fresh")
        killed = kill_within(job, share, first[fresh].elapsed_s, fresh)
    else:
        killed = kill_in_step(job, step, share, whole)
    goes_on(job, whole, killed, record_property)


@pytest.mark.parametrize(("step", "share"), WIDE_WHEN, ids=[f"{step}-{share:.2f}" for step, share in WIDE_WHEN])
def test_killed_run_of_other_precisions_and_methods_goes_on(workspace, undisturbed_wide, record_property, step, share):
    job = Job(workspace, f"wide-{step}-{share:.4f}", WIDE)
    goes_on(job, undisturbed_wide, kill_in_step(job, step, share, undisturbed_wide), record_property)


@pytest.mark.parametrize("share", SWEEP_WHEN, ids=[f"{share:.2f}" for share in SWEEP_WHEN])
def test_killed_sweep_goes_on(workspace, undisturbed_sweep, record_property, share):
    whole, first = undisturbed_sweep
    job = Job(workspace, f"sweep-{share:.4f}", SWEEP)
    killed = kill_within(job, share, first.elapsed_s, fresh=False)
    goes_on(job, whole, killed, record_property)


def kill_in_step(job: Job, step: str, share: float, whole: Job) -> Done:
    """Kill it so far into a step, by how long that took in the undisturbed run."""
    step_s = json.loads((whole.run / "records" / f"{step}.json").read_text())["elapsed_s"]

    def wait(running: Running, share: float) -> None:
        assert running.wait_for(f"> {step}: started"), running.said
        time.sleep(share * step_s)

    return _kill(job, share, wait)


def kill_within(job: Job, share: float, whole_s: float, fresh: bool) -> Done:
    """Kill it so far into the whole."""
    return _kill(job, share, lambda _, share: time.sleep(share * whole_s), fresh)


def _kill(job: Job, share: float, wait: Callable[[Running, float], None], fresh: bool = False) -> Done:
    """Start it, wait, kill it; where it was over by then, on a machine that was busier before, again and earlier."""
    while True:
        running = job.start(fresh=fresh)
        try:
            wait(running, share)
            if running.poll() is None:
                running.send_signal(signal.SIGKILL)
            killed = running.wait()
        finally:
            end_session(running.pid)
        if killed.code != 0:
            return killed
        shutil.rmtree(job.run)
        share *= 0.8


def goes_on(job: Job, whole: Job, killed: Done, note: Callable[[str, object], None]) -> None:
    """The same command finishes what is left, and leaves what an undisturbed run does."""
    assert killed.code == -signal.SIGKILL
    wanted = whole.artefacts()
    assert not job.run.exists() or not job.half_made(wanted)
    finished = job.finished()
    again = job.finish()
    assert again.code == 0, again.stderr
    redone = finished - set(again.steps("reused"))
    in_step = [each for each in killed.steps("started") if each not in killed.steps("done")]
    note("fault", "kill -9")
    note("place", (in_step or ["between steps"])[0])
    note("finished", len(finished))
    note("redone", len(redone))
    assert not redone
    assert job.artefacts() == wanted
    assert verify(job.run).whole
    assert not job.leftovers()
