"""Make an ONNX Runtime engine: the graph passes, each proven against the graph before it, then ONNX Runtime's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from trsp_deploy.artifacts import files_below, free_bytes, storage_errors
from trsp_deploy.artifacts.storage import NOTHING_LEFT
from trsp_deploy.errors import EngineUnavailable, one_line
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.building import ReadyGraph, check_compiled, ready_graph
from trsp_deploy.tools.runners.calibration import exported_positions, longest_text, read_text
from trsp_deploy.tools.runners.graph_files import graph_files
from trsp_deploy.tools.runners.manifest import BuiltEngine, PassOutcome, kept_products, left_in_floats
from trsp_deploy.tools.runners.ort_session import bindings_of, create_session
from trsp_deploy.tools.runners.passes import Pass, run_passes
from trsp_deploy.tools.runners.requirements import adds_int8_exactly

ENGINE = "model.onnx"


def build_cpu(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
    """Run the passes, let ONNX Runtime optimise what they left, and save that: opening does none of it again.

    Writes model.onnx and model.onnx.data into `folder`. Raises EngineUnavailable when ONNX Runtime refuses the graph.
    """
    with ready_graph(onnx, spec, folder, calibration, prepare) as ready:
        bindings = _accepted(ready.path, spec, save_to=folder / ENGINE)
    return _built(bindings, spec, onnx, folder / ENGINE, ready)


def build_cuda(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
    """Run the passes and put the graph into `folder`, where a session on the GPU has to accept it.

    ONNX Runtime optimises it when it is opened: a graph saved from a CUDA session carries that session's placement and
    its copies between host and device, which only the same ONNX Runtime on the same hardware may read.
    """
    with ready_graph(onnx, spec, folder, calibration, prepare) as ready:
        for name in graph_files(ready.path):  # external data is found by its name
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ready.path.parent / name, folder / name)
    engine = folder / ready.path.name
    return _built(_accepted(engine, spec), spec, onnx, engine, ready)


def _accepted(
    graph: Path, spec: EngineSpec, save_to: Path | None = None
) -> tuple[decoder_io.Bindings, decoder_io.Bindings]:
    """Inputs and outputs as a session that has read the graph tells them; it is gone when this returns."""
    try:
        session = create_session(graph, spec.backend, spec.threads, save_to=save_to)
    except EngineUnavailable as problem:
        if save_to is None or free_bytes(save_to.parent) >= NOTHING_LEFT:
            raise
        with storage_errors(save_to.parent):  # of which ONNX Runtime says that it cannot load the graph
            raise RuntimeError(one_line(problem)) from problem
    return bindings_of(session.get_inputs()), bindings_of(session.get_outputs())


def _built(
    bindings: tuple[decoder_io.Bindings, decoder_io.Bindings],
    spec: EngineSpec,
    onnx: Path,
    engine: Path,
    ready: ReadyGraph,
) -> BuiltEngine:
    """What is in the engine's folder. bindings: its inputs and outputs. onnx: the graph as it was exported."""
    inputs, outputs = bindings
    check_compiled(spec, inputs, outputs)
    longest = longest_text(onnx)
    if longest is not None:
        decoder_io.write_longest(engine, longest)
    files = tuple(path.relative_to(engine.parent).as_posix() for path in files_below(engine.parent))
    return BuiltEngine(
        engine.name, files, inputs, outputs, ready.passes, ready.half_range, longest, padding=ready.padding
    )


def prepare(
    onnx: Path, spec: EngineSpec, scratch: Path, calibration: np.ndarray | None = None
) -> tuple[Path, tuple[PassOutcome, ...]]:
    """Run the spec's passes over a decoder's graph; returns the graph that came out and what each pass did.

    onnx: stays as it is. scratch: an empty folder for the graphs in between. calibration: (texts, sequence) tokens of
    real text, for int8 and int4; None takes random ones. A pass that does not fit the graph, or after which the logits
    differ, is left out and says why: the engine is then slower, and right.
    """
    wanted = fusions(onnx) if spec.fuse else {}
    if spec.backend == "onnxruntime-cuda":
        # CUDA's GroupQueryAttention refuses a mask of the graph's own (`attention_bias`) and has no fp32 kernel.
        wanted = {name: wanted[name] for name in ("fuse-norms", "cut-logits") if name in wanted}
    current, outcomes = run_passes(onnx, wanted, spec, scratch)
    if spec.is_quantised:
        current, quantised = _quantise(onnx, current, spec, scratch / "quantize" / onnx.name, calibration)
        outcomes += quantised
    return current, outcomes


def fusions(onnx: Path) -> dict[str, Pass]:
    """The passes that leave the logits what they are, in the order in which they run."""
    from trsp_deploy.tools.graphs.attention import fuse_attention
    from trsp_deploy.tools.graphs.logits import cut_logits
    from trsp_deploy.tools.graphs.masks import simplify_masks
    from trsp_deploy.tools.graphs.norms import fuse_norms
    from trsp_deploy.tools.graphs.projections import pack_projections
    from trsp_deploy.tools.graphs.rotary import fuse_rotary

    return {
        "fuse-attention": fuse_attention,
        "fuse-rotary": lambda model: fuse_rotary(model, exported_positions(onnx)),
        "simplify-masks": lambda model: simplify_masks(model, exported_positions(onnx)),
        "pack-projections": pack_projections,
        "fuse-norms": fuse_norms,
        "cut-logits": cut_logits,
    }


def _quantise(
    onnx: Path, graph: Path, spec: EngineSpec, out: Path, calibration: np.ndarray | None
) -> tuple[Path, tuple[PassOutcome, ...]]:
    import onnx_ir as ir

    from trsp_deploy.tools.graphs import costs, products, quantize, smoothing
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import NoMatch, check_opset, put_down

    out.parent.mkdir()
    try:
        model = open_graph(graph)
        if spec.precision == "int4":
            check_opset(model)
        head = products.open_products(model)
        floats = products.in_floats(model)
        products.pack_products(model, head)  # fewer kernels: 10% of an int8 step on two cores, 2 to 8% of an int4 one
        model = put_down(model, out.parent / "opened.onnx")
        activations = read_text(model, graph, onnx, spec, calibration, out.parent, keep=spec.precision == "int8")
        products.check_finite(activations, spec.graph_precision)
    except NoMatch as problem:
        raise EngineUnavailable(f"{onnx}: cannot be quantised: {problem}") from problem
    kept = costs.chosen(model, head, activations, spec)
    if spec.precision == "int4":
        model = quantize.quantize_int4(
            model,
            spec.block_size,
            head,
            activations,
            kept,
            head_bits=spec.head_bits,
            embedding_bits=spec.embedding_bits,
            zero_points=spec.zero_points,
        )
    else:
        factors, activations = smoothing.smooth_norms(model, head, activations, kept)
        model = quantize.quantize_int8(
            model,
            spec.block_size,
            head,
            activations,
            kept,
            factors=factors,
            reduced=not adds_int8_exactly(),
            head_bits=spec.head_bits,
        )
    ir.save(model, out, external_data=f"{out.name}.data")
    return out, (*kept_products(kept), *left_in_floats(floats))
