"""A report, or a sweep, as rows of text: what the pages and the terminal show of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trsp_deploy.artifacts import Provenance
from trsp_deploy.results import ROLES, PerplexityParity, Role
from trsp_deploy.tools.judging.comparisons import ComparisonReport, notes
from trsp_deploy.tools.reports.measured import measured_rows
from trsp_deploy.tools.reports.quality import ChoicesReport, Price, QualityReport, budget_text
from trsp_deploy.tools.reports.record import EngineReport, Report, prices
from trsp_deploy.tools.reports.sweeps import Point, Sweep, token_s
from trsp_deploy.tools.reports.texts import text_rows
from trsp_deploy.tools.triton_server.served import served_notes

FITTED = {"span": " after a fold", "layers": " after a refit"}  # in closed form, before the transfer


def choice_rows(found: ChoicesReport) -> list[tuple[str, str, str, str]]:
    """Task, dense, pruned, and what was lost and gained."""
    rows = [
        (
            f"accuracy{f' ({task.metric})' if task.metric else ''}, {name}",
            f"{task.dense:.1%}",
            f"{task.pruned:.1%}",
            f"{task.lost} of {task.items} lost, {task.gained} gained (p {task.p_value:.2g})",
        )
        for name, task in found.tasks.items()
    ]
    return [*rows, ("accuracy retained", "", "", found.shown)]


def model_rows(report: Report) -> list[tuple[str, str]]:
    """What was cut and what it costs, as label and value."""
    model, removal = report.model, report.removal
    edited = f"; {chosen_by(report)}" if model.layers_edited else ""
    rows = [
        ("model", f"{model.name} ({model.architecture})"),
        (
            "layers",
            f"{model.num_layers_dense} -> {model.num_layers_pruned} ({model.layers_dropped_share:.1%} fewer; "
            f"dropped {', '.join(map(str, model.dropped_layers))}{edited})",
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
                f"perplexity on {name}, PyTorch",
                f"{text.dense_ppl:.2f} -> {text.pruned_ppl:.2f} = {text.shown(f'; {text.tokens:,} tokens')}",
            )
        )
    rows += [("overlap", text.note) for text in report.texts if text.note]
    found = prices(report.engines, report.quality)
    through_engines = any(price.engine is not None for price in found)
    for price in found:  # PyTorch's beside engines' is of texts alone that none of them has read
        lacking = [] if price.engine is None and through_engines else _unmeasured(report, price)
        rows.append((f"quality budgets, {price.source}", budget_text(price, lacking)))
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


def chosen_by(report: Report) -> str:
    """What chose the layers that were dropped, for people."""
    return f"edited by hand after {report.plan.method}" if report.model.layers_edited else report.plan.method


def _unmeasured(report: Report, price: Price) -> list[str]:
    """Texts and tasks of the recipe that a price has no figure of."""
    tasks = report.recipe.evaluate.tasks if price.choices is None else ()
    return [*(name for name in report.quality if name not in price.quality), *tasks]


def provenance_rows(report: Report) -> list[tuple[str, str]]:
    """With what the report was written, when its figures were taken, and what was another one then."""
    made = [*machine_rows(report.provenance, report.model.origin), *measured_rows(report.measured)]
    texts = text_rows(report.texts) or [(f"text {name}", text.origin) for name, text in report.quality.items()]
    return [*made, ("seed", str(report.recipe.seed)), *texts]


def machine_rows(made: Provenance, origin: str) -> list[tuple[str, str]]:
    """Where, when and with what something was made."""
    driver = "" if made.driver is None else f", driver {made.driver}"
    rows = [
        ("model", origin),
        ("machine", f"{made.cpu}, {made.cores} cores, {made.memory_bytes / 1e9:.0f} GB"),
        ("GPU", f"{', '.join(made.gpus)}{driver}" if made.gpus else "none"),
        ("versions", f"trsp_deploy {made.trsp_deploy}, Python {made.python}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in made.packages.items())),
    ]
    return rows if made.time is None else [*rows, ("written", made.time)]


def server_notes(report: Report) -> list[str]:
    """How serving was measured, and what the engine alone gained, one line each; none where it was not."""
    if report.served is None:
        return []
    lines = served_notes(report.served)
    for engine in report.engines:
        if engine.name == report.served.engine and engine.comparison is not None:
            found, case = engine.comparison, engine.comparison.headline
            where = found.where or (", one text" if case.batch_size == 1 else f", {case.title}")
            lines.append(f"the engine alone{where}: {found.of('total').speedup.text()} end to end")
    return lines


ENGINE_COLUMNS = ("engine", "status", "phase", "dense", "pruned", "speed-up (95%)", "limit", "of the limit")
FOOTNOTE = (  # of the engines' table
    "(!) above its limit: a measurement to distrust. Speed-up: dense, dense again (the control, where memory allows "
    "it) and pruned in turn, in replicates of fresh processes, everyone else stopped; mean over replicates with a 95% "
    "interval (the wider of a bootstrap's and Student's t), never narrower than the control is off on average. Limit: "
    "from bytes, operations and layers at this machine's measured rates, or assumed, as an engine's notes explain."
)


def engine_rows(report: Report) -> list[tuple[str, ...]]:
    """The engines' table: a row per figure, in the order of ENGINE_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for engine in report.engines:
        if engine.dense is None or engine.pruned is None:
            rows.append((engine.name, engine.status, *[""] * 6))
            continue
        sizes = (f"{engine.dense.size_bytes / 1e6:.0f} MB", f"{engine.pruned.size_bytes / 1e6:.0f} MB")
        rows.append((engine.name, engine.status, "size", *sizes, "", "", ""))
        if engine.comparison is not None:
            rows += [("", "", *row) for row in _measured_rows(engine.comparison)]
        rows += [("", "", *row) for row in perplexity_rows(engine.quality)]
        rows += [("", "", *row, "", "") for row in to_pytorch_rows(engine.to_pytorch)]
        if engine.choices is not None:
            rows += [("", "", *row, "", "") for row in choice_rows(engine.choices)]
    return rows


