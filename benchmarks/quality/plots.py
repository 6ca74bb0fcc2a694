"""The two plots: what each method loses by layers dropped, and what each form regains by tokens trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.quality.figures import Found, Interval
from benchmarks.quality.rows import Kind
from benchmarks.quality.table import PAPER_ARMS, RIVALS, Arm, Way
from trsp_deploy.artifacts import writing

# Okabe and Ito's colours, which colour-blind readers tell apart; each has a marker too, for print without colour.
STYLES: dict[str, tuple[str, str]] = {
    "default": ("#D55E00", "o"),
    "control": ("#000000", "s"),
    "refit-anneal": ("#882255", "p"),
    "layers": ("#D55E00", "o"),
    "own-text": ("#0072B2", "^"),
    "own-text-control": ("#56B4E9", "X"),
    "instructions": ("#44AA99", ">"),
    "instructions-control": ("#DDCC77", "<"),
    "given-text": ("#D55E00", "o"),
    "given-text-control": ("#000000", "s"),
    "anneal": ("#E69F00", "v"),
    "fold": ("#009E73", "D"),
    "refit": ("#CC79A7", "P"),
    "fold-layers": ("#117733", "d"),
    "trsp": ("#E69F00", "v"),
    "sleb": ("#0072B2", "^"),
    "shortgpt": ("#56B4E9", "X"),
    "uidl": ("#999999", "<"),
    "dense-trained": ("#999999", "h"),
}
UNNAMED = ("#332288", "*")  # an arm that is new to the table
FINE_TICKS = (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.5, 3)
COARSE_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20)
CEILING = 20.0  # a line that leaves the plot there belongs to a model that is broken
DODGE = 1.04  # neighbouring arms stand this factor apart, so that their intervals do not hide each other


def draw_curve(found: Found, path: Path) -> None:
    """Perplexity over dense against layers dropped, without training: one panel a text."""
    figure, panels = _panels(found, "layers dropped, of 30")
    for panel, text in zip(panels, found.texts, strict=True):
        for arm in reversed(_distinct(found, "untrained", found.table.untrained)):
            points: dict[float, Interval | None] = {
                n: found.ratio("curve", arm.name, text, drop=n) for n in found.table.counts
            }
            # The table's own number may be there under its other name only.
            points[found.table.drop] = found.ratio("untrained", arm.name, text)
            _line(panel, arm, points)
        panel.set_xticks(found.table.counts or (found.table.drop,))
    _finish(figure, panels, "SmolLM2-135M-Instruct, nothing trained", path)


def draw_budgets(found: Found, path: Path) -> None:
    """Perplexity over dense against training tokens, with intervals over seeds: one panel a text."""
    figure, panels = _panels(found, "tokens trained on")
    dense = Arm(name="dense-trained", label="dense, trained on the same tokens", selection="", way=Way(transfer={}))
    tokens = {steps: steps * 4 * found.table.subject.context_length for steps in found.table.steps}
    left_out = (*RIVALS, *PAPER_ARMS, *_mixed(found))
    arms = [arm for arm in _distinct(found, "trained", found.table.arms) if arm.name not in left_out]
    for panel, text in zip(panels, found.texts, strict=True):
        for place, arm in enumerate((dense, *reversed(arms))):
            kind: Kind = "dense-trained" if arm is dense else "trained"
            aside = 1.0 if arm is dense else DODGE ** (place - (len(arms) + 1) / 2)
            _line(panel, arm, {tokens[s] * aside: found.ratio(kind, arm.name, text, s) for s in found.table.steps})
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(tokens.values()), [f"{count / 1e3:.0f}k" for count in tokens.values()])
        panel.set_xlim(min(tokens.values()) / 1.3, max(tokens.values()) * 1.3)
    _finish(figure, panels, f"SmolLM2-135M-Instruct, {found.table.drop} of 30 layers removed", path)


def _mixed(found: Found) -> tuple[str, ...]:
    """The default and its control, where they are rows of other lines: another text at each budget makes no line."""
    return ("default", "control") if any(arm.name == "given-text" for arm in found.table.arms) else ()


def _distinct(found: Found, kind: Kind, arms: Sequence[Arm]) -> list[Arm]:
    """Arms without those whose rows are an earlier arm's: where the default is the refit, one line shows both."""
    shown: dict[tuple[str, ...], Arm] = {}
    for arm in arms:
        rows = [row.key for steps in (0, *found.table.steps) for row in found.rows(kind, arm.name, steps)]
        shown.setdefault(tuple(rows), arm)
    return list(shown.values())


def _panels(found: Found, below: str) -> tuple[Any, Sequence[Any]]:
    figure, panels = pyplot.subplots(
        1, len(found.texts), figsize=(4.2 * len(found.texts), 4.6), sharey=True, squeeze=False
    )
    for number, (panel, text) in enumerate(zip(panels[0], found.texts, strict=True)):
        panel.set_title(f"{text} ({'in' if number == 0 else 'out of'} domain)", fontsize=11)
        panel.set_xlabel(below)
        panel.set_yscale("log")
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("perplexity over the dense model's")
    return figure, panels[0]


def _line(panel: Any, arm: Arm, points: Mapping[float, Interval | None]) -> None:
    known = sorted((x, found) for x, found in points.items() if found is not None)
    if not known:
        return
    colour, marker = STYLES.get(arm.name, UNNAMED)
    default = arm.name in ("default", "layers", "given-text", "own-text")
    means = [found.mean for _, found in known]
    low = [found.mean - (found.low or found.mean) for _, found in known]
    high = [(found.high or found.mean) - found.mean for _, found in known]
    panel.errorbar(
        [x for x, _ in known],
        means,
        yerr=[low, high] if any(low) else None,
        color=colour,
        marker=marker,
        markersize=5 if default else 7,
        linewidth=2.2 if default else 1.4,
        linestyle="--" if arm.name == "dense-trained" else "-",
        capsize=3,
        label=arm.label,
    )


def _finish(figure: Any, panels: Sequence[Any], title: str, path: Path) -> None:
    low, high = panels[0].get_ylim()  # shared by all panels
    high = min(high, CEILING)
    for panel in panels:
        panel.set_ylim(low, high)
        panel.set_yticks([tick for tick in (FINE_TICKS if high / low < 4 else COARSE_TICKS) if low <= tick <= high])
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        panel.yaxis.set_minor_locator(NullLocator())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
