"""Two runs into one folder, as processes: the second refuses and names the first; a dead one's lock is free."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.faults.harness import Job, end_session, session_members

pytestmark = pytest.mark.faults


def test_second_run_names_the_first(workspace, undisturbed, record_property):
    record_property("fault", "two runs, one folder")
    job = Job(workspace, "shared")
    first = job.start()
    assert first.wait_for("> dense: started"), first.said
    refused = job.finish()
    assert refused.code == 1 and refused.is_one_line, refused.stderr
    assert f"in use by another trsp-deploy (process {first.pid})" in refused.last
    done = first.wait()
    assert done.code == 0, done.stderr
    assert job.artefacts() == undisturbed[0].artefacts()


def test_of_many_at_once_one_goes_on(workspace, undisturbed, record_property):
    record_property("fault", "two runs, one folder")
    job = Job(workspace, "crowded")
    runs = [job.start(fresh=True) for _ in range(4)]
    while sum(running.poll() is None for running in runs) > 1:
        time.sleep(0.01)
    working = {pid for running in runs if running.poll() is None for pid in session_members(running.pid)}
    ended = {running.pid: running.wait() for running in runs}
    won = [pid for pid, done in ended.items() if done.code == 0]
    assert len(won) == 1, [done.last for done in ended.values()]
    for done in ended.values():
        if done.code:
            named = re.search(r"in use by another trsp-deploy \(process (\d+)\)", done.last)
            assert done.is_one_line and named and int(named[1]) in working, (done.last, working)
    assert job.artefacts() == undisturbed[0].artefacts()


@pytest.mark.parametrize("step", ["prune", "bench-ort-cpu-fp32"])
def test_lock_of_the_dead_is_taken_over(workspace, undisturbed, record_property, step):
    """Also where the dead one's measuring processes have not ended yet."""
    record_property("fault", "dead holder of the lock")
    job = Job(workspace, f"inherited-{step}")
    first = job.start()
    try:
        assert first.wait_for(f"> {step}: started"), first.said
        time.sleep(0.5 if step.startswith("bench") else 0.02)
        first.send_signal(signal.SIGKILL)
        assert first.wait().code == -signal.SIGKILL
        again = job.finish()
    finally:
        end_session(first.pid)
    assert again.code == 0, again.stderr
    assert job.artefacts() == undisturbed[0].artefacts()