def to_pytorch_rows(found: Sequence[PerplexityParity]) -> list[tuple[str, str, str, str]]:
    """Text, dense, pruned, and the tolerance: an engine's perplexity over PyTorch's of the same model."""
    by_text: dict[str, dict[Role, PerplexityParity]] = {}
    for each in found:
        by_text.setdefault(each.text, {})[each.role] = each
    return [
        (
            f"ppl on {text} to PyTorch",
            f"{both['dense'].ratio:.4f}x",
            f"{both['pruned'].ratio:.4f}x",
            f"within {both['dense'].tolerance:.1%}",
        )
        for text, both in by_text.items()
    ]


COMPARISON_COLUMNS = ENGINE_COLUMNS[2:]


def comparison_rows(found: ComparisonReport) -> list[tuple[str, ...]]:
    """Every figure of dense and pruned, their size on disk where it is known, in the order of COMPARISON_COLUMNS."""
    rows = _measured_rows(found)
    if len(found.size_bytes) == len(ROLES):
        rows.append(("size", *(f"{found.size_bytes[role] / 1e6:.0f} MB" for role in ROLES), "", "", ""))
    return rows


def perplexity_rows(quality: Mapping[str, QualityReport]) -> list[tuple[str, ...]]:
    """Perplexity of dense and pruned on each text, in the order of COMPARISON_COLUMNS."""
    return [
        (f"ppl on {name}", f"{text.dense_ppl:.2f}", f"{text.pruned_ppl:.2f}", text.shown(), "", "")
        for name, text in quality.items()
    ]


def _measured_rows(found: ComparisonReport) -> list[tuple[str, ...]]:
    """Phases, rate, loading and memory: a run's report has an engine's size from its build, measured or not."""
    rows: list[tuple[str, ...]] = []
    for phase in found.phases:
        rows.append(
            (
                found.title_of(phase),
                f"{1e3 * phase.dense_s:.1f} ms",
                f"{1e3 * phase.pruned_s:.1f} ms",
                phase.speedup.text() + (" (!)" if phase.above_limit else ""),
                phase.shown_limit,
                "" if phase.efficiency is None else f"{phase.efficiency:.0%}",
            )
        )
    for phase in found.phases:
        if phase.device is not None:
            title = found.title_of(phase)
            rows.append(
                (
                    f"{title}, GPU time by CUDA events",
                    f"{1e3 * phase.device.dense_s:.1f} ms",
                    f"{1e3 * phase.device.pruned_s:.1f} ms",
                    phase.device.speedup.text(),
                    "",
                    "",
                )
            )
    for phase in found.phases:
        title = found.title_of(phase)
        rows += [
            (f"{title}, {name}", f"{1e3 * dense:.1f} ms", f"{1e3 * pruned:.1f} ms", "", "", "")
            for name, (dense, pruned) in phase.tail.items()
        ]
    decode = found.of("decode")
    rates = (decode.case.batch_size / seconds for seconds in (decode.dense_s, decode.pruned_s))
    rows.append(
        (
            f"rate, {decode.case.title}" if found.has_several_shapes else "rate",
            *(f"{rate:.1f} tokens/s" for rate in rates),
            "",
            "",
            "",
        )
    )
    rows.append(("load", *(f"{found.load_s[role]:.2f} s" for role in ROLES), "", "", ""))
    rows.append(("peak memory", *(f"{found.peak_rss_bytes[role] / 1e6:.0f} MB" for role in ROLES), "", "", ""))
    if len(found.gpu_bytes) == len(ROLES):
        rows.append(("GPU memory", *(f"{found.gpu_bytes[role] / 1e6:.0f} MB" for role in ROLES), "", "", ""))
    return rows


