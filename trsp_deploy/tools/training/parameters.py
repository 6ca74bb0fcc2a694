"""Which parameters stage 2 trains, weights or adapters, and what backward computes again."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trsp_deploy.decoder import decoder_layers, forward_replaced
from trsp_deploy.errors import RecipeError, first_line
from trsp_deploy.recipe import TransferSettings

# What costs more to compute again than to keep.
_aten = torch.ops.aten
PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)
SELECTIVE = functools.partial(create_selective_checkpoint_contexts, list(PRODUCTS))


def choose_trained(model: PreTrainedModel, settings: TransferSettings) -> None:
    """Mark what trains: the layers, or everything."""
    model.requires_grad_(settings.train == "all")
    decoder_layers(model).requires_grad_(True)


def add_adapters(model: PreTrainedModel, rank: int, seed: int) -> Any:
    """Put LoRA adapters on every linear module of the layers; they alone train. Returns what `merge_adapters` wants."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as problem:
        raise RecipeError(
            f"transfer.lora_rank {rank}: peft is not installed; pip install 'trsp_deploy[train]', or leave it out"
        ) from problem
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = {f"{prefix}.{name}": module for name, module in layers.named_modules() if _gives_its_product(module)}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).eval()
        except ValueError as problem:  # of state spaces, whose kernels read a projection's weight past its adapter
            raise RecipeError(
                f"transfer.lora_rank {rank}: peft has no adapters for {type(model).__name__} ({first_line(problem)}); "
                "leave it out"
            ) from problem


@torch.no_grad()
def _gives_its_product(module: nn.Module) -> bool:
    """Whether it is a linear module whose result is one tensor; a router may return its choice as well."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    features = module.in_features if isinstance(module, nn.Linear) else module.nx
    return isinstance(module(module.weight.new_zeros(1, features)), torch.Tensor)


def merge_adapters(adapted: Any) -> None:
    """Add what the adapters learned to the weights and take them off again, in place."""
    adapted.merge_and_unload()


def recomputed_layers(
    model: PreTrainedModel, checkpointing: bool | Literal["selective"]
) -> AbstractContextManager[None]:
    """Within the block, backward computes again what it needs of each layer's forward instead of finding it kept.

    checkpointing: True keeps nothing but a layer's input. "selective" keeps the results of matrix products and
    attention as well, so that only what is cheap is made again: norms, and what acts on single numbers. False keeps
    everything. Where a model clips such results where they lie (`clip_qkv` of OLMo), its layers are made again whole:
    what was kept would be what it became, and the gradient that of another function.
    Enter it before the gates, so that they stay outside: what they hold on to is what the layer really returned.
    """
    layers = list(decoder_layers(model)) if checkpointing else []
    in_place = getattr(model.config.get_text_config(), "clip_qkv", None) is not None
    contexts = SELECTIVE if checkpointing == "selective" and not in_place else noop_context_fn
    return forward_replaced(layers, lambda _, forward: functools.partial(_recomputed, forward, contexts))


def _recomputed(forward: Any, contexts: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)
