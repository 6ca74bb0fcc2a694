"""Configs of the models that have a recipe, as their `config.json` on the hub has them, so that a test needs no hub.

    estimate = MemoryEstimate(config_of("opt-1.3b"), "cuda", fast_bf16=True)

What decides about memory is here: sizes, heads, vocabulary, whether the LM head is tied, sliding windows.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig


def _opt(hidden: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    return "OPTConfig", {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 50272}


def _rotary(
    family: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    return f"{family}Config", {**sizes, **attention, **more}


# billions of parameters as published, and the config
SHAPES: dict[str, tuple[float, tuple[str, dict[str, Any]]]] = {
    "opt-1.3b": (1.32, _opt(2048, 24, 32)),
    "opt-2.7b": (2.65, _opt(2560, 32, 32)),
    "opt-6.7b": (6.66, _opt(4096, 32, 32)),
    "opt-13b": (12.85, _opt(5120, 40, 40)),
    "llama2-7b": (6.74, _rotary("Llama", 4096, 11008, 32, 32, 32, 32000, False)),
    "llama3.1-8b": (8.03, _rotary("Llama", 4096, 14336, 32, 32, 8, 128256, False)),
    "llama3.2-1b": (1.24, _rotary("Llama", 2048, 8192, 16, 32, 8, 128256, True, head_dim=64)),
    "llama3.2-3b": (3.21, _rotary("Llama", 3072, 8192, 28, 24, 8, 128256, True, head_dim=128)),
    "qwen2.5-0.5b": (0.49, _rotary("Qwen2", 896, 4864, 24, 14, 2, 151936, True)),
    "qwen2.5-1.5b": (1.54, _rotary("Qwen2", 1536, 8960, 28, 12, 2, 151936, True)),
    "qwen2.5-7b": (7.62, _rotary("Qwen2", 3584, 18944, 28, 28, 4, 152064, False)),
    "qwen3-1.7b": (1.72, _rotary("Qwen3", 2048, 6144, 28, 16, 8, 151936, True, head_dim=128)),
    "qwen3-8b": (8.19, _rotary("Qwen3", 4096, 12288, 36, 32, 8, 151936, False, head_dim=128)),
    "phi-2": (2.78, _rotary("Phi", 2560, 10240, 32, 32, 32, 51200, False, partial_rotary_factor=0.4)),
    "mistral-7b": (7.24, _rotary("Mistral", 4096, 14336, 32, 32, 8, 32000, False, sliding_window=4096)),
    "smollm2-135m": (0.135, _rotary("Llama", 576, 1536, 30, 9, 3, 49152, True)),
    "smollm2-360m": (0.362, _rotary("Llama", 960, 2560, 32, 15, 5, 49152, True)),
    "smollm2-1.7b": (1.71, _rotary("Llama", 2048, 8192, 24, 32, 32, 49152, True)),
}


def config_of(model: str) -> PretrainedConfig:
    """The config of a model with a recipe, by its short name."""
    name, values = SHAPES[model][1]
    config: PretrainedConfig = getattr(transformers, name)(**{"max_position_embeddings": 2048, **values})
    return config
