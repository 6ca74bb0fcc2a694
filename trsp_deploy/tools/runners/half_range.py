"""Read a text with an fp16 graph in fp32, and keep in fp32 what comes near the end of fp16's range."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from trsp_deploy.errors import EngineUnavailable, one_line
from trsp_deploy.reading import what_is_wrong
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import check, decoder_io
from trsp_deploy.tools.graphs.fp16_range import METADATA, HalfRange
from trsp_deploy.tools.runners.calibration import check_known, fitting, text_length
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.ort_session import bindings_of, create_session, one_line_errors

PADDING = 4  # one token in this many is left padding in front of the text: what stands there must be a number too


def within_range(
    onnx: Path, spec: EngineSpec, scratch: Path, calibration: np.ndarray | None
) -> tuple[Path, HalfRange | None]:
    """`guard_range` for an engine's build; graphs in fp32 have nothing to guard, and bf16 has range for everything."""
    if spec.graph_precision != "fp16":
        return onnx, None
    folder = scratch / "fp16-range"
    folder.mkdir()
    try:
        return guard_range(onnx, calibration, folder, spec.threads)
    except EngineUnavailable:
        if spec.precision != "bf16":
            raise
        return onnx, None


def guard_range(
    onnx: Path, calibration: np.ndarray | None, scratch: Path, threads: int | None = None
) -> tuple[Path, HalfRange]:
    """Make and return a graph that stays within fp16's range, and what the text showed.

    onnx: an fp16 decoder; stays as it is, and is itself what comes back where it has been through this before, or where
    ONNX Runtime on the CPU cannot read it in fp32. calibration: (batch, sequence) tokens of real text, of which the
    first row is read; None takes random ones. scratch: an empty folder, in which the new graph comes to lie.
    Raises EngineUnavailable when the cache or the logits leave the range, or a weight has left it.
    """
    import onnx_ir as ir

    from trsp_deploy.tools.graphs import half
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import NoMatch

    out = scratch / onnx.name
    try:
        model = open_graph(onnx)
        if METADATA in model.metadata_props:
            return onnx, HalfRange.model_validate_json(model.metadata_props[METADATA])
        half.infer_types(model)
        half.hide_within_range(model)
        wide = model.clone()
        half.widen(wide)
        tokens, largest = _read(wide, half.half_values(model), onnx, scratch, calibration, threads)
    except (NoMatch, EngineUnavailable, FileNotFoundError, ValidationError) as problem:
        # The backend says what it thinks of it.
        wrong = what_is_wrong(problem, HalfRange) if isinstance(problem, ValidationError) else one_line(problem)
        return onnx, HalfRange(tokens=0, largest=0, reason=wrong)
    beyond = next((name for name, magnitude in largest.items() if not np.isfinite(magnitude)), None)
    if beyond is not None:
        raise EngineUnavailable(f"{onnx}: '{beyond}' is no number even in fp32; take precision fp32")
    try:
        kept = half.keep_wide(model, largest)
    except NoMatch as problem:
        raise EngineUnavailable(f"{onnx}: {problem}; take precision fp32, or bf16 with TensorRT") from problem
    found = HalfRange(tokens=tokens, largest=max(largest.values()), kept=kept)
    expected = _logits(wide, scratch, threads) if kept else None  # first: a graph beside the exported one is enough
    ir.save(model, out, external_data=f"{out.name}_data")
    if expected is not None:
        with OrtRunner(out, threads=threads, brief=True) as runner:
            error = check.difference(expected, check.sample_logits(runner, runner.vocabulary))
        found = found.model_copy(update={"error": error})
    _write_record(out, found)
    config = onnx.with_name("config.json")
    if config.is_file():
        shutil.copy(config, scratch)  # says how long a text may be
    return out, found


