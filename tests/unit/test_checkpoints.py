"""A killed training ends as one that was never killed, to the last bit; strange checkpoints are left alone."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.breadth import BREADTH, by_default
from tests.tiny import save_tiny, tiny_model
from tests.training import TRAIN, recipe, same_weights, transfer, windows
from trsp_deploy.stages.selection import select_layers
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import forms, optimizers, teacher
from trsp_deploy.tools.training.checkpoints import Checkpoints, put_back_moments, trains_with
from trsp_deploy.tools.training.state_file import write_state


class Killed(Exception):
    """Stands for the kill."""


class KilledAfter(Checkpoints):
    """Dies once it has saved `saves` times."""

    def __init__(self, folder, saves, key="key"):
        super().__init__(folder, key, every_s=0)
        self.left = saves

    def save(self, state):
        super().save(state)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("dense"))


FORMS = [
    {"form": "anneal", "anneal_share": 0.6},
    {"form": "l2"},
    {"form": "train", "refit": "span", "kl_weight": 1.0, "ce_weight": 0.5},
    {"form": "anneal", "train": "all", "kl_weight": 1.0},
    {"form": "anneal", "lora_rank": 2},
    {"form": "anneal", "refit": "layers", "anneal_share": 0.6},
    {"form": "anneal", "refit": "layers", "anneal_share": 0.6, "lora_rank": 2},
    {"form": "anneal", "optimizer": "adamw-8bit"},
]


@pytest.mark.parametrize("settings", by_default(FORMS[2:4], FORMS), ids=lambda s: "-".join(map(str, s.values())))
def test_transfer_goes_on_where_it_was_killed(dense, tmp_path, settings):
    if "lora_rank" in settings:
        pytest.importorskip("peft", reason="peft is not installed: pip install 'trsp_deploy[train]'")
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trsp_deploy[train]'")
    whole = transfer(dense, tmp_path / "whole", **settings)
    for saves in (2, 3):  # killed twice
        with pytest.raises(Killed):
            transfer(dense, tmp_path / "out", KilledAfter(tmp_path / "checkpoint", saves), **settings)
    resumed = transfer(dense, tmp_path / "out", KilledAfter(tmp_path / "checkpoint", 99), **settings)
    assert resumed == whole
    assert same_weights(tmp_path / "whole", tmp_path / "out")


@BREADTH
def test_what_a_checkpoint_holds_is_not_worked_out_again(dense, tmp_path, monkeypatch):
    settings = {"form": "train", "refit": "span", "kl_weight": 1.0, "steps": 6}  # of 4 windows; there are 32
    whole = transfer(dense, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        transfer(dense, tmp_path / "out", KilledAfter(tmp_path / "checkpoint", 4), **settings)
    read = []
    monkeypatch.setattr(forms.FORMS["train"], "refit", lambda *_: pytest.fail("the checkpoint has the folded weights"))
    monkeypatch.setattr(teacher, "Meter", lambda _, count: read.append(count) or Meter(_, count))
    assert transfer(dense, tmp_path / "out", Checkpoints(tmp_path / "checkpoint", "key", 99), **settings) == whole
    assert read == [8], "the windows of the two steps that were left"
    assert same_weights(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("gate", ["branch", "output"])
def test_selection_goes_on_where_it_was_killed(tmp_path, gate):
    chosen = recipe(plan={"steps": 3, "candidates": 2, "gate": gate})

    def select(checkpoints=None):
        return select_layers(
            tiny_model("llama"), windows()[:TRAIN], windows()[TRAIN:], 2, chosen, "manual", checkpoints
        )

    whole = select()
    for saves in (2, 3):  # within the first round, and within the second
        with pytest.raises(Killed):
            select(KilledAfter(tmp_path / "checkpoint", saves))
    resumed = KilledAfter(tmp_path / "checkpoint", 99)
    assert select(resumed) == whole
    assert 99 - resumed.left == 3  # of 2 x (3 updates + 1 pick) saves


@BREADTH
def test_sleb_goes_on_after_its_last_round(tmp_path):
    """It tries every layer in every round: half an hour for SmolLM2-135M on 2 cores."""
    chosen = recipe(plan={"method": "sleb"})

    def select(checkpoints=None):
        return select_layers(
            tiny_model("llama"), windows()[:TRAIN], windows()[TRAIN:], 4, chosen, "manual", checkpoints
        )

    whole = select()
    for saves in (1, 2):  # after the first round, and after the third
        with pytest.raises(Killed):
            select(KilledAfter(tmp_path / "checkpoint", saves))
    resumed = KilledAfter(tmp_path / "checkpoint", 99)
    assert select(resumed) == whole
    assert 99 - resumed.left == 1


def test_a_checkpoint_of_another_key_is_ignored(dense, tmp_path):
    folder = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        transfer(dense, tmp_path / "out", KilledAfter(folder, 2, key="these settings"))
    assert Checkpoints(folder, "these settings", 0).load() is not None
    assert Checkpoints(folder, "other settings", 0).load() is None


def test_a_checkpoint_of_other_versions_is_ignored(tmp_path, monkeypatch):
    Checkpoints(tmp_path / "stage", "key", 0).save({"step": 1})
    assert Checkpoints(tmp_path / "stage", "key", 0).load() == {"step": 1}
    said = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else version(name))
    assert Checkpoints(tmp_path / "stage", "key", 0, say=said.append).load() is None
    words = "a checkpoint of other settings or versions is there and is not used"
    assert said == [f"{words} ({state_of(tmp_path)}: torch was {version('torch')!r} and is '1.0')"]


def state_of(folder):
    return folder / "stage" / "state.safetensors"


@pytest.mark.parametrize("package", ["onnxruntime", "tensorrt", "datasets", "lm-eval", "optimum", "bitsandbytes"])
def test_a_checkpoint_outlives_packages_that_the_training_does_not_use(tmp_path, monkeypatch, package):
    """They were installed between the kill and the next start, and the training of hours began anew without a word."""
    Checkpoints(tmp_path / "stage", "key", 0).save({"step": 1})
    installed(monkeypatch, package)
    said = []
    assert Checkpoints(tmp_path / "stage", "key", 0, say=said.append).load() == {"step": 1} and not said


@pytest.mark.parametrize(
    ("settings", "package"), [({"optimizer": "adamw-8bit"}, "bitsandbytes"), ({"lora_rank": 2}, "peft")]
)
def test_a_checkpoint_is_of_the_packages_that_the_training_does_use(tmp_path, monkeypatch, settings, package):
    uses = trains_with(recipe(transfer=settings).transfer)
    Checkpoints(tmp_path / "stage", "key", 0, packages=uses).save({"step": 1})
    installed(monkeypatch, package)
    assert Checkpoints(tmp_path / "stage", "key", 0, packages=uses).load() is None


def installed(monkeypatch, package):
    """Another version of a package, or its first."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == package else version(name))


