"""Artefacts appear whole or not at all, and a finished step is redone only when something it depends on changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.made_run import made_run, made_sweep
from trsp_deploy.artifacts import (
    Finished,
    RunFolder,
    RunLayout,
    Step,
    fingerprint,
    model_of_engine,
    provenance,
    reading_alone,
    run_folder,
    size_bytes,
    storage_errors,
    write_json,
    writing,
)
from trsp_deploy.artifacts import Made as Before
from trsp_deploy.artifacts.layout import check_can_hold
from trsp_deploy.artifacts.storage import remove
from trsp_deploy.errors import RunError, StorageError
from trsp_deploy.recipe import Strict


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Made(Strict):
    number: int


class Job:
    """A step that counts how often it works."""

    def __init__(self, run: RunFolder, source: Path) -> None:
        self.run, self.source, self.calls = run, source, 0

    def __call__(self, settings=None, schema=None) -> Made:
        def work() -> Made:
            self.calls += 1
            (self.run.path / "out.txt").write_text(self.source.read_text() * 2)
            return Made(number=self.calls)

        return self.run.step(
            "double",
            work,
            Made,
            settings=settings or {},
            inputs={"source": self.source},
            outputs=["out.txt"],
            schema=schema,
        )


@pytest.fixture
def announced():
    return []


@pytest.fixture
def job(tmp_path, announced):
    (tmp_path / "source.txt").write_text("a")
    with RunFolder(tmp_path / "run", lambda step, state: announced.append((step, state))) as run:
        yield Job(run, tmp_path / "source.txt")


def test_finished_step_is_reused(job):
    assert job() == Made(number=1) == job()
    assert job.calls == 1


def test_records_tell_what_need_not_be_done_again(job):
    """Settings, inputs as the steps before left them, and output, without reading any of it."""
    assert not asked(job).steps
    job({"times": (2,)})
    source, made = fingerprint(job.source), fingerprint(job.run.path / "out.txt")
    assert asked(job, source).steps == {"double"} and asked(job, source).left == {"double": made}
    assert asked(job, source, times=(3,)).steps == asked(job, "another").steps == asked(job).steps == set()
    assert not asked(job, source, output="elsewhere.txt").steps
    (job.run.path / "out.txt").unlink()
    assert not asked(job, source).steps and asked(job, source).left == {"double": made}, "made again as it was"


def asked(job: Job, source: str | None = None, output: str = "out.txt", times: tuple[int, ...] = (2,)) -> Finished:
    found = Finished(job.run)
    found.ask(Step("double", lambda: {"times": times}, lambda: {"source": source or Before("single", "a.txt")}, output))
    return found


def test_what_was_made_of_more_than_is_asked_about_has_to_be_made_again(job):
    """An input that was left out of the question passed for one that had not changed."""
    job.run.step("sum", lambda: Made(number=1), Made, settings={}, inputs={"one": "1", "other": "2"})
    of_both = Step("sum", dict, lambda: {"one": "1", "other": "2"})
    of_one = Step("sum", dict, lambda: {"one": "1"})
    found = Finished(job.run)
    found.ask(of_one)
    assert not found.steps
    found.ask(of_both)
    assert found.steps == {"sum"}


def test_a_step_is_asked_about_as_it_was_done(job):
    """Said once: what it is made of is a file where it is done, and what the records say where it is asked about."""
    first = Step("first", dict, lambda: {"text": "1"}, "first.txt")
    second = Step("second", lambda: {"times": (2,)}, lambda: {"it": Before("first", "first.txt")}, "second.txt")

    def write(step: Step) -> Made:
        (job.run.path / step.output).write_text(step.name)
        return Made(number=1)

    for step in (first, second):
        job.run.do(step, lambda step=step: write(step), Made)
    found = Finished(job.run)
    for step in (first, second):
        found.ask(step)
    assert found.steps == {"first", "second"}
    assert job.run.record("second").inputs == {"it": fingerprint(job.run.path / "first.txt")}


class Parts(Strict):
    first: int = 1
    second: int = 2


class Times(Strict):
    """Settings, of which some came later than others."""

    factor: int
    rounds: int = 1
    parts: Parts = Parts()


def test_a_setting_that_came_later_leaves_finished_work_finished(job, announced):
    """Made before it was there, a step was made as by its default; with an update days of training were done again."""
    job({"factor": 2, "parts": {"first": 1}})
    later = Times(factor=2)
    assert job(later) == Made(number=1) and job(later.model_dump(mode="json"), Times) == Made(number=1)
    source = fingerprint(job.source)
    found = Finished(job.run)
    found.ask(Step("double", lambda: later.model_dump(), lambda: {"source": source}, "out.txt", Times))
    assert found.steps == {"double"}
    assert job(later.model_copy(update={"rounds": 3})) == Made(number=2)
    assert ("double", "rounds is 3, was 1; done again") in announced


def test_a_step_that_is_done_again_says_what_is_another(job, announced):
    job({"factor": 2, "old": 1, "deep": {"text": "x" * 99}})
    job.source.write_text("b")
    job({"factor": 3, "deep": {"text": "y" * 99}, "new": None})
    reasons = "factor is 3, was 2; deep.text is another; new is new; old is gone; source is another"
    assert announced[2] == ("double", f"{reasons}; done again")


def test_a_record_by_another_form_of_the_toolkit_says_so(job, announced, monkeypatch):
    job()
    monkeypatch.setattr(run_folder, "FORMAT", 99)
    assert job() == Made(number=2)
    assert ("double", "it was done by another version; done again") in announced
    found = Finished(job.run)
    found.ask(Step("double", dict, lambda: {"source": fingerprint(job.source)}, "out.txt"))
    assert found.steps == {"double"}
    monkeypatch.setattr(run_folder, "FORMAT", 100)
    found = Finished(job.run)
    found.ask(Step("double", dict, lambda: {"source": fingerprint(job.source)}, "out.txt"))
    assert not found.steps


def test_a_result_that_cannot_be_read_any_more_is_made_again_and_said(job, announced):
    job()

    class Later(Strict):
        number: int
        more: int

    job.run.step(
        "double",
        lambda: Later(number=1, more=2),
        Later,
        settings={},
        inputs={"source": job.source},
        outputs=["out.txt"],
    )
    assert ("double", "what was recorded of it is of another version; done again") in announced


def test_a_folder_that_is_not_entered_is_not_written(tmp_path):
    """It had no lock, and another command could do the same step."""
    run = RunFolder(str(tmp_path / "run"))
    step = {"settings": {}, "inputs": {}}
    with pytest.raises(RunError, match="is not entered; `with RunFolder"):
        run.step("make", lambda: Made(number=1), Made, **step)
    with run:
        assert run.step("make", lambda: Made(number=1), Made, **step) == Made(number=1)
    with pytest.raises(RunError, match="is not entered"):
        run.step("make", lambda: Made(number=1), Made, **step)


def test_changed_input_setting_or_output_redoes_it(job):
    job()
    job.source.write_text("b")
    job()
    job({"factor": 2})
    (job.run.path / "out.txt").write_text("tampered")
    job({"factor": 2})
    (job.run.path / "out.txt").unlink()
    job({"factor": 2})
    assert job.calls == 5


def test_damaged_record_redoes_it(job):
    job()
    (job.run.path / "records" / "double.json").write_text("{")
    job()
    assert job.calls == 2


def test_record_with_a_changed_digit_is_not_believed(job, announced):
    """Its key and its outputs fit, and its result would be another."""
    job()
    record = job.run.path / "records" / "double.json"
    record.write_text(record.read_text().replace('"number": 1', '"number": 9'))
    assert job() == Made(number=2)
    assert ("double", "records/double.json is damaged, or of another version; done again") in announced


def test_record_without_a_seal_is_taken_as_it_is(job):
    """So were all records before there was one, and so is one that was edited by hand."""
    job()
    record = job.run.path / "records" / "double.json"
    values = json.loads(record.read_text())
    assert len(values.pop("sha256")) == 64
    record.write_text(json.dumps(values))
    assert job() == Made(number=1)


def test_changed_output_is_named(job, announced):
    job()
    (job.run.path / "out.txt").write_text("tampered")
    job()
    assert ("double", "out.txt is not what was made (SHA-256); made again") in announced


def test_an_output_that_was_removed_is_no_damage(job, announced):
    """As after `clean`: it was said to be other than what was made."""
    job()
    (job.run.path / "out.txt").unlink()
    job()
    assert ("double", "out.txt is not there; made again") in announced


def test_failed_step_leaves_no_record(job):
    job.source.unlink()
    with pytest.raises(FileNotFoundError):
        job()
    assert job.run.record("double") is None


def test_record_says_where_it_comes_from(job):
    job()
    record = job.run.record("double")
    assert record.inputs["source"] == fingerprint(job.source)
    assert record.outputs["out.txt"] == fingerprint(job.run.path / "out.txt")
    assert record.provenance.differences(provenance()) == {} and record.provenance.time is not None
    assert job.run.made == {"double": record.provenance}
    assert record.provenance.cores >= 1 and "torch" in record.provenance.packages


def test_second_run_in_the_same_folder_is_refused(job):
    with pytest.raises(RunError, match=f"in use by another trsp-deploy \\(process {os.getpid()}\\)"):
        RunFolder(job.run.path).__enter__()


@pytest.mark.parametrize("below", ["", "engines/ort-cpu-fp32/dense", "onnx/dense-fp32/model.onnx"])
def test_a_run_is_held_while_it_or_a_part_of_it_is_read(tmp_path, below):
    run = made_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    named = (run / below, run, tmp_path / "link", tmp_path / "engine")  # three times it is one run
    with reading_alone(*named), pytest.raises(RunError, match="in use by another trsp-deploy"), RunFolder(run):
        pass
    with RunFolder(run), pytest.raises(RunError, match="in use by another"), reading_alone(run / below):
        pass
    assert names(tmp_path) == ["link", "run"]


@pytest.mark.parametrize(
    "marks", [("records", ".lock"), ("records", ".place"), ("records",), (".lock", ".place"), (".place",)]
)
@pytest.mark.parametrize("make", [made_run, made_sweep])
def test_a_run_is_one_however_it_was_made_and_copied(tmp_path, make, marks):
    """By an older version, stopped before its first record, or without the files that begin with a dot."""
    folder = make(tmp_path / "folder")
    (folder / ".place").write_text("/somewhere")
    for name in {"records", ".lock", ".place"} - set(marks):
        remove(folder / name)
    check_can_hold(folder, sweep=make is made_sweep)
    assert RunLayout(folder).is_begun


def test_a_recipe_of_ones_own_is_said_to_be_in_the_way(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    with pytest.raises(RunError, match=r"has recipe\.yaml and is no run .*; choose another --out, or move it away"):
        check_can_hold(tmp_path, sweep=False)


def test_a_manifest_beside_a_folder_of_plans_is_no_sweeps(tmp_path):
    """A project has plans too, and what lies beside them goes on being its own."""
    run = made_run(tmp_path / "run")
    (tmp_path / "plans").mkdir()
    (tmp_path / "MANIFEST.json").write_text("{}")
    RunFolder(run).outdate_manifest()
    assert names(tmp_path) == ["MANIFEST.json", "plans", "run"]


def test_other_processes_of_the_same_run_come_in_and_follow_the_main_one(job, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    worked, answers = [], iter([Made(number=7), None, Made(number=8), None, Made(number=9)])
    with RunFolder(job.run.path) as run:  # the main process holds the lock
        run.from_main = lambda value: next(answers)

        def step(together: bool) -> Made:
            work = lambda: worked.append(together)  # noqa: E731
            return run.step("double", work, Made, settings={}, inputs={}, together=together)

        assert step(together=True) == Made(number=7) and worked == []  # reused
        assert step(together=False) == Made(number=8) and worked == []  # the main process's work
        assert step(together=True) == Made(number=9) and worked == [True]
    assert not (job.run.path / "records").exists()


def test_key_is_that_of_the_record(job):
    job({"factor": 2})
    key = job.run.key("double", settings={"factor": 2}, inputs={"source": job.source})
    assert job.run.record("double").key == key
    assert job.run.key("double", settings={"factor": 3}, inputs={"source": job.source}) != key


def test_lock_of_a_killed_run_is_free(tmp_path):
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom trsp_deploy.artifacts import RunFolder\n"
        f"RunFolder(Path({str(tmp_path / 'run')!r})).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with RunFolder(tmp_path / "run") as run:
        assert run.path.is_dir()


@pytest.fixture
def synced(monkeypatch):
    """Every fsync: of what, and the names that are there by then."""
    found, fsync = [], os.fsync

    def listen(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        found.append((path, names(path) if path.is_dir() else None))
        fsync(handle)

    monkeypatch.setattr("os.fsync", listen)
    return found


def test_a_power_cut_leaves_the_name_too(tmp_path, synced):
    """Contents before the rename, and after it every folder that has a new name in it."""
    with writing(tmp_path / "new" / "deep" / "a.json") as partial:
        partial.write_text("{}")
    deep = tmp_path / "new" / "deep"
    assert synced == [
        (deep / ".a.json.partial", None),
        (deep, ["a.json"]),
        (tmp_path / "new", ["deep"]),
        (tmp_path, ["new"]),
    ]
    synced.clear()
    for _ in range(2):  # the second takes the first one's place
        with writing(tmp_path / "folder") as partial:
            (partial / "inner").mkdir(parents=True)
            (partial / "inner" / "file").write_text("x")
    once = [
        (tmp_path / ".folder.partial", ["inner"]),
        (tmp_path / ".folder.partial" / "inner", ["file"]),
        (tmp_path / ".folder.partial" / "inner" / "file", None),
    ]
    first, second = (tmp_path, ["folder", "new"]), (tmp_path, [".folder.former", "folder", "new"])
    assert synced == [*once, first, *once, second]


@pytest.mark.parametrize(("number", "taken"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_may_sync_no_folders(tmp_path, monkeypatch, number, taken):
    fsync = os.fsync

    def refuse(handle):
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(number, "refused")
        fsync(handle)

    monkeypatch.setattr("os.fsync", refuse)
    with contextlib.nullcontext() if taken else pytest.raises(OSError, match="refused"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_file_keeps_its_old_content_when_writing_fails(tmp_path):
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="half-way"), writing(target) as partial:
        partial.write_text("half")
        raise ValueError("half-way")
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["value.json"]


def test_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with writing(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert names(tmp_path / "model") == ["new"]
    assert size_bytes(tmp_path / "model") == 3


def test_a_folder_is_made_and_put_aside_elsewhere(tmp_path, monkeypatch):
    """Whoever reads the folder around it sees it whole, or not at all, and nothing else."""
    shelf, staging, seen = tmp_path / "shelf", tmp_path / "staging", []
    staging.mkdir()
    replace = Path.replace

    def listen(self, target):
        seen.append(names(shelf))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", listen)
    for content in ("old", "new"):
        with writing(shelf / "model", staging) as partial:
            partial.mkdir()
            (partial / content).touch()
    assert seen == [[], ["model"], []]
    with pytest.raises(ValueError, match="half-way"), writing(shelf / "model", staging) as partial:
        partial.mkdir()
        raise ValueError("half-way")
    assert names(shelf) == ["model"] and names(shelf / "model") == ["new"] and names(staging) == []


def test_a_file_never_takes_a_folders_place(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "precious.txt").write_text("x")
    with pytest.raises(RunError, match="kept: is a folder"):
        write_json(tmp_path / "kept", {"a": 1})
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "precious.txt"]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    with writing(tmp_path / "model") as partial:
        partial.mkdir()
    (tmp_path / "model" / "old").touch()
    replace = Path.replace

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EPERM, "not permitted", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match="no permission"), writing(tmp_path / "model") as partial:
        partial.mkdir()
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_full_disk_is_seen_before_room_is_made_again(tmp_path, monkeypatch):
    """torch says no word about the disk, and what it wrote in vain is removed at once."""
    monkeypatch.setattr(
        "trsp_deploy.artifacts.storage.free_bytes", lambda path: 0 if list(tmp_path.glob(".*")) else 1 << 30
    )
    with pytest.raises(StorageError, match="disk is full"), writing(tmp_path / "state.pt") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(("free", "said"), [(0, "the disk is full"), (1 << 30, "a file may not be that large here")])
def test_numpys_short_write_has_no_number_of_its_own(tmp_path, monkeypatch, free, said):
    """onnx_ir writes weights with it."""
    monkeypatch.setattr("trsp_deploy.artifacts.storage.free_bytes", lambda path: free)
    with pytest.raises(StorageError, match=said), storage_errors(tmp_path), Path("/dev/full").open("wb") as full:
        np.zeros(100_000).tofile(full)


def test_fingerprint_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("x")
    first = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = fingerprint(tmp_path)
    (tmp_path / "b").write_text("y")
    assert len({first, second, fingerprint(tmp_path)}) == 3


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read for their SHA-256."""
    names, digest = [], hashlib.file_digest

    def counted(file, algorithm):
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_file_is_read_once_for_its_fingerprint_under_whatever_name(tmp_path, read):
    weights, long_ago = tmp_path / "weights", time.time_ns() - 10**12
    weights.write_text("x" * 100)
    os.utime(weights, ns=(long_ago, long_ago))
    os.link(weights, tmp_path / "again")
    assert len({fingerprint(weights), fingerprint(tmp_path / "again"), fingerprint(weights)}) == 1
    assert read == ["weights"]
    weights.write_text("y" * 100)  # in place, of the same size
    os.utime(weights, ns=(long_ago + 1, long_ago + 1))
    assert fingerprint(weights) == hashlib.sha256(b"y" * 100).hexdigest()


