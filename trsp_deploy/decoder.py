"""The only module that knows how a decoder-only model is put together.

It finds the layer list by shape instead of by name, so that a new architecture needs no entry here,
and checks what it found: after a cut, a model rebuilt from the cut config must have the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import Strict

# Lists in a config that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens"})
# Lists in a config that hold layer indices instead of one entry a layer.
LAYER_INDEX_LISTS = frozenset({"mlp_only_layers"})


class WeightCounts(Strict):
    """Numbers of parameters, each tied weight counted once."""

    total: int
    layers: tuple[int, ...]
    lm_head: int  # read in full for every token, tied to the embedding or not
    embeddings: int  # input and position embeddings: looked up, not read in full


class DecoderSize(Strict):
    """What a token costs a model, in parameters and elements."""

    weights: WeightCounts
    cache_per_token: int  # elements of keys and values that one token adds to each layer's cache
    attention_width: int  # heads x head_dim


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a causal language model from a local folder in eval mode; "auto" keeps the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    # Dropout stays off everywhere, in training too: gates at 1 must give the dense logits exactly.
    return model.to(device).eval()


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model folder's weights are stored in, as its config says; fp32 where it does not say."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).dtype or torch.float32


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of transformer layers.

    It is the outermost ModuleList with `num_hidden_layers` members. Raises ModelError when there is none
    or more than one.
    """
    parent, name = _layer_list_place(model)
    return getattr(parent, name)


def _layer_list_place(model: PreTrainedModel) -> tuple[nn.Module, str]:
    count = model.config.num_hidden_layers
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


def next_token_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood in nats of each next token; input_ids is (batch, sequence) int64."""
    return nn.functional.cross_entropy(next_token_logits(model, input_ids).flatten(0, 1), input_ids[:, 1:].flatten())


def count_weights(model: PreTrainedModel) -> WeightCounts:
    """Count parameters in all, by layer, in the LM head and in the look-up tables."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return WeightCounts(
        total=sum(p.numel() for p in model.parameters()),
        layers=tuple(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        lm_head=sum(p.numel() for p in head.parameters()),
        embeddings=sum(p.numel() for table in tables for p in table.parameters()),
    )


def decoder_size(folder: Path) -> DecoderSize:
    """Size of the model in a folder, from its config alone: no weights are read."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache_heads = getattr(config, "num_key_value_heads", None) or heads
    return DecoderSize(
        weights=count_weights(_skeleton(config)),
        cache_per_token=2 * cache_heads * head_dim,
        attention_width=heads * head_dim,
    )


def _skeleton(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def remove_layers(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Delete layers in place: the list, every `layer_idx`, the layer count and per-layer config lists.

    dropped: indices of the dense model. Raises ModelError, with the model untouched, when a layer's function depends
    on its index, and after the cut when the config no longer describes the weights.
    """
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            f"{type(model).__name__} with scale_attn_by_inverse_layer_idx: its attention depends on the layer's "
            "number, so layers cannot be renumbered"
        )
    parent, name = _layer_list_place(model)
    layers = getattr(parent, name)
    kept = [index for index in range(len(layers)) if index not in set(dropped)]
    setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
    for new_index, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            # The KV cache is addressed by this index; a stale one exports without a word and fails at run time.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new_index
    _cut_config(config, kept, len(layers))
    _check_config_describes(model)


def _cut_config(config: Any, kept: Sequence[int], num_layers: int) -> None:
    new_index = {old: new for new, old in enumerate(kept)}
    for key, value in config.to_dict().items():
        if key in LAYER_INDEX_LISTS and value:
            setattr(config, key, [new_index[i] for i in value if i in new_index])
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and key not in NOT_PER_LAYER:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _check_config_describes(model: PreTrainedModel) -> None:
    expected = {name: weight.shape for name, weight in _skeleton(model.config).state_dict().items()}
    actual = {name: weight.shape for name, weight in model.state_dict().items()}
    if expected != actual:
        different = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        raise ModelError(
            f"{type(model).__name__}: after removing layers its config describes other weights than it has "
            f"(first difference: {different[0]}); this architecture cannot be cut"
        )
