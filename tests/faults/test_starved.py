"""prune-and-build without room: a full disk, a read-only one, too few file descriptors, too little memory.

Each ends with one line, keeps what was finished, and leaves nothing that a later run takes for whole.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable

import pytest

from tests.faults.conftest import remount
from tests.faults.harness import STEPS, Done, Job

pytestmark = pytest.mark.faults
# KB. A whole run of the tiny model takes about 1,500: the last is one in which only the report does not fit.
SIZES_KB = (16, 256, 400, 500, 600, 720, 800, 880, 1000, 1120, 1240, 1320)
DESCRIPTORS = (8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
MEMORY_MB = (200, 400, 600, 800, 1000, 1200, 1600, 2000, 2400, 2800, 3200, 3600)


def went_on(job: Job, starved: Done, whole: Job, record_property: Callable[[str, object], None]) -> None:
    """What holds after every shortage: a rerun with room finishes, redoes nothing, and makes what it should."""
    wanted = whole.artefacts()
    assert not job.run.exists() or not job.half_made(wanted)
    finished = job.finished()
    again = job.finish()
    assert again.code == 0, again.stderr
    redone = finished - set(again.steps("reused"))
    record_property("finished", len(finished))
    record_property("redone", len(redone))
    record_property("place", next((step for step in STEPS if step not in starved.steps("done")), "report"))
    assert not redone
    assert job.artefacts() == wanted
    assert not job.leftovers()


@pytest.mark.parametrize("size_kb", SIZES_KB)
def test_full_disk(workspace, undisturbed, disk, record_property, size_kb):
    record_property("fault", "full disk")
    job = Job(workspace, disk / "run")
    job.arguments.append("--ignore-disk")  # what is refused beforehand fills no disk
    remount(disk, f"size={size_kb}k")
    starved = job.finish()
    assert starved.is_one_line and starved.code == 1, starved.stderr
    assert "the disk is full" in starved.last and "finished steps are kept" in starved.last
    assert [name for name in job.leftovers() if not name.startswith("checkpoints")] == []
    remount(disk, "size=64m")
    went_on(job, starved, undisturbed[0], record_property)


@pytest.mark.parametrize("until", [None, "plan", "export-dense-fp32", "bench-ort-cpu-fp32"])
def test_folder_that_cannot_be_written(workspace, undisturbed, disk, record_property, until):
    """From the start, or from one moment on: the steps before it are there from another run."""
    whole, _ = undisturbed
    record_property("fault", "read-only folder")
    job = Job(workspace, disk / "run")
    if until is not None:
        shutil.copytree(whole.run, job.run)
        for step in STEPS[STEPS.index(until) :]:
            (job.run / "records" / f"{step}.json").unlink()
    remount(disk, "ro")
    starved = job.finish()
    assert starved.is_one_line and starved.code == 1, starved.stderr
    assert str(disk) in starved.last and "Read-only file system" in starved.last
    remount(disk, "rw")
    went_on(job, starved, whole, record_property)


def limited(what: int, amount: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (amount, amount))


@pytest.mark.parametrize("descriptors", DESCRIPTORS)
def test_too_few_file_descriptors(workspace, undisturbed, record_property, descriptors):
    record_property("fault", "few file descriptors")
    job = Job(workspace, f"descriptors-{descriptors}")
    starved = job.finish(limited(resource.RLIMIT_NOFILE, descriptors))
    record_property("enough", starved.code == 0)
    assert starved.code == 0 or starved.is_one_line, starved.stderr
    assert starved.code == 0 or "ulimit -n" in starved.last, starved.last
    went_on(job, starved, undisturbed[0], record_property)


@pytest.mark.parametrize("megabytes", MEMORY_MB)
def test_too_little_memory(workspace, undisturbed, record_property, megabytes):
    """Of address space, which is all that the kernel limits for one process. Native code may die of it, with a line."""
    record_property("fault", "little memory")
    job = Job(workspace, f"memory-{megabytes}")
    starved = job.finish(limited(resource.RLIMIT_AS, megabytes << 20))
    record_property("enough", starved.code == 0)
    record_property("killed_by_signal", starved.code > 128)
    assert starved.code == 0 or (starved.is_one_line and "memory" in starved.last), starved.stderr
    went_on(job, starved, undisturbed[0], record_property)


def test_files_of_a_size_that_is_forbidden(workspace, undisturbed, record_property):
    """`ulimit -f`: the same as a full disk, by another name."""
    record_property("fault", "file size limit")
    job = Job(workspace, "file-size")
    starved = job.finish(limited(resource.RLIMIT_FSIZE, 150_000))
    assert starved.is_one_line, starved.stderr
    went_on(job, starved, undisturbed[0], record_property)
