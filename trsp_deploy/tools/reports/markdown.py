"""`report.md`."""

from __future__ import annotations

from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.reports.rows import ENGINE_COLUMNS, engine_notes, engine_rows, model_rows, server_notes
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
        f"{'; '.join(case.title for case in bench.cases)}; {bench.new_tokens} tokens a block. Dense, dense again (the "
        "control, where memory allows it) and pruned in turn, in replicates of fresh processes. Speed-up: mean over "
        "replicates with a 95% bootstrap interval, never narrower than what the control shows. Limit: from bytes and "
        "operations at this machine's measured rates.",
        "",
    ]
    if report.served is not None:
        lines += ["## On a server", "", f"| {' | '.join(SERVED_COLUMNS)} |", "|" + "---|" * len(SERVED_COLUMNS)]
        lines += [f"| {' | '.join(row)} |" for row in served_rows(report.served)]
        lines += ["", *(f"- {note}" for note in server_notes(report)), ""]
    lines += [
        "## Parity with fp32 PyTorch",
        "",
        "| subject | role | precision | error (std of logits) | tolerance | greedy tokens equal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.subject} | {p.role} | {p.precision} | {p.max_error:.2g} | {p.tolerance:g} "
        f"| {p.tokens_equal} of {p.tokens_compared} |"
        for p in report.parity
    ]
    made = report.provenance
    versions = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    machine = f"{made.cpu}, {made.cores} cores, {made.memory_bytes / 1e9:.0f} GB; GPU: {', '.join(made.gpus) or 'none'}"
    lines += ["", "## Provenance", "", f"- {report.model.origin}", f"- {machine}"]
    lines += [f"- trsp_deploy {made.trsp_deploy}, Python {made.python}, {versions}", f"- seed {report.recipe.seed}", ""]
    return "\n".join(lines)