@pytest.mark.parametrize(
    ("key", "words"), [("other settings", "settings or inputs are others"), (None, "it is of another version")]
)
def test_what_a_checkpoint_that_is_not_used_is_of_is_said(tmp_path, key, words):
    said = []
    if key is None:
        state_of(tmp_path).parent.mkdir()
        write_state(state_of(tmp_path), "0f" * 32, {"step": 1})
    else:
        Checkpoints(tmp_path / "stage", key, 0).save({"step": 1})
    assert Checkpoints(tmp_path / "stage", "key", 0, say=said.append).load() is None
    assert len(said) == 1 and words in said[0]
    state_of(tmp_path).write_bytes(state_of(tmp_path).read_bytes()[:-40])
    assert Checkpoints(tmp_path / "stage", "key", 0, say=said.append).load() is None
    assert len(said) == 1, "one that is damaged is of nothing"


def test_a_broken_file_is_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path / "stage", "key", 0)
    assert checkpoints.load() is None
    checkpoints.save({"step": 1})
    path = tmp_path / "stage" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    assert checkpoints.load() is None
    path.write_bytes(b"")
    assert checkpoints.load() is None


def test_an_optimiser_holds_nothing_of_the_file_it_goes_on_from(tmp_path):
    """It would keep the disk space of a file that the next checkpoint has replaced."""
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    checkpoints = Checkpoints(tmp_path / "stage", "key", 0)
    checkpoints.save({"optimizer": optimizer.state_dict()})
    fresh = torch.optim.AdamW([weight])
    put_back_moments(checkpoints.load()["optimizer"], fresh)
    assert torch.equal(fresh.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert "state.safetensors" not in Path("/proc/self/maps").read_text()


def test_bf16_weights_on_another_device_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    """The fused kernel of a GPU reads the number of steps where it is told to, and main memory is out of its reach."""
    told: list[torch.Tensor] = []
    monkeypatch.setattr(
        optimizers, "adamw", lambda *lists, state_steps, **_: told.extend(each for (each,) in (*lists, state_steps))
    )
    monkeypatch.setattr(optimizers, "rounding_draws", lambda *_: None)  # `meta` has no generators

    def stepped(device, state=None):
        weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
        weight.grad = torch.ones_like(weight)
        optimizer = optimizers.RoundingAdamW([weight])
        if state is not None:
            put_back_moments(state, optimizer)
        optimizer.step()
        return optimizer

    checkpoints = Checkpoints(tmp_path / "stage", "key", 0)
    checkpoints.save({"optimizer": stepped("cpu").state_dict()})
    told.clear()
    (moments,) = stepped("meta", checkpoints.load()["optimizer"]).state.values()
    assert {each.device.type for each in told} == {"meta"} and len(told) == 5
    assert int(moments["step"]) == 2


def test_due_after_the_interval_and_gone_when_removed(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints" / "prune", "key", 0).due()
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "prune", "key", 1000)
    assert not checkpoints.due()
    checkpoints.save({"step": 1})
    checkpoints.remove()
    assert not (tmp_path / "checkpoints").exists()
    checkpoints.remove()  # nothing there is nothing to do
