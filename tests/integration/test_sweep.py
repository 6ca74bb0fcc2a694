"""A sweep on a tiny model: one search, a run for each number of layers, resumable, and a choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.breadth import BREADTH
from tests.command import Done, trsp_deploy
from tests.planted import SECRETS, check_no_secret
from tests.samples import made_up, made_up_report
from tests.tiny import english, save_tiny
from trsp_deploy import sweep as sweeping
from trsp_deploy.artifacts import MANIFEST, RunFolder, write_json
from trsp_deploy.cli import sweep_jobs
from trsp_deploy.errors import ParityError, StorageError, TrspError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.resources import disk, memory_plan
from trsp_deploy.tools.resources.cleaning import freed_bytes
from trsp_deploy.tools.sources import model_folders

SETTINGS = [
    "calibration.context_length=32",
    "calibration.max_windows=8",
    "calibration.validation_windows=2",
    "plan.steps=1",
    "plan.candidates=2",
    "transfer.form=none",
    "evaluate.context_length=64",
    "evaluate.max_tokens=640",
    "bench.prompt_tokens=8",
    "bench.new_tokens=2",
    "bench.budget_s=1",
    "bench.replicates=2",
    "bench.control=false",
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny("llama", folder / "tiny")
    (folder / "text.txt").write_text(english()[:30_000])
    return folder


def sweep(workspace: Path, *options: str, out: str = "sweep"):  # type: ignore[no-untyped-def]
    settings = [option for pair in SETTINGS for option in ("--set", pair)]
    texts = ["--calibration", "text.txt", "--eval", "manual=text.txt", "--engine", "ort-cpu-fp32"]
    arguments = ["--model", "tiny", *texts, *settings, "--out", out, *options]
    return trsp_deploy("sweep", *arguments, cwd=workspace, **SECRETS)


@BREADTH
def test_a_sweep_is_one_search_and_a_run_each_and_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = sweep(workspace, "--drop", "1..2", "--max-ppl-ratio", "1000", "--json")
    assert done.code == 0, done.said
    assert check_no_secret(workspace / "sweep", done.said) > 80
    found = json.loads(done.stdout)
    assert [point["num_dropped"] for point in found["points"]] == [1, 2] and found["choice"]["num_dropped"] == 2
    assert done.stderr.count("plans: started") == 1
    # What concerns dense alone is made in the first run only.
    for step in ("export-dense-fp32", "build-ort-cpu-fp32-dense", "evaluate-manual-dense"):
        assert f"drop-1: {step}: started" in done.stderr and f"drop-2: {step}: reused" in done.stderr
    for count in (1, 2):
        folder = workspace / "sweep" / f"drop-{count}"
        plan = json.loads((folder / "plan.json").read_text())
        assert len(plan["dropped"]) == count and (folder / "report.html").is_file()
        assert plan == json.loads((workspace / "sweep" / "plans" / f"drop-{count}.json").read_text())
        assert trsp_deploy("verify", str(folder), cwd=workspace).code == 0
    later = trsp_deploy("report", "sweep/drop-1", "--json", cwd=workspace)  # by itself, as any run
    assert later.code == 0 and "started" not in later.stderr, later.said
    kept = workspace / "sweep" / "drop-1"
    points = json.loads((kept / "report.json").read_text())["sweep"]["points"]
    assert [point["num_dropped"] for point in points] == [1, 2]
    assert all("Other cuts of this model" in (kept / name).read_text() for name in ("report.html", "report.md"))
    assert "drop-2/report.html" in (workspace / "sweep" / "sweep.html").read_text()
    first, second = ((workspace / "sweep" / f"drop-{c}" / "dense" / "model.safetensors").stat() for c in (1, 2))
    assert first.st_ino == second.st_ino, "linked, not copied"
    assert not (workspace / "sweep" / "MANIFEST.json").exists(), "a run within is another now"
    again = sweep(workspace, "--drop", "1..2", "--max-ppl-ratio", "0.0001", "--json")
    assert again.code == 1 and "--max-ppl-ratio" in again.stderr  # below 1 makes no sense
    again = sweep(workspace, "--drop", "1..2", "--target-speedup", "50", "--json")
    assert again.code == 2, again.said
    assert json.loads(again.stdout)["choice"]["num_dropped"] is None and "started" not in again.stderr
    whole = trsp_deploy("verify", "sweep", "--json", cwd=workspace)
    assert whole.code == 0 and json.loads(whole.stdout)["against"] == "MANIFEST.json", whole.said
    (workspace / "sweep" / "sweep.json").write_text("{}")
    broken = trsp_deploy("verify", "sweep", cwd=workspace)
    assert broken.code == 2 and "changed: sweep.json" in broken.stdout, broken.said
    assert "(dense there, drop-1 there, drop-2 there)" in again.stderr
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    again = sweep(workspace, "--drop", "1..2", "--json")
    assert again.code == 0, "nothing is to be done: nothing is asked about"
    other = sweep(workspace, "--drop", "1..3", "--ignore-memory")
    assert other.code == 1 and "(dense there, drop-1 there, drop-2 there, drop-3 0.00 GB)" in other.last
    other = sweep(workspace, "--drop", "1..2", "--set", "evaluate.context_length=48")
    assert other.stderr.splitlines()[-1].startswith("error: run ort-cpu-fp32 needs about ")
    other = sweep(workspace, "--drop", "1..2", "--set", "transfer.form=l2")
    assert other.stderr.splitlines()[-1].startswith("error: transfer needs about ")


@BREADTH
def test_the_disk_that_a_sweep_needs_was_estimated(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is on another disk: one copy for all runs, which was counted for each, and made twice."""
    monkeypatch.setattr(model_folders, "_linked", lambda file, place: False)
    monkeypatch.setattr(disk, "_shares_blocks", lambda source, run: False)
    monkeypatch.setattr(Proof, "bench", lambda self: {})
    planned = []
    monkeypatch.setattr(disk, "check_fits", lambda plan, alone: planned.append(plan))
    options = ["--method", "shortgpt", "--set", "engines=[ort-cpu-fp32]", "--set", "evaluation={}"]
    done = sweep(workspace, "--drop", "1..3", *options, out="measured")
    assert done.code == 0, done.said
    folder = workspace / "measured"
    weights = [folder / each / "dense" / "model.safetensors" for each in (".", "drop-1", "drop-2", "drop-3")]
    assert len({each.stat().st_ino for each in weights}) == 1, "linked, not copied"
    measured = freed_bytes([folder])
    assert measured <= planned[0].total_bytes <= planned[0].needed_bytes < 1.25 * measured


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--drop", "5..50%"], ["--drop '5..50%': begins with 5 and ends with 50%"]),
        (["--drop", "5.."], ["--drop '5..': expected a range such as 5%..50%"]),
        (["--drop", "1..9"], ["--drop", "1 to 5"]),
        (["--target-latency", "20"], ["--target-latency '20': expected a time such as 20ms"]),
        (["--drop", "1..2", "--max-ppl-ratio", "2", "--set", "evaluation={}"], ["--max-ppl-ratio needs texts"]),
    ],
)
def test_bad_input_is_one_line(workspace: Path, options: list[str], words: list[str]) -> None:
    done = sweep(workspace, *options)
    assert done.code == 1 and done.stdout == ""
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


