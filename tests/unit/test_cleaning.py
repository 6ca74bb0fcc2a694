"""What `clean` removes, what it says, and what it never touches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.made_run import OUTPUTS, Nothing, made_run
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, size_bytes
from trsp_deploy.errors import RunError
from trsp_deploy.pipeline import proof
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.resources.cleaning import clean, held, plan_cleaning


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def cleaned(run: Path, *keep: str) -> tuple[str, ...]:
    with held(run) as runs:
        plan = plan_cleaning(runs, keep or None)
        clean(runs, plan)
    return plan.paths


def test_the_kept_stay_and_the_rest_goes(run: Path) -> None:
    before = files(run)
    (run / "mine.txt").write_text("of my own")
    freed = sum(size_bytes(run / name) for name in ("dense", "pruned", "onnx"))
    with held(run) as runs:
        plan = plan_cleaning(runs, ("engines", "reports"))
        assert plan.freed_bytes == freed and set(plan.redone) == {step for step in OUTPUTS if "build" not in step}
        assert files(run) == before | {"mine.txt"}, "a plan removes nothing"
        clean(runs, plan)
    gone = {name for name in before if name.startswith(("dense/", "pruned/", "onnx/"))}
    assert files(run) == (before - gone) | {"mine.txt"}
    assert {finding.path for finding in verify(run).findings} == {"mine.txt"}, "the manifest names what is left"


def test_without_keep_only_leftovers_go(run: Path) -> None:
    before = files(run)
    (run / "engines" / "ort-cpu-fp32" / ".dense.partial").mkdir()
    (run / ".report.json.partial").write_text("{")
    (run / ".pruned.former").mkdir()  # of a kill between two renames
    (run / "engines" / "ort-cpu-fp32" / "dense-failed.log").write_text("error")
    (run / "checkpoints" / "prune").mkdir(parents=True)
    (run / "checkpoints" / "prune" / ".state.safetensors.partial").write_text("x")
    assert len(cleaned(run)) == 5
    assert files(run) == before and verify(run).whole


def test_what_a_killed_training_goes_on_from_goes_only_where_parts_do(run: Path) -> None:
    state = run / "checkpoints" / "prune" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_text("x" * 1000)
    assert not cleaned(run) and state.exists()
    cleaned(run, "engines", "checkpoints")
    assert state.exists()
    assert "checkpoints" in cleaned(run, "engines") and not state.exists()


def test_the_dense_models_own_text_stays(run: Path) -> None:
    text = run / "self-generated.jsonl"
    with RunFolder(run) as folder:

        def write() -> Nothing:
            text.write_text("{}")
            return Nothing()

        folder.step("self-generated", write, Nothing, settings={}, inputs={}, outputs=[text.name])
        plan = plan_cleaning((folder,), ("engines", "reports"))
    assert plan.paths and text.name not in plan.paths and "self-generated" not in plan.redone


def test_one_engine_of_several(run: Path) -> None:
    (run / "engines" / "other" / "dense").mkdir(parents=True)
    (run / "engines" / "other" / "dense" / "model.onnx").write_text("x")
    assert "engines/other" in cleaned(run, "engines/ort-cpu-fp32", "dense", "pruned", "onnx", "reports")
    assert [path.name for path in (run / "engines").iterdir()] == ["ort-cpu-fp32"]
    assert verify(run).whole
    cleaned(run, "dense", "pruned", "onnx", "reports")
    assert not (run / "engines").exists()


def test_a_later_run_makes_again_what_is_missing(run: Path) -> None:
    made: list[str] = []
    cleaned(run, "engines", "dense", "onnx", "reports")

    def make(output: str) -> Nothing:
        made.append(output)
        (run / output).mkdir()
        (run / output / "model.safetensors").write_text("again")
        return Nothing()

    with RunFolder(run) as folder:
        for step, output in OUTPUTS.items():
            folder.step(step, lambda name=output: make(name), Nothing, settings={}, inputs={}, outputs=[output])
    assert made == ["pruned"]


def test_nothing_outside_is_ever_touched(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (run / "plans").symlink_to(outside)
    (run / "onnx" / "link").symlink_to(outside)
    (run / "report.md").unlink()
    (run / "report.md").symlink_to(outside / "precious")
    for name in ("checkpoints", ".x.partial"):
        (run / name).symlink_to(outside)
    (run / "engines" / "far").symlink_to(outside)
    (outside / "y-failed.log").write_text("x")
    cleaned(run, "dense")
    assert files(outside) == {"precious", "y-failed.log"}
    assert not any((run / name).is_symlink() for name in ("plans", "report.md", "checkpoints", ".x.partial"))
    with pytest.raises(RunError, match="no such part"):
        cleaned(run, "../outside")
    with pytest.raises(RunError, match="no run of trsp-deploy"):
        cleaned(outside, "dense")
    assert {"precious", "y-failed.log"} <= files(outside)


def test_engines_that_lie_elsewhere_are_not_reached_into(run: Path, tmp_path: Path) -> None:
    (run / "engines").rename(tmp_path / "engines")
    (tmp_path / "engines" / "empty").mkdir()
    (run / "engines").symlink_to(tmp_path / "engines")
    before = sorted((tmp_path / "engines").rglob("*"))
    assert not any(name.startswith("engines") for name in cleaned(run, "engines/empty"))
    assert "engines" in cleaned(run, "dense")
    assert sorted((tmp_path / "engines").rglob("*")) == before and not (run / "engines").exists()


def test_blocks_that_have_another_name_are_not_freed(run: Path, tmp_path: Path) -> None:
    dense = run / "dense" / "model.safetensors"
    os.link(dense, tmp_path / "source.safetensors")
    os.link(run / "onnx" / "dense-fp32" / "model.onnx", run / "onnx" / "again.onnx")  # both names go
    with held(run) as runs:
        plan = plan_cleaning(runs, ("pruned", "engines", "reports"))
    by_path = {removal.path: removal for removal in plan.removals}
    assert by_path["dense"].freed_bytes == 0 and by_path["dense"].size_bytes == dense.stat().st_size
    assert plan.freed_bytes == sum(size_bytes(run / "onnx" / f"{role}-fp32") for role in ("dense", "pruned"))


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    assert cli.run(["clean", str(run), "--keep", "engines,reports", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [removal["path"] for removal in found["removals"]] == ["dense", "onnx", "pruned"] and not found["removed"]
    assert "would free" in printed.err and "export-dense-fp32" in printed.err and files(run) == before
    assert cli.run(["clean", str(run), "--keep", "engines", "--keep", "reports", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert cli.run(["clean", str(run), "--keep", "engine"]) == 1
    assert "--keep engine: no such part; did you mean 'engines'?" in capsys.readouterr().err
    assert cli.run(["clean", str(run.parent), "--keep", "engines"]) == 1
    assert "no run of trsp-deploy" in capsys.readouterr().err and not (run.parent / ".lock").exists()
    with RunFolder(run):
        assert cli.run(["clean", str(run)]) == 1
        assert "in use by another trsp-deploy" in capsys.readouterr().err
    assert cli.run(["clean", str(run), "--keep", "engines,reports"]) == 0
    assert "freed" in capsys.readouterr().out and not (run / "dense").exists()


def test_what_a_killed_parity_check_was_reading_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph in fp32 of each bf16 engine's: as large as the model, and no part of a run by any name."""
    (run / "onnx" / "dense-fp16").mkdir()
    monkeypatch.setattr(proof, "write_widened", lambda graph, widened: widened.write_text("weights"))
    at_work = proof.Proof._widened(SimpleNamespace(run=RunFolder(run)), run / "onnx" / "dense-fp16")  # type: ignore[arg-type]
    with at_work as scratch, held(run) as runs:
        assert plan_cleaning(runs, None).paths == (scratch.name,)
