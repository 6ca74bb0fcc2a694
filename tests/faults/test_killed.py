"""`kill -9` of prune-and-build at 40 moments: in every step, and anywhere from its first import to its end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest

from tests.faults.harness import STEPS, Job, end_session

pytestmark = pytest.mark.faults
MOMENTS = 40
SEED = 20250525
# A step and how far into it, or how far into the whole: from its first import, or from where the libraries are loaded.
_draw = random.Random(SEED).random
WHEN = [(step, _draw()) for step in STEPS]
WHEN += [("anywhere, fresh", _draw()) for _ in range(8)]
WHEN += [("anywhere", _draw()) for _ in range(MOMENTS - len(WHEN))]


@pytest.mark.parametrize(("step", "share"), WHEN, ids=[f"{step}-{share:.2f}" for step, share in WHEN])
def test_killed_run_goes_on(workspace, undisturbed, record_property, step, share):
    whole, first = undisturbed
    job = Job(workspace, f"killed-{step}-{share:.4f}")
    fresh = step.endswith("fresh")
    running = job.start(fresh=fresh)
    try:
        if step.startswith("anywhere"):
            time.sleep(share * first[fresh].elapsed_s)
            while running.poll() is not None:  # the machine was busier before: again, and earlier
                shutil.rmtree(job.run)
                running, share = job.start(fresh=fresh), 0.8 * share
                time.sleep(share * first[fresh].elapsed_s)
        else:
            assert running.wait_for(f"> {step}: started"), running.said
            record = json.loads((whole.run / "records" / f"{step}.json").read_text())
            time.sleep(share * record["elapsed_s"])
        running.send_signal(signal.SIGKILL)
        killed = running.wait()
    finally:
        end_session(running.pid)
    assert killed.code == -signal.SIGKILL
    wanted = whole.artefacts()
    assert not job.run.exists() or not job.half_made(wanted)
    finished = job.finished()
    again = job.finish()
    assert again.code == 0, again.stderr
    redone = finished - set(again.steps("reused"))
    in_step = [each for each in killed.steps("started") if each not in killed.steps("done")]
    record_property("fault", "kill -9")
    record_property("place", (in_step or ["between steps"])[0])
    record_property("finished", len(finished))
    record_property("redone", len(redone))
    assert not redone
    assert job.artefacts() == wanted
    assert not job.leftovers()
