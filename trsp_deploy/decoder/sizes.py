"""How large a model is: weights by where they are, and what a token adds to its KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder.layers import decoder_layers
from trsp_deploy.decoder.loading import load_config, meta_model
from trsp_deploy.recipe import Strict


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


def count_config(config: Any) -> WeightCounts:
    """Count the parameters of the model that a config describes: no weights are read or made."""
    return count_weights(meta_model(config))


def known_positions(folder: Path) -> int | None:
    """Tokens that the model in a folder was made for, where its config says."""
    config = load_config(folder)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value is not None and value > 0), None)  # XLNet says -1: any


def max_positions(folder: Path) -> int:
    """Tokens that a graph of the model holds for; 2,048 where its config does not say."""
    return graph_positions(load_config(folder)) or known_positions(folder) or 2048


def graph_positions(config: Any) -> int | None:
    """Number of tokens from which the model turns keys by other angles, which a traced graph does not; None for most.

    LongRoPE (arXiv 2402.13753) has a second set of frequencies for texts beyond the original length (Phi-3 128k), and
    dynamic NTK scaling new ones for every length beyond the model's positions.
    config: transformers' or the values of a config.json, in which transformers 5 calls the scaling `rope_parameters`.
    """
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("longrope", "su", "dynamic"):
        return None
    original = scaling.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    positions = getattr(config, "max_position_embeddings", None)
    # transformers looks at the original length for LongRoPE alone, and without one at the positions.
    limit = positions if kind == "dynamic" else original or positions
    return int(limit) if limit else None


def decoder_size(folder: Path) -> DecoderSize:
    """Size of the model in a folder, from its config alone: no weights are read."""
    config = load_config(folder)
    return DecoderSize(
        weights=count_weights(meta_model(config)),
        cache_per_token=cache_per_token(config),
        attention_width=config.num_attention_heads * _head_dim(config),
    )


def cache_per_token(config: Any) -> int:
    """Numbers that one layer keeps of a token in the KV cache, keys and values together."""
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        return _latent_per_token(config)
    # Falcon's newer architecture spreads its shared heads out before it caches them.
    one_head = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    cache_heads = getattr(config, "num_key_value_heads", None) or (1 if one_head else config.num_attention_heads)
    return int(2 * cache_heads * _head_dim(config))


def _latent_per_token(config: Any) -> int:
    """Numbers that one layer of latent attention keeps of a token (DeepSeek-V2, arXiv 2405.04434).

    transformers 5 (5.24) caches the latent and the rotated part that all heads share, transformers 4 the keys and
    values that heads make of them.
    """
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
