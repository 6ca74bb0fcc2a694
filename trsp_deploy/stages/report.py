"""Everything a run found, as `report.json` for tools and `report.md` for people, from the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from trsp_deploy.artifacts import Provenance, write_json, writing
from trsp_deploy.recipe import Backend, Precision, Recipe, Strict
from trsp_deploy.results import Latency, Measurement, Parity, Perplexity, PrunedCheckpoint
from trsp_deploy.tools.limits import SpeedLimit
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.statistics import (
    Ratio,
    decode_by_block,
    decode_speedup,
    median,
    perplexity_ratio,
    prefill_speedup,
)

SCHEMA_VERSION = 1
ABOVE_LIMIT = 1.02  # a speed-up this far above its limit is a measurement to distrust


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


class RemovalReport(Strict):
    """Perplexity on held-out calibration text around the removal."""

    form: str
    trained_tokens: int
    dense_ppl: float
    before_ppl: float
    after_ppl: float


class EngineFigures(Strict):
    """One built engine; latencies and memory are None when it did not run."""

    size_bytes: int
    build_s: float
    prefill_s: float | None = None  # median
    decode_s: float | None = None  # median seconds a token
    tokens_per_s: float | None = None
    load_s: float | None = None
    peak_rss_bytes: int | None = None
    gpu_bytes: int | None = None


class SpeedupReport(Strict):
    """dense time / pruned time, with 95% intervals, beside what bytes and operations allow at most."""

    prefill: float
    prefill_low: float
    prefill_high: float
    prefill_limit: float
    decode: float
    decode_low: float
    decode_high: float
    limit: float  # of decode, from bytes


class EngineReport(Strict):
    """One engine spec, whatever came of it."""

    name: str
    backend: Backend
    precision: Precision
    status: Literal["ran", "built", "unavailable"]
    reason: str | None = None
    dense: EngineFigures | None = None
    pruned: EngineFigures | None = None
    speedup: SpeedupReport | None = None


class Report(Strict):
    """`report.json`."""

    schema_version: int
    verdict: str
    model: ModelReport
    removal: RemovalReport
    quality: dict[str, QualityReport]
    engines: tuple[EngineReport, ...]
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
    )


def engine_figures(size_bytes: int, build_s: float, latency: Latency | None, batch_size: int) -> EngineFigures:
    """Medians of one engine's raw samples."""
    if latency is None:
        return EngineFigures(size_bytes=size_bytes, build_s=build_s)
    decode_s = median(decode_by_block(latency))
    return EngineFigures(
        size_bytes=size_bytes,
        build_s=build_s,
        prefill_s=median(latency.prefill_s),
        decode_s=decode_s,
        tokens_per_s=batch_size / decode_s,
        load_s=latency.load_s,
        peak_rss_bytes=latency.peak_rss_bytes,
        gpu_bytes=latency.gpu_bytes,
    )


def speedup_report(measurement: Measurement, limit: SpeedLimit) -> SpeedupReport:
    """Measured speed-up beside its limit."""
    prefill, decode = prefill_speedup(measurement), decode_speedup(measurement)
    return SpeedupReport(
        prefill=prefill.ratio,
        prefill_low=prefill.low,
        prefill_high=prefill.high,
        prefill_limit=limit.prefill,
        decode=decode.ratio,
        decode_low=decode.low,
        decode_high=decode.high,
        limit=limit.decode,
    )


def verdict(engines: list[EngineReport], quality: dict[str, QualityReport]) -> str:
    """One sentence an engine that ran, then what the cut costs."""
    sentences = [_speed_sentence(engine.name, engine.speedup) for engine in engines if engine.speedup is not None]
    if not sentences:
        sentences = ["NOT MEASURED: no engine could run on this machine, so no acceleration is claimed."]
    cost = ", ".join(f"{text.ratio:.2f}x on {name}" for name, text in quality.items())
    return " ".join([*sentences, f"Perplexity: {cost}."])


