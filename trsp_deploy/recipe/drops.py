"""How many layers a `--drop` means, for one model or for a sweep."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from trsp_deploy.errors import RecipeError

# Of a drop. Longer ones are no numbers that anyone means, and Python refuses to read them or rounds them to infinity.
INTEGER = r"[0-9]{1,9}"
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
MOST_POINTS = 1000  # in a range of drops
UNREAD = 10**9  # layers of a model that was not read yet: more than any count, so that only a share can drop them all


def parse_drop(drop: str, num_layers: int = UNREAD) -> int:
    """Turn `25%` or `8` into a number of layers, rounding half up.

    Raises RecipeError when it is neither, when it drops nothing, or leaves no layer.
    """
    text = drop.strip()
    share = re.fullmatch(rf"({NUMBER})\s*%", text)
    if share:
        count = math.floor(Fraction(share[1]) * num_layers / 100 + Fraction(1, 2))  # a float may lose the half
    elif re.fullmatch(INTEGER, text):
        count = int(text)
    else:
        raise RecipeError(f"--drop '{drop}': give a share such as 25% or a count of layers such as 8")
    if not 1 <= count < num_layers:
        if num_layers == UNREAD:
            what = "no layer" if count < 1 else "every layer"
            raise RecipeError(f"--drop '{drop}' drops {what}: at least 1 must go and at least 1 must stay")
        if num_layers < 2:
            raise RecipeError(f"--drop '{drop}': the model has {num_layers} layer, and at least 1 must stay")
        raise RecipeError(
            f"--drop '{drop}' is {count} of the model's {num_layers} layers: "
            f"at least 1 must go and at least 1 must stay (1 to {num_layers - 1}, "
            f"or {_smallest_share(num_layers)}% upwards)"
        )
    return count


def parse_drops(drops: str, num_layers: int = UNREAD) -> tuple[int, ...]:
    """Turn a range (`5%..50%`, `2..12:2`; steps of 5% or 1) or a list (`10%,4,25%`) into numbers of layers, ascending.

    Raises RecipeError as `parse_drop` does, and when a range has no beginning, no end, or they are of two kinds.
    """
    ranged = re.fullmatch(rf"\s*({NUMBER})(%?)\s*\.\.\s*({NUMBER})(%?)\s*(?::\s*({NUMBER})(%?))?\s*", drops)
    if ranged is None:
        if ".." in drops:
            raise RecipeError(f"--drop '{drops}': expected a range such as 5%..50%, 2..12, or 10%..40%:10%")
        return tuple(sorted({parse_drop(each, num_layers) for each in drops.split(",")}))
    first, kind, last, kind_of_last, step, kind_of_step = ranged.groups()
    if kind != kind_of_last or float(first) > float(last):
        raise RecipeError(f"--drop '{drops}': begins with {first}{kind} and ends with {last}{kind_of_last}")
    if step is not None and kind_of_step != kind:
        raise RecipeError(f"--drop '{drops}': the step {step}{kind_of_step} is of another kind than {first}{kind}")
    width = float(step) if step is not None else (5.0 if kind else 1.0)
    if width <= 0:
        raise RecipeError(f"--drop '{drops}': a step of 0 leads nowhere")
    points = math.floor((float(last) - float(first)) / width + 1e-9) + 1
    if points > MOST_POINTS:
        raise RecipeError(f"--drop '{drops}': is {points} points, at most {MOST_POINTS} can be asked for")
    values = [float(first) + width * index for index in range(points)]
    return tuple(sorted({parse_drop(f"{value:.10g}{kind}", num_layers) for value in values}))


def _smallest_share(num_layers: int) -> int:
    return math.ceil(50 / num_layers)
