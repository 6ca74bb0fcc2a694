"""How an engine's graph turns keys by their place in the cache, for code that moves them to another place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.graphs.fused import Input, fused_attention
from trsp_deploy.tools.runners.running_batch import Rotation


def engine_rotations(path: Path) -> tuple[Rotation, ...]:
    """Read an engine's ONNX file: each way in which attention turns keys itself, with the caches of its layers.

    Some models have layers that turn no keys (SmolLM3), or turn them in two ways (Gemma 3).
    Raises EngineUnavailable where they are not turned by the same angle at every place.
    """
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[tuple[str, str, bool], list[str]] = {}  # tables and kind -> caches of the layers that use them
    for node in fused_attention(graph.node):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes.get("do_rotary"):
            kind = (node.input[Input.COS], node.input[Input.SIN], bool(attributes.get("rotary_interleaved")))
            found.setdefault(kind, []).append(node.input[Input.PAST_KEY])
    return tuple(
        Rotation(
            angles=_angles(_table(tensors[cos], path.parent), _table(tensors[sin], path.parent), path),
            interleaved=interleaved,
            caches=tuple(caches),
        )
        for (cos, sin, interleaved), caches in found.items()
    )


def _table(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A table (places, pairs) of cosines or sines."""
    if not uses_external_data(tensor):
        return np.asarray(onnx.numpy_helper.to_array(tensor), dtype=np.float64)
    # By hand: onnx reads no file with several hard links, and an engine has them as soon as it is in a repository.
    info, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    table = np.memmap(folder / info.location, dtype, "r", offset=info.offset or 0, shape=tuple(tensor.dims))
    return np.asarray(table, dtype=np.float64)


def _angles(cos: np.ndarray, sin: np.ndarray, path: Path) -> tuple[float, ...]:
    """Radians per place; the tables may hold a factor besides, as YaRN's do."""
    places = np.arange(len(cos))[:, None]
    # The last place tells a small angle best, and the first a large one: refine from place to place, doubling.
    angles = np.arctan2(sin[1], cos[1])
    place = 1
    while 2 * place < len(cos):
        place *= 2
        turns = np.round((place * angles - np.arctan2(sin[place], cos[place])) / (2 * np.pi))
        angles = (np.arctan2(sin[place], cos[place]) + 2 * np.pi * turns) / place
    norm, turns = np.hypot(sin[0], cos[0]), places * angles
    # Graphs multiply places and angles in fp32, whose products of 200,000 radians are a hundredth apart.
    allowed = (1e-2 + 2 * np.spacing(np.abs(turns).astype(np.float32))) * norm.max()
    if (np.abs(np.cos(turns) * norm - cos) > allowed).any():
        raise EngineUnavailable(f"{path}: its keys are not turned by one angle a place")
    return tuple(float(angle) for angle in angles)
