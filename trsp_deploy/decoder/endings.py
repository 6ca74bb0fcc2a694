"""Where a model's texts end."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.decoder.loading import load_config, load_tokenizer
from trsp_deploy.errors import ModelError
from trsp_deploy.reading import read_json


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens that end a text: the generation config's, else the config's, else the tokenizer's; none where none says.

    folder: a Hugging Face model, or its tokenizer alone. What a config does not say, its class may.
    """
    path = folder / "generation_config.json"
    found = read_json(path, ModelError).get("eos_token_id") if path.is_file() else None
    if found is None and (folder / "config.json").is_file():
        found = getattr(load_config(folder), "eos_token_id", None)
    if found is None:
        found = load_tokenizer(folder).eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)
