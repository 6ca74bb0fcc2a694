"""The list of layers, found by its shape and not by name, and what goes into a layer and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.errors import ModelError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of transformer layers.

    It is the outermost ModuleList with `num_hidden_layers` members. Raises ModelError when there is none
    or more than one.
    """
    parent, name = layer_list_place(model)
    return getattr(parent, name)


def layer_list_place(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the model's list of layers, and under which name."""
    count = getattr(model.config, "num_hidden_layers", None)
    if count is None:
        raise ModelError(
            f"{type(model).__name__}: its config has no num_hidden_layers, as of a multimodal model; give a text model"
        )
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0
    ]
    outermost = [p for p in found if p.count(".") == min(q.count(".") for q in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one list of {count} transformer layers, found {len(outermost)}"
            f" ({', '.join(outermost) or 'none'}); this architecture is not supported"
        )
    parent_path, _, name = outermost[0].rpartition(".")
    return model.get_submodule(parent_path), name


def kept_layers(dropped: Sequence[int], num_layers: int) -> list[int]:
    """The layers that stay when `dropped` go, as sorted indices of the dense model."""
    gone = set(dropped)
    return [index for index in range(num_layers) if index not in gone]


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its LM head. Gemma 3's text model says that its body is itself, and knows it as its decoder."""
    found: nn.Module = model.get_decoder() if model.base_model is model else model.base_model
    return found


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states (batch, sequence, hidden) that a layer's forward was called with."""
    return args[0] if args else kwargs["hidden_states"]


def layer_output(output: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
    """The hidden states (batch, sequence, hidden) in what a layer's forward returned."""
    return output[0] if isinstance(output, tuple) else output


def with_layer_output(output: torch.Tensor | tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor | tuple[Any, ...]:
    """What the layer returned, with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def next_token_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, sequence - 1, vocabulary) float32 of each next token; input_ids is (batch, sequence) int64."""
    return model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
