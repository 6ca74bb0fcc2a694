"""A quick stage 2 on a tiny model: `transfer(dense, out, form="anneal")`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests.tiny import english, tiny_tokenizer
from trsp_deploy.decoder import load_model
from trsp_deploy.recipe import Recipe, read_recipe
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.stages.transfer import transfer_and_remove
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.sources.models import ModelSource
from trsp_deploy.tools.training.checkpoints import Checkpoints

TRAIN = 32  # windows of WINDOWS to train on; the rest is held out
PLAN = PruningPlan(
    model="tiny", num_layers=6, dropped=(1, 4), kept=(0, 2, 3, 5), method="hand", seed=0, settings={}, calibration="-"
)


@functools.cache
def windows() -> torch.Tensor:
    """40 windows of 16 tokens of English."""
    ids = tiny_tokenizer()(english()[:8_000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 40 * 16]).view(40, 16)


def recipe(**groups: Any) -> Recipe:
    """A recipe for exact results on a CPU."""
    return read_recipe({"model": "tiny", "autocast": "off", "device": "cpu", **groups}, "test")


def transfer(dense: Path, out: Path, checkpoints: Checkpoints | None = None, **settings: Any) -> PrunedCheckpoint:
    """Stage 2 for PLAN: 6 steps of 4 windows, unless `settings` of the transfer say otherwise."""
    source = ModelSource(name="tiny", kind="folder", path=str(dense), origin=str(dense))
    chosen = recipe(transfer={"steps": 6, "batch_size": 4, "learning_rate": 3e-3, **settings})
    return transfer_and_remove(
        dense=dense,
        source=source,
        plan=PLAN,
        train=windows()[:TRAIN],
        validation=windows()[TRAIN:],
        recipe=chosen,
        out=out,
        checkpoints=checkpoints,
    )


def same_weights(first: Path, second: Path) -> bool:
    """Whether two model folders hold the same weights to the last bit."""
    one, two = load_model(first).state_dict(), load_model(second).state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
