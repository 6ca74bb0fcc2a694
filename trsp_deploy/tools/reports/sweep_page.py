"""`sweep.html`: speed against quality for every number of layers, and the one that was chosen."""

from __future__ import annotations

from trsp_deploy.tools.reports.html import fill, sweep_plots
from trsp_deploy.tools.reports.measured import measured_rows
from trsp_deploy.tools.reports.rows import machine_rows, sweep_columns, sweep_rows
from trsp_deploy.tools.reports.sweeps import Sweep, answer


def render(found: Sweep) -> str:
    """The sweep as one HTML page, in the style of the report's; green where a choice leaves no doubt."""
    sure = found.choice.num_dropped is not None and not found.choice.doubts and not found.lacking
    return fill(
        "sweep.html.jinja",
        title=f"{found.model}: how many of {found.num_layers} layers to drop",
        mood="good" if sure else "",
        sentences=[answer(found)],
        plots=sweep_plots(found),
        columns=sweep_columns(found),
        rows=[(row, f"{point.folder}/report.html") for row, point in zip(sweep_rows(found), found.points, strict=True)],
        provenance=[*machine_rows(found.provenance, found.model), *measured_rows(found.measured)],
    )
