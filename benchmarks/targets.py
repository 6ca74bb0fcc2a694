"""The targets of a bench: bounds that its figures have to keep, and how that is told to people and to scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from benchmarks.pages import markdown
from trsp_deploy.recipe import Strict

Figures = Mapping[str, float | None]  # None: not measured
ABSENT = "–"


class Target(Strict):
    """A bound that a figure has to keep."""

    sense: Literal["at least", "at most", "above"]
    bound: float
    meaning: str = ""  # for people: what the figure is

    def met(self, figure: float | None) -> bool:
        """Whether the figure keeps the bound; what is not measured does not."""
        if figure is None:
            return False
        if self.sense == "at most":
            return bool(figure <= self.bound)
        return bool(figure >= self.bound if self.sense == "at least" else figure > self.bound)


def at_least(bound: float, meaning: str = "") -> Target:
    """A target that its bound meets, and what is more."""
    return Target(sense="at least", bound=bound, meaning=meaning)


def at_most(bound: float, meaning: str = "") -> Target:
    """A target that its bound meets, and what is less."""
    return Target(sense="at most", bound=bound, meaning=meaning)


def above(bound: float, meaning: str = "") -> Target:
    """A target that is not met by its bound itself."""
    return Target(sense="above", bound=bound, meaning=meaning)


def met(targets: Mapping[str, Target], figures: Figures) -> dict[str, bool]:
    """Which targets are met."""
    return {name: target.met(figures[name]) for name, target in targets.items()}


def verdict(
    bench: str, targets: Mapping[str, Target], figures: Figures, decimals: int | None = None, **more: object
) -> dict[str, Any]:
    """The line of JSON that a bench ends with: three maps with the same keys.

    decimals: of the figures that are told; what is judged is not rounded. more: what else the line says.
    """
    told = {
        name: round(value, decimals) if value is not None and decimals is not None else value
        for name in targets
        for value in [figures[name]]
    }
    return {
        "bench": bench,
        "figures": told,
        "targets": {name: target.bound for name, target in targets.items()},
        "met": met(targets, figures),
        **more,
    }


def table(
    targets: Mapping[str, Target],
    figures: Figures,
    shown: Callable[[float], str] = "{:.3f}".format,
    cells: Mapping[str, str] | None = None,
) -> str:
    """Markdown: every target and what was measured. cells: of figures that take more than a number, by name."""
    body = []
    for name, target in targets.items():
        value = figures[name]
        number = ABSENT if value is None else (cells or {}).get(name) or shown(value)
        word = "not measured" if value is None else "met" if target.met(value) else "**not met**"
        body.append([target.meaning, f"{target.sense} {target.bound:,g}", number, word])
    return markdown(["figure", "target", "measured", ""], body)
