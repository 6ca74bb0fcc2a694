"""A report as rows of text: what the pages and the terminal show of it."""

from __future__ import annotations

from trsp_deploy.results import PHASES, ROLES
from trsp_deploy.tools.judging.comparisons import ComparisonReport, notes
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.reports.record import ChoicesReport, QualityReport, Report
from trsp_deploy.tools.triton_server.served import served_notes

FITTED = {"span": " after a fold", "layers": " after a refit"}  # in closed form, before the transfer


def choice_rows(found: ChoicesReport) -> list[tuple[str, str, str, str]]:
    """Task, dense, pruned, and what was lost and gained."""
    rows = [
        (
            f"accuracy, {name}",
            f"{task.dense:.1%}",
            f"{task.pruned:.1%}",
            f"{task.lost} of {task.items} lost, {task.gained} gained (p {task.p_value:.2g})",
        )
        for name, task in found.tasks.items()
    ]
    kept = found.retained
    return [*rows, ("accuracy retained", "", "", f"{kept.ratio:.1%} ({kept.low:.1%} to {kept.high:.1%})")]


def model_rows(report: Report) -> list[tuple[str, str]]:
    """What was cut and what it costs, as label and value."""
    model, removal = report.model, report.removal
    rows = [
        ("model", f"{model.name} ({model.architecture})"),
        (
            "layers",
            f"{model.num_layers_dense} -> {model.num_layers_pruned} ({model.layers_dropped_share:.1%} fewer; "
            f"dropped {', '.join(map(str, model.dropped_layers))})",
        ),
        (
            "parameters",
            f"{model.parameters_dense / 1e6:,.1f}M -> {model.parameters_pruned / 1e6:,.1f}M "
            f"({model.parameters_dropped_share:.1%} fewer)",
        ),
        (
            "perplexity around the removal",
            f"dense {removal.dense_ppl:.2f}, before {removal.before_ppl:.2f}, after {removal.after_ppl:.2f} "
            f"(held-out calibration text; transfer '{removal.form}'"
            f"{FITTED.get(removal.refit, '')}, {removal.trained_tokens:,} tokens)",
        ),
    ]
    if removal.unfitted_because:
        rows.append(("not folded", removal.unfitted_because))
    for name, text in report.quality.items():
        rows.append(
            (
                f"perplexity on {name}",
                f"{text.dense_ppl:.2f} -> {text.pruned_ppl:.2f} = {text.ratio:.2f}x "
                f"({text.ratio_low:.2f} to {text.ratio_high:.2f}; {text.tokens:,} tokens)",
            )
        )
    rows.append(("quality budgets", budget_text(report.quality)))
    worst = max(report.parity, key=lambda parity: parity.max_error / parity.tolerance, default=None)
    if worst is not None:
        rows.append(
            (
                "parity",
                f"{len(report.parity)} checks passed; nearest to its tolerance: {worst.subject} {worst.role} "
                f"{worst.precision}, error {worst.max_error:.2g} of {worst.tolerance:g}",
            )
        )
    return rows


QUALITY_BUDGETS = (0.99, 0.999)  # of quality kept: MLPerf Inference's accuracy targets


def budget_text(quality: dict[str, QualityReport]) -> str:
    """Whether perplexity on every text stays within each budget: a share kept of q allows a ratio of 1 / q.

    A text that is too short to decide leaves a budget open, unless another misses it.
    """
    if not quality:
        return "no text was evaluated"
    worst = max(quality.values(), key=lambda text: text.ratio)
    words = []
    for share in QUALITY_BUDGETS:
        met = [text.ratio_high <= 1 / share and not text.doubt for text in quality.values()]
        missed = any(text.ratio_low > 1 / share and not text.doubt for text in quality.values())
        words.append(f"{share:.1%} {'kept' if all(met) else 'not kept' if missed else 'not decided'}")
    return f"{', '.join(words)} (worst text {worst.ratio:.2f}x; they allow 1.01x and 1.001x)"


