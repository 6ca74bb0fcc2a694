"""Run graph passes one after the other, each proven against the graph before it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trsp_deploy.errors import EngineUnavailable, machine_reason, named, one_line, passes_through
from trsp_deploy.recipe import Backend, EngineSpec, Float
from trsp_deploy.tools.graphs import check
from trsp_deploy.tools.runners.half_range import write_widened
from trsp_deploy.tools.runners.manifest import PassOutcome
from trsp_deploy.tools.runners.ort import OrtRunner

VERSION = "7"  # raise when what the passes make of a graph changes: engines are then built anew
INT8_VERSION = "8"  # the same of int8 on ONNX Runtime, whose products changed alone
Pass = Callable[[Any], int]  # changes an onnx_ir model in place; returns in how many places, or raises NoMatch


def passes_version(spec: EngineSpec) -> str:
    """Of what an engine's graph becomes before it is built."""
    return INT8_VERSION if spec.precision == "int8" and not spec.on_tensorrt else VERSION


def run_passes(
    onnx: Path, passes: Mapping[str, Pass], spec: EngineSpec, scratch: Path
) -> tuple[Path, tuple[PassOutcome, ...]]:
    """Run the passes; returns the graph that came out and what each pass did.

    onnx: stays as it is. scratch: a folder for the graphs in between. A pass that does not fit the graph, or that
    changes the logits of a left-padded prompt and a few steps, is left out and says why.
    """
    if not passes:
        return onnx, ()
    try:
        logits = _logits(onnx, spec, scratch)
    except EngineUnavailable as problem:  # the backend itself may read it; without a proof nothing is changed
        _refuse_of_the_machine(problem)
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

    from trsp_deploy.tools.graphs.nodes import NoMatch

    try:
        changed = _changed(work, before, after)
        if not changed:
            return PassOutcome(name=name, reason="there is nothing to change"), None
    except NoMatch as problem:
        return PassOutcome(name=name, reason=str(problem)), None
    except ir.serde.SerdeError as problem:  # ONNX Runtime reads more than is valid
        return PassOutcome(name=name, reason=f"onnx_ir: {one_line(problem)}"), None
    except Exception as problem:  # of ours or of ONNX Runtime's tools; the graph before it is right
        if passes_through(problem):
            raise
        return PassOutcome(name=name, reason=f"it failed ({named(problem)})"), None
    try:
        logits = _logits(after, spec, after.parent)
    except EngineUnavailable as problem:  # the form fits and the kernel has limits of its own
        _refuse_of_the_machine(problem)
        return PassOutcome(name=name, reason=str(problem).partition(": ")[2]), None
    error, tolerance = check.difference(expected, logits), check.TOLERANCES[_read_in(spec)]
    if error > tolerance:
        reason = f"the logits would differ by {error:.2g} standard deviations (tolerance {tolerance:g})"
        return PassOutcome(name=name, error=error, reason=reason), None
    return PassOutcome(name=name, changed=changed, error=error), logits


def _changed(work: Pass, before: Path, after: Path) -> int:
    """Write the graph that a pass makes of another and return in how many places it differs; 0: it is not written.

    What the pass held in memory is gone when this returns: the proof after it needs room for a model of its own.
    """
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import put_down

    model = open_graph(before)
    changed = work(model)
    if changed:
        after.parent.mkdir()
        put_down(model, after)
    return changed


def holds_padding(onnx: Path, spec: EngineSpec, scratch: Path) -> bool:
    """Whether a text's logits stay what they are beside a longer one, when it is padded on the left.

    Fused attention of other exporters often counts the mask's ones and reads as many places from the left. True where
    that cannot be tried here: the backend itself may read the graph. scratch: as in `source_runner`.
    """
    try:
        with source_runner(onnx, spec, scratch) as runner:
            error = check.padding_error(runner, runner.vocabulary)
    except EngineUnavailable as problem:
        _refuse_of_the_machine(problem)
        return True
    return error <= check.TOLERANCES[_read_in(spec)]


def _refuse_of_the_machine(problem: EngineUnavailable) -> None:
    """Raise what says nothing of the graph: an engine that is made meanwhile would lack passes for good."""
    if machine_reason(problem) is not None:
        raise problem


def _read_in(spec: EngineSpec) -> Float:
    return "fp32" if spec.precision == "bf16" else spec.graph_precision


def _logits(graph: Path, spec: EngineSpec, scratch: Path) -> np.ndarray:
    with source_runner(graph, spec, scratch) as runner:
        return check.sample_logits(runner, runner.vocabulary)


@contextlib.contextmanager
def source_runner(graph: Path, spec: EngineSpec, scratch: Path) -> Iterator[OrtRunner]:
    """The graph on the engine's own backend where that is ONNX Runtime, else on ONNX Runtime's CPU backend.

    For bf16 in fp32: the graph is in fp16 still, whose range may be too small for what bf16 holds. scratch: a folder
    where such a graph may lie meanwhile.
    """
    if spec.precision == "bf16":
        with tempfile.TemporaryDirectory(prefix="fp32-", dir=scratch) as folder:
            wide = Path(folder) / graph.name
            write_widened(graph, wide)
            with OrtRunner(wide, threads=spec.threads, lean=True) as runner:
                yield runner
        return
    backend: Backend = "onnxruntime-cuda" if spec.backend == "onnxruntime-cuda" else "onnxruntime-cpu"
    with OrtRunner(graph, backend=backend, threads=spec.threads, brief=True) as runner:
        yield runner
