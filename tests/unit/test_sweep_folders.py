"""A sweep's folder: verified and signed with every run within, and never taken for a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.made_run import Nothing, made_run, made_sweep
from trsp_deploy import cli
from trsp_deploy.artifacts import MANIFEST, RunFolder, steps
from trsp_deploy.errors import RunError
from trsp_deploy.results import ROLES
from trsp_deploy.sweep import _adopt_dense, _of_earlier_call
from trsp_deploy.tools.delivery.verification import manifest_of, verify
from trsp_deploy.tools.resources.cleaning import clean, held, plan_cleaning


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return made_sweep(tmp_path / "sweep")


def test_what_was_cleaned_away_is_not_adopted(sweep: Path, tmp_path: Path) -> None:
    """Records stay behind `clean`; the engine of one that nobody asks for any more is gone."""
    source = sweep / "drop-4"
    shutil.rmtree(source / "engines" / "ort-cpu-fp32" / "dense")
    _adopt_dense(RunFolder(source), RunFolder(tmp_path / "next"))
    records = {path.stem for path in (tmp_path / "next" / "records").iterdir()}
    assert "dense" in records and "build-ort-cpu-fp32-dense" not in records


def test_whatever_is_measured_of_the_dense_model_alone_is_adopted(tmp_path: Path) -> None:
    """Its answers to choice tasks were not: thousands of prompts, asked anew in each of a sweep's runs."""
    names = {
        role: {
            steps.parity("onnx", role, "fp32"),
            steps.parity("e", role, "int8"),
            steps.parity("own-dense-cpu", role, "fp32"),
            steps.evaluate("text", role),
            steps.evaluate("text", role, "e"),
            steps.zero_shot("e", role),
        }
        for role in ROLES
    }
    with RunFolder(tmp_path / "drop-2") as first:
        for name in (*names["dense"], *names["pruned"], steps.bench("e")):
            first.step(name, Nothing, Nothing, settings={}, inputs={})
    _adopt_dense(first, RunFolder(tmp_path / "drop-4"))
    assert {path.stem for path in (tmp_path / "drop-4" / "records").iterdir()} == names["dense"]


def test_a_run_keeps_its_own_engine_with_what_was_measured_of_it(tmp_path: Path) -> None:
    """A smaller cut that came later had an engine of its own, and every call measured the others' dense one anew."""
    runs = [RunFolder(tmp_path / name) for name in ("drop-2", "drop-3")]
    measured = steps.evaluate("text", "dense", "e")
    for run in runs:
        with run:
            _build_dense(run, run.path.name)  # two builds of one graph differ, by their times
            run.step(
                measured, Nothing, Nothing, settings={}, inputs={"engine": run.layout.engine("e", "dense"), "text": "1"}
            )
    before = runs[1].record(measured)
    _adopt_dense(*runs)
    assert runs[1].record(measured) == before, "of the engine that it has"
    shutil.rmtree(runs[1].layout.engines)
    _adopt_dense(*runs)
    assert runs[1].record(measured) == runs[0].record(measured)
    assert (runs[1].layout.engine("e", "dense") / "engine").read_text() == "drop-2"
    assert not list(runs[1].path.rglob(".*.partial"))


def test_a_cut_that_comes_later_has_the_dense_engine_of_those_before(tmp_path: Path) -> None:
    assert _of_earlier_call(RunFolder(tmp_path), tmp_path / "drop-1") is None
    sweep = RunFolder(made_sweep(tmp_path / "sweep"))
    source = _of_earlier_call(sweep, sweep.path / "drop-1")
    assert source is not None and source.path == sweep.path / "drop-4"
    assert _of_earlier_call(sweep, sweep.path / "drop-4") is None, "it has its own"
    for record in (sweep.path / "drop-4" / "records").glob("*-dense*"):
        record.unlink()
    source = _of_earlier_call(sweep, sweep.path / "drop-1")
    assert source is not None and source.path == sweep.path / "drop-10", "the first was stopped before its engines"


def _build_dense(run: RunFolder, content: str) -> None:
    folder = run.layout.engine("e", "dense")

    def work() -> Nothing:
        folder.mkdir(parents=True)
        (folder / "engine").write_text(content)
        return Nothing()

    output = run.layout.below(folder)
    run.step(steps.build("e", "dense"), work, Nothing, settings={}, inputs={"onnx": "0"}, outputs=[output])


