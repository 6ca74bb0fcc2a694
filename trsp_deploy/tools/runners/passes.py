"""Run graph passes one after the other, each proven against the graph before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trsp_deploy.errors import EngineUnavailable, TrspError, first_line, machine_reason
from trsp_deploy.recipe import Backend, EngineSpec
from trsp_deploy.tools.graphs import check
from trsp_deploy.tools.runners.manifest import PassOutcome
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.requirements import one_line

VERSION = "3"  # raise when what the passes make of a graph changes: engines are then built anew
Pass = Callable[[Any], int]  # changes an onnx_ir model in place; returns in how many places, or raises NoMatch


def run_passes(
    onnx: Path, passes: Mapping[str, Pass], spec: EngineSpec, scratch: Path
) -> tuple[Path, tuple[PassOutcome, ...]]:
    """Returns the graph that came out and what each pass did.

    onnx: stays as it is. scratch: a folder for the graphs in between. A pass that does not fit the graph, or that
    changes the logits of a left-padded prompt and a few steps, is left out and says why.
    """
    if not passes:
        return onnx, ()
    try:
        logits = _logits(onnx, spec)
    except EngineUnavailable as problem:  # the backend itself may read it; without a proof nothing is changed
        return onnx, tuple(PassOutcome(name=name, reason=str(problem)) for name in passes)
    current, outcomes = onnx, []
    for name, work in passes.items():
        candidate = scratch / name / onnx.name
        outcome, found = _try(name, work, current, candidate, logits, spec)
        outcomes.append(outcome)
        if found is not None:
            # A graph is as large as the model: of those in between one at a time is enough.
            if current != onnx:
                shutil.rmtree(current.parent)
            current, logits = candidate, found
        else:
            shutil.rmtree(candidate.parent, ignore_errors=True)
    return current, tuple(outcomes)


def _try(
    name: str, work: Pass, before: Path, after: Path, expected: np.ndarray, spec: EngineSpec
) -> tuple[PassOutcome, np.ndarray | None]:
    """Run one pass; returns what it did and, when it is kept, the new graph's logits."""
    import onnx_ir as ir

    from trsp_deploy.tools.graphs.nodes import NoMatch, load

    try:
        model = load(before)
        changed = work(model)
        if not changed:
            return PassOutcome(name=name, reason="there is nothing to change"), None
        after.parent.mkdir()
        ir.save(model, after, external_data=f"{after.name}.data")
    except NoMatch as problem:
        return PassOutcome(name=name, reason=str(problem)), None
    except ir.serde.SerdeError as problem:  # ONNX Runtime reads more than is valid
        return PassOutcome(name=name, reason=f"onnx_ir: {one_line(problem)}"), None
    except Exception as problem:  # of ours or of ONNX Runtime's tools; the graph before it is right
        if isinstance(problem, TrspError) or machine_reason(problem) is not None:
            raise
        return PassOutcome(name=name, reason=f"it failed ({type(problem).__name__}: {first_line(problem)})"), None
    try:
        logits = _logits(after, spec)
    except EngineUnavailable as problem:  # the form fits and the kernel has limits of its own
        return PassOutcome(name=name, reason=str(problem).partition(": ")[2]), None
    error, tolerance = check.difference(expected, logits), check.TOLERANCES[spec.graph_precision]
    if error > tolerance:
        reason = f"the logits would differ by {error:.2g} standard deviations (tolerance {tolerance:g})"
        return PassOutcome(name=name, error=error, reason=reason), None
    return PassOutcome(name=name, changed=changed, error=error), logits


def _logits(graph: Path, spec: EngineSpec) -> np.ndarray:
    """By the engine's own backend where that is ONNX Runtime, else by ONNX Runtime on the CPU."""
    backend: Backend = "onnxruntime-cuda" if spec.backend == "onnxruntime-cuda" else "onnxruntime-cpu"
    with OrtRunner(graph, backend=backend, threads=spec.threads, brief=True) as runner:
        return check.sample_logits(runner, runner.vocabulary)
