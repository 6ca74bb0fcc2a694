"""What comes with a model, a recipe or a checkpoint never runs, and no password is written down.

That no secret of the environment gets into a run is in test_pipeline.py, which plants some.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from tests.tiny import tokens
from tests.untrusted import fails, prune
from trsp_deploy import cli
from trsp_deploy.decoder import load_model
from trsp_deploy.errors import ModelError, redacted
from trsp_deploy.tools.sources.model_folders import check_folder, copy_model, fingerprint_model
from trsp_deploy.tools.sources.models import is_of_a_model
from trsp_deploy.tools.sources.safe_copy import convert
from trsp_deploy.tools.training.checkpoints import Checkpoints

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"
PASSWORD = "https://me:s3cret-word@hub.example/owner/name"
TOKEN = "hf_" + "aBcDeFgH" * 4


@pytest.fixture
def model(untrusted: Path) -> Path:
    return untrusted


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE.format(mark=str(self.mark)),)


# -- pickles --------------------------------------------------------------------------------------------


def test_a_bomb_does_explode_where_it_is_loaded(mark: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "else the tests below prove nothing"


def test_pickled_weights_are_refused_and_never_loaded(
    model: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, model / "pytorch_model.bin")
    line = prune(capsys)
    assert "its weights are a pickle (pytorch_model.bin)" in line and "`trsp-deploy convert model --out DIR`" in line
    line = fails(capsys, "convert", "model", "--out", "safe")
    assert "holds more than tensors" in line and "nothing was run" in line
    assert not mark.exists() and not Path("safe").exists()


def test_pickles_beside_safetensors_stay_behind(model: Path, mark: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Bomb(mark), model / name)
    (model / "modeling_mine.py").write_text(CODE.format(mark=str(mark)))
    copy_model(model, tmp_path / "dense")
    kept = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept
    assert not {name for name in kept if name.endswith((".bin", ".pt", ".py"))}
    load_model(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(model)
    assert not mark.exists()


def test_honest_pickles_are_converted(model: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model)
    wanted = dense(tokens()).logits
    (model / "model.safetensors").unlink()
    torch.save(dense.state_dict(), model / "pytorch_model.bin")  # with the tied head, under two names
    assert cli.run(["convert", "model", "--out", "safe"]) == 0
    assert torch.equal(load_model(tmp_path / "safe")(tokens()).logits, wanted)
    assert cli.run(["convert", "model", "--out", "safe"]) == 1


def test_a_checkpoint_that_is_a_bomb_is_no_checkpoint(tmp_path: Path, mark: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "key", 0.0)
    checkpoints.save({"step": 1})
    assert checkpoints.load() == {"step": 1}
    (saved,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_file())
    torch.save({"key": "key", "state": Bomb(mark)}, saved)
    assert checkpoints.load() is None and not mark.exists()


# -- code of a model ------------------------------------------------------------------------------------


def test_code_for_generating_does_not_run_by_loading(model: Path, mark: Path) -> None:
    """transformers 4.57 imports it for any architecture, whatever `trust_remote_code` is."""
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(ModelError, match=r"custom_generate: transformers would run the Python in it"):
        load_model(model)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(
    model: Path, mark: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("modeling_mine", "tokenization_mine"):
        (model / f"{name}.py").write_text(CODE.format(mark=str(mark)))
    values = json.loads((model / file).read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM", "AutoTokenizer": ["tokenization_mine.T", None]}
    (model / file).write_text(json.dumps({**values, "auto_map": auto_map}))
    line = prune(capsys)
    assert f"{file}: its auto_map would run code that comes with the model" in line
    assert (
        "AutoModelForCausalLM as MineForCausalLM of modeling_mine.py, AutoTokenizer as T of tokenization_mine.py"
        in line
    )
    assert "trust_remote_code stays off" in line
    assert not mark.exists()


# -- YAML -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_yaml_is_data(model: Path, mark: Path, tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = f'{tag} ["touch {mark}"]'
    Path("bomb.yaml").write_text(f"model: {bomb}\n")
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(f"model: {bomb}\n")
    assert "not valid YAML" in prune(capsys, "--recipe", "bomb.yaml")
    assert "not valid YAML" in prune(capsys, "--set", f"seed={bomb}")
    assert "not valid YAML" in fails(capsys, "export", "run")
    command = ["build", "--onnx", "model.onnx", "--engine", "bomb.yaml", "--out", "engine"]
    assert "not valid YAML" in fails(capsys, *command)
    assert not mark.exists()


# -- paths ----------------------------------------------------------------------------------------------


def test_names_out_of_recipes_do_not_leave_the_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path().rglob("*"))
    assert "evaluation" in prune(capsys, "--set", "evaluation={../../up: text.txt}")
    Path("up.yaml").write_text("name: ../../up\ndescription: x\nbackend: onnxruntime-cpu\nprecision: fp32\n")
    assert "'name'" in fails(capsys, "build", "--onnx", "model.onnx", "--engine", "up.yaml", "--out", "engine")
    assert {path for path in set(Path().rglob("*")) - before if path.name != "up.yaml"} == set()


# -- secrets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["--model", "--calibration", "--eval"])
@pytest.mark.parametrize("secret", [PASSWORD, f"owner/name?token={TOKEN}", TOKEN])
def test_a_password_in_a_name_is_neither_kept_nor_shown(
    model: Path, where: str, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--model": "model", "--calibration": "text.txt", "--eval": "own=text.txt"}
    options[where] = f"own={secret}" if where == "--eval" else secret
    command = ["prune-and-build", "--drop", "2", "--out", "run", *(part for pair in options.items() for part in pair)]
    assert cli.run(command) == 1
    said = "".join(capsys.readouterr())
    assert "looks like a password or token" in said
    assert not Path("run").exists()
    for word in ("s3cret-word", TOKEN):
        assert word not in said


def test_what_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redacted(f"see {PASSWORD}") == "see https://***@hub.example/owner/name"
    assert redacted(f"token {TOKEN}, and hf_short") == "token ***, and hf_short"
    assert redacted("https://x.example/a?sig=abc%2F&b=1") == "https://x.example/a?sig=***&b=1"
    for plain in ("facebook/opt-6.7b@abc123", "Salesforce/wikitext,wikitext-2:test", "http://127.0.0.1:8000/v2"):
        assert redacted(plain) == plain
    monkeypatch.setenv("SOME_PASSWORD", "correct-horse")
    monkeypatch.setenv("OTHER_TOKEN", "1")
    assert redacted("it was correct-horse 1") == "it was *** 1"


def test_the_name_of_a_tokenizer_is_no_token(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that a variable such as TOKENIZER_NAME held was refused as a password; no line told why."""
    for name in ("TOKENIZER_NAME", "TOKENISER", "MY_TOKENIZER_TOKENIZATION"):
        monkeypatch.setenv(name, "Qwen/Qwen2.5-1.5B")
    monkeypatch.setenv("MAX_TOKENS", "131072")
    assert redacted("Qwen/Qwen2.5-1.5B reads 131072") == "Qwen/Qwen2.5-1.5B reads 131072"
    monkeypatch.setenv("TOKENIZER_TOKEN", "correct-horse")
    said = prune(capsys, "--set", "model=owner/correct-horse")
    why = "holds what looks like a password or token (it is in the environment, as TOKENIZER_TOKEN)"
    assert f"'owner/***' {why}" in said


