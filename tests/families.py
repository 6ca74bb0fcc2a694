"""One tiny random model of every decoder-only family that pruning supports, and of some that it refuses.

model = family_model("gemma3")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tests.tiny import VOCABULARY, random_model

LAYERS = 6
DROPPED = (1, 4)  # leaves no pattern that repeats every 2 or 3 layers, or begins at layer 3, as it was
WINDOW = 4

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLP = {**COMMON, "intermediate_size": 64}
GROUPED = {**MLP, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
OPT = {**COMMON, "ffn_dim": 64, "pad_token_id": 1, "word_embed_proj_dim": 32}


@dataclass(frozen=True)
class Family:
    """How to make the model, and what is to be found out about it."""

    config: str  # class of transformers
    values: dict[str, Any]
    folds: float | None = 1.0  # what fold's projection is scaled by; None: it refuses
    lists: dict[str, list[Any]] = field(default_factory=dict)  # config lists once DROPPED is gone


def layer_types(pattern: str) -> dict[str, list[Any]]:
    """ "sf" -> sliding, then full attention."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {"layer_types": [names[letter] for letter in pattern]}


FAMILIES: dict[str, Family] = {
    "opt": Family("OPTConfig", OPT),
    "opt-post-norm": Family("OPTConfig", {**OPT, "do_layer_norm_before": False}, folds=None),
    "opt-350m": Family("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}, folds=None),
    "llama": Family("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", {**GROUPED, "sliding_window": None}),
    "mistral-sliding": Family("MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config", GROUPED, lists=layer_types("ffff")),
    "qwen2-sliding": Family(
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
        lists=layer_types("ffss"),
    ),
    "qwen2-layer-types": Family(
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, **layer_types("fssfsf")},
        lists=layer_types("fsff"),
    ),
    "qwen3": Family(
        "Qwen3Config",
        {**GROUPED, "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
        lists=layer_types("ffss"),
    ),
    "phi": Family("PhiConfig", MLP),
    "phi3": Family("Phi3Config", {**GROUPED, "sliding_window": WINDOW}),
    "gpt2": Family("GPT2Config", {**GPT, "bos_token_id": 0, "eos_token_id": 0}),
    "gpt-neo": Family(
        "GPTNeoConfig",
        {
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_layers": LAYERS,
                "num_heads": 4,
                "window_size": WINDOW,
            },
            **{"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0},
            "attention_types": [[["global", "local"], 3]],
        },
        lists={"attention_layers": ["global", "global", "local", "local"]},
    ),
    "gpt-neox-parallel": Family("GPTNeoXConfig", {**MLP, "use_parallel_residual": True}),
    "gpt-neox-sequential": Family("GPTNeoXConfig", {**MLP, "use_parallel_residual": False}),
    "gptj": Family("GPTJConfig", {**GPT, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0}),
    "falcon-7b": Family("FalconConfig", {**COMMON, "parallel_attn": True, "multi_query": True, "bias": False}),
    "falcon-40b": Family("FalconConfig", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": Family(
        "FalconConfig", {**COMMON, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}
    ),
    "bloom": Family("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "gemma2": Family("Gemma2Config", GEMMA, folds=None, lists=layer_types("ssff")),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**GEMMA, "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 100.0},
        folds=None,
        lists=layer_types("sfsf"),
    ),
    "stablelm-parallel": Family("StableLmConfig", {**GROUPED, "use_parallel_residual": True}),
    "stablelm-sequential": Family("StableLmConfig", {**GROUPED, "use_parallel_residual": False}),
    "starcoder2": Family("Starcoder2Config", {**GROUPED, "sliding_window": WINDOW}),
    "olmo2": Family("Olmo2Config", GROUPED, folds=None),
    "granite": Family("GraniteConfig", {**GROUPED, "residual_multiplier": 0.25}, folds=0.25),
    "smollm3": Family(
        "SmolLM3Config",
        {**GROUPED, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW},
        lists={"no_rope_layers": [1, 1, 0, 0], **layer_types("ffss")},
    ),
    "mixtral": Family("MixtralConfig", {**GROUPED, "num_local_experts": 4}, folds=None),
    # As many experts as layers, so that their lists are as long as the layer list.
    "mixtral-6-experts": Family("MixtralConfig", {**GROUPED, "num_local_experts": LAYERS}, folds=None),
}


def family_config(name: str, **changes: Any) -> PretrainedConfig:
    """Config of a family's tiny model; `changes` override its fields."""
    family = FAMILIES[name]
    config: PretrainedConfig = getattr(transformers, family.config)(**{**family.values, **changes})
    return config


def family_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of that family, in which every layer matters."""
    return random_model(family_config(name, **changes), seed)
