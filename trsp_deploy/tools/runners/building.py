"""What a build does whichever backend compiles: the graph made ready before, inputs and outputs looked at after."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.graphs.fp16_range import HalfRange
from trsp_deploy.tools.graphs.understood import check_reads_prompts
from trsp_deploy.tools.runners.half_range import within_range
from trsp_deploy.tools.runners.manifest import PassOutcome
from trsp_deploy.tools.runners.passes import holds_padding

# ONNX file, spec, empty folder for graphs in between, calibration tokens (texts, sequence) or None -> the graph that a
# backend reads, and what each pass did
Prepare = Callable[[Path, EngineSpec, Path, np.ndarray | None], tuple[Path, tuple[PassOutcome, ...]]]


@dataclass(frozen=True)
class ReadyGraph:
    """A graph as a backend is to compile it, and what was found on the way to it."""

    path: Path
    passes: tuple[PassOutcome, ...]
    half_range: HalfRange | None  # of graphs in fp16
    padding: bool  # whether left padding leaves a text's logits what they are


@contextlib.contextmanager
def ready_graph(
    onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None, prepare: Prepare
) -> Iterator[ReadyGraph]:
    """Guard a graph's range, look how it takes padding, and let the backend's `prepare` change it.

    onnx: stays as it is, and is what comes out where nothing is to change. folder: in which everything else lies until
    the block ends. Raises EngineUnavailable where a part of it is not possible.
    """
    with tempfile.TemporaryDirectory(prefix="passes-", dir=folder) as scratch:
        source, half_range = within_range(onnx, spec, Path(scratch), calibration)
        padding = holds_padding(source, spec, Path(scratch))
        path, passes = prepare(source, spec, Path(scratch), calibration)
        yield ReadyGraph(path, passes, half_range, padding)


def check_compiled(spec: EngineSpec, inputs: decoder_io.Bindings, outputs: decoder_io.Bindings) -> None:
    """Raise EngineUnavailable unless what a backend has read is a decoder of the spec's precision, for any prompt."""
    decoder_io.check_decoder(inputs, outputs)
    decoder_io.check_logits(outputs)
    check_reads_prompts(inputs, outputs)
    decoder_io.check_precision(inputs, "bf16" if spec.precision == "bf16" else spec.graph_precision)