def test_a_key_may_begin_like_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Base64 has slashes; the path of a file with a secret is none, whether the file is there or not."""
    key = "/9uK7MDENG+bPxRfi/CYplanted="
    monkeypatch.setenv("STORAGE_SECRET_KEY", key)
    monkeypatch.setenv("HF_TOKEN_PATH", f"{tmp_path}/not-yet/token")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert redacted(f"refused: {key}") == "refused: ***"
    for plain in (f"{tmp_path}/not-yet/token: no such file", f"{tmp_path}/run: no run"):
        assert redacted(plain) == plain


# -- what a model's folder leads to ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "words"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "../other"}, "has adapter_config.json, by which"),
        ("config.json", {"transformers_weights": "../other/model.safetensors"}, "`transformers_weights` names a file"),
    ],
)
def test_weights_of_another_folder_are_not_loaded(
    model: Path, file: str, key: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    (model / file).write_text(json.dumps({**values, **key}))
    assert words in prune(capsys)
    assert not Path("run/dense").exists()


def test_what_a_link_leads_to_does_not_go_with_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.key").write_text("a key")
    (model / "LICENSE").symlink_to(tmp_path / "secret.key")
    (model / "notes.json").symlink_to(tmp_path / "secret.key")
    for name in ("model.safetensors", "tokenizer.json"):  # as `ln -s base/*` leaves them
        (model / name).symlink_to(shutil.move(model / name, tmp_path / name))
    check_folder(model)
    copy_model(model, tmp_path / "dense")
    kept = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= kept and not kept & {"LICENSE", "notes.json"}
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret.key")
    assert "chat_template.jinja: is a link out of the model's folder" in prune(capsys)
    (model / "chat_template.jinja").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(model).state_dict(), model / "pytorch_model.bin")
    assert cli.run(["convert", "model", "--out", "safe"]) == 0 and not (tmp_path / "safe" / "LICENSE").exists()
    for name in ("LICENSE", "notes.json", "pytorch_model.bin"):
        (model / name).unlink()
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    (tmp_path / "bigger disk").mkdir()
    blobs.symlink_to(tmp_path / "bigger disk")
    for path in [*model.iterdir()]:
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (blobs / "1").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    copy_model(snapshot, tmp_path / "of a stranger")  # whose `blobs` may lead to anything of the user's
    assert not (tmp_path / "of a stranger" / "LICENSE").exists()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    check_folder(snapshot)
    copy_model(snapshot, tmp_path / "of the hub")
    assert (tmp_path / "of the hub" / "LICENSE").read_text() == "terms"


def test_a_lock_that_is_a_link_is_not_written_through(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    run = tmp_path / "made"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: model\n")
    (run / ".lock").symlink_to(tmp_path / "mine.txt")
    assert "made/.lock: is a link" in fails(capsys, "clean", str(run), "--dry-run")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_names_that_no_manifest_holds_stay_behind(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", model / "original\\params.json")
    copy_model(model, tmp_path / "dense")
    assert not [path.name for path in (tmp_path / "dense").iterdir() if "\\" in path.name]
    before = fingerprint_model(model)
    (model / "original\\params.json").unlink()
    assert fingerprint_model(model) == before


def test_a_push_leaves_others_folders() -> None:
    mine = ("config.json", "modeling_mine.py", "model-00001-of-00002.safetensors", "additional_chat_templates/a.jinja")
    others = ("scripts/eval.py", "inference/server/app.py", "data/additional_chat_templates/x.jinja", "a/config.json")
    assert all(map(is_of_a_model, mine)) and not any(map(is_of_a_model, others))


# -- conversions -------------------------------------------------------------------------------------------------------


def test_shards_of_another_save_are_left_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    names = sorted(weights)
    (model / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: weights[name] for name in part}, model / f"pytorch_model-0000{number}-of-00002.bin")
        index |= dict.fromkeys(part, f"pytorch_model-0000{number}-of-00002.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    old = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    torch.save(old, model / "pytorch_model-00003-of-00003.bin")
    said: list[str] = []
    convert("model", tmp_path / "safe", said.append)
    assert len([line for line in said if line.startswith("reading")]) == 2
    found = load_model(tmp_path / "safe").state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in names)
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    assert "which pytorch_model.bin.index.json names in" in fails(capsys, "convert", "model", "--out", "more")


def test_weights_of_one_storage_are_each_written(model: Path, tmp_path: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    (model / "model.safetensors").unlink()
    keys, values = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    both = torch.cat([weights[keys], weights[values]])
    weights[keys], weights[values] = both.split(len(weights[keys]))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # once tied, and no longer so by its config
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    torch.save(weights, model / "pytorch_model.bin")
    assert cli.run(["convert", "model", "--out", "safe"]) == 0
    found = load_model(tmp_path / "safe").state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
