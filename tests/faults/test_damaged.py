"""A flipped byte, a file cut short, a file of another model in its place: found by fingerprint, named, made again.

What cannot be made again (a baseline, an engine outside its run, a plan that a user may have edited) is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import Done, Job, run_in
from tests.samples import made_up
from trsp_deploy.artifacts import RunLayout, provenance, write_json
from trsp_deploy.tools.reports.baselines import SCHEMA_VERSION, Baseline, engine_baseline, this_machine

pytestmark = pytest.mark.faults

ENGINE = "engines/ort-cpu-fp32"
# What is damaged -> the step that makes it, and what is put in its place by a swap.
ARTEFACTS = {
    "dense/model.safetensors": ("dense", "pruned/model.safetensors"),
    "pruned/model.safetensors": ("prune", "dense/model.safetensors"),
    "pruned/tokenizer.json": ("prune", "pruned/config.json"),
    "onnx/dense-fp32/model.onnx": ("export-dense-fp32", "onnx/pruned-fp32/model.onnx"),
    "onnx/pruned-fp32/model.onnx": ("export-pruned-fp32", "onnx/dense-fp32/model.onnx"),
    f"{ENGINE}/dense/model.onnx": ("build-ort-cpu-fp32-dense", f"{ENGINE}/pruned/model.onnx"),
    f"{ENGINE}/pruned/model.onnx.data": ("build-ort-cpu-fp32-pruned", f"{ENGINE}/dense/model.onnx.data"),
    f"{ENGINE}/pruned/manifest.json": ("build-ort-cpu-fp32-pruned", f"{ENGINE}/dense/manifest.json"),
}
RECORDS = {
    "records/plan.json": ("plan", "records/prune.json"),
    "records/prune.json": ("prune", "records/plan.json"),
    "records/export-dense-fp32.json": ("export-dense-fp32", "records/export-pruned-fp32.json"),
    "records/build-ort-cpu-fp32-dense.json": ("build-ort-cpu-fp32-dense", "records/build-ort-cpu-fp32-pruned.json"),
    "records/parity-onnx-dense-fp32.json": ("parity-onnx-dense-fp32", "records/parity-onnx-pruned-fp32.json"),
    "records/bench-ort-cpu-fp32.json": ("bench-ort-cpu-fp32", "records/dense.json"),
    "records/evaluate-manual-dense.json": ("evaluate-manual-dense", "records/evaluate-manual-pruned.json"),
}


def flip(path: Path, other: Path) -> None:
    """The lowest bit of a byte in the middle; of text that of a digit, which leaves it well-formed."""
    data = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    place = len(data) // 2 if path.suffix not in (".json", ".yaml") else digits[len(digits) // 2]
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES = (flip, truncate, swap)
each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@pytest.fixture
def copied(workspace: Path, undisturbed: tuple[Job, Done], request) -> Job:
    """A finished run whose files are its own: in the run itself `dense/` and the user's model share their blocks."""
    job = Job(workspace, f"damaged-{request.node.nodeid.rpartition('::')[2].replace('/', '_')}")
    shutil.copytree(undisturbed[0].run, job.run)
    return job


@each_damage
@pytest.mark.parametrize("name", [*ARTEFACTS, *RECORDS])
def test_made_again(workspace, undisturbed, copied, record_property, name, damage):
    step, other = {**ARTEFACTS, **RECORDS}[name]
    record_property("fault", damage.__name__)
    record_property("place", name)
    damage(copied.run / name, copied.run / other)
    again = run_in(workspace, copied.arguments)
    assert again.code == 0, again.stderr
    assert step in again.steps("done"), again.stderr
    said = [line for line in again.stderr.splitlines() if line.startswith(f"> {step}: ") and "again" in line]
    if name in ARTEFACTS:
        assert said and name.startswith(said[0].partition(": ")[2].split(" is not ")[0]) and "SHA-256" in said[0]
    elif damage is not swap:  # a whole record of another step is as good as none
        assert said and name in said[0], again.stderr
    assert copied.artefacts() == undisturbed[0].artefacts()
    assert run_in(workspace, copied.arguments).steps("done") == []


@each_damage
@pytest.mark.parametrize("name", ["calibration-1", "evaluation-manual"])
def test_a_text_is_copied_again(workspace, undisturbed, copied, record_property, name, damage):
    record_property("fault", damage.__name__)
    record_property("place", f"texts/{name}.json")
    text = RunLayout(copied.run).text
    damage(text(name), text("calibration-1" if name != "calibration-1" else "evaluation-manual"))
    again = run_in(workspace, copied.arguments)
    assert again.code == 0 and again.steps("done") == [], again.stderr
    assert copied.artefacts() == undisturbed[0].artefacts()


@each_damage
@pytest.mark.parametrize("kind", ["run", "repository"])
def test_a_manifest_is_what_verify_names(workspace, undisturbed, copied, record_property, kind, damage):
    """And none of the files that it speaks of; a rerun, or another `triton`, writes it again."""
    record_property("fault", damage.__name__)
    record_property("place", f"MANIFEST.json of a {kind}")
    folder, again = copied.run, copied.arguments
    if kind == "repository":
        folder = workspace / f"{copied.run.name}-served"
        again = ["triton", copied.run.name, "--name", "served", "--out", folder.name]
        assert run_in(workspace, again).code == 0
    other = copied.run / "report.json" if kind == "repository" else copied.run / ENGINE / "pruned" / "manifest.json"
    damage(folder / "MANIFEST.json", other)
    done = run_in(workspace, ["verify", folder.name])
    assert done.code == 1 and done.is_one_line and f"{folder.name}/MANIFEST.json: " in done.last, done.stderr
    if kind == "repository":
        shutil.rmtree(folder)
    assert run_in(workspace, again).code == 0
    done = run_in(workspace, ["verify", folder.name])
    assert done.code == 0, done.stderr


