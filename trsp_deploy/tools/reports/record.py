"""Everything a run found, as one record: `report.json`, and what the pages and the terminal show of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trsp_deploy.artifacts import Provenance
from trsp_deploy.recipe import Backend, Precision, Recipe, Strict
from trsp_deploy.results import PHASES, ROLES, Parity, Perplexity, PrunedCheckpoint, ZeroShot
from trsp_deploy.tools.judging.comparisons import ComparisonReport, notes, sentence
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.judging.statistics import (
    PairedAccuracy,
    Ratio,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    retained_accuracy,
)
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.triton_server.served import ServedReport, served_notes, served_sentence

SCHEMA_VERSION = 2


class ModelReport(Strict):
    """What was cut."""

    name: str
    origin: str
    architecture: str
    num_layers_dense: int
    num_layers_pruned: int
    dropped_layers: tuple[int, ...]
    parameters_dense: int
    parameters_pruned: int
    layers_dropped_share: float
    parameters_dropped_share: float


class QualityReport(Strict):
    """Perplexity of both on one text, on the same tokens."""

    origin: str
    dense_ppl: float
    pruned_ppl: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens: int
    context_length: int
    pairs: Literal["documents", "windows"]  # what the interval's bootstrap draws


class ChoicesReport(Strict):
    """Both on multiple-choice tasks, on the same items."""

    tasks: dict[str, PairedAccuracy]
    retained: Ratio  # mean accuracy, pruned / dense


class RemovalReport(Strict):
    """Perplexity on held-out calibration text around the removal."""

    form: str
    trained_tokens: int
    dense_ppl: float
    before_ppl: float
    after_ppl: float


class EngineFigures(Strict):
    """One built engine."""

    size_bytes: int
    build_s: float


class EngineReport(Strict):
    """One engine spec, whatever came of it."""

    name: str
    backend: Backend
    precision: Precision
    status: Literal["ran", "built", "unavailable"]
    reason: str | None = None
    dense: EngineFigures | None = None
    pruned: EngineFigures | None = None
    comparison: ComparisonReport | None = None
    quality: dict[str, QualityReport] = Field(default_factory=dict)  # through the engine, by text
    choices: ChoicesReport | None = None  # through the engine; None where no task was asked for


class Report(Strict):
    """`report.json`."""

    schema_version: int
    verdict: str
    model: ModelReport
    removal: RemovalReport
    quality: dict[str, QualityReport]
    engines: tuple[EngineReport, ...]
    served: ServedReport | None = None  # on a Triton server; None where `bench-server` was not run
    parity: tuple[Parity, ...]
    recipe: Recipe
    plan: PruningPlan
    provenance: Provenance


def model_report(name: str, origin: str, architecture: str, checkpoint: PrunedCheckpoint) -> ModelReport:
    """State both shares: 25% of the layers is less than 25% of the parameters."""
    return ModelReport(
        name=name,
        origin=origin,
        architecture=architecture,
        num_layers_dense=checkpoint.num_layers_dense,
        num_layers_pruned=checkpoint.num_layers_pruned,
        dropped_layers=checkpoint.dropped,
        parameters_dense=checkpoint.parameters_dense,
        parameters_pruned=checkpoint.parameters_pruned,
        layers_dropped_share=len(checkpoint.dropped) / checkpoint.num_layers_dense,
        parameters_dropped_share=1 - checkpoint.parameters_pruned / checkpoint.parameters_dense,
    )


def removal_report(checkpoint: PrunedCheckpoint) -> RemovalReport:
    """What the removal did to held-out calibration text."""
    return RemovalReport(
        form=checkpoint.form,
        trained_tokens=checkpoint.tokens,
        dense_ppl=checkpoint.ppl_dense,
        before_ppl=checkpoint.ppl_before_removal,
        after_ppl=checkpoint.ppl_after_removal,
    )


def quality_report(dense: Perplexity, pruned: Perplexity) -> QualityReport:
    """Pair two models on one text."""
    ratio = perplexity_ratio(dense, pruned)
    return QualityReport(
        origin=dense.origin,
        dense_ppl=dense.ppl,
        pruned_ppl=pruned.ppl,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        tokens=dense.tokens,
        context_length=dense.context_length,
        pairs="documents" if paired_by_documents(dense, pruned) else "windows",
    )


def choices_report(dense: ZeroShot, pruned: ZeroShot) -> ChoicesReport:
    """Pair two models item by item."""
    return ChoicesReport(
        tasks={
            before.task: paired_accuracy(before, after) for before, after in zip(dense.tasks, pruned.tasks, strict=True)
        },
        retained=retained_accuracy(dense, pruned),
    )


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


def verdict(engines: list[EngineReport], quality: dict[str, QualityReport], served: ServedReport | None = None) -> str:
    """One sentence an engine that ran, one for the server, then what the cut costs."""
    sentences = [sentence(engine.name, engine.comparison) for engine in engines if engine.comparison is not None]
    if not sentences:
        sentences = ["NOT MEASURED: no engine could run on this machine, so no acceleration is claimed."]
    if served is not None:
        sentences.append(served_sentence(served))
    if quality:
        cost = ", ".join(f"{text.ratio:.2f}x on {name}" for name, text in quality.items())
        sentences.append(f"Perplexity: {cost}.")
    return " ".join(sentences)


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
            f"(held-out calibration text; transfer '{removal.form}', {removal.trained_tokens:,} tokens)",
        ),
    ]
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
    """Whether perplexity on every text stays within each budget: a share kept of q allows a ratio of 1 / q."""
    if not quality:
        return "no text was evaluated"
    worst = max(quality.values(), key=lambda text: text.ratio)
    words = []
    for share in QUALITY_BUDGETS:
        met = [text.ratio_high <= 1 / share for text in quality.values()]
        missed = any(text.ratio_low > 1 / share for text in quality.values())
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
    if found.gpu_bytes:
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
