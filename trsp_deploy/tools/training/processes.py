"""The processes of one training: alone, or as `accelerate launch` started them, with DDP or FSDP.

Each process sees every batch's order and takes its share of the rows; gradients are averaged, so that one process with
the same batch size takes the same steps. Accelerate reads the launch, FSDP is torch's `fully_shard` (FSDP2).
"""

from __future__ import annotations

import atexit
import functools
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import RecipeError
from trsp_deploy.recipe import TransferSettings
from trsp_deploy.tools.training.losses import TokenLosses

Value = TypeVar("Value")

WAIT = timedelta(hours=12)  # others wait while the main process copies, compares and writes


class Processes:
    """This process among its fellows; a single one is a team of its own."""

    def __init__(self, device: str) -> None:
        """device: "cpu" or "cuda"; joins the fellows. Raises RecipeError for a launch that cannot work."""
        self.count, self._index = 1, 0
        self._fsdp = None
        if "RANK" in os.environ:
            self._fsdp = _fsdp_settings()
            wait = InitProcessGroupKwargs(timeout=WAIT)
            # No mixed precision of Accelerate's own: tools/training/shared.py has the autocast.
            self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[wait])
            self.count, self._index = self._accelerator.num_processes, self._accelerator.process_index
            atexit.register(_leave)
        self.main = self._index == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every weight (FSDP)."""
        return self._fsdp is not None

    def local_rows(self, rows: torch.Tensor, setting: str) -> torch.Tensor:
        """This process's part of a batch's rows (batch_size,); `setting` is named when it does not divide."""
        if len(rows) % self.count:
            raise RecipeError(f"{setting} {len(rows)} with {self.count} processes; valid: a multiple of {self.count}")
        return rows.chunk(self.count)[self._index]

    def forward_batch(self, settings: TransferSettings) -> int:
        """Windows of one forward pass of this process: of its part of a batch, where it reads all windows too."""
        return min(settings.forward_batch, max(1, settings.batch_size // self.count))

    def wrap(self, losses: TokenLosses) -> nn.Module:
        """The module to call in training, whose gradients are means over processes; FSDP shards the model in place."""
        if self._fsdp is not None:
            shard = functools.partial(fully_shard, offload_policy=self._fsdp.cpu_offload or OffloadPolicy())
            for layer in decoder_layers(losses.model):
                shard(layer, reshard_after_forward=self._fsdp.reshard_after_forward)
            shard(losses)
        elif self.count > 1 and any(parameter.requires_grad for parameter in losses.parameters()):
            # Dropped layers leave the graph in the course of the training.
            return DistributedDataParallel(losses, find_unused_parameters=True)
        return losses

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over processes, the same on each."""
        if self.count == 1:
            return tensor
        mean: torch.Tensor = self._accelerator.reduce(tensor, reduction="mean")
        return mean

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes that backward goes through: what a norm over the whole batch needs."""
        if self.count == 1:
            return tensor
        from torch.distributed.nn.functional import all_reduce

        total: torch.Tensor = all_reduce(tensor)
        return total

    def whole_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """All weights of a sharded model, in main memory, on the main process; empty on the others, which must call."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(model, options=options)
        return dict(weights)

    def from_main(self, value: Value) -> Value:
        """The main process's value, on each process."""
        if self.count == 1:
            return value
        values: list[Any] = broadcast_object_list([value])
        result: Value = values[0]
        return result


def _leave() -> None:
    """Leave the group when this process ends, which its backend wants to be told of."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fsdp_settings() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` says of FSDP, None without it; Accelerate itself knows FSDP on accelerators alone."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"accelerate launch: FSDP version {version} is not supported; valid: --fsdp_version 2")
    # transformers would leave the weights empty in all processes but the main one, which Accelerate would send them on
    # from; here each one needs the dense model first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return FullyShardedDataParallelPlugin()
