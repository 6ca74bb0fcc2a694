"""Which of a run's engines is taken where none is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.breadth import BREADTH
from tests.made_run import SPEC, Nothing, made_run
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, write_json
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.results import Role
from trsp_deploy.stages import bench
from trsp_deploy.tools.measuring.subjects import common_engine, find_engine
from trsp_deploy.tools.runners.manifest import read_manifest, spec_sha256

CUSTOM = "custom"  # before ort-cpu-fp32 by its letters


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with engines ort-cpu-fp32 and custom."""
    run = made_run(tmp_path / "run")
    for role in ("dense", "pruned"):
        folder = Path(shutil.copytree(run / "engines" / SPEC.name / role, run / "engines" / CUSTOM / role))
        spec = SPEC.model_copy(update={"name": CUSTOM})
        changes = {"name": CUSTOM, "spec": spec, "spec_sha256": spec_sha256(spec)}
        write_json(folder / "manifest.json", read_manifest(folder).model_copy(update=changes))
    return run


def wants(run: Path, *engines: str) -> None:
    """Have a run's recipe name these engines."""
    text = "model: tiny\ndrop: '1'\ncalibration: {texts: text.txt}\n"
    (run / "recipe.yaml").write_text(f"{text}engines: [{', '.join(engines)}]\n")


def outdate(run: Path, role: Role) -> None:
    """Have a run's ort-cpu-fp32 be of another graph than it has by now."""
    step = f"build-{SPEC.name}-{role}"
    with RunFolder(run) as folder:
        output = f"engines/{SPEC.name}/{role}"
        folder.step(step, Nothing, Nothing, settings={}, inputs={"onnx": "another"}, outputs=[output])


@pytest.mark.parametrize(
    ("engines", "taken"),
    [
        ([SPEC.name, CUSTOM], SPEC.name),
        ([SPEC.name, "mine/custom.yaml"], SPEC.name),
        (["mine/custom.yaml", SPEC.name], CUSTOM),
        (["tensorrt-fp16", "auto", CUSTOM], SPEC.name),
        ([SPEC.name], SPEC.name),  # the other one is of an earlier recipe
        (["tensorrt-fp16"], CUSTOM),
    ],
)
def test_the_recipes_first_is_taken_as_check_does(
    engines: list[str], taken: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`triton` and `compare` took the first by its letters, and so another one than `check` had judged."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wants(run, *engines)
    assert find_engine(run, "pruned", None).parent.name == taken
    assert common_engine(run, run) == taken


def test_a_recipe_that_cannot_be_read_leaves_the_engines(run: Path) -> None:
    (run / "recipe.yaml").write_text("engines: 3\n")
    assert find_engine(run, "pruned", None).parent.name == CUSTOM


@pytest.mark.parametrize("role", ["dense", "pruned"])
def test_an_engine_that_is_outdated_of_one_model_is_not_common(role: Role, run: Path) -> None:
    """One that was outdated of the pruned model alone was chosen, and then refused, whatever else would have done."""
    wants(run, SPEC.name, CUSTOM)
    outdate(run, role)
    assert common_engine(run, run) == CUSTOM
    shutil.rmtree(run / "engines" / CUSTOM)
    with pytest.raises(RunError, match=rf"no engine that runs here \(ort-cpu-fp32: .*of another onnx/{role}-fp32"):
        common_engine(run, run)


@BREADTH
def test_a_run_in_use_is_not_compared(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each replicate opens its engines anew, and they might be others by then."""
    monkeypatch.setattr(bench, "compare_engines", lambda *_, **__: pytest.fail("was measured"))
    dense, pruned = (str(run / "engines" / SPEC.name / role) for role in ("dense", "pruned"))
    for paths in ([str(run)], [str(run), str(run)], [dense, pruned]):
        with RunFolder(run):
            assert cli.run(["compare", *paths]) == 1
        assert "in use by another trsp-deploy" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["engine/manifest.json", "model.onnx", None])
def test_an_engine_that_was_made_anew_while_it_was_measured(
    changed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    for name in ("engine/manifest.json", "model.onnx"):
        (tmp_path / name).write_text("1")

    def measure(*_: Any, **__: Any) -> str:
        if changed is not None:
            (tmp_path / changed).write_text("22")
        return "measured"

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "measure_rates", lambda device: None)
    pair: Any = [SimpleNamespace(path=tmp_path / name, device="cpu", vocabulary=9) for name in ("engine", "model.onnx")]
    if changed is None:
        assert bench.compare_engines(*pair, "x", BenchSettings(), 0) == "measured"
        return
    with pytest.raises(RunError, match=f"{changed.partition('/')[0]}: was made anew while it was measured"):
        bench.compare_engines(*pair, "x", BenchSettings(), 0)
