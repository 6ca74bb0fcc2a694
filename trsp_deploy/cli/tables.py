"""Tables for the terminal; the numbers come from where `report.md` has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.table import Table
from rich.text import Text

from trsp_deploy.cli.terminal import console, plain_table
from trsp_deploy.tools.judging.comparisons import ComparisonReport, notes, sentence
from trsp_deploy.tools.reports.quality import QualityReport
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.reports.rows import (
    COMPARISON_COLUMNS,
    ENGINE_COLUMNS,
    comparison_rows,
    engine_notes,
    engine_rows,
    model_rows,
    perplexity_rows,
    shapes_note,
    sweep_columns,
    sweep_rows,
)
from trsp_deploy.tools.reports.sweeps import Sweep, answer
from trsp_deploy.tools.resources.memory_plan import NAMES, MemoryPlan
from trsp_deploy.tools.triton_server.served import (
    SERVED_COLUMNS,
    ServedReport,
    served_notes,
    served_rows,
    served_sentence,
)

MEMORY_LABELS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimiser state, adapters",
    "teacher_bytes": "teacher",
    "activations_bytes": "activations",
    "loss_bytes": "logits and loss",
    "refit_bytes": "normal equations (fold, refit)",
    "slack_bytes": "allocator and libraries",
}


def print_report(report: Report, run: Path, file: TextIO) -> None:
    """The model, its quality, every engine, and the verdict."""
    out = console(file)
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in model_rows(report):
        facts.add_row(label, Text(value))
    out.print()
    out.print(facts)
    out.print()
    out.print(plain_table(ENGINE_COLUMNS, engine_rows(report)))
    for note in engine_notes(report):
        out.print(Text(note, style="dim"), soft_wrap=True)
    if report.served is not None:
        out.print()
        out.print(plain_table(SERVED_COLUMNS, served_rows(report.served)))
    out.print()
    out.print(Text(report.verdict, style="bold"), soft_wrap=True)
    out.print(f"report: {run / 'report.html'}, and the same as report.md and report.json", soft_wrap=True)


def print_comparison(label: str, found: ComparisonReport, quality: Mapping[str, QualityReport], file: TextIO) -> None:
    """Every figure of one comparison, perplexities by text, how it was measured, and the verdict."""
    out = console(file)
    out.print()
    out.print(plain_table(COMPARISON_COLUMNS, [*comparison_rows(found), *perplexity_rows(quality)]))
    for note in (shapes_note(found), *notes(found)):
        out.print(Text(note, style="dim"), soft_wrap=True)
    out.print()
    out.print(Text(sentence(label, found), style="bold"), soft_wrap=True)


def print_served(found: ServedReport, file: TextIO) -> None:
    """Every concurrency and metric, how it was measured, and the verdict."""
    out = console(file)
    out.print()
    out.print(plain_table(SERVED_COLUMNS, served_rows(found)))
    for note in served_notes(found):
        out.print(Text(note, style="dim"), soft_wrap=True)
    out.print()
    out.print(Text(served_sentence(found), style="bold"), soft_wrap=True)


def print_sweep(found: Sweep, folder: Path, file: TextIO) -> None:
    """A row per number of layers, and the answer."""
    out = console(file)
    out.print()
    out.print(plain_table(sweep_columns(found), sweep_rows(found)))
    out.print()
    out.print(Text(answer(found), style="bold"), soft_wrap=True)
    out.print(f"page: {folder / 'sweep.html'}, and the same as sweep.json", soft_wrap=True)


def print_memory(plan: MemoryPlan, file: TextIO) -> None:
    """Each stage's highest moment by purpose, the sum, and what the device has."""
    out = console(file)
    peaks = [stage.peak for stage in plan.stages]
    rows = [
        [label, *(f"{peak.parts[part] / 1e9:.2f}" for peak in peaks)]
        for part, label in MEMORY_LABELS.items()
        if any(peak.parts[part] for peak in peaks)
    ]
    rows.append(
        ["needed at least" if plan.at_least else "needed", *(f"{peak.total_bytes / 1e9:.2f}" for peak in peaks)]
    )
    rows.append(["highest at", *(peak.name for peak in peaks)])
    there = "unknown: it is not in this machine or does not tell"
    if plan.available_bytes is not None:
        there = f"{plan.available_bytes / 1e9:.2f} GB"
        rows.append(["fits", *(_fits(plan.fits(stage), plan.available_bytes) for stage in plan.stages)])
    out.print(plain_table(("GB", *(stage.stage for stage in plan.stages)), rows))
    out.print(f"{plan.model}, {plan.weights} weights; {NAMES[plan.device]} available: {there}", soft_wrap=True)
    if plan.at_least:
        out.print("activations are missing: this architecture's cannot be told without its data", soft_wrap=True)
    rows = [
        [
            each.stage,
            NAMES["cpu"],
            f"{each.peak.total_bytes / 1e9:.2f}",
            _fits(plan.host_fits(each), plan.host_available_bytes),
        ]
        for each in plan.host
    ]
    rows += [
        [
            each.stage,
            NAMES[each.device],
            f"{each.needed_bytes / 1e9:.2f}",
            _fits(plan.later_fits(each), plan.later_available_bytes[each.device]),
        ]
        for each in plan.later
    ]
    out.print(plain_table(("beside and after training, GB", "in", "needed", "fits"), rows))


def _fits(within: bool, there: int | None) -> str:
    """Nothing where it is not known what is there."""
    return "" if there is None else "yes" if within else "no"