def test_a_file_of_this_moment_is_read_again_for_its_fingerprint(tmp_path, read):
    """A disk may give two writes the same time: the second one would not be noticed."""
    weights = tmp_path / "weights"
    weights.write_text("x" * 100)
    written = weights.stat().st_mtime_ns
    first = fingerprint(weights)
    weights.write_text("y" * 100)
    os.utime(weights, ns=(written, written))
    assert fingerprint(weights) != first
    assert read == ["weights", "weights"]


def test_a_file_that_is_written_to_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    weights, long_ago, digest = tmp_path / "weights", time.time_ns() - 10**12, hashlib.file_digest
    weights.write_text("x" * 100)
    os.utime(weights, ns=(long_ago, long_ago))

    def overtaken(file, algorithm):
        found = digest(file, algorithm)
        weights.write_text("y" * 100)
        return found

    with monkeypatch.context() as during:
        during.setattr(hashlib, "file_digest", overtaken)
        fingerprint(weights)
    os.utime(weights, ns=(long_ago, long_ago))  # as if no one had touched it: it was not kept under this time either
    assert fingerprint(weights) == hashlib.sha256(b"y" * 100).hexdigest()


def test_refused_write_is_one_line(tmp_path):
    with pytest.raises(StorageError, match="no permission to write"), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux's /dev/shm")
