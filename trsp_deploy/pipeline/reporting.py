"""The report of a run: what its stages found, gathered."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from trsp_deploy.artifacts import provenance, steps
from trsp_deploy.artifacts.layout import SWEEP
from trsp_deploy.pipeline.engines import EngineOutcome
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.plan_origin import was_edited
from trsp_deploy.pipeline.proof import Proof
from trsp_deploy.stages.report import write_report
from trsp_deploy.tools.reports.measured import measured_by
from trsp_deploy.tools.reports.quality import quality_report
from trsp_deploy.tools.reports.record import (
    SCHEMA_VERSION,
    EngineFigures,
    EngineReport,
    Report,
    model_report,
    plan_report,
    removal_report,
    verdict,
)
from trsp_deploy.tools.reports.sweeps import Point, Sweep
from trsp_deploy.tools.sources.model_folders import check_decoder_only
from trsp_deploy.tools.triton_server.served import derive


def make_report(proof: Proof) -> Report:
    """Write report.json, report.md and report.html, and the manifest of the run; measures what is not measured yet."""
    inputs, pruning = proof.inputs, proof.pruning
    inputs.texts.check_lengths()
    source, checkpoint = inputs.model.copied(), pruning.prune()
    parity = proof.check_onnx() + proof.check_engines()  # before anything is timed
    quality = {name: quality_report(ppl["dense"], ppl["pruned"]) for name, ppl in proof.evaluate().items()}
    engines = [_engine_report(proof, outcome) for outcome in proof.engines.build()]
    served = proof.served()
    as_served = None if served is None else derive(served)
    now, made = provenance(), dict(proof.run.made)
    if served is not None:
        made[steps.SERVED] = served.provenance
    decoder = check_decoder_only(inputs.path("dense"))
    report = Report(
        schema_version=SCHEMA_VERSION,
        verdict=verdict(engines, quality, as_served),
        model=model_report(inputs.model.shown, source.origin, decoder, checkpoint, was_edited(proof.run)),
        removal=removal_report(checkpoint),
        quality=quality,
        engines=tuple(engines),
        served=as_served,
        parity=parity,
        recipe=proof.recipe.public,
        plan=plan_report(pruning.plan()),
        provenance=now,
        measured=measured_by(made, now),
        texts=inputs.texts.reports(),
    )
    return write_pages(proof, report)


def write_pages(proof: Proof, report: Report) -> Report:
    """Write a report, with the sweep that the run is a point of as it is now, and the run's manifest anew; returns the
    report as written."""
    run = proof.run
    report = report.model_copy(update={"sweep": sweep_of(proof.inputs, report)})
    run.outdate_manifest()
    write_report(report, proof.bench(), run.path, proof.answers(), proof.served())
    run.write_manifest()
    return report


def sweep_of(inputs: Inputs, report: Report) -> Sweep | None:
    """The sweep beside whose `sweep.json` a run's folder lies, where this cut is one of its points."""
    folder = inputs.run.path.resolve()
    path = folder.parent / SWEEP
    try:
        found = Sweep.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        inputs.say(f"{path}: is no sweep of this version; it is left out of the report")
        return None
    point = next((point for point in found.points if point.folder == folder.name), None)
    if point is None:
        return None
    names = (report.model.name, report.recipe.model)  # the second in older files, as "."
    of_another_cut = found.model not in names or point.dropped != report.plan.dropped
    other = "layers" if of_another_cut else _other(point, report)
    if other:
        inputs.say(
            f"{path}: its {other} of {folder.name} are no longer that run's; the report leaves the sweep out until "
            "`trsp-deploy sweep` has made it anew"
        )
        return None
    return found


def _other(point: Point, report: Report) -> str:
    """In what a sweep's point differs from the report of its run; empty where it does not."""
    measured = {engine.name: engine.comparison for engine in report.engines}
    if point.engine is not None and point.comparison != measured.get(point.engine):
        return "times"
    if point.quality not in (report.quality, *(engine.quality for engine in report.engines)):
        return "perplexities"
    if point.choices not in (None, *(engine.choices for engine in report.engines)):
        return "accuracies"
    return ""


def _engine_report(proof: Proof, outcome: EngineOutcome) -> EngineReport:
    spec = outcome.spec
    comparison = proof.bench().get(spec.name)
    status: Literal["ran", "built", "unavailable"] = "ran"
    if not outcome.manifests:
        status = "unavailable"
    elif comparison is None:
        status = "built"
    figures = {
        role: EngineFigures(size_bytes=manifest.size_bytes, build_s=manifest.build_s)
        for role, manifest in outcome.manifests.items()
    }
    return EngineReport(
        name=spec.name,
        backend=spec.backend,
        precision=spec.precision,
        status=status,
        reason=outcome.reason or proof.failed.get(spec.name),
        comparison=None if comparison is None else proof.compared(spec.name),
        quality={} if comparison is None else proof.engine_quality(spec),
        to_pytorch=() if comparison is None else proof.check_perplexity(spec),
        choices=None if comparison is None else proof.engine_choices(spec),
        **figures,
    )
