"""What a killed training goes on from: one file a stage, replaced whole, gone when the stage is finished.

checkpoints = Checkpoints(run / "checkpoints" / "prune", key, every_s=600)
state = checkpoints.load()                     # None at the first start, or when made for anything else
if checkpoints.due():
    checkpoints.save({"step": step, "weights": {...}})
checkpoints.remove()
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from trsp_deploy.artifacts import writing
from trsp_deploy.errors import shown
from trsp_deploy.recipe import TransferSettings
from trsp_deploy.tools.training.state_file import State, read_state, write_state

# Raise when what a state holds, or what a step does with it, changes.
FORMAT = 4
PACKAGES = ("torch", "transformers", "accelerate", "numpy")  # which every training depends on
STAGE = "settings or inputs"


class Checkpoints:
    """The checkpoint of one stage of one run, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        key: str,
        every_s: float,
        *,
        packages: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """key: of the stage's settings and inputs; versions and launch are added, since they decide the last bits.

        packages: that the stage trains with beside PACKAGES. say: hears why a checkpoint that is there is not used.
        """
        self._path = folder / "state.safetensors"
        self._say = say
        launch = ("WORLD_SIZE", "ACCELERATE_USE_FSDP")
        self._of: dict[str, Any] = {
            STAGE: key,
            "its form": FORMAT,
            **{name: _version(name) for name in (*PACKAGES, *packages)},
            **{name: os.environ.get(name) for name in launch},
        }
        self._key = json.dumps(self._of)
        self._every_s = every_s
        self._saved_at = time.monotonic()

    def load(self) -> State | None:
        """The last state saved; None when there is none, or it belongs to other settings, inputs or versions.

        Its tensors are mapped from the file: copy what is to live on, and let go of the rest.
        """
        state = read_state(self._path, self._key)
        if state is None and (differs := self._differs()):
            self._say(f"a checkpoint of other settings or versions is there and is not used ({self._path}: {differs})")
        return state

    def _differs(self) -> str:
        """What the checkpoint that is there is of, and this is not; empty where none is there, or it is damaged."""
        try:
            with safe_open(self._path, "pt") as file:
                key = (file.metadata() or {}).get("key", "")
        except (SafetensorError, OSError):
            return ""
        if key == self._key:
            return ""
        try:
            was = dict(json.loads(key))
        except (ValueError, TypeError):
            return "it is of another version"
        others = {name: now for name, now in self._of.items() if was.get(name) != now}
        if STAGE in others:
            return f"{STAGE} are others"
        return "; ".join(f"{name} was {shown(was.get(name))} and is {shown(now)}" for name, now in others.items())

    def due(self) -> bool:
        """Whether the last one is old enough for the next."""
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, state: State) -> None:
        """Replace the last state; after a kill at any moment the file is the old one or the new one."""
        with writing(self._path) as partial:
            write_state(partial, self._key, state)
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Delete what was saved: the stage is finished."""
        shutil.rmtree(self._path.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # another stage's may lie beside it
            self._path.parent.parent.rmdir()


def trains_with(settings: TransferSettings) -> list[str]:
    """The packages that a training of these settings depends on beside PACKAGES."""
    needed = {"peft": settings.lora_rank is not None, "bitsandbytes": settings.optimizer == "adamw-8bit"}
    return [name for name, is_needed in needed.items() if is_needed]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # of which the training says more


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> State:
    """What trains and its optimiser's moments, whole; of a sharded model all processes must call, the main one gets it.

    Sharded or not is part of the form, so a checkpoint belongs to one of the two (its key says which).
    """
    if sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights, moments = get_state_dict(model, optimizer, options=options)
        return {"weights": weights, "optimizer": moments}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"weights": weights, "optimizer": optimizer.state_dict()}


@torch.no_grad()
def put_back(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
    """The reverse of `training_state`, on all processes."""
    if sharded:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state["weights"][name])
    put_back_moments(state["optimizer"], optimizer)


def put_back_moments(state: State, optimizer: torch.optim.Optimizer) -> None:
    """The reverse of an optimiser's `state_dict`; nothing of the state is held afterwards."""
    optimizer.load_state_dict(state)  # which takes tensors of the right dtype and device as they are
    for moments in optimizer.state.values():
        moments.update({name: each.clone() for name, each in moments.items() if isinstance(each, torch.Tensor)})
