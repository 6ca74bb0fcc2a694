"""Every file that is missing, changed, unknown or outside is named; and what was signed is what is there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.made_run import OUTPUTS, SPEC, Nothing, made_run
from trsp_deploy import cli
from trsp_deploy.artifacts import (
    ENGINE_MANIFEST,
    MANIFEST,
    RunFolder,
    RunManifest,
    fingerprint,
    provenance,
    write_json,
)
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.recipe import read_engine_spec, read_recipe
from trsp_deploy.stages.serve_bench import Address, LoadSettings, measure_served
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel, read_repository
from trsp_deploy.tools.runners import check_fresh
from trsp_deploy.tools.runners.manifest import Bound, check_manifest, read_manifest
from trsp_deploy.tools.triton_server import process
from trsp_deploy.tools.triton_server.load import LoadGenerator

ENGINE = "engines/ort-cpu-fp32/pruned"
ONNX = "onnx/pruned-fp32"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "1" / "model.py").write_text("pass")
    (folder / "README.md").write_text("How to serve it.")
    model = ServedModel(
        name="m",
        role="pruned",
        engine="e",
        backend="onnxruntime-cpu",
        backend_version="1",
        precision="fp32",
        packages=(),
        max_batch=1,
        max_length=8,
        files={"1/model.py": fingerprint(folder / "m" / "1" / "model.py")},
    )
    manifest = RepositoryManifest(
        models=(model,),
        packages=(),
        gpu=None,
        files={"README.md": fingerprint(folder / "README.md")},
        container="c",
        provenance=provenance(),
    )
    write_json(folder / MANIFEST, manifest)
    return folder


def test_two_models_of_one_role_are_not_compared_by_chance(repository: Path) -> None:
    manifest = read_repository(repository)
    again = manifest.models[0].model_copy(update={"name": "n"})
    with pytest.raises(
        RunError, match="'m' and 'n' are both pruned: a comparison is of one dense and one pruned model"
    ):
        manifest.model_copy(update={"models": (*manifest.models, again)}).texts  # noqa: B018 (a property that refuses)


@pytest.mark.parametrize("gone", ["m/1/model.py", "m"])
def test_a_server_of_models_that_are_gone_is_not_measured(repository: Path, gone: str) -> None:
    """It was told of an engine called `engine`, to be built, and of a tokenizer by a traceback."""
    path = repository / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = f"{repository}: m/1/model.py is not there any more (`trsp-deploy verify {repository}` names all"
    with pytest.raises(RunError, match=re.escape(words)):
        measure_served(
            repository, lambda: contextlib.nullcontext(Address("", "")), LoadGenerator(Path("none")), LoadSettings()
        )


def test_an_engine_that_is_gone_is_built_by_the_name_that_it_had(run: Path) -> None:
    """That of its folder is its model's."""
    engine = run / ENGINE
    shutil.rmtree(engine)
    for folder, again in ((engine, str(run)), (run / "nowhere", "RUN --engine NAME")):
        with pytest.raises(EngineUnavailable, match=f"no engine here; build it again: trsp-deploy build {again}$"):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("engines", "more"),
    [
        ("[auto]", ""),
        ("[ort-cpu-int8, ort-cpu-fp32]", ""),
        ("[ort-cpu-int8, mine/ort-cpu-fp32.yaml]", ""),
        ("[ort-cpu-int8]", " --engine ort-cpu-fp32"),
        ("3", " --engine ort-cpu-fp32"),
    ],
)
def test_an_engine_that_its_recipe_names_is_built_with_the_others(engines: str, more: str, run: Path) -> None:
    """By `--engine` it became the recipe's only one, and the next report was without the others; of a spec's file it
    was refused."""
    (run / "recipe.yaml").write_text(f"model: tiny\nengines: {engines}\n")
    shutil.rmtree(run / ENGINE)
    with pytest.raises(EngineUnavailable, match=f"no engine here; build it again: trsp-deploy build {run}{more}$"):
        read_manifest(run / ENGINE)