def engine_notes(report: Report) -> list[str]:
    """How each engine was measured, or why it did not run, one line each: nothing is skipped in silence."""
    lines = []
    for engine in report.engines:
        measured = [f"{engine.name}: {note}" for note in measured_notes(report, engine)]
        lines += measured if engine.comparison is not None else [absent_note(engine)]
    return lines


def measured_notes(report: Report, engine: EngineReport) -> list[str]:
    """How one engine was measured, and what of it was not; none of one that was not timed."""
    if engine.comparison is None:
        return []
    unread, tasks = [name for name in report.quality if name not in engine.quality], report.recipe.evaluate.tasks
    lacking = [f"its perplexity on {', '.join(unread)} is not measured"] if unread else []
    if tasks and engine.choices is None:
        lacking.append(f"its accuracy on {', '.join(tasks)} is not measured, or dense has none to retain")
    cut = [] if engine.choices is None else engine.choices.cut
    return [shapes_note(engine.comparison), *notes(engine.comparison), *lacking, *cut]


def shapes_note(found: ComparisonReport) -> str:
    """What was timed, without which no time and no speed-up says anything."""
    cases = dict.fromkeys(phase.case for phase in found.phases)
    new = ", ".join(dict.fromkeys(str(case.new_tokens) for case in cases))
    return f"timed: {'; '.join(case.title for case in cases)}; end to end with {new} new tokens"


def absent_note(engine: EngineReport) -> str:
    """Why an engine was not timed."""
    states = {"built": "built, not timed", "unavailable": "unavailable"}
    return f"{engine.name}: {states[engine.status]} ({engine.reason})"


def sweep_columns(found: Sweep) -> tuple[str, ...]:
    """Heads of a sweep's table; one of accuracy where any point has it."""
    perplexity = (f"perplexity, {text}" for text in found.points[0].quality)
    accuracy = ["accuracy retained"] * _answered(found)
    return ("layers", "parameters", *perplexity, *accuracy, "end to end", "limit", "ms a token", "peak memory", "size")


def sweep_rows(found: Sweep) -> list[tuple[str, ...]]:
    """A row of figures per point, in the order of `sweep_columns`."""
    answered = _answered(found)
    return [_sweep_row(point, answered) for point in found.points]


def _answered(found: Sweep) -> bool:
    return any(point.choices is not None for point in found.points)


def _sweep_row(point: Point, answered: bool) -> tuple[str, ...]:
    source = " (PyTorch)" if point.quality_in_pytorch else ""
    perplexity = (text.shown() + source for text in point.quality.values())
    cut = (f"-{point.num_dropped}", f"-{point.parameters_dropped_share:.1%}", *perplexity)
    found = point.comparison
    if found is None or point.size_bytes is None:
        return (*cut, *["not measured"] * (5 + answered))
    total = found.of("total")
    memory = found.gpu_bytes.get("pruned") or found.peak_rss_bytes["pruned"]
    return (
        *cut,
        # Empty where an engine that ran has none, as its notes say.
        *["" if point.choices is None else point.choices.shown] * answered,
        total.speedup.text() + (" (!)" if total.above_limit else "") + found.where,
        total.shown_limit,
        f"{1e3 * token_s(found):.1f}",
        f"{memory / 1e6:.0f} MB",
        f"{point.size_bytes / 1e6:.0f} MB",
    )
