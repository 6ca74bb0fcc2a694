"""`report.html`: one file without network or script, light and dark, for a phone as for a desk."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import to_json

from trsp_deploy.recipe import shown_name
from trsp_deploy.results import Comparison, Perplexity, Served, ZeroShot
from trsp_deploy.tools.judging.comparisons import ComparisonReport, PhaseReport, elsewhere
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, replicate_ratios
from trsp_deploy.tools.judging.verdicts import Claim
from trsp_deploy.tools.reports import plots
from trsp_deploy.tools.reports.quality import Price, QualityReport, in_brackets
from trsp_deploy.tools.reports.record import EngineReport, Report, prices
from trsp_deploy.tools.reports.rows import (
    ENGINE_COLUMNS,
    FOOTNOTE,
    absent_note,
    chosen_by,
    engine_rows,
    measured_notes,
    model_rows,
    provenance_rows,
    server_notes,
    sweep_columns,
    sweep_rows,
)
from trsp_deploy.tools.reports.sweeps import Sweep, answer
from trsp_deploy.tools.triton_server.served import (
    SERVED_COLUMNS,
    ServedReport,
    served_claim,
    served_rows,
    served_sentence,
)

TEMPLATE = "report.html.jinja"
MOODS: dict[Claim, str] = {"CONFIRMED": "good", "NOT THERE": "bad", "INCONCLUSIVE": ""}
OPENINGS: dict[Claim, str] = {
    "CONFIRMED": "Faster: {name} generates {ratio:.2f} times as fast as before ({low:.2f} to {high:.2f}).",
    "NOT THERE": "Not faster throughout: a phase got slower on {name}, which is {ratio:.2f} times as fast end to end "
    "({low:.2f} to {high:.2f}).",
    "INCONCLUSIVE": "Not decided: {name} generates {ratio:.2f} times as fast ({low:.2f} to {high:.2f}), but for a "
    "phase its interval, or what dense shows against itself, leaves no difference possible.",
}


FEW = (
    "Not decided: {name} generates {ratio:.2f} times as fast ({low:.2f} to {high:.2f}), in {replicates} replicates; "
    "{fewest} are the fewest that decide."
)


def render(
    report: Report,
    comparisons: Mapping[str, Comparison],
    answers: Mapping[str, Perplexity | ZeroShot] | None = None,
    served: Served | None = None,
) -> str:
    """The report as one HTML page.

    comparisons: raw samples by engine, for the plots and to download.
    answers: what quality is derived from, by step, to download. served: raw samples under load, to download.
    """
    measured = [engine for engine in report.engines if engine.comparison is not None]
    model = report.model
    return fill(
        TEMPLATE,
        title=f"{model.name}: {model.num_layers_dense} layers cut to {model.num_layers_pruned}",
        sentences=_sentences(report, measured),
        mood=_mood(report, measured),
        cards=_cards(report, measured),
        engines=[_engine(report, engine, comparisons[engine.name]) for engine in measured],
        engine_columns=ENGINE_COLUMNS,
        engine_rows=engine_rows(report),
        footnote=FOOTNOTE,
        absent=[absent_note(engine) for engine in report.engines if engine.comparison is None],
        sweep_plots=[] if report.sweep is None else sweep_plots(report.sweep),
        sweep_columns=() if report.sweep is None else sweep_columns(report.sweep),
        sweep_rows=[] if report.sweep is None else sweep_rows(report.sweep),
        sweep_answer="" if report.sweep is None else answer(report.sweep),
        layer_map=Markup(plots.layers(report.plan)),
        layer_caption=_layer_caption(report),
        model_rows=model_rows(report),
        parity=report.parity,
        provenance=provenance_rows(report),
        served_plot=Markup("" if report.served is None else plots.serving(report.served)),
        served_caption="" if report.served is None else _served_caption(report.served),
        served_columns=SERVED_COLUMNS,
        served_rows=[] if report.served is None else served_rows(report.served),
        served_notes=server_notes(report),
        downloads=[
            _download("report.json", report.model_dump_json(indent=2), compress=False),
            *(_download(f"samples-{name}.json.gz", raw.model_dump_json()) for name, raw in comparisons.items()),
            *([_download("quality.json.gz", to_json(_shown(answers)).decode())] if answers else []),
            *([] if served is None else [_download("served.json.gz", served.model_dump_json())]),
        ],
        recipe=yaml.safe_dump(report.recipe.model_dump(mode="json"), sort_keys=False),
    )


def _sentences(report: Report, measured: list[EngineReport]) -> list[str]:
    """What a reader without time should know: speed, then price, then a warning."""
    lines = []
    for engine in measured:
        assert engine.comparison is not None
        ratio = engine.comparison.of("total").speedup
        few = engine.comparison.replicates < FEWEST_REPLICATES
        opening = FEW if few else OPENINGS[engine.comparison.claim]
        figures = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
        counts = {"replicates": engine.comparison.replicates, "fewest": FEWEST_REPLICATES}
        lines.append(opening.format(name=f"{engine.name}{_aside(engine.comparison)}", **figures, **counts))
        if at_others := elsewhere(engine.comparison):
            lines.append(f"At another shape, {at_others}.")
        above = [phase.title for phase in engine.comparison.phases if phase.above_limit]
        if above:
            lines.append(f"Above what the hardware allows, so distrust it: {'; '.join(above)}.")
    if not measured:
        lines.append("Not measured: no engine was timed on this machine, so no acceleration is claimed.")
    if report.served is not None:
        lines.append(served_sentence(report.served))
    return lines + [_price_sentence(price) for price in prices(report.engines, report.quality) if _costs(price)]


def _aside(found: ComparisonReport) -> str:
    """The shape that a sentence's figures are of, in brackets; empty where it is the only one."""
    return f" ({found.where.strip()})" if found.where else ""