def _speed_sentence(name: str, found: SpeedupReport) -> str:
    phases = {
        "decode": (Ratio(ratio=found.decode, low=found.decode_low, high=found.decode_high), found.limit),
        "prefill": (Ratio(ratio=found.prefill, low=found.prefill_low, high=found.prefill_high), found.prefill_limit),
    }
    parts, suspicious = [], []
    for phase, (ratio, limit) in phases.items():
        parts.append(f"{phase} {ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}, limit {limit:.2f}x)")
        if ratio.low > ABOVE_LIMIT * limit:
            suspicious.append(phase)
    lows, highs = [r.low for r, _ in phases.values()], [r.high for r, _ in phases.values()]
    if all(low > 1 for low in lows):
        word = "CONFIRMED"
    elif any(high < 1 for high in highs):
        word = "NOT THERE"
    else:
        word = "INCONCLUSIVE"
    caution = f" Above its limit, so distrust it: {', '.join(suspicious)}." if suspicious else ""
    return f"{word} on {name}: {', '.join(parts)}.{caution}"


def write_report(report: Report, run: Path) -> None:
    """Write report.json and report.md into the run folder."""
    write_json(run / "report.json", report)
    with writing(run / "report.md") as partial:
        partial.write_text(render(report), encoding="utf-8")


def summary(report: Report, run: Path) -> dict[str, Any]:
    """The part of the report that `--json` prints: no raw data, no provenance."""
    plain = report.model_dump(
        mode="json", include={"schema_version", "verdict", "model", "removal", "quality", "engines"}
    )
    return {**plain, "run": str(run), "report": str(run / "report.json")}


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


ENGINE_COLUMNS = ("engine", "status", "phase", "dense", "pruned", "speed-up (95%)", "limit")


def engine_rows(report: Report) -> list[tuple[str, ...]]:
    """The engines' table: a row a figure, in the order of ENGINE_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for engine in report.engines:
        dense, pruned, found = engine.dense, engine.pruned, engine.speedup
        if dense is None or pruned is None:
            rows.append((engine.name, engine.status, "", "", "", "", ""))
            continue
        size = (f"{dense.size_bytes / 1e6:.0f} MB", f"{pruned.size_bytes / 1e6:.0f} MB", "", "")
        rows.append((engine.name, engine.status, "size", *size))
        if found is None:
            continue
        for phase, ms, interval, limit in (
            (
                "prefill",
                (dense.prefill_s, pruned.prefill_s),
                (found.prefill, found.prefill_low, found.prefill_high),
                found.prefill_limit,
            ),
            (
                "decode",
                (dense.decode_s, pruned.decode_s),
                (found.decode, found.decode_low, found.decode_high),
                found.limit,
            ),
        ):
            cells = [f"{1e3 * (value or 0):.1f} ms" for value in ms]
            shown = f"{interval[0]:.2f}x ({interval[1]:.2f} to {interval[2]:.2f})"
            rows.append(("", "", phase, *cells, shown, f"{limit:.2f}x"))
        rate = (f"{dense.tokens_per_s:.1f} tokens/s", f"{pruned.tokens_per_s:.1f} tokens/s")
        rows.append(("", "", "rate", *rate, "", ""))
        memory = (f"{(dense.peak_rss_bytes or 0) / 1e6:.0f} MB", f"{(pruned.peak_rss_bytes or 0) / 1e6:.0f} MB")
        rows.append(("", "", "peak memory", *memory, "", ""))
        if dense.gpu_bytes is not None and pruned.gpu_bytes is not None:
            gpu = (f"{dense.gpu_bytes / 1e6:.0f} MB", f"{pruned.gpu_bytes / 1e6:.0f} MB")
            rows.append(("", "", "GPU memory", *gpu, "", ""))
    return rows


def engine_notes(report: Report) -> list[str]:
    """Why an engine did not run, a line each: nothing is skipped in silence."""
    states = {"built": "built, not run", "unavailable": "unavailable"}
    return [f"{e.name}: {states[e.status]} ({e.reason})" for e in report.engines if e.status != "ran"]


def render(report: Report) -> str:
    """`report.md`."""
    bench = report.recipe.bench
    lines = [f"# {report.model.name}: {report.model.num_layers_dense} -> {report.model.num_layers_pruned} layers", ""]
    lines += [f"**{report.verdict}**", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in model_rows(report)]
    lines += ["", "## Engines", "", f"| {' | '.join(ENGINE_COLUMNS)} |", "|" + "---|" * len(ENGINE_COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in engine_rows(report)]
    lines += ["", *(f"- {note}" for note in engine_notes(report))]
    lines += [
        "",
        f"Batch {bench.batch_size}, prompt {bench.prompt_tokens}, {bench.new_tokens} tokens a block, "
        f"{bench.blocks} blocks each, dense and pruned in turn. Speed-up: median over block pairs with a bootstrap "
        "interval. Limit: bytes read a token (decode), operations (prefill).",
        "",
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
