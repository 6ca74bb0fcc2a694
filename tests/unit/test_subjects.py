"""Which of a run's engines is taken where none is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.made_run import SPEC, Nothing, made_run
from trsp_deploy.artifacts import RunFolder, write_json
from trsp_deploy.errors import RunError
from trsp_deploy.results import Role
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
