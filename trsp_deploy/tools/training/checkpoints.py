"""What a killed training goes on from: one file a stage, replaced whole, gone when the stage is finished.

checkpoints = Checkpoints(run / "checkpoints" / "prune", key, every_s=600)
state = checkpoints.load()                     # None at the first start, or when made for anything else
if checkpoints.due():
    checkpoints.save({"step": step, "weights": {...}})
checkpoints.remove()
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from trsp_deploy.artifacts import provenance, writing
from trsp_deploy.tools.training.state_file import State, read_state, write_state

# Raise when what a state holds, or what a step does with it, changes.
FORMAT = 4


class Checkpoints:
    """The checkpoint of one stage of one run, in a folder of its own."""

    def __init__(self, folder: Path, key: str, every_s: float) -> None:
        """key: of the stage's settings and inputs; versions and launch are added, since they decide the last bits."""
        self._path = folder / "state.safetensors"
        launch = [os.environ.get(name) for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP")]
        self._key = hashlib.sha256(json.dumps([FORMAT, key, provenance().packages, launch]).encode()).hexdigest()
        self._every_s = every_s
        self._saved_at = time.monotonic()

    def load(self) -> State | None:
        """The last state saved; None when there is none, or it belongs to other settings, inputs or versions.

        Its tensors are mapped from the file: copy what is to live on, and let go of the rest.
        """
        return read_state(self._path, self._key)

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
