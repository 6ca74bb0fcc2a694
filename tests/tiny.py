"""Small random models of every family that the spine supports, a tokenizer for them, and English text.

folder = save_tiny("llama", tmp_path / "llama")
"""

from __future__ import annotations

import copy
import functools
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from trsp_deploy.decoder import next_token_logits

LAYERS = 6
VOCABULARY = 384
POSITIONS = 256

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROTARY = {**COMMON, "intermediate_size": 96}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 48, "pad_token_id": 1}),
    "llama": ("LlamaConfig", {**ROTARY, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**ROTARY, "num_key_value_heads": 2}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_neox": ("GPTNeoXConfig", ROTARY),
    "phi": ("PhiConfig", ROTARY),
    "mistral": ("MistralConfig", {**ROTARY, "num_key_value_heads": 2, "sliding_window": None}),
}
FAMILIES = tuple(CONFIGS)


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Config of a family's tiny model; `changes` override its fields."""
    name, values = CONFIGS[family]
    config: PretrainedConfig = getattr(transformers, name)(**{**values, **changes})
    return config


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of one of the families that the whole pipeline is tested with."""
    return random_model(tiny_config(family, **changes), seed)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model whose layers all matter: the default initialisation leaves them near the identity."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def next_token_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of each next token, by whole logits; input_ids is (batch, sequence) int64."""
    return torch.nn.functional.cross_entropy(
        next_token_logits(model, input_ids).flatten(0, 1), input_ids[:, 1:].flatten()
    )


@functools.cache
def english() -> str:
    """About 700 kB of English prose that every Python carries: its own reference manual."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([english()[:100_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=POSITIONS)


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """The same as one with `add_eos_token`: it puts an EOS behind each text."""
    return _adding("$A {}")


def beginning_tokenizer() -> PreTrainedTokenizerFast:
    """The same as one with `add_bos_token`, as Llama's: it puts a BOS, here the same token as EOS, before each text."""
    tokenizer = _adding("{} $A")
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def _adding(template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    special = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.format(special), special_tokens=[(special, tokenizer.eos_token_id)]
    )
    return tokenizer


def save_tiny(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a complete Hugging Face folder: model, tokenizer, generation config."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of `tokens()`, (batch, length, vocabulary)."""
    found: torch.Tensor = model(input_ids=tokens(), use_cache=False).logits
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients that there are, by the parameter's name."""
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
