"""Everything a run found, as one record: `report.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trsp_deploy.artifacts import Provenance
from trsp_deploy.recipe import Backend, Precision, Recipe, Strict, shown_name
from trsp_deploy.results import Parity, Perplexity, PrunedCheckpoint, ZeroShot
from trsp_deploy.tools.judging.comparisons import ComparisonReport, sentence
from trsp_deploy.tools.judging.statistics import (
    FEWEST_ITEMS,
    FEWEST_WINDOWS,
    PairedAccuracy,
    Ratio,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    retained_accuracy,
)
from trsp_deploy.tools.plan import PruningPlan
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

    @property
    def doubt(self) -> str:
        """Why the interval decides nothing, for people; empty where it does."""
        windows = self.tokens // max(1, self.context_length - 1)
        if self.pairs == "documents" or windows >= FEWEST_WINDOWS:
            return ""
        return (
            f"{windows} window{'s' * (windows > 1)} of {self.context_length} tokens, {FEWEST_WINDOWS} are the fewest "
            "that decide: give more text, or a smaller evaluate.context_length"
        )


class ChoicesReport(Strict):
    """Both on multiple-choice tasks, on the same items."""

    tasks: dict[str, PairedAccuracy]
    retained: Ratio  # mean accuracy, pruned / dense

    @property
    def doubt(self) -> str:
        """Why the interval decides nothing, for people; empty where it does."""
        items = sum(task.items for task in self.tasks.values())
        if items >= FEWEST_ITEMS:
            return ""
        return f"{items} items, {FEWEST_ITEMS} are the fewest that decide: ask more with evaluate.task_items"


class RemovalReport(Strict):
    """Perplexity on held-out calibration text around the removal."""

    form: str
    refit: str = ""  # what was fitted in closed form first: span, layers or none; of runs that did not keep it ""
    unfitted_because: str = ""  # where a fold was asked for by default and cannot be
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
        origin=shown_name(origin),
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
        refit=checkpoint.refit,
        unfitted_because=checkpoint.unfitted_because,
        trained_tokens=checkpoint.tokens,
        dense_ppl=checkpoint.ppl_dense,
        before_ppl=checkpoint.ppl_before_removal,
        after_ppl=checkpoint.ppl_after_removal,
    )


def quality_report(dense: Perplexity, pruned: Perplexity) -> QualityReport:
    """Pair two models on one text."""
    ratio = perplexity_ratio(dense, pruned)
    return QualityReport(
        origin=shown_name(dense.origin),
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
