"""A workspace with a tiny model and texts, and the run that nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, SWEEP, WIDE, WIDE_STEPS, Done, Job
from tests.faults.tally import Tally
from tests.tiny import english, save_tiny
from trsp_deploy.tools.sources.packaged import find_asset

with contextlib.suppress(ImportError):  # without hypothesis its tests are skipped and say so
    from hypothesis import HealthCheck, settings

    COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("few", max_examples=20, **COMMON)
    settings.register_profile("faults", max_examples=1500, **COMMON)  # `make faults`
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_tiny("llama", folder / "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=4)
    (folder / "train.txt").write_text(english()[:30_000])
    (folder / "test.txt").write_text(english()[60_000:70_000])
    return folder


@pytest.fixture(scope="session")
def undisturbed(workspace: Path) -> tuple[Job, dict[bool, Done]]:
    """A whole run, and what two of them said: one in a fresh process (True), one with the libraries loaded (False)."""
    first, job = Job(workspace, "undisturbed-fresh"), Job(workspace, "undisturbed")
    done = {True: first.finish(fresh=True), False: job.finish()}
    for each in done.values():
        assert each.code == 0, each.stderr
        assert tuple(each.steps("done")) == STEPS
    assert not job.leftovers()
    assert first.artefacts() == job.artefacts()
    return job, done


@pytest.fixture(scope="session")
def undisturbed_wide(workspace: Path) -> Job:
    """A whole run of what the other lacks; skips without lm-eval, or PIQA (`trsp-deploy fetch piqa`)."""
    pytest.importorskip("lm_eval")
    if find_asset("piqa") is None:
        pytest.skip("needs a packaged task: trsp-deploy fetch piqa")
    first, job = Job(workspace, "undisturbed-wide-first", WIDE), Job(workspace, "undisturbed-wide", WIDE)
    for each in (first, job):
        done = each.finish()
        assert done.code == 0, done.stderr
        assert tuple(done.steps("done")) == WIDE_STEPS
    assert not job.leftovers()
    assert first.artefacts() == job.artefacts()
    return job


@pytest.fixture(scope="session")
def undisturbed_sweep(workspace: Path) -> tuple[Job, Done]:
    """A whole sweep, and what it said."""
    job = Job(workspace, "undisturbed-sweep", SWEEP)
    done = job.finish()
    assert done.code == 0, done.stderr
    assert not job.leftovers()
    return job, done


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 64 MB, to be made smaller or read-only."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs as user {os.getuid()}: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def remount(mount: Path, options: str) -> None:
    """Change the file system's size, or whether it can be written."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)


@pytest.fixture
def tally(record_property) -> Iterator[Tally]:
    found = Tally()
    yield found
    record_property("fault", "generated bad input")
    record_property("tried", found.tried)
    record_property("refused", found.refused)
    record_property("longest_s", round(found.longest_s, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generated")