@pytest.mark.parametrize("option", [("--target-speedup", "1.2"), ("--target-latency", "20ms")])
def test_a_target_of_speed_that_nothing_measures_is_said_first(
    workspace: Path, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said after the training of every cut."""
    monkeypatch.setattr(sweeping, "runnable", lambda specs: [])
    done = sweep(workspace, "--drop", "1..2", *option, out="unmeasured")
    assert done.code == 1 and done.stdout == "" and not (workspace / "unmeasured").exists()
    assert f"{option[0]} needs an engine that runs here, and none of the recipe's does (ort-cpu-fp32; " in done.last


Made = dict[int, BaseException]  # by layers dropped: how the run fails, where it does


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Plans and runs of a sweep are made up from here on, and fail as the test says."""
    failing: Made = {}

    def make(one: Pipeline) -> Report:
        count = int(one.recipe.drop)
        if count in failing:
            raise failing[count]
        report = made_up_report(made_up(speedup=1 + count / 20))
        return report.model_copy(update={"plan": report.plan.model_copy(update={"dropped": tuple(range(count))})})

    def write(proof: Proof, report: Report) -> Report:
        write_json(proof.run.path / "report.json", report)
        proof.run.write_manifest()
        return report

    def plans(self: Pruning, counts: tuple[int, ...]) -> dict[int, Path]:
        self.inputs.model.copied()  # as choosing layers makes it
        return {count: self.run.path / f"drop-{count}.json" for count in counts}

    monkeypatch.setattr(Pruning, "plans", plans)
    for name, stand_in in (("check_before_work", lambda job: None), ("prune_and_build", make), ("write_pages", write)):
        monkeypatch.setattr(sweeping, name, stand_in)
    return failing


def test_a_refused_target_leaves_a_finished_sweep_as_it_is(workspace: Path, made: Made) -> None:
    """Its recipe was another by then, and its manifest gone."""
    assert sweep(workspace, "--drop", "1..2", out="finished").code == 0
    files = [workspace / "finished" / name for name in ("recipe.yaml", MANIFEST)]
    before = [file.read_bytes() for file in files]
    options = ["--max-ppl-ratio", "2", "--set", "evaluation={}"]
    refused = sweep(workspace, "--drop", "1..2", *options, out="finished")
    assert refused.code == 1 and "--max-ppl-ratio needs texts" in refused.last
    assert [file.read_bytes() for file in files] == before


def test_a_task_is_of_every_run(workspace: Path, made: Made) -> None:
    done = sweep(workspace, "--drop", "1..2", "--task", "piqa", "--task", "copa", out="asked")
    assert done.code == 0, done.said
    for folder in ("asked", "asked/drop-1", "asked/drop-2"):
        recipe = yaml.safe_load((workspace / folder / "recipe.yaml").read_text())
        assert recipe["evaluate"]["tasks"] == ["piqa", "copa"]


PARITY = "parity: ort-cpu-fp32 (pruned, fp32) gives logits that are no numbers"


@BREADTH
def test_a_cut_that_fails_leaves_the_others(workspace: Path, made: Made) -> None:
    """It ended the sweep, every time: none was made after it, those before were not shown, and no line named it."""
    made[2] = ParityError(PARITY)
    done = sweep(workspace, "--drop", "1..3", "--engine", "ort-cpu-int8", out="failing")
    assert done.code == ParityError.exit_code
    then = "the other cuts are there: leave 2 out of --drop, or put that right and run the same again"
    assert done.last == f"error: drop-2: {PARITY}; {then}"
    assert (
        "Figures are of ort-cpu-fp32; not judged: ort-cpu-int8. Judged so far: 2 of 3 cuts; 2 has no figures."
        in done.stdout
    )
    folder = workspace / "failing"
    found = json.loads((folder / "sweep.json").read_text())
    assert [point["num_dropped"] for point in found["points"]] == [1, 3] and found["asked"] == [1, 2, 3]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {f"drop-1/{MANIFEST}", f"drop-3/{MANIFEST}", "sweep.json"} <= set(manifest["files"])
    made.clear()
    assert "so far" not in sweep(workspace, "--drop", "1..3", out="failing").stdout


@pytest.mark.parametrize(
    ("failing", "tried"),
    [
        ({2: StorageError("the disk is full")}, 2),
        ({1: ParityError(PARITY), 2: ParityError(PARITY)}, 2),
    ],
    ids=["disk", "dense"],
)
def test_what_is_wrong_with_every_cut_ends_the_sweep(
    workspace: Path, made: Made, failing: dict[int, TrspError], tried: int
) -> None:
    made.update(failing)
    done = sweep(workspace, "--drop", "1..3", out=f"ended-{type(failing[2]).__name__}")
    assert done.code == failing[2].exit_code and done.last == f"error: {failing[2]}"
    assert f"> [{tried}/3]" in done.stderr and f"> [{tried + 1}/3]" not in done.stderr


@BREADTH
def test_a_sweep_goes_on_where_its_model_is_no_more(workspace: Path, made: Made, tmp_path: Path) -> None:
    """The folder that it came from was asked for the number of layers, and not the sweep's own copy of the model."""
    assert sweep(workspace, "--drop", "1..2", out="begun").code == 0
    taken = Path(shutil.copytree(workspace / "begun", tmp_path / "sweep"))
    (taken / ".place").unlink()  # as on another machine
    shutil.copy(workspace / "text.txt", tmp_path)
    done = sweep(tmp_path, "--drop", "1..3")
    assert done.code == 0, done.said
    assert "model 'tiny': no such folder here; going on with the run's copy of it" in done.stderr
    assert "> dense: reused" in done.stderr and (taken / "drop-3" / "report.json").is_file()
    beyond = sweep(tmp_path, "--drop", "1..9")
    assert beyond.code == 1 and "is 6 of the model's 6 layers" in beyond.last, "told by that copy too"


@BREADTH
def test_a_sweeps_runs_are_in_use_until_it_ends(workspace: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another command did to a finished one meanwhile was written over with the report of before."""
    others: list[Done] = []

    def say(line: str) -> None:
        if line.startswith("[2/2]"):
            others.append(trsp_deploy("evaluate", "held/drop-1", cwd=workspace))

    monkeypatch.setattr(sweep_jobs, "say", say)
    assert sweep(workspace, "--drop", "1..2", out="held").code == 0
    assert [other.code for other in others] == [1] and "in use by another trsp-deploy" in others[0].last
    made[2] = KeyboardInterrupt()
    assert sweep(workspace, "--drop", "1..2", out="held").code == 130
    for count in (1, 2):
        with RunFolder(workspace / "held" / f"drop-{count}"):
            pass