def found(folder: Path) -> set[tuple[str, str]]:
    return {(finding.state, finding.path) for finding in verify(folder).findings}


def test_a_finished_sweep_names_its_root_and_each_runs_manifest(sweep: Path) -> None:
    names = set(json.loads((sweep / MANIFEST).read_text())["files"])
    assert names == {
        *("recipe.yaml", "sweep.json", "sweep.html", "records/dense.json", "records/plans.json"),
        *("dense/model.safetensors", "plans/model.safetensors", "drop-4/MANIFEST.json", "drop-10/MANIFEST.json"),
    }
    whole = verify(sweep)
    assert (whole.whole, whole.kind, whole.against) == (True, "sweep", MANIFEST)
    assert whole.checked == len(names) + sum(verify(sweep / f"drop-{count}").checked for count in (4, 10))
    assert manifest_of(sweep) == sweep / MANIFEST


def test_each_damage_is_named_from_the_sweeps_folder(sweep: Path) -> None:
    for name in ("sweep.json", "drop-4/pruned/model.safetensors", "plans/model.safetensors"):
        (sweep / name).write_text("tampered")
    (sweep / "drop-10" / "report.md").unlink()
    (sweep / "drop-10" / "recipe.yaml").unlink()
    (sweep / "drop-4" / "mine.txt").write_text("mine")
    (sweep / "drop-6").mkdir()
    (sweep / "drop-6" / "recipe.yaml").write_text("model: tiny\n")
    assert found(sweep) == {
        ("changed", "sweep.json"),
        ("changed", "drop-4/pruned/model.safetensors"),
        ("changed", "plans/model.safetensors"),
        ("missing", "drop-10/report.md"),
        ("missing", "drop-10/recipe.yaml"),
        ("unknown", "drop-4/mine.txt"),
        ("unknown", "drop-6"),
    }


def test_a_run_that_a_sweep_was_finished_without_is_one_finding(sweep: Path) -> None:
    """A larger range was asked for and given up: each of the files of the last run was a line of its own."""
    made_run(sweep / "drop-12", finished=False)
    (sweep / "drop-12" / "checkpoints").mkdir()
    with RunFolder(sweep) as folder:
        folder.write_manifest()
    (finding,) = verify(sweep).findings
    assert (finding.state, finding.path) == ("unknown", "drop-12")
    assert f"`trsp-deploy report {sweep / 'drop-12'}` and the same `trsp-deploy sweep` make it a part" in finding.detail
    with RunFolder(sweep / "drop-12") as run:
        run.write_manifest()
    with RunFolder(sweep) as folder:
        folder.write_manifest()
    assert verify(sweep).whole


def test_a_run_that_was_exchanged_whole_is_found(sweep: Path, tmp_path: Path) -> None:
    """Its own manifest vouches for it, and the sweep's for another."""
    shutil.rmtree(sweep / "drop-4")
    shutil.move(made_run(tmp_path / "other"), sweep / "drop-4")
    assert verify(sweep / "drop-4").whole and found(sweep) == {("changed", f"drop-4/{MANIFEST}")}
    (sweep / "drop-4" / MANIFEST).write_text("{")
    assert ("unreadable", f"drop-4/{MANIFEST}") in found(sweep)
    shutil.move(sweep / "drop-4", tmp_path / "elsewhere")
    (sweep / "drop-4").symlink_to(tmp_path / "elsewhere")
    assert {state for state, _ in found(sweep)} == {"outside"}


def test_a_sweep_that_is_not_finished_is_held_against_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = made_sweep(tmp_path / "sweep", finished=False)
    with RunFolder(sweep / "drop-10") as run:
        run.outdate_manifest()
    assert cli.run(["verify", str(sweep)]) == 0
    assert "has no MANIFEST.json (the same `trsp-deploy sweep` writes it)" in capsys.readouterr().out
    for name in ("plans", "drop-4/pruned", "drop-10/dense"):
        (sweep / name / "model.safetensors").write_text("tampered")
    assert found(sweep) == {
        ("changed", "plans"),
        ("changed", "drop-4/pruned/model.safetensors"),
        ("changed", "drop-10/dense"),
    }
    with pytest.raises(RunError, match="its `trsp-deploy sweep` again finishes the sweep and writes it"):
        manifest_of(sweep)


