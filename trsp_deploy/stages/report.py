"""What a run found, written down: `report.json` for tools, `report.md` and `report.html` for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trsp_deploy.artifacts import RunLayout, write_json, writing
from trsp_deploy.results import Comparison, Perplexity, Served, ZeroShot
from trsp_deploy.tools.reports import markdown
from trsp_deploy.tools.reports.record import Report


def write_report(
    report: Report,
    comparisons: Mapping[str, Comparison],
    run: Path,
    answers: Mapping[str, Perplexity | ZeroShot],
    served: Served | None = None,
) -> None:
    """Write the report into the run folder; arguments as for the page."""
    from trsp_deploy.tools.reports import html  # draws with matplotlib, which takes a second to load

    path = RunLayout(run).report
    write_json(path, report)
    with writing(path.with_suffix(".md")) as partial:
        partial.write_text(markdown.render(report), encoding="utf-8")
    with writing(path.with_suffix(".html")) as partial:
        partial.write_text(html.render(report, comparisons, answers, served), encoding="utf-8")


def summary(report: Report, run: Path) -> dict[str, Any]:
    """The part of the report that `--json` prints: no raw data, no provenance."""
    plain = report.model_dump(
        mode="json", include={"schema_version", "verdict", "model", "removal", "quality", "engines", "served"}
    )
    path = RunLayout(run).report
    return {**plain, "run": str(run), "report": str(path), "page": str(path.with_suffix(".html"))}