def found(folder: Path) -> set[tuple[str, str]]:
    return {(finding.state, finding.path) for finding in verify(folder).findings}


def test_a_finished_run_is_whole(run: Path) -> None:
    assert verify(run).whole and verify(run).against == MANIFEST
    names = json.loads((run / MANIFEST).read_text())["files"]
    assert set(names) == {
        path.relative_to(run).as_posix()
        for path in run.rglob("*")
        if path.is_file() and path.name not in (".lock", MANIFEST)
    }


@pytest.mark.parametrize(
    "file", ["dense/model.safetensors", "onnx/pruned-fp32/model.onnx", f"{ENGINE}/model.onnx.data"]
)
def test_each_damage_is_named(run: Path, file: str) -> None:
    path = run / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert found(run) == {("changed", file)}
    path.write_bytes(content[:10])
    assert found(run) == {("changed", file)}
    path.unlink()
    assert found(run) == {("missing", file)}
    path.write_bytes(content)
    (path.parent / "more.py").write_text("print(1)")
    assert found(run) == {("unknown", f"{path.parent.relative_to(run)}/more.py")}


@pytest.mark.parametrize("kind", ["run", "repository"])
def test_a_manifest_is_itself_named_as_what_is_damaged(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another digit of a file's SHA-256 is no damage of the file; a manifest without a seal is as it was."""
    folder: Path = request.getfixturevalue(kind)
    manifest = folder / MANIFEST
    values = json.loads(manifest.read_text())
    digests = values["files"] if kind == "run" else values["models"][0]["files"]
    name = next(iter(digests))
    digests[name] = ("1" if digests[name][0] == "0" else "0") + digests[name][1:]
    manifest.write_text(json.dumps(values))
    assert cli.run(["verify", str(folder)]) == 2
    said = capsys.readouterr()
    assert "unreadable: MANIFEST.json: damaged, unsafe, or of another version (is not what was written" in said.out
    assert name not in said.out + said.err
    del values["sha256"]
    manifest.write_text(json.dumps(values))
    assert found(folder) == {("changed", name if kind == "run" else f"m/{name}")}


def test_an_engines_manifest_in_a_run_does_not_stand_for_the_run(run: Path) -> None:
    (run / "dense" / "model.safetensors").write_bytes(b"")
    shutil.copy(run / ENGINE / ENGINE_MANIFEST, run)
    with pytest.raises(RunError, match=r"holds an engine's manifest\.json and what a run holds"):
        verify(run)


def test_records_and_reports_are_among_them(run: Path) -> None:
    (run / "records" / "prune.json").write_text("{}")
    (run / "report.html").write_text("fine")
    (run / "recipe.yaml").unlink()
    states = {("changed", "records/prune.json"), ("changed", "report.html"), ("missing", "recipe.yaml")}
    assert found(run) == states


def test_what_lies_beside_is_nobodys(run: Path) -> None:
    (run / "checkpoints" / "prune").mkdir(parents=True)
    (run / "checkpoints" / "prune" / "state.safetensors").write_text("x")
    for beside in ("dense-failed.log", "dense-trtexec.engine"):
        (run / "engines" / "ort-cpu-fp32" / beside).write_text("x")
    assert verify(run).whole


def test_a_signature_may_come_change_and_go(run: Path) -> None:
    engine = next((run / "engines").glob("*/*"))
    before = fingerprint(engine)
    for content in (b"one", b"another"):
        (engine / "manifest.json.sig").write_bytes(content)
        with RunFolder(run) as folder:
            folder.write_manifest()
        assert fingerprint(engine) == before and verify(run).whole
    (engine / "manifest.json.sig").unlink()
    assert verify(run).whole
    (engine / "more.sig").write_bytes(b"no signature of it")
    assert not verify(run).whole and fingerprint(engine) != before


def test_an_unfinished_run_is_held_against_its_records(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", finished=False)
    assert verify(run).whole and verify(run).against == "records" and verify(run).checked == len(OUTPUTS) + 1
    (run / "pruned" / "model.safetensors").write_text("other")
    (run / ENGINE / "model.onnx").unlink()
    shutil.rmtree(run / "onnx" / "dense-fp32")
    (run / "records" / "dense.json").write_text("{")
    assert found(run) == {
        ("changed", "pruned"),
        ("missing", f"{ENGINE}/model.onnx"),
        ("missing", "onnx/dense-fp32"),
        ("unreadable", "records/dense.json"),
    }
    said = [finding.detail for finding in verify(run).findings if not finding.path.startswith(ENGINE)]
    assert not any("manifest" in detail for detail in said), "there is none"


def test_links_that_leave_an_unfinished_run_are_not_followed(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", finished=False)
    file = run / "pruned" / "model.safetensors"
    file.rename(tmp_path / "elsewhere")  # the very same bytes
    file.symlink_to(tmp_path / "elsewhere")
    assert found(run) == {("outside", "pruned/model.safetensors")}


def test_of_an_engine_the_graph_that_it_was_compiled_from_is_held_too_and_its_log_is_not(run: Path) -> None:
    engine = run / ENGINE
    for name in ("graph.onnx", "build.log"):
        (engine / name).write_text("made")
    beside = {"graph.onnx": fingerprint(engine / "graph.onnx")}
    write_json(engine / ENGINE_MANIFEST, read_manifest(engine).model_copy(update={"beside": beside}))
    assert verify(engine).whole and verify(engine).checked == len(read_manifest(engine).files) + 1
    (engine / "graph.onnx").write_text("other")
    assert found(engine) == {("changed", "graph.onnx")}


def test_a_manifest_that_is_there_holds(run: Path) -> None:
    """A step that works removes it, and what a step did not make never gets into it."""
    with RunFolder(run) as folder:
        (run / "pruned" / "model.safetensors").write_text("tampered")
        (run / "mine.txt").write_text("mine")
        folder.write_manifest()
        assert found(run) == {("unknown", "pruned/model.safetensors"), ("unknown", "mine.txt")}
        with pytest.raises(KeyboardInterrupt):
            folder.step("new", _interrupted, read_recipe.__class__, settings={}, inputs={})
    assert not (run / MANIFEST).exists()


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "", "a\\..\\b"])
def test_paths_that_leave_are_refused_before_anything_is_read(run: Path, repository: Path, name: str) -> None:
    for path, keys in (
        (run / MANIFEST, ("files",)),
        (run / ENGINE / "manifest.json", ("files",)),
        (repository / MANIFEST, ("models", 0, "files")),
    ):
        values = json.loads(path.read_text())
        place = values
        for key in keys:
            place = place[key]
        place[name] = "0" * 64
        values.pop("sha256", None)  # whoever forges a manifest can forge its seal too
        path.write_text(json.dumps(values))
        (finding,) = verify(path.parent).findings
        assert finding.state == "unreadable" and "leads out of its folder" in finding.detail
    with pytest.raises(EngineUnavailable, match="leads out of its folder"):
        read_manifest(run / ENGINE)
    record = run / "records" / "prune.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "outputs": {name: "0"}}))
    assert RunFolder(run).record("prune") is None


def test_links_that_leave_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    file = run / ENGINE / "model.onnx"
    content = file.read_bytes()
    (tmp_path / "elsewhere" / "model.onnx").write_bytes(content)  # the very same bytes, and still not in the folder
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere" / "model.onnx")
    (run / "pruned" / "more").symlink_to(tmp_path / "secret")
    (run / "folder").symlink_to(tmp_path / "elsewhere")
    states = {("outside", f"{ENGINE}/model.onnx"), ("outside", "pruned/more"), ("outside", "folder")}
    assert found(run) == states
    with pytest.raises(EngineUnavailable, match="a link out of its folder"):
        check_manifest(run / ENGINE, read_manifest(run / ENGINE), "1", Bound())


def test_an_engine_that_its_manifest_does_not_vouch_for_is_not_opened(run: Path) -> None:
    manifest = read_manifest(run / ENGINE)
    with pytest.raises(EngineUnavailable, match=r"has no SHA-256 of other\.onnx"):
        check_manifest(run / ENGINE, manifest.model_copy(update={"file": "other.onnx"}), "1", Bound())


def test_an_engine_of_another_spec_than_its_manifest_says_is_not_opened(run: Path) -> None:
    file = run / ENGINE / "manifest.json"
    values = json.loads(file.read_text())
    del values["sha256"]  # edited by hand
    del values["spec"]["zero_points"]  # as an older version wrote it, that knew no such key
    before = values["spec_sha256"]
    values["spec_sha256"] = hashlib.sha256(json.dumps(values["spec"], separators=(",", ":")).encode()).hexdigest()
    file.write_text(json.dumps(values))
    check_manifest(run / ENGINE, read_manifest(run / ENGINE), "1", Bound())
    file.write_text(json.dumps({**values, "spec_sha256": before}))
    again = rf"was built from {before[:12]}…; build it again: trsp-deploy build {run}$"
    with pytest.raises(EngineUnavailable, match=again):
        check_manifest(run / ENGINE, read_manifest(run / ENGINE), "1", Bound())


@pytest.mark.parametrize("key", ["source", "spec_file"])
def test_a_path_that_is_none_is_refused_with_the_manifest(key: str, run: Path) -> None:
    file = run / ENGINE / "manifest.json"
    values = json.loads(file.read_text())
    del values["sha256"]
    file.write_text(json.dumps({**values, key: "a\0b"}))
    with pytest.raises(EngineUnavailable, match="holds a NUL character"):
        read_manifest(run / ENGINE)


def test_a_folder_is_the_same_by_a_link_to_it(run: Path, repository: Path, tmp_path: Path) -> None:
    for place in (run, repository, run / ENGINE):
        link = tmp_path / f"latest-{place.name}"
        link.symlink_to(place)
        assert verify(link).whole
        (place / "more").write_text("nobody made this")
        assert found(link) == {("unknown", "more")}
        (place / "more").unlink()


def test_a_link_to_itself_is_a_finding(run: Path) -> None:
    (run / "loop").symlink_to(run / "loop")
    assert not verify(run).whole


@pytest.mark.parametrize(("step", "output"), [("prune", "pruned"), ("export-pruned-fp32", ONNX)])
def test_an_engine_of_the_model_that_a_run_had_before_is_not_opened(
    step: str, output: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(run) as folder:
        for name, key, source in (
            ("export-pruned-fp32", "model", "pruned"),
            ("build-ort-cpu-fp32-pruned", "onnx", ONNX),
        ):
            inputs: dict[str, Path | str] = {key: run / source}
            folder.step(name, Nothing, Nothing, settings={}, inputs=inputs, outputs=[OUTPUTS[name]])
    check_fresh(run / ENGINE, read_manifest(run / ENGINE))
    check_fresh(tmp_path / "of" / "no" / "run", read_manifest(run / ENGINE))
    with RunFolder(run) as folder:
        folder.layout.record(step).unlink()
        folder.step(step, _other(run / output), Nothing, settings={}, inputs={"model": "new"}, outputs=[output])
        if step == "export-pruned-fp32":  # of the same checkpoint, by another exporter
            folder.layout.record("prune").unlink()
    wanted = f"is of another {output} than {run} has by now; build it again: trsp-deploy build {run}"
    for command in (
        ["generate", str(run / ENGINE), "--prompt", "a"],
        ["compare", str(run / ENGINE), str(run / ENGINE)],
        ["triton", str(run), "--out", str(tmp_path / "repository"), "--engine", "ort-cpu-fp32"],
        ["triton", str(run), "--out", str(tmp_path / "repository")],
    ):
        assert cli.run(command) == 1
        assert wanted in capsys.readouterr().err
    check_fresh(run / ENGINE.replace("pruned", "dense"), read_manifest(run / ENGINE))


def _other(folder: Path) -> Callable[[], Nothing]:
    def make() -> Nothing:
        (folder / "other").write_text("another model")
        return Nothing()

    return make


@pytest.mark.parametrize("name", ["../../up", "a/b", ".hidden", ""])
def test_names_that_become_paths_are_names(name: str) -> None:
    with pytest.raises(Exception, match="name"):
        read_engine_spec({**SPEC.model_dump(), "name": name}, "test")
    with pytest.raises(Exception, match="evaluation"):
        read_recipe({"model": "m", "evaluation": {name: "texts"}}, "test")


def test_a_damaged_manifest_says_what_is_wrong_with_it_and_what_helps(repository: Path) -> None:
    manifest = repository / MANIFEST
    values = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "sha256"}
    manifest.write_text(json.dumps(values | {"gpus": 1}))
    reason = r"\(unknown key 'gpus'; did you mean 'gpu'\?\)"
    with pytest.raises(
        RunError, match=rf"or damaged {reason}; delete the folder and write it again: trsp-deploy triton"
    ):
        read_repository(repository)
    (finding,) = verify(repository).findings
    assert re.fullmatch(rf"damaged, unsafe, or of another version {reason}", finding.detail)


def test_a_record_of_a_server_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_folder", lambda repository: tmp_path)
    assert process.find(tmp_path) is None
    (tmp_path / process.STATE).write_text('{"log": ""}')
    with pytest.raises(RunError, match=r"is no record of a server \(key 'pid' is missing\); delete it"):
        process.find(tmp_path)


@pytest.mark.parametrize("prefix", ["", "trsp-", "trsp-00000000-*", "../trsp-00000000-", "python"])
def test_a_record_whose_prefix_others_processes_have_ends_none(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is in every command line, and in every name of /dev/shm."""
    monkeypatch.setattr(process, "_folder", lambda repository: tmp_path)
    ended: list[object] = []

    def clear_up(_: Path, server: object) -> tuple[int, tuple[str, ...]]:
        ended.append(server)
        return 0, ()

    monkeypatch.setattr(process, "_clear_up", clear_up)
    monkeypatch.setattr(process, "_processes", lambda server: [])
    record = {"pid": 0, "http": 1, "grpc": 2, "metrics": 3, "shared_memory": prefix, "log": ""}
    (tmp_path / process.STATE).write_text(json.dumps(record))
    for call in (process.find, process.stop):
        with pytest.raises(RunError, match=r"is no record of a server \(key 'shared_memory'"):
            call(tmp_path)
    assert ended == []


def test_a_repository(repository: Path) -> None:
    assert verify(repository).whole
    (repository / "m" / "1" / "model.py").write_text("import os")
    (repository / "m" / "1" / "more.py").write_text("")
    assert found(repository) == {("changed", "m/1/model.py"), ("unknown", "m/1/more.py")}


def test_the_lock_of_a_triton_that_was_killed_is_no_part_of_its_repository(repository: Path) -> None:
    (repository / ".writing.lock").write_text("1 here")
    assert verify(repository).whole


def test_what_lies_beside_a_repositorys_models_is_held_too(repository: Path) -> None:
    (repository / "compose.yaml").write_text("made")
    manifest = read_repository(repository)
    files = {**manifest.files, "compose.yaml": fingerprint(repository / "compose.yaml")}
    write_json(repository / MANIFEST, manifest.model_copy(update={"files": files}))
    assert verify(repository).whole
    (repository / "compose.yaml").write_text("other")
    assert found(repository) == {("changed", "compose.yaml")}


def test_a_name_forges_no_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "x\nrun: run, 41 held against MANIFEST.json, 0 wrong\nsignature: valid\x1b[8m\u202e").touch()
    assert cli.run(["verify", str(run)]) == 2
    finding, summary = capsys.readouterr().out.splitlines()
    assert finding.startswith(r"unknown: x\nrun: ")
    assert finding.endswith(r"valid\x1b[8m\u202e: MANIFEST.json does not name it")
    assert summary.endswith("1 wrong")
    (odd,) = verify(run).findings
    assert "\n" in odd.path, "for a program it is the file's own"


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(run)]) == 0
    (run / "plan.json").write_text("[]")
    assert cli.run(["verify", str(run)]) == 2
    assert "changed: plan.json: SHA-256" in capsys.readouterr().out
    assert cli.run(["verify", str(run), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["findings"][0]["path"] == "plan.json" and "changed: plan.json" in printed.err
    assert cli.run(["verify", str(run / "pruned")]) == 1
    assert "holds no manifest; give the folder of a run" in capsys.readouterr().err
    capsys.readouterr()
    (run / MANIFEST).write_text("{")
    assert cli.run(["verify", str(run), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    (finding,) = said["findings"]
    assert (said["kind"], said["whole"], finding["state"], finding["path"]) == ("run", False, "unreadable", MANIFEST)
    assert "not valid JSON" in finding["detail"]


def test_a_manifest_of_another_schema_vouches_for_nothing(run: Path) -> None:
    values = json.loads((run / MANIFEST).read_text())
    del values["sha256"]
    (run / MANIFEST).write_text(json.dumps(values))
    assert verify(run).whole
    (run / MANIFEST).write_text(json.dumps(values | {"schema_version": 2}))
    (finding,) = verify(run).findings
    assert finding.state == "unreadable" and "damaged, unsafe, or of another version" in finding.detail
    assert "'schema_version'" in finding.detail


def test_what_a_damaged_manifest_is_of_its_folder_tells(run: Path, repository: Path) -> None:
    (repository / "m" / "config.pbtxt").touch()
    for folder, manifest, kind in (
        (run, MANIFEST, "run"),
        (run / ENGINE, ENGINE_MANIFEST, "engine"),
        (repository, MANIFEST, "repository"),
    ):
        (folder / manifest).write_text("{")
        found = verify(folder)
        assert (found.kind, found.against, found.checked) == (kind, manifest, 0)
        assert [(finding.state, finding.path) for finding in found.findings] == [("unreadable", manifest)]


def test_signatures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("model_signing", reason="needs: pip install 'trsp_deploy[signing]'")
    pytest.importorskip("OpenSSL", reason="needs: pip install 'trsp_deploy[signing]'")
    (private, public), (_, other) = _keys(tmp_path, "own"), _keys(tmp_path, "other")
    check = ["verify", str(run), "--public-key"]
    assert cli.run([*check, public]) == 2
    assert "MANIFEST.json.sig is missing" in capsys.readouterr().out
    assert cli.run(["sign", str(run), "--key", private]) == 0
    assert cli.run([*check, public]) == 0
    assert "signature: valid" in capsys.readouterr().out
    assert cli.run([*check, other]) == 2
    assert "no signature of this MANIFEST.json by that key" in capsys.readouterr().out
    assert cli.run([*check, private]) == 1
    assert "expected a PEM file" in capsys.readouterr().err
    # Who changes a file and the manifest with it cannot sign that.
    (run / "pruned" / "model.safetensors").write_text("other")
    manifest = RunManifest.model_validate_json((run / MANIFEST).read_bytes())
    files = {**manifest.files, "pruned/model.safetensors": fingerprint(run / "pruned" / "model.safetensors")}
    write_json(run / MANIFEST, manifest.model_copy(update={"files": files}))
    assert verify(run).whole
    assert cli.run([*check, public]) == 2
    (run / "plan.json").write_text("[]")
    assert cli.run(["sign", str(run), "--key", private]) == 1
    assert "files are not as its manifest says" in capsys.readouterr().err


def _keys(folder: Path, name: str) -> tuple[str, str]:
    private, public = str(folder / f"{name}.pem"), str(folder / f"{name}.pub")
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    for command in (curve, ["openssl", "ec", "-in", private, "-pubout", "-out", public]):
        subprocess.run(command, check=True, capture_output=True)
    return private, public


def test_without_the_library_the_line_says_so(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    from trsp_deploy.tools.delivery.signing import sign

    with pytest.raises(RunError, match=r"pip install 'trsp_deploy\[signing\]'"):
        sign(run, tmp_path / "key.pem")