@each_damage
def test_external_data_of_a_graph(workspace, undisturbed, copied, record_property, damage):
    """torch's exporter keeps weights beside the graph at every size, Optimum's above 2 GB."""
    record_property("fault", damage.__name__)
    name = "onnx/dense-fp32/model.onnx_data"
    record_property("place", name)
    command = ["export", copied.run.name, "--set", "export.exporter=dynamo"]
    assert run_in(workspace, command).code == 0
    whole = copied.artefacts()
    assert name in whole
    damage(copied.run / name, copied.run / "onnx/pruned-fp32/model.onnx_data")
    again = run_in(workspace, command)
    assert again.code == 0 and again.steps("done") == ["export-dense-fp32"], again.stderr
    assert "onnx/dense-fp32 is not what was made (SHA-256)" in again.stderr
    assert copied.artefacts() == whole


@each_damage
@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "manifest.json"])
@pytest.mark.parametrize("command", ["generate", "inspect", "triton", "compare"])
def test_engine_is_not_used(workspace, copied, record_property, command, file, damage):
    """By the commands that take engines as they are."""
    record_property("fault", damage.__name__)
    record_property("place", f"engine, {command}")
    engine = copied.run / ENGINE / "pruned"
    damage(engine / file, engine.parent / "dense" / file)
    run, folder = copied.run.name, str(engine.relative_to(workspace))
    arguments = {
        "generate": [folder, "--prompt", "The", "--max-tokens", "2"],
        "inspect": [folder],
        "triton": [run, "--out", f"{run}-repository"],
        "compare": [run, "--budget", "1", "--set", "prompt_tokens=8", "--set", "new_tokens=2"],
    }[command]
    done = run_in(workspace, [command, *arguments])
    assert done.code == 1 and done.is_one_line, done.stderr
    assert "ort-cpu-fp32" in done.last and (file in done.last or "SHA-256" in done.last), done.last
    assert "build it again" in done.last or "trsp-deploy build" in done.last
    assert not (workspace / f"{run}-repository").exists()


@each_damage
def test_plan_is_refused_or_taken_as_edited(workspace, copied, record_property, damage):
    """A plan may be edited by hand and has no seal: what fits the model is applied, and said; the rest is refused."""
    record_property("fault", damage.__name__)
    record_property("place", "plan.json")
    path = copied.run / "plan.json"
    other = json.loads(path.read_text())
    write_json(workspace / "other-plan.json", {**other, "dropped": [0], "kept": [1, 2, 3]})
    damage(path, workspace / "other-plan.json")
    done = run_in(workspace, copied.arguments)
    if damage is truncate:
        assert done.code == 1 and done.is_one_line and "plan.json" in done.last, done.stderr
        path.unlink()
        done = run_in(workspace, copied.arguments)
        assert done.code == 0 and "plan" in done.steps("done"), done.stderr
    else:
        assert "plan.json was edited by hand: dropping" in done.stderr or done.is_one_line, done.stderr


@each_damage
def test_baseline_is_refused(workspace, undisturbed, record_property, damage):
    record_property("fault", damage.__name__)
    record_property("place", "baseline.json")

    def made(engine: str) -> Baseline:
        engines = {engine: engine_baseline(made_up(replicates=3), {})}
        return Baseline(schema_version=SCHEMA_VERSION, machine=this_machine(), engines=engines, provenance=provenance())

    path, other = workspace / "baseline.json", workspace / "other-baseline.json"
    write_json(path, made("ort-cpu-fp32"))
    write_json(other, made("ort-cpu-int8"))
    damage(path, other)
    run = undisturbed[0].run.name
    done = run_in(workspace, ["check", run, "--against", path.name, "--max-speedup-loss", "3%", "--budget", "1"])
    assert done.code == 1 and done.is_one_line and "baseline.json" in done.last, done.stderr
    assert not done.steps("started")


@each_damage
def test_recipe_of_a_run(workspace, copied, record_property, damage):
    """The recipe may be edited too; the whole command writes it again, and the others refuse what they cannot read."""
    record_property("fault", damage.__name__)
    record_property("place", "recipe.yaml")
    path = copied.run / "recipe.yaml"
    damage(path, copied.run / "plan.json")
    done = run_in(workspace, ["export", copied.run.name])
    assert done.code == 0 or (done.is_one_line and "recipe.yaml" in done.last), done.stderr
    assert run_in(workspace, copied.arguments).code == 0


def test_training_checkpoint(tmp_path, record_property):
    """What a killed training goes on from is itself or nothing."""
    import random

    import torch

    from trsp_deploy.tools.training.checkpoints import Checkpoints

    record_property("fault", "flip")
    record_property("place", "training checkpoint")
    checkpoints = Checkpoints(tmp_path / "checkpoints", "key", 0)
    state = {"step": 3, "weights": {"w": torch.arange(512, dtype=torch.float32)}}
    checkpoints.save(state)
    path = tmp_path / "checkpoints" / "state.safetensors"
    whole = path.read_bytes()
    places = random.Random(1).sample(range(len(whole)), 400)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        found = checkpoints.load()
        assert found is None or (found["step"] == 3 and torch.equal(found["weights"]["w"], state["weights"]["w"])), (
            place
        )
    for place in places:
        path.write_bytes(whole[:place])
        assert checkpoints.load() is None, place
    record_property("tried", 2 * len(places))