def write_widened(onnx: Path, out: Path) -> None:
    """Write a graph that computes in fp32 what `onnx`, which stays as it is, computes in fp16 or bf16, of the same
    weights.

    What a graph is for that will run in bf16, whose range is fp32's and which ONNX Runtime does not multiply in on a
    CPU. Raises EngineUnavailable for a graph that cannot be followed.
    """
    import onnx_ir as ir

    from trsp_deploy.tools.graphs import half
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import NoMatch

    try:
        model = open_graph(onnx)
        half.infer_types(model)
        half.widen(model)
        half.widen(model, half.BRAIN)
    except NoMatch as problem:
        raise EngineUnavailable(f"{onnx}: cannot be read in fp32: {problem}") from problem
    ir.save(model, out, external_data=f"{out.name}_data")


def _read(
    wide: Any, names: Iterable[str], onnx: Path, scratch: Path, calibration: np.ndarray | None, threads: int | None
) -> tuple[int, dict[str, float]]:
    """Tokens read, and the largest magnitude of each of these values, computed in fp32.

    wide: the onnx_ir model of `onnx` after `half.widen`; stays as it is. scratch: a folder, in which a graph that tells
    them lies meanwhile.
    """
    from trsp_deploy.tools.graphs import half

    copy = wide.clone()
    outputs = half.add_largest(copy, names)
    # The cache would be held to the end; the logits tell the vocabulary.
    told = {*outputs.values(), "logits"}
    copy.graph.outputs[:] = [value for value in copy.graph.outputs if value.name in told]
    with _in_a_file(copy, scratch) as path:
        # In another order every value is held to the end, for its magnitude is an output: 4.2 GB, not 0.9, beside 0.4
        # GB of weights.
        session = create_session(path, "onnxruntime-cpu", threads, lean=True)
        inputs, made = bindings_of(session.get_inputs()), bindings_of(session.get_outputs())
        decoder_io.check_decoder(inputs, {value.name: ("", ()) for value in wide.graph.outputs})
        decoder_io.check_logits(made)
        vocabulary = int(made["logits"][1][-1])
        if calibration is None:
            calibration = np.random.default_rng(0).integers(vocabulary, size=(1, text_length(onnx)))
        ids = fitting(calibration, onnx)[:1]  # (1, sequence): a second row would be memory
        check_known(ids, vocabulary, onnx)
        mask = np.ones_like(ids)
        mask[0, : ids.shape[1] // PADDING] = 0
        feeds = decoder_io.token_inputs(inputs, ids, mask, keep=1)
        for name in decoder_io.cache_inputs(inputs):
            dtype, shape = inputs[name]
            feeds[name] = np.zeros(decoder_io.input_shape(name, shape, batch=1, sequence=0, past=0), dtype)
        with one_line_errors(f"ONNX Runtime cannot read a text with {onnx}"):
            found = session.run(list(outputs.values()), feeds)
    # The largest of nothing is minus infinity: of an expert that no token of the text was sent to.
    return int(mask.sum()), {name: max(float(value), 0.0) for name, value in zip(outputs, found, strict=True)}


def _logits(wide: Any, scratch: Path, threads: int | None) -> np.ndarray:
    """What the passes' proof asks of a graph, of one in fp32; scratch: as in `_read`."""
    with _in_a_file(wide, scratch) as path, OrtRunner(path, threads=threads, lean=True) as runner:
        return check.sample_logits(runner, runner.vocabulary)


@contextlib.contextmanager
def _in_a_file(graph: Any, scratch: Path) -> Iterator[Path]:
    """A graph as a file, which goes again: it is as large as the model."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix="fp32-", dir=scratch) as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data=f"{path.name}_data")
        yield path


def _write_record(graph: Path, found: HalfRange) -> None:
    """Write the record into the graph itself, so that a build from it reads no text again."""
    import onnx_ir as ir

    model = ir.load(graph)
    model.metadata_props[METADATA] = found.model_dump_json()
    ir.save(model, graph)  # the weights stay in their file
