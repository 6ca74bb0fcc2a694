"""Several calibration texts as one: an equal part of the windows from each, in random order.

What is trained on one domain forgets the others (docs/quality.md), so who has text of each use gives all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trsp_deploy.errors import TextError
from trsp_deploy.recipe.settings import shown_name
from trsp_deploy.tools.sources.texts import Texts, split_windows

if TYPE_CHECKING:
    import torch


def joined(texts: Sequence[Texts]) -> Texts:
    """The texts as one; raises TextError where two of them are the same.

    Of several the origin holds names alone: who shows one place of a file by its name would not find a second one.
    """
    if len(texts) == 1:
        return texts[0]
    first: dict[str, str] = {}
    for text in texts:
        if (same := first.get(text.fingerprint)) is not None:
            raise TextError(f"--calibration '{text.name}': holds the same documents as '{same}'; each text counts once")
        first[text.fingerprint] = text.name
    return Texts(
        name=" + ".join(text.name for text in texts),
        origin=" + ".join(shown_name(text.origin) for text in texts),
        documents=tuple(document for text in texts for document in text.documents),
        fingerprint=hashlib.sha256("".join(text.fingerprint for text in texts).encode()).hexdigest(),
    )


def mix_windows(
    texts: Sequence[torch.Tensor], wanted: int, held_out: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `wanted` windows to train on, in random order, and about `held_out` to judge by: `split_windows` of each.

    texts: (windows, sequence) of each text. One that is shorter than its part is read whole, and the others make up
    for it. Every text is judged by one window at least.
    """
    import torch

    if len(texts) == 1:
        return split_windows(texts[0], wanted, held_out, seed)
    judging = equal_parts(held_out, [len(windows) for windows in texts])
    split = [split_windows(each, len(each), max(1, held), seed) for each, held in zip(texts, judging, strict=True)]
    counts = equal_parts(wanted, [len(train) for train, _ in split])
    train = torch.cat([train[:count] for (train, _), count in zip(split, counts, strict=True)])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train[order], torch.cat([validation for _, validation in split])


def equal_parts(wanted: int, there: Sequence[int]) -> list[int]:
    """How many to take of each so that they come to `wanted`: as many as of any other, or all that are there."""
    counts = [0] * len(there)
    for place, which in enumerate(sorted(range(len(there)), key=there.__getitem__)):
        counts[which] = min(there[which], (wanted - sum(counts)) // (len(there) - place))
    return counts
