"""Let a decoder read a text before its weights become integers, through ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from trsp_deploy.errors import ModelError, TextError
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.ort_session import one_line_errors

TOKENS = 256  # of a text that is made up
INT4_TEXTS = 8  # to round weights to 4 bits by; more gain little (docs/log.md). Everything else is seen in one
READ_TOKENS = 512  # of each text that an engine's choices are made on
POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")  # by family


def read_text(
    model: Any,
    graph: Path,
    exported: Path,
    spec: EngineSpec,
    calibration: np.ndarray | None,
    scratch: Path,
    *,
    symmetric: bool = False,
    keep: bool = False,
) -> dict[str, Any]:
    """What every product reads (graphs/products.py: Activations), by the product's name.

    model: an onnx_ir model after `open_products`, of the file `graph`, as it lies in a file in `scratch`
    (graphs/nodes.py: put_down). exported: the file as it was exported, with its config.json. calibration: (texts,
    sequence) tokens of real text, of which as many rows are read as the precision needs; None takes random ones, as
    what a product reads depends on the model more than on the text.
    symmetric: 8-bit scales have no zero point. keep: some of the tokens too.
    """
    from trsp_deploy.tools.graphs.products import measure_activations

    count = INT4_TEXTS if spec.precision == "int4" else 1
    with OrtRunner(graph, threads=spec.threads, lean=True) as runner:
        if calibration is None:
            calibration = np.random.default_rng(0).integers(runner.vocabulary, size=(count, text_length(exported)))
        calibration = fitting(calibration[:count], exported)
        check_known(calibration, runner.vocabulary, exported)
        texts = [runner.feeds(text[None], np.ones_like(text[None])) for text in calibration]
    with one_line_errors(f"ONNX Runtime cannot read a text with {exported}"):
        return measure_activations(model, texts, scratch, symmetric=symmetric, keep=keep)


def check_known(calibration: np.ndarray, vocabulary: int, exported: Path) -> None:
    """Raise TextError for tokens that a graph does not know."""
    unknown = int(calibration.max(initial=0))
    if unknown >= vocabulary:
        raise TextError(
            f"{exported}: knows {vocabulary} tokens, and the calibration text has token {unknown}: it was read with "
            "the tokenizer of another model"
        )


def text_length(exported: Path) -> int:
    """Tokens of a text that is made up for an exported model."""
    return min(TOKENS, _readable(exported) or TOKENS)


def fitting(calibration: np.ndarray, exported: Path) -> np.ndarray:
    """As much of a text (batch, sequence) as the model has positions for."""
    return calibration[:, : _readable(exported)]


def _readable(exported: Path) -> int | None:
    """Tokens that an exported model can read, by its config or its graph; None where neither ends it."""
    from trsp_deploy.tools.graphs.nodes import NoMatch

    try:
        return exported_positions(exported)
    except NoMatch:
        return longest_text(exported)


def exported_positions(exported: Path) -> int:
    """Tokens that the model of an exported graph was made for, from the config.json that an export leaves beside it.

    Raises NoMatch where there is none, or it names no number: XLNet's says -1, for any.
    """
    from trsp_deploy.tools.graphs.nodes import NoMatch

    values = _config(exported)
    named = (values.get(key) for key in POSITION_KEYS)
    found = next((value for value in named if isinstance(value, int) and value > 0), None)
    if found is None:
        raise NoMatch(f"no config.json beside {exported} says how long a text may be")
    return found


def longest_text(exported: Path) -> int | None:
    """Tokens of the longest text that an exported graph holds for; None where nothing ends it.

    By where its angles become others (`longest_turned`), where its table of learned positions ends, and what the graph
    says itself.
    """
    from trsp_deploy.tools.graphs.decoder_io import LONGEST
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import NoMatch
    from trsp_deploy.tools.graphs.positions import table_end

    limits = [longest_turned(exported)]
    try:
        model = open_graph(exported)
    except NoMatch:
        return limits[0]  # whoever builds from it says so
    said = model.metadata_props.get(LONGEST)
    limits += [table_end(model), None if said is None else int(said)]
    return min((limit for limit in limits if limit is not None), default=None)


def longest_turned(exported: Path) -> int | None:
    """Tokens beyond which an exported graph turns keys otherwise than its model (LongRoPE, dynamic NTK); None for most.

    By the config.json that an export leaves beside its graph.
    """
    from trsp_deploy.decoder import graph_positions

    return graph_positions(SimpleNamespace(**_config(exported)))


def _config(exported: Path) -> dict[str, Any]:
    """The values of the config.json beside an exported graph; none where there is no such file."""
    config = exported.with_name("config.json")
    return read_json(config, ModelError) if config.is_file() else {}
