"""The one interface that every pruning method has: model + calibration windows + number of layers -> Selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers, fixed_ends
from trsp_deploy.errors import ModelError, RecipeError, TextError


@dataclass(frozen=True)
class Selection:
    """What a method chose, and what the choice cost."""

    dropped: tuple[int, ...]  # indices of the dense model, sorted
    scores: dict[str, Any]  # why, for the plan's record; lists and numbers that JSON can hold
    forward_passes: float  # over all calibration windows; a pass over a quarter of them counts 0.25


# (model, windows (windows, sequence) int64, number of layers to drop, batch size) -> Selection; the model is unchanged.
SelectionMethod = Callable[[PreTrainedModel, torch.Tensor, int, int], Selection]


@dataclass(frozen=True)
class Rounds:
    """What a search by rounds has found, so that it can go on after a kill."""

    found: Sequence[Any]  # of the rounds that were kept; lists and numbers that JSON can hold
    keep: Callable[[Sequence[Any]], None]  # is told of all rounds after each


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods."""

    name: str
    description: str
    source: str  # paper and public code
    select: SelectionMethod
    # The same, of a search that takes so long that a kill must not cost all of it.
    go_on: Callable[[PreTrainedModel, torch.Tensor, int, int, Rounds], Selection] | None = None
    # Whether bf16 products will do, where the hardware has them: so for losses, not for equations and angles.
    mixed_precision: bool = False


def removable_layers(model: PreTrainedModel, windows: torch.Tensor, num_dropped: int) -> tuple[int, ...]:
    """Return the indices of the layers that may go: all but an end that the model would not survive without.

    Raises RecipeError when not at least one layer would go and one stay, TextError when there are no windows.
    """
    num_layers = len(decoder_layers(model))
    free = tuple(sorted(set(range(num_layers)) - fixed_ends(model)))
    most = min(len(free), num_layers - 1)
    if not 1 <= num_dropped <= most:
        raise RecipeError(f"{num_dropped} of the model's {num_layers} layers cannot be dropped; valid: 1 to {most}")
    if len(windows) == 0:
        raise TextError("no calibration windows: the calibration text is shorter than one context")
    return free


def checked_finite(scores: Iterable[float], what: str) -> list[float]:
    """Return the scores as a list; raises ModelError when one is nan or infinite, which no choice may rest on."""
    values = list(scores)
    broken = [value for value in values if not math.isfinite(value)]
    if broken:
        raise ModelError(
            f"{what} is {broken[0]} for {len(broken)} of {len(values)}: the model overflows on this text; "
            "try fp32 weights"
        )
    return values
