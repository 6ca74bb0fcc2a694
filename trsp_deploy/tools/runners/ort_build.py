"""Make an ONNX Runtime engine: the graph passes, each proven against the graph before it, then ONNX Runtime's own."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.graphs.fp16_range import HalfRange
from trsp_deploy.tools.runners.calibration import longest_text, max_positions, read_text
from trsp_deploy.tools.runners.half_range import within_range
from trsp_deploy.tools.runners.manifest import BuiltEngine, PassOutcome, kept_products
from trsp_deploy.tools.runners.ort_session import bindings_of, create_session
from trsp_deploy.tools.runners.passes import Pass, run_passes
from trsp_deploy.tools.runners.requirements import adds_int8_exactly

ENGINE = "model.onnx"


def build_cpu(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
    """Run the passes, let ONNX Runtime optimise what they left, and save that: opening does none of it again.

    Writes model.onnx and model.onnx.data into `folder`. Raises EngineUnavailable when ONNX Runtime refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix="passes-", dir=folder) as scratch:
        source, found = within_range(onnx, spec, Path(scratch), calibration)
        graph, passes = prepare(source, spec, Path(scratch), calibration)
        session = create_session(graph, spec.backend, spec.threads, save_to=folder / ENGINE)
    return _built(session, spec, onnx, folder / ENGINE, passes, found)


def build_cuda(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
    """Run the passes and put the graph into `folder` after a session on the GPU has accepted it.

    ONNX Runtime optimises it when it is opened: a graph saved from a CUDA session carries that session's placement and
    its copies between host and device, which only the same ONNX Runtime on the same hardware may read.
    """
    with tempfile.TemporaryDirectory(prefix="passes-", dir=folder) as scratch:
        source, found = within_range(onnx, spec, Path(scratch), calibration)
        graph, passes = prepare(source, spec, Path(scratch), calibration)
        session = create_session(graph, spec.backend, spec.threads)
        for source in sorted(graph.parent.glob(f"{graph.name}*")):  # external data is found by its name
            shutil.copy(source, folder / source.name)
    return _built(session, spec, onnx, folder / graph.name, passes, found)


def _built(
    session: Any, spec: EngineSpec, onnx: Path, engine: Path, passes: tuple[PassOutcome, ...], found: HalfRange | None
) -> BuiltEngine:
    """What is in the engine's folder. onnx: the graph as it was exported."""
    inputs, outputs = bindings_of(session.get_inputs()), bindings_of(session.get_outputs())
    decoder_io.check_decoder(inputs, outputs)
    decoder_io.check_precision(inputs, spec.graph_precision)
    longest = longest_text(onnx)
    if longest is not None:
        decoder_io.write_longest(engine, longest)
    files = tuple(sorted(path.name for path in engine.parent.iterdir()))
    return BuiltEngine(engine.name, files, inputs, outputs, passes, found)


def prepare(
    onnx: Path, spec: EngineSpec, scratch: Path, calibration: np.ndarray | None = None
) -> tuple[Path, tuple[PassOutcome, ...]]:
    """Run the spec's passes over a decoder's graph; returns the graph that came out and what each pass did.

    onnx: stays as it is. scratch: an empty folder for the graphs in between. calibration: (texts, sequence) tokens of
    real text, for int8 and int4; None takes random ones. A pass that does not fit the graph, or after which the logits
    differ, is left out and says why: the engine is then slower, and right.
    """
    wanted = fusions(onnx) if spec.fuse else {}
    if spec.backend == "onnxruntime-cuda" and spec.precision == "fp32":
        # CUDA has no fp32 kernel of the fused attention: it would run on the CPU, its cache copied to and fro.
        wanted = {name: wanted[name] for name in ("fuse-norms", "cut-logits") if name in wanted}
    current, outcomes = run_passes(onnx, wanted, spec, scratch)
    if spec.precision in ("int8", "int4"):
        current, kept = _quantise(onnx, current, spec, scratch / "quantize" / onnx.name, calibration)
        outcomes += kept_products(kept)
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
        "fuse-rotary": lambda model: fuse_rotary(model, max_positions(onnx)),
        "simplify-masks": lambda model: simplify_masks(model, max_positions(onnx)),
        "pack-projections": pack_projections,
        "fuse-norms": fuse_norms,
        "cut-logits": cut_logits,
    }


def _quantise(
    onnx: Path, graph: Path, spec: EngineSpec, out: Path, calibration: np.ndarray | None
) -> tuple[Path, dict[str, float]]:
    import onnx_ir as ir

    from trsp_deploy.tools.graphs import costs, products, quantize
    from trsp_deploy.tools.graphs.nodes import NoMatch, check_opset

    out.parent.mkdir()
    model = ir.load(graph)
    try:
        if spec.precision == "int4":
            check_opset(model)
        head = products.open_products(model)
        activations = read_text(model, graph, onnx, spec, calibration, out.parent)
        products.check_finite(activations, spec.graph_precision)
    except NoMatch as problem:
        raise EngineUnavailable(f"{graph}: cannot be quantised: {problem}") from problem
    products.pack_products(model, head)  # fewer kernels: 10% of an int8 step on two cores, 2 to 8% of an int4 one
    kept = costs.chosen(model, head, activations, spec)
    if spec.precision == "int4":
        model = quantize.quantize_int4(
            model,
            spec.block_size,
            head,
            activations,
            kept,
            head_bits=spec.head_bits,
            zero_points=spec.zero_points,
        )
    else:
        reduced = not adds_int8_exactly()
        model = quantize.quantize_int8(model, spec.block_size, head, activations, out.parent, kept, reduced)
    ir.save(model, out, external_data=f"{out.name}.data")
    return out, kept
