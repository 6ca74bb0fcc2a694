"""`report.md`."""

from __future__ import annotations

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
    sweep_row,
)
from trsp_deploy.tools.reports.sweeps import answer
from trsp_deploy.tools.triton_server.served import SERVED_COLUMNS, served_rows


def render(report: Report) -> str:
    """The whole report as Markdown."""
    bench = report.recipe.bench
    lines = [f"# {report.model.name}: {report.model.num_layers_dense} -> {report.model.num_layers_pruned} layers", ""]
    lines += [f"**{report.verdict}**", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in model_rows(report)]
    lines += ["", "## Engines", "", f"| {' | '.join(ENGINE_COLUMNS)} |", "|" + "---|" * len(ENGINE_COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in engine_rows(report)]
    lines += ["", *(f"- {note}" for note in engine_notes(report))]
    lines += [
        "",
        f"{'; '.join(case.title for case in bench.cases)}; {bench.new_tokens} tokens a block. {FOOTNOTE}",
        "",
    ]
    if report.served is not None:
        lines += ["## On a server", "", f"| {' | '.join(SERVED_COLUMNS)} |", "|" + "---|" * len(SERVED_COLUMNS)]
        lines += [f"| {' | '.join(row)} |" for row in served_rows(report.served)]
        lines += ["", *(f"- {note}" for note in server_notes(report)), ""]
    if report.sweep is not None:
        columns = sweep_columns(report.sweep)
        lines += ["## Other cuts of this model", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(sweep_row(point))} |" for point in report.sweep.points]
        lines += ["", answer(report.sweep), ""]
    lines += [
        "## Parity with fp32 PyTorch",
        "",
        "| subject | role | precision | error (std of logits) | tolerance | greedy tokens equal | perplexity ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.subject} | {p.role} | {p.precision} | {p.max_error:.2g} | {p.tolerance:g} "
        f"| {p.tokens_equal} of {p.tokens_compared} | {'' if p.ppl_ratio is None else f'{p.ppl_ratio:.4f}'} |"
        for p in report.parity
    ]
    lines += ["", "## Provenance", "", *(f"- {label}: {value}" for label, value in provenance_rows(report)), ""]
    return "\n".join(lines)
