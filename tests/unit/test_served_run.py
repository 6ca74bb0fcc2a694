"""What `bench-server --run` does to the run: it is held while the server is measured, and changed at the end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.made_run import made_run
from tests.samples import made_up_served
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, steps
from trsp_deploy.cli import running
from trsp_deploy.errors import RunError, StorageError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.runs import save_recipe
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import Served
from trsp_deploy.stages import serve_bench
from trsp_deploy.tools.triton_server import load


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with a recipe; whoever measures a server finds made-up samples."""
    run = made_run(tmp_path / "run")
    recipe = {"model": "tiny", "drop": "1", "calibration": {"texts": "text.txt"}, "engines": ["ort-cpu-fp32"]}
    monkeypatch.setattr(load, "find_load_generator", lambda environment: SimpleNamespace())
    monkeypatch.setattr(serve_bench, "measure_served", lambda *_, **__: made_up_served())
    monkeypatch.setattr(Pipeline, "report", lambda self: None)
    monkeypatch.setattr(running, "check_memory", lambda *_, **__: None)  # it would read the model and texts of a run
    with RunFolder(run) as folder:
        save_recipe(folder, Recipe.model_validate(recipe))
        folder.write_manifest()
    return run


def bench_server(run: Path, *options: str) -> int:
    return cli.run(["bench-server", "repository", "--run", str(run), *options])


def test_a_run_in_use_is_said_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said after the measurement, of which served.json had been written beside who was at work there."""
    monkeypatch.setattr(serve_bench, "measure_served", lambda *_, **__: pytest.fail("was measured"))
    with RunFolder(run):
        assert bench_server(run) == 1
    assert f"{run}: in use by another trsp-deploy" in capsys.readouterr().err
    assert not (run / "served.json").exists() and (run / "MANIFEST.json").is_file()


def test_a_measurement_that_is_left_out_is_said_once(run: Path) -> None:
    """It was looked at for the report and again for its pages."""
    (run / "served.json").write_text("{}")
    said: list[str] = []
    proof = Pipeline(RunFolder(run), Recipe(model="tiny"), say=said.append).proof
    assert proof.served() is None and proof.served() is None
    assert said == [f"{run / 'served.json'}: is no measurement of this version; it is left out of the report"]


def test_an_engine_of_any_name_keeps_when_it_was_measured() -> None:
    """That of an engine called "server" was the server's."""
    assert steps.SERVED not in {steps.bench(name) for name in ("server", "served", "")}
    assert not steps.SERVED.startswith(steps.MEASURING)


def test_nobody_else_enters_a_run_while_its_server_is_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any, **__: Any) -> Served:
        with pytest.raises(RunError, match="in use by another"), RunFolder(run):
            pass
        assert (run / "MANIFEST.json").is_file(), "nothing of the run is another yet"
        return made_up_served()

    monkeypatch.setattr(serve_bench, "measure_served", measure)
    assert bench_server(run) == 0


def test_the_manifest_goes_before_what_it_names(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two left a manifest that named an earlier served.json."""

    def report(job: Pipeline) -> None:
        assert not (run / "MANIFEST.json").exists()
        assert json.loads((run / "served.json").read_text())["engine"] == "ort-cpu-fp32"
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "report", report)
    assert bench_server(run) == 130
    assert not (run / "MANIFEST.json").exists()


def test_what_cannot_be_written_has_been_shown(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, value: object) -> None:
        raise StorageError(f"{path}: the disk is full")

    monkeypatch.setattr("trsp_deploy.artifacts.write_json", refuse)
    for options, file in (([], run / "served.json"), (["--out", str(run.parent / "raw.json")], "raw.json")):
        assert bench_server(run, *options) == 1
        said = capsys.readouterr()
        assert "CONFIRMED as served on ort-cpu-fp32" in said.out and f"{file}: the disk is full" in said.err
