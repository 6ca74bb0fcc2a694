"""Token windows of a text, of which the model knows every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from trsp_deploy.errors import ModelError
from trsp_deploy.tools.sources.texts import Texts, tokenize_windows

if TYPE_CHECKING:
    import torch


class Extent(NamedTuple):
    """How a text was read."""

    tokens: int
    bos: bool  # whether every window begins with the tokenizer's BOS


def extent_of(windows: torch.Tensor, tokenizer: Any) -> Extent:
    """How a text was read as windows (windows, length)."""
    begins = tokenizer.bos_token_id
    return Extent(windows.numel(), begins is not None and bool((windows[:, 0] == begins).all()))


def known_windows(
    text: Texts, tokenizer: Any, length: int, most: int | None, option: str, vocabulary: int
) -> torch.Tensor:
    """Windows (windows, length) of a text, `most` at most, as int64.

    tokenizer: a Hugging Face tokenizer. option: that the text came from. vocabulary: tokens with an embedding.
    Raises TextError when the text is shorter than one window, ModelError for a token that the model lacks.
    """
    windows = tokenize_windows(text, tokenizer, length, most, option)
    unknown = windows[windows >= vocabulary]
    if len(unknown):
        token = int(unknown[0])
        raise ModelError(
            f"{option} '{text.name}': {len(unknown)} of its tokens are not among the model's {vocabulary}, "
            f"such as {token} ('{tokenizer.convert_ids_to_tokens(token)}'): the tokenizer has more; put the "
            "model's own one into its folder, or resize the model's embeddings (resize_token_embeddings)"
        )
    return windows