def _price_sentence(price: Price) -> str:
    return f"The price {price.where}: {'; '.join(_costs(price))}."


def _costs(price: Price) -> list[str]:
    """What the cut costs in perplexity and in accuracy, as far as either was asked for."""
    costs = []
    if price.quality:
        texts = (f"{_percent(text)} on {name}{in_brackets(text.few)}" for name, text in price.quality.items())
        costs.append(f"perplexity (how surprised the model is by held-out text) {', '.join(texts)}")
    if price.choices is not None:
        few = in_brackets(price.choices.few)
        costs.append(f"{price.choices.retained.ratio:.1%} of dense's accuracy on tasks is kept{few}")
    return costs


def _percent(text: QualityReport) -> str:
    change = text.ratio - 1
    return f"{'up' if change >= 0 else 'down'} by {abs(change):.0%}"


def _mood(report: Report, measured: list[EngineReport]) -> str:
    """That of the claims above the price, the served one's among them, where all are the same and none is doubtful."""
    found = [engine.comparison for engine in measured if engine.comparison is not None]
    claims = {comparison.claim for comparison in found}
    served = None if report.served is None else served_claim(report.served)
    if served is not None:
        claims.add(served)
    doubtful = not found or any(phase.above_limit for comparison in found for phase in comparison.phases)
    return MOODS[claims.pop()] if len(claims) == 1 and not doubtful else ""


def _cards(report: Report, measured: list[EngineReport]) -> list[tuple[str, str]]:
    cards = []
    for engine in measured[:1]:
        assert engine.comparison is not None and engine.dense is not None and engine.pruned is not None
        for phase, what in (("total", "end to end"), ("decode", "each new token"), ("prefill", "reading the prompt")):
            found = engine.comparison.of(phase)  # type: ignore[arg-type]
            whose, where = "" if len(measured) == 1 else f"{engine.name}, ", engine.comparison.where
            if where and phase != "total":  # of this one another shape may have the least
                where = f" at {found.case.title}"
            cards.append((f"{found.speedup.ratio:.2f}x", f"{whose}{what}{where}{_possible(found)}"))
        share = 1 - engine.pruned.size_bytes / engine.dense.size_bytes
        cards.append((f"{share:.0%}", f"smaller: {engine.pruned.size_bytes / 1e6:.0f} MB"))
    return cards + _price_cards(prices(report.engines, report.quality), measured[0].name if measured else None)