def server_notes(report: Report) -> list[str]:
    """How serving was measured, and what the engine alone gained, a line each; none where it was not."""
    if report.served is None:
        return []
    lines = served_notes(report.served)
    for engine in report.engines:
        if engine.name == report.served.engine and engine.comparison is not None:
            ratio = engine.comparison.of("total").speedup
            lines.append(
                f"the engine alone, one text: {ratio.ratio:.2f}x end to end ({ratio.low:.2f} to {ratio.high:.2f})"
            )
    return lines


ENGINE_COLUMNS = ("engine", "status", "phase", "dense", "pruned", "speed-up (95%)", "limit", "of the limit")


def engine_rows(report: Report) -> list[tuple[str, ...]]:
    """The engines' table: a row a figure, in the order of ENGINE_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for engine in report.engines:
        if engine.dense is None or engine.pruned is None:
            rows.append((engine.name, engine.status, *[""] * 6))
            continue
        sizes = (f"{engine.dense.size_bytes / 1e6:.0f} MB", f"{engine.pruned.size_bytes / 1e6:.0f} MB")
        rows.append((engine.name, engine.status, "size", *sizes, "", "", ""))
        if engine.comparison is not None:
            rows += [("", "", *row) for row in comparison_rows(engine.comparison)]
        for name, text in engine.quality.items():
            interval = f"{text.ratio:.2f}x ({text.ratio_low:.2f} to {text.ratio_high:.2f})"
            rows.append(("", "", f"ppl on {name}", f"{text.dense_ppl:.2f}", f"{text.pruned_ppl:.2f}", interval, "", ""))
        if engine.choices is not None:
            rows += [("", "", *row, "", "") for row in choice_rows(engine.choices)]
    return rows


COMPARISON_COLUMNS = ENGINE_COLUMNS[2:]


def comparison_rows(found: ComparisonReport) -> list[tuple[str, ...]]:
    """Phases, rate, loading and memory of dense and pruned, in the order of COMPARISON_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    several = len(found.phases) > len(PHASES)
    for phase in found.phases:
        ratio = phase.speedup
        rows.append(
            (
                phase.title if several else PHASE_TITLES[phase.phase],
                f"{1e3 * phase.dense_s:.1f} ms",
                f"{1e3 * phase.pruned_s:.1f} ms",
                f"{ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})" + (" (!)" if phase.above_limit else ""),
                "" if phase.limit is None else f"{phase.limit:.2f}x",
                "" if phase.efficiency is None else f"{phase.efficiency:.0%}",
            )
        )
    for phase in found.phases:
        title = phase.title if several else PHASE_TITLES[phase.phase]
        rows += [
            (f"{title}, {name}", f"{1e3 * dense:.1f} ms", f"{1e3 * pruned:.1f} ms", "", "", "")
            for name, (dense, pruned) in phase.tail.items()
            if name == "p95"
        ]
    decode = found.of("decode")
    rates = (decode.case.batch_size / seconds for seconds in (decode.dense_s, decode.pruned_s))
    rows.append(("rate", *(f"{rate:.1f} tokens/s" for rate in rates), "", "", ""))
    rows.append(("load", *(f"{found.load_s[role]:.2f} s" for role in ROLES), "", "", ""))
    rows.append(("peak memory", *(f"{found.peak_rss_bytes[role] / 1e6:.0f} MB" for role in ROLES), "", "", ""))
    if len(found.gpu_bytes) == len(ROLES):
        rows.append(("GPU memory", *(f"{found.gpu_bytes[role] / 1e6:.0f} MB" for role in ROLES), "", "", ""))
    return rows


def engine_notes(report: Report) -> list[str]:
    """How each engine was measured, or why it did not run, a line each: nothing is skipped in silence."""
    states = {"built": "built, not run", "unavailable": "unavailable"}
    lines = []
    for engine in report.engines:
        if engine.comparison is None:
            lines.append(f"{engine.name}: {states[engine.status]} ({engine.reason})")
        else:
            lines += [f"{engine.name}: {note}" for note in notes(engine.comparison)]
    return lines
