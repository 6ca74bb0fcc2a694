"""`sweep.html`: speed against quality for every number of layers, and the one that was chosen."""

from __future__ import annotations

from trsp_deploy.tools.reports.html import fill, machine_rows, sweep_plots
from trsp_deploy.tools.reports.sweeps import Point, Sweep, answer


def render(found: Sweep) -> str:
    """The page, in the style of the report's."""
    texts = list(found.points[0].quality)
    return fill(
        "sweep.html.jinja",
        title=f"{found.model}: how many of {found.num_layers} layers to drop",
        mood="good" if found.choice.num_dropped is not None else "",
        sentences=[answer(found)],
        plots=sweep_plots(found),
        columns=columns(texts),
        rows=[(row(point), f"{point.folder}/report.html") for point in found.points],
        provenance=machine_rows(found.provenance, found.model),
    )


def columns(texts: list[str]) -> tuple[str, ...]:
    """Heads of the table."""
    perplexity = (f"perplexity, {text}" for text in texts)
    return ("layers", "parameters", *perplexity, "end to end", "limit", "ms a token", "peak memory", "size")


def row(point: Point) -> tuple[str, ...]:
    """One point's figures, in the order of `columns`."""
    perplexity = (
        f"{text.ratio:.2f}x ({text.ratio_low:.2f} to {text.ratio_high:.2f})" for text in point.quality.values()
    )
    cut = (f"-{point.num_dropped}", f"-{point.parameters_dropped_share:.1%}", *perplexity)
    found = point.comparison
    if found is None or point.size_bytes is None:
        return (*cut, *["not measured"] * 5)
    total = found.of("total")
    speed = f"{total.speedup.ratio:.2f}x ({total.speedup.low:.2f} to {total.speedup.high:.2f})"
    memory = found.gpu_bytes.get("pruned") or found.peak_rss_bytes["pruned"]
    return (
        *cut,
        speed + (" (!)" if total.above_limit else ""),
        "" if total.limit is None else f"{total.limit:.2f}x",
        f"{1e3 * found.of('decode').pruned_s:.1f}",
        f"{memory / 1e6:.0f} MB",
        f"{point.size_bytes / 1e6:.0f} MB",
    )
