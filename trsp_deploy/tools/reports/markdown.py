"""`report.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trsp_deploy.results import Parity
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.reports.rows import (
    ENGINE_COLUMNS,
    FOOTNOTE,
    engine_notes,
    engine_rows,
    model_rows,
    provenance_rows,
    server_notes,
    sweep_columns,
    sweep_rows,
)
from trsp_deploy.tools.reports.sweeps import answer
from trsp_deploy.tools.triton_server.served import SERVED_COLUMNS, served_rows

PARITY_COLUMNS = (
    "subject",
    "role",
    "precision",
    "error (std of logits)",
    "tolerance",
    "greedy tokens equal",
    "perplexity ratio",
)


def render(report: Report) -> str:
    """The whole report as Markdown."""
    lines = [f"# {report.model.name}: {report.model.num_layers_dense} -> {report.model.num_layers_pruned} layers", ""]
    lines += [f"**{report.verdict}**", "", *_table(("", ""), model_rows(report))]
    lines += ["", "## Engines", "", *_table(ENGINE_COLUMNS, engine_rows(report))]
    lines += ["", *(f"- {note}" for note in engine_notes(report))]
    lines += ["", FOOTNOTE, ""]
    if report.served is not None:
        lines += ["## On a server", "", *_table(SERVED_COLUMNS, served_rows(report.served))]
        lines += ["", *(f"- {note}" for note in server_notes(report)), ""]
    if report.sweep is not None:
        lines += ["## Other cuts of this model", "", *_table(sweep_columns(report.sweep), sweep_rows(report.sweep))]
        lines += ["", answer(report.sweep), ""]
    lines += ["## Parity with fp32 PyTorch", "", *_table(PARITY_COLUMNS, map(_parity_row, report.parity))]
    lines += ["", "## Provenance", "", *(f"- {label}: {value}" for label, value in provenance_rows(report)), ""]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines. A cell may hold a name of the user's, and with it what ends a cell."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (columns, *rows)]
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return [head, "|" + "---|" * len(columns), *body]


def _parity_row(found: Parity) -> tuple[str, ...]:
    return (
        found.subject,
        found.role,
        found.precision,
        f"{found.max_error:.2g}",
        f"{found.tolerance:g}",
        f"{found.tokens_equal} of {found.tokens_compared}",
        "" if found.ppl_ratio is None else f"{found.ppl_ratio:.4f}",
    )
