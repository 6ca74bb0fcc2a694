"""Tiny models of the families that graph passes are tested on, exported once for all tests.

Fixture `exported`: family -> folder with `model/` (Hugging Face) and `onnx/` (fp32) or `onnx-fp16/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import transformers
from filelock import FileLock
from transformers import PretrainedConfig

from tests.families import FAMILIES, Family
from tests.tiny import random_model
from trsp_deploy.decoder import remove_layers
from trsp_deploy.recipe import ExportSettings, Float
from trsp_deploy.stages.export import export_onnx
from trsp_deploy.tools.quiet import quiet_libraries

LAYERS = 4
DROPPED = (1, 2)
HEADS = {"hidden_size": 64, "num_attention_heads": 4}  # the fused node wants heads of a multiple of 8
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 64, as TensorRT fuses them
# Name -> family, and changes of its tiny config.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", HEADS),
    "llama-wide": ("llama", WIDE),
    "mistral-sliding": ("mistral-sliding", HEADS),
    # Wider than any text of the other tests, and narrower than its own longest.
    "mistral-wide-window": ("mistral-sliding", {**HEADS, "sliding_window": 400, "max_position_embeddings": 1024}),
    "smollm3": ("smollm3", {**HEADS, "use_sliding_window": False}),  # layers without rotary embedding between others
    "qwen2": ("qwen2", HEADS),
    "qwen3": ("qwen3", HEADS),
    "phi3": ("phi3", HEADS),
    "opt": ("opt", {**HEADS, "word_embed_proj_dim": 64}),
    "opt-wide": ("opt", {"hidden_size": 256, "num_attention_heads": 4, "word_embed_proj_dim": 256}),
    "opt-350m": ("opt-350m", HEADS),
    "gpt2": ("gpt2", {"n_embd": 64}),
    "gpt-neox-parallel": ("gpt-neox-parallel", HEADS),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4}),
}
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """exported(name, precision="fp32", dropped=()): the model's folder, after some layers were removed."""
    import torch

    # One folder for all processes of `--numprocesses`: whoever comes second waits, and finds what is made.
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exported"
    folder.mkdir(exist_ok=True)

    def made(name: str, precision: Float = "fp32", dropped: Sequence[int] = ()) -> Path:
        with FileLock(folder / f"{name}.lock"):
            return make(name, precision, dropped)

    def make(name: str, precision: Float, dropped: Sequence[int]) -> Path:
        family, changes = MODELS[name]
        source = folder / "-".join([name, *map(str, dropped)])
        if not source.exists():
            model = random_model(_config(FAMILIES[family], changes))
            with torch.no_grad():  # norms of 1 and biases of 0 would be slimmed away before a pass sees them
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
            if dropped:
                remove_layers(model, dropped)
            model.save_pretrained(source / "model")
        out = onnx_of(source, precision).parent
        if not out.exists():
            with quiet_libraries():
                export_onnx(source / "model", precision, ExportSettings(), out)
        return source

    return made


def _config(family: Family, changes: dict[str, int]) -> PretrainedConfig:
    layers = "n_layer" if "n_layer" in family.values else "num_hidden_layers"
    config: PretrainedConfig = getattr(transformers, family.config)(**{**family.values, layers: LAYERS, **changes})
    return config


def onnx_of(source: Path, precision: Float = "fp32") -> Path:
    """The exported graph in a model's folder."""
    return source / ("onnx" if precision == "fp32" else f"onnx-{precision}") / "model.onnx"