def test_a_full_disk_is_the_one_that_the_error_names(tmp_path):
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("temporary files are on /dev/shm")

    def said(*named):
        with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "pruned"):
            raise OSError(errno.ENOSPC, "No space left on device", *named)
        return str(caught.value).partition(" (")[0]

    assert said("/dev/shm/trsp/x") == "/dev/shm/trsp/x: the disk is full"
    own = f"{tmp_path / 'pruned'}: the disk is full"
    assert said(str(tmp_path / ".pruned.partial")) == own and said() == own


def test_a_full_disk_of_temporary_files_is_told_from_the_runs(tmp_path, monkeypatch):
    """A write that fails names no file."""
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    free = {scratch: 0, run: 1 << 30}
    monkeypatch.setattr("trsp_deploy.artifacts.storage.free_bytes", free.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(StorageError, match=rf"^{scratch}: the disk is full \(0 MB free\)"), storage_errors(run):
        raise OSError(errno.ENOSPC, "No space left on device")
    free[run] = 0
    with pytest.raises(StorageError, match=f"^{run}: the disk is full"), storage_errors(run):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_unwritable_place_is_one_line():
    with pytest.raises(RunError, match=r"/proc/trsp-run: cannot be created .* choose another --out"):
        RunFolder(Path("/proc/trsp-run")).__enter__()
    with pytest.raises(StorageError, match="no permission to write"):
        RunFolder(Path("/sys/trsp-run")).__enter__()


def test_a_link_to_a_disk_that_is_not_mounted_is_one_line(tmp_path):
    link = tmp_path / "runs"
    link.symlink_to(tmp_path / "disk" / "runs")
    for folder in (link, link / "mine"):
        said = f"{folder}: cannot be created .{link} is a link that leads nowhere.; choose another --out"
        with pytest.raises(RunError, match=said):
            RunFolder(folder).__enter__()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_full_disk_is_one_line_and_keeps_what_was_there(small_disk):
    write_json(small_disk / "kept.json", {"a": 1})
    with pytest.raises(StorageError) as caught, writing(small_disk / "big") as partial:
        partial.write_bytes(bytes(8 << 20))
    assert "the disk is full" in str(caught.value) and "finished steps are kept" in str(caught.value)
    assert names(small_disk) == ["kept.json"]


def test_full_disk_under_a_library_that_raises_its_own_error(small_disk):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(StorageError, match="the disk is full"), writing(small_disk / "model.safetensors") as partial:
        save_file({"weight": torch.zeros(2 << 20)}, partial)
    assert names(small_disk) == []


def test_an_engine_leads_to_the_model_that_it_is_of(tmp_path):
    run = RunLayout(tmp_path / "run")
    assert model_of_engine(run.engine("ort-cpu-fp32", "pruned")) == run.model("pruned")
    assert model_of_engine(tmp_path / "run" / "mine" / "ort-cpu-fp32" / "pruned") is None, "of no run"
    assert model_of_engine(Path("/engine")) is None


def test_every_precision_has_a_folder_of_its_own():
    """Whichever engine a run is asked for first: another order would write one graph over the other."""
    run = RunLayout(Path("run"))
    folders = [run.below(run.onnx("dense", precision)) for precision in ("fp32", "fp16")]
    assert folders == ["onnx/dense-fp32", "onnx/dense-fp16"]


def test_a_step_that_leaves_its_output_elsewhere_is_done_again(tmp_path):
    def make(name):
        def work():
            (run.path / name).write_text("x")
            return Made(number=len(name))

        return run.step("make", work, Made, settings={}, inputs={}, outputs=[name]).number

    with RunFolder(tmp_path / "run") as run:
        assert make("first") == make("first") == 5 and make("second") == 6
        assert (run.path / "second").is_file()


def test_a_step_that_rewrites_its_own_input_is_done_again(tmp_path):
    """Its result is of what the input was before."""
    source = tmp_path / "source.txt"
    source.write_text("a")

    def work():
        source.write_text(f"{source.read_text()}a")
        (run.path / "out").write_text(source.read_text())
        return Made(number=len(source.read_text()))

    with RunFolder(tmp_path / "run") as run:
        for number in (2, 3):
            found = run.step("grow", work, Made, settings={}, inputs={"source": source}, outputs=["out"])
            assert found.number == number


@pytest.mark.parametrize("state", ["partial", "former"])
def test_what_a_kill_left_beside_a_folder_is_not_in_the_next_one(state, tmp_path):
    model, left = tmp_path / "model", tmp_path / f".model.{state}"
    for folder in (model, left):
        folder.mkdir()
        (folder / "old").write_text("old")
    with writing(model) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert names(model) == ["new"] and names(tmp_path) == ["model"]


def test_a_link_that_leads_out_of_a_run_is_in_no_manifest(tmp_path):
    """It would name a file that the run has not got, by a SHA-256 that whoever owns it changes."""
    (tmp_path / "elsewhere").write_text("mine")

    def work():
        (run.path / "out").mkdir()
        (run.path / "out" / "file").write_text("made")
        (run.path / "out" / "link").symlink_to(tmp_path / "elsewhere")
        return Made(number=1)

    with RunFolder(tmp_path / "run") as run:
        run.step("make", work, Made, settings={}, inputs={}, outputs=["out"])
        assert sorted(run.write_manifest().files) == ["out/file", "records/make.json"]
