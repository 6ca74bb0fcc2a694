"""Plots of the report as SVG text that follows the page's light or dark colours.

matplotlib draws with placeholder colours, and `_svg` puts the page's CSS variables in their place. Each plot is as wide
as a phone: a wide screen shows two side by side.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trsp_deploy.results import PHASES, Comparison, Subject, Telemetry
from trsp_deploy.tools.judging.comparisons import ComparisonReport
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.judging.statistics import phase_s
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.reports.sweeps import Sweep
from trsp_deploy.tools.triton_server.served import TAILS, ServedReport

WIDTH = 4.2  # inches
MARKERS, LINES = "osD^v<>", ("-", "--", ":")
# Placeholder colours, unlike any that matplotlib chooses by itself, and the page's variables for them.
VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--dense)",
    "#040404": "var(--pruned)",
    "#050505": "var(--control)",
    "#060606": "var(--limit)",
}
INK, FAINT, DENSE, PRUNED, CONTROL, LIMIT = VARIABLES
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def speedups(found: ComparisonReport) -> str:
    """Every phase's speed-up with its interval, its control and its limit."""
    with rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.42 * len(found.phases))
        for place, phase in enumerate(found.phases):
            ratio = phase.speedup
            axes.plot([ratio.low, ratio.high], [place, place], color=PRUNED, linewidth=3, solid_capstyle="round")
            axes.plot(ratio.ratio, place, "o", color=PRUNED, markersize=6, label="_" if place else "pruned")
            if phase.control is not None:
                ends = [phase.control.low, phase.control.high]
                axes.plot(ends, [place + 0.25] * 2, color=CONTROL, linewidth=2, label="_" if place else "dense itself")
            if phase.limit is not None:
                axes.plot([phase.limit] * 2, [place - 0.3, place + 0.3], color=LIMIT, linewidth=2)
                axes.plot([], [], color=LIMIT, linewidth=2, label="_" if place else "limit")
        axes.axvline(1, color=FAINT, linewidth=1)
        titles = [found.title_of(phase) for phase in found.phases]
        axes.set_yticks(range(len(titles)), titles)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        # Beside long titles there is room for a short label.
        axes.set_xlabel("times as fast (95%)" if found.has_several_shapes else "times as fast as dense (95% interval)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, handlelength=1)
        return _svg(figure, "speedups", "Speed-up of each phase with its 95% interval, its control and its limit")


def samples(comparison: Comparison, case: int) -> str:
    """Distribution of every block's time at one shape, by its index, dense and pruned."""
    with rc_context(STYLE):
        figure, panels = _panels(len(PHASES), 4.2)
        for panel, phase in zip(panels, PHASES, strict=True):
            for subject, colour in (("dense", DENSE), ("pruned", PRUNED)):
                times = np.sort([1e3 * phase_s(block, phase) for block in _blocks(comparison, subject, case)])  # type: ignore[arg-type]
                panel.plot(times, np.arange(1, len(times) + 1) / len(times), color=colour, label=subject)
            everything = [1e3 * phase_s(b, phase) for s in ("dense", "pruned") for b in _blocks(comparison, s, case)]
            panel.set_xlim(0.95 * min(everything), 1.1 * float(np.percentile(everything, 97)))
            panel.set_title(PHASE_TITLES[phase], loc="left")
            panel.set_yticks([0, 0.5, 1], ["0", "half", "all"])
        panels[0].legend(loc="lower right")
        panels[-1].set_xlabel("milliseconds; share of the blocks that took no longer")
        return _svg(figure, "samples", "Distribution of the times of all blocks, dense and pruned")


def replicates(found: ComparisonReport, ratios: Sequence[float]) -> str:
    """Each replicate's end-to-end speed-up in the order taken, at the headline's shape: drifts and outliers show."""
    with rc_context(STYLE):
        figure, axes = _figure(2.2)
        axes.plot(range(1, len(ratios) + 1), np.exp(ratios), "o", color=PRUNED, markersize=5)
        ratio = found.of("total").speedup
        axes.axhspan(ratio.low, ratio.high, color=PRUNED, alpha=0.2, linewidth=0)
        axes.axhline(1, color=FAINT, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("replicate, in the order taken")
        axes.set_ylabel("end to end")
        return _svg(figure, "replicates", "Speed-up of each replicate in the order taken, and the interval")


def learned_gates(plan: PruningPlan) -> tuple[float, ...] | None:
    """The last gate of each layer; None where none were learned, or in a plan that was adapted of another model's."""
    last = plan.picks[-1].gates[-1] if plan.picks and plan.picks[-1].gates else ()
    return last if len(last) == plan.num_layers else None


def layers(plan: PruningPlan) -> str:
    """Which layers went, and the last gate of each where gates were learned."""
    with rc_context(STYLE):
        gates = learned_gates(plan)
        figure, axes = _figure(1.9 if gates else 1.0)
        indices = np.arange(plan.num_layers)
        gone = np.isin(indices, plan.dropped)
        heights = np.ones(plan.num_layers) if gates is None else np.array(gates)
        axes.bar(indices[~gone], heights[~gone], color=PRUNED, width=0.8, label="kept")
        axes.bar(
            indices[gone], np.maximum(heights[gone], 0.02), color=CONTROL, width=0.8, label="dropped", hatch="////"
        )
        axes.set_xlabel("layer of the dense model")
        axes.set_xlim(-0.8, plan.num_layers - 0.2)
        if gates is None:
            axes.set_yticks([])
        else:
            axes.set_ylabel("gate")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, handlelength=1)
        dropped = ", ".join(map(str, plan.dropped))
        return _svg(figure, "layers", f"Layers of the dense model; dropped: {dropped}")


def telemetry(taken: Sequence[Telemetry]) -> str:
    """What the machine did during the comparison; empty where nothing was recorded."""
    if len(taken) < 2:
        return ""
    with rc_context(STYLE):
        gpus = [sample.gpu for sample in taken]
        rows: list[tuple[str, list[float]]] = [("processors busy, %", [100 * sample.busy_share for sample in taken])]
        if any(sample.steal_share > 0.005 for sample in taken):
            rows.append(("stolen by the hypervisor, %", [100 * sample.steal_share for sample in taken]))
        if all(sample.mhz for sample in taken) and len({sample.mhz for sample in taken}) > 1:
            rows.append(("MHz", [sample.mhz or 0 for sample in taken]))
        if all(gpu is not None for gpu in gpus):
            known = [gpu for gpu in gpus if gpu is not None]
            rows.append(("GPU MHz", [gpu.sm_mhz for gpu in known]))
            rows.append(("GPU °C", [gpu.temperature_c for gpu in known]))
            rows.append(("GPU watts", [gpu.power_w for gpu in known]))
        figure, panels = _panels(len(rows), 0.7 + 1.1 * len(rows))
        for panel, (title, values) in zip(panels, rows, strict=True):
            panel.plot([sample.at_s for sample in taken], values, color=CONTROL, linewidth=1)
            panel.set_title(title, loc="left")
            panel.set_ylim(0, 1.1 * max(*values, 1))
        panels[-1].set_xlabel("seconds since the comparison began")
        return _svg(figure, "telemetry", "Load and clocks of the machine during the comparison")


def serving(found: ServedReport) -> str:
    """Throughput and inter-token latency of each model against the requests at once."""
    with rc_context(STYLE):
        figure, panels = _panels(2, 4.2)
        levels, tail = [level.concurrency for level in found.levels], _common_tail(found)
        for role, colour in (("dense", DENSE), ("pruned", PRUNED)):
            figures = [level.figures[role] for level in found.levels if role in level.figures]
            if not figures:
                continue
            panels[0].plot(levels, [each.tokens_per_s for each in figures], "o-", color=colour, label=role)
            times = [each.inter_token_s for each in figures]
            typical = [1e3 * time.get("p50", np.nan) for time in times]
            panels[1].plot(levels, typical, "o-", color=colour)
            if tail is not None:
                slow = [1e3 * time[tail] for time in times]
                panels[1].fill_between(levels, typical, slow, color=colour, alpha=0.15, linewidth=0)
        panels[0].set_title("throughput, new tokens a second", loc="left")
        band = "" if tail is None else f"; the band goes to {tail}"
        panels[1].set_title(f"inter-token latency, ms{band}", loc="left")
        for panel in panels:
            panel.set_ylim(bottom=0)
            panel.set_xticks(levels)
        panels[0].legend(loc="upper left")
        panels[1].set_xlabel("requests at once")
        served = " and ".join(found.roles)
        return _svg(figure, "serving", f"Throughput and inter-token latency of {served} on one server")


def _common_tail(found: ServedReport) -> str | None:
    """The furthest percentile of the inter-token latency that each model has at each concurrency; None without one."""
    times = [figures.inter_token_s for level in found.levels for figures in level.figures.values()]
    return next((name for name in reversed(TAILS) if all(name in time for time in times)), None)


def pareto(found: Sweep) -> str:
    """Perplexity ratio against end-to-end speed-up: one line per text, a number at each point; empty if nothing ran, or
    no text was read."""
    points = [point for point in found.points if point.comparison is not None]
    if not points or not points[0].quality:
        return ""
    with rc_context(STYLE):
        texts = points[0].quality
        figure, axes = _figure(3.4 + 0.2 * max(0, len(texts) - len(MARKERS)))  # room for the legend
        speeds = [point.comparison.of("total").speedup.ratio for point in points if point.comparison is not None]
        # After as many texts as there are markers the line changes.
        for text, (line, marker) in zip(texts, itertools.cycle(itertools.product(LINES, MARKERS)), strict=False):
            ratios = [point.quality[text].ratio for point in points]
            axes.plot(speeds, ratios, marker=marker, ls=line, color=PRUNED, linewidth=1, markersize=5, label=text)
        for point, speed in zip(points, speeds, strict=True):
            chosen = point.num_dropped == found.choice.num_dropped
            axes.annotate(
                str(point.num_dropped),
                (speed, point.worst_ppl_ratio),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                weight="bold" if chosen else "normal",
                color=LIMIT if chosen else INK,
            )
        if found.targets.min_speedup is not None:
            axes.axvline(found.targets.min_speedup, color=LIMIT, linewidth=1, linestyle="--")
        if found.targets.max_ppl_ratio is not None:
            axes.axhline(found.targets.max_ppl_ratio, color=LIMIT, linewidth=1, linestyle="--")
        axes.set_xlabel(_end_to_end(found))
        axes.set_ylabel("perplexity, times dense")
        axes.legend(loc="best")
        return _svg(figure, "pareto", "Perplexity over dense against end-to-end speed-up for each number of layers")


def by_count(found: Sweep) -> str:
    """Speed-up and its limit against the number of layers dropped; empty where nothing ran."""
    points = [
        (point.num_dropped, point.comparison.of("total")) for point in found.points if point.comparison is not None
    ]
    if not points:
        return ""
    with rc_context(STYLE):
        figure, axes = _figure(3.4)
        counts = [count for count, _ in points]
        ratios = [total.speedup for _, total in points]
        lows, highs = [r.ratio - r.low for r in ratios], [r.high - r.ratio for r in ratios]
        axes.errorbar(counts, [r.ratio for r in ratios], [lows, highs], fmt="o-", color=PRUNED, label="measured")
        limits = [(count, total.limit) for count, total in points if total.limit is not None]
        if limits:
            label = "limit, assumed" if found.limits_assumed else "limit"
            axes.plot(*zip(*limits, strict=True), color=LIMIT, linewidth=1, linestyle="--", label=label)
        axes.axhline(1, color=FAINT, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layers dropped")
        axes.set_ylabel(_end_to_end(found))
        axes.legend(loc="upper left")
        return _svg(figure, "by-count", "End-to-end speed-up and its limit against the number of layers dropped")


def _end_to_end(found: Sweep) -> str:
    several = any(point.comparison is not None and point.comparison.where for point in found.points)
    return "times as fast, end to end" + (", at the shape with the least" if several else "")


def _blocks(comparison: Comparison, subject: Subject, case: int) -> list:  # type: ignore[type-arg]
    return [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    found = figure.subplots(count, 1, squeeze=False)
    return figure, list(found[:, 0])


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one <svg> element: transparent, with the page's colours, and ids of its own."""
    file = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # two plots of a page must not share an id
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text))
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
