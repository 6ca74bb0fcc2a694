"""Everything a run found, as one record: `report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from trsp_deploy.artifacts import Provenance
from trsp_deploy.recipe import Backend, Precision, Recipe, Strict, shown_name
from trsp_deploy.results import Parity, PerplexityParity, PrunedCheckpoint
from trsp_deploy.tools.judging.comparisons import ComparisonReport, sentence
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.reports.measured import Measured
from trsp_deploy.tools.reports.quality import ChoicesReport, Price, QualityReport, price_sentences
from trsp_deploy.tools.reports.sweeps import Sweep
from trsp_deploy.tools.reports.texts import TextReport
from trsp_deploy.tools.triton_server.served import ServedReport, served_sentence

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
    layers_edited: bool = False  # `plan.json`, by hand, after its method had chosen


class RemovalReport(Strict):
    """Perplexity on held-out calibration text around the removal."""

    form: str
    refit: str = ""  # what was fitted in closed form first: span, layers or none; of runs that did not keep it ""
    unfitted_because: str = ""  # why a fold that was asked for was not made
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
    to_pytorch: tuple[PerplexityParity, ...] = ()  # its perplexity over PyTorch's, by text and role
    choices: ChoicesReport | None = None  # through the engine; None where no task was asked for


class Report(Strict):
    """`report.json`."""

    schema_version: int
    verdict: str
    model: ModelReport
    removal: RemovalReport
    quality: dict[str, QualityReport]  # in PyTorch, by text; engines have their own
    engines: tuple[EngineReport, ...]
    served: ServedReport | None = None  # on a Triton server; None where `bench-server` was not run
    sweep: Sweep | None = None  # that the run is a point of
    parity: tuple[Parity, ...]
    recipe: Recipe
    plan: PruningPlan
    provenance: Provenance  # of writing the report
    measured: tuple[Measured, ...] = ()  # each measurement that it rests on
    texts: tuple[TextReport, ...] = ()  # that were read; empty in files older than this key


def model_report(
    name: str, origin: str, architecture: str, checkpoint: PrunedCheckpoint, layers_edited: bool
) -> ModelReport:
    """State both shares: 25% of the layers is less than 25% of the parameters."""
    return ModelReport(
        name=name,
        origin=shown_name(origin),
        architecture=architecture,
        num_layers_dense=checkpoint.num_layers_dense,
        num_layers_pruned=checkpoint.num_layers_pruned,
        dropped_layers=checkpoint.dropped,
        parameters_dense=checkpoint.parameters_dense,
        parameters_pruned=checkpoint.parameters_pruned,
        layers_dropped_share=len(checkpoint.dropped) / checkpoint.num_layers_dense,
        parameters_dropped_share=1 - checkpoint.parameters_pruned / checkpoint.parameters_dense,
        layers_edited=layers_edited,
    )


def plan_report(plan: PruningPlan) -> PruningPlan:
    """The plan as it is shown to others: files and folders of this machine by name alone."""
    shown = {"model": shown_name(plan.model), "calibration": shown_name(plan.calibration)}
    return plan.model_copy(update=shown)


def removal_report(checkpoint: PrunedCheckpoint) -> RemovalReport:
    """What the removal did to held-out calibration text."""
    return RemovalReport(
        form=checkpoint.form,
        refit=checkpoint.refit,
        unfitted_because=checkpoint.unfitted_because,
        trained_tokens=checkpoint.tokens,
        dense_ppl=checkpoint.ppl_dense,
        before_ppl=checkpoint.ppl_before_removal,
        after_ppl=checkpoint.ppl_after_removal,
    )


def prices(engines: Sequence[EngineReport], quality: Mapping[str, QualityReport]) -> list[Price]:
    """What the cut costs: through each engine that ran, for that is what is shipped. PyTorch's figures stand only for
    texts that none of them has read, all of them where none ran.

    quality: PyTorch's, by text.
    """
    ran = [engine for engine in engines if engine.comparison is not None]
    found = [Price(each.name, each.quality, each.choices) for each in ran if each.quality or each.choices is not None]
    read = {name for engine in ran for name in engine.quality}
    unread = {name: text for name, text in quality.items() if name not in read}
    return [*found, Price(None, unread)] if unread or not found else found


def verdict(engines: list[EngineReport], quality: dict[str, QualityReport], served: ServedReport | None = None) -> str:
    """One sentence per engine that ran, one for the server, then what the cut costs."""
    sentences = [sentence(engine.name, engine.comparison) for engine in engines if engine.comparison is not None]
    if not sentences:
        sentences = ["NOT MEASURED: no engine was timed on this machine, so no acceleration is claimed."]
    if served is not None:
        sentences.append(served_sentence(served))
    sentences += price_sentences(prices(engines, quality))
    return " ".join(sentences)