def _price_cards(found: list[Price], engine: str | None) -> list[tuple[str, str]]:
    """Of the engine that the other cards are of; where it was not judged the source is named.

    engine: its name; None where none ran.
    """
    price = next((price for price in found if price.engine == engine), found[-1])
    whose = "" if engine is not None and price.engine == engine else f", {price.source}"
    cards = [
        (f"{text.ratio:.2f}x", f"perplexity on {name}{whose}{in_brackets(text.few)}")
        for name, text in price.quality.items()
    ]
    if price.choices is not None:
        few = in_brackets(price.choices.few)
        cards.append((f"{price.choices.retained.ratio:.1%}", f"of accuracy retained{whose}{few}"))
    return cards


def _possible(phase: PhaseReport) -> str:
    """What stands behind a speed-up: its limit, and where it lies above that, where the rest comes from."""
    if phase.limit is None:
        return ""
    above = round(phase.speedup.ratio, 2) > round(phase.limit, 2)  # as they are shown
    if phase.limit_assumed:
        return f"{';' if above else ', of'} {phase.limit:.2f}x assumed possible"
    rest = "distrust it" if phase.above_limit else "the rest is noise"
    return f"; {phase.limit:.2f}x possible, {rest}" if above else f", of {phase.limit:.2f}x possible"


def _engine(report: Report, engine: EngineReport, raw: Comparison) -> dict[str, Any]:
    found: ComparisonReport | None = engine.comparison
    assert found is not None
    case = raw.settings.cases.index(found.headline)
    ratios, _ = replicate_ratios(raw.replicates, case, "total")
    drawn = [
        (
            plots.speedups(found),
            "Speed-up by phase. Where the bar of dense against itself reaches, no difference is seen.",
        ),
        (plots.samples(raw, case), f"Every block at {found.headline.title}."),
        (
            plots.replicates(found, ratios),
            f"One dot a replicate: fresh processes each time. The band is the interval{found.where}.",
        ),
        (plots.telemetry(raw.telemetry), "What else the machine did."),
    ]
    return {
        "name": engine.name,
        "plots": [(Markup(svg), caption) for svg, caption in drawn if svg],
        "notes": measured_notes(report, engine),
    }


def sweep_plots(found: Sweep) -> list[tuple[Markup, str]]:
    """Speed against quality, and speed against the number of layers, with their captions."""
    allow = "are assumed to allow" if found.limits_assumed else "allow"
    drawn = (
        (plots.pareto(found), "Down and to the right is better. A number is how many layers were dropped."),
        (plots.by_count(found), f"Measured speed-up with its interval, and what bytes and operations {allow}."),
    )
    return [(Markup(svg), caption) for svg, caption in drawn if svg]


def _served_caption(found: ServedReport) -> str:
    return f"{' and '.join(found.roles).capitalize()} on one Triton server, streamed."


def _layer_caption(report: Report) -> str:
    plan = report.plan
    learned = "" if plots.learned_gates(plan) is None else "Bars are the gates that were learned; "
    return f"{learned}{len(plan.dropped)} of {plan.num_layers} layers were dropped ({chosen_by(report)})."


def fill(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of models and texts are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _shown(answers: Mapping[str, Perplexity | ZeroShot]) -> dict[str, Perplexity | ZeroShot]:
    """The same without what they say of this machine: a text's file by its name alone."""
    return {
        step: each.model_copy(update={"origin": shown_name(each.origin)}) if isinstance(each, Perplexity) else each
        for step, each in answers.items()
    }


def _download(name: str, text: str, compress: bool = True) -> dict[str, str]:
    """A link that downloads a file held inside the page."""
    data = gzip.compress(text.encode(), mtime=0) if compress else text.encode()
    kind = "application/gzip" if compress else "application/json"
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"name": name, "uri": uri, "size": f"{len(data) / 1e3:,.0f} kB"}