def test_a_manifest_that_is_there_holds(sweep: Path) -> None:
    """A run that goes on, or is cleaned, is another than the sweep's manifest names."""
    with RunFolder(sweep / "drop-4") as run:
        clean((run,), plan_cleaning((run,), ("pruned",)))
        assert not (sweep / MANIFEST).exists() and verify(sweep).whole
        with RunFolder(sweep) as folder:
            folder.write_manifest()
        run.outdate_manifest()
    assert not (sweep / MANIFEST).exists()


def test_a_sweep_is_cleaned_with_every_run_within(sweep: Path, tmp_path: Path) -> None:
    elsewhere = made_run(tmp_path / "elsewhere")
    (sweep / "drop-6").symlink_to(elsewhere)
    (sweep / "drop-4" / "checkpoints").mkdir()
    with held(sweep) as runs:
        assert [run.path.name for run in runs] == ["sweep", "drop-4", "drop-10"]
        plan = plan_cleaning(runs, ("dense", "plans", "pruned", "engines", "reports"))
        assert plan.paths == ("drop-10/onnx", "drop-4/checkpoints", "drop-4/onnx")
        exports = {f"{run}/export-{role}-fp32" for run in ("drop-4", "drop-10") for role in ("dense", "pruned")}
        assert set(plan.redone) == exports
        clean(runs, plan)
    assert not (sweep / "drop-10" / "onnx").exists() and (elsewhere / "onnx").exists()
    assert all(verify(sweep / f"drop-{count}").whole for count in (4, 10))
    assert found(sweep) == {("outside", "drop-6")}, "as before it was cleaned"


def test_a_cleaned_sweep_is_whole_and_what_was_wrong_with_it_still_is(sweep: Path) -> None:
    """Its manifest was gone, and by its records what `clean` had removed was missing."""
    for folder in (sweep, sweep / "drop-4"):
        (folder / f"{MANIFEST}.sig").write_text("of what they were")
    assert cli.run(["clean", str(sweep), "--keep", "engines,reports"]) == 0
    assert cli.run(["verify", str(sweep)]) == 0 and verify(sweep).against == MANIFEST
    names = set(json.loads((sweep / MANIFEST).read_text())["files"])
    assert {"sweep.json", "drop-4/MANIFEST.json"} <= names and "plans/model.safetensors" not in names
    assert not list(sweep.rglob("*.sig")), "no signature of another manifest, which would look forged"
    (sweep / "sweep.json").write_text("tampered")
    with RunFolder(sweep / "drop-10") as run:
        (run.path / "plan.json").write_text("tampered")
    (sweep / "drop-4" / MANIFEST).write_text((sweep / "drop-10" / MANIFEST).read_text())
    wrong = {("changed", name) for name in ("sweep.json", "drop-10/plan.json", "drop-4/MANIFEST.json")}
    assert wrong <= found(sweep)
    assert cli.run(["clean", str(sweep), "--keep", "reports"]) == 0
    assert wrong <= found(sweep)


def test_a_sweep_of_which_a_run_goes_on_is_not_cleaned(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(sweep.rglob("*"))
    with RunFolder(sweep / "drop-10"):
        assert cli.run(["clean", str(sweep), "--keep", "reports"]) == 1
    assert f"{sweep / 'drop-10'}: in use by another trsp-deploy" in capsys.readouterr().err
    assert set(before) - set(sweep.rglob("*")) == set()


@pytest.mark.parametrize(
    "command",
    [
        *(["report"], ["export"], ["build"], ["bench"], ["evaluate"], ["baseline"], ["compare"]),
        *(["check", "--min-speedup", "1.1"], ["push", "me/model"], ["triton", "--dense", "--out", "repository"]),
    ],
    ids=lambda command: command[0],
)
def test_commands_of_a_run_name_one_of_the_sweeps(
    sweep: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(sweep.rglob("*"))
    assert cli.run([command[0], str(sweep), *command[1:]]) == 1
    said = f"error: {sweep}: is a sweep and no run; give one of its runs, such as {sweep}/drop-4\n"
    assert capsys.readouterr().err == said
    assert sorted(sweep.rglob("*")) == before


def test_a_run_and_a_sweep_have_each_a_folder_of_their_own(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run")
    for arguments, said in (
        (["prune-and-build", "--drop", "1", "--out", str(sweep)], f"{sweep}: is a sweep and no run"),
        (["sweep", "--drop", "1..2", "--out", str(run)], f"{run}: is a run of one cut and no sweep; choose another"),
    ):
        assert cli.run([*arguments, "--model", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert verify(sweep).whole and verify(run).whole
