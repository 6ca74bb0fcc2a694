"""The files that an ONNX graph consists of, and what an engine is built from."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trsp_deploy.artifacts import fingerprint, leaves, size_bytes
from trsp_deploy.errors import EngineUnavailable, shown
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.graphs.understood import check_cache, check_ranks
from trsp_deploy.tools.runners.manifest import SourceFile

if TYPE_CHECKING:
    import onnx_ir as ir


def source_files(onnx: Path) -> dict[str, SourceFile]:
    """What an engine is built from: a graph's files, and the config.json beside it, which says how long texts may be.

    A missing file counts as none: whoever builds from it says so.
    """
    found = {}
    for name in sorted({*graph_files(onnx), "config.json"}):
        path = onnx.parent / name
        if path.is_file():
            stat = path.stat()
            found[name] = SourceFile(size_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=fingerprint(path))
    return found


def onnx_sha256(files: Mapping[str, SourceFile]) -> str:
    """SHA-256 over the names and contents of a graph's files."""
    return hashlib.sha256("".join(f"{name} {file.sha256}\n" for name, file in files.items()).encode()).hexdigest()


def graph_files(onnx: Path) -> tuple[str, ...]:
    """An ONNX file and the files that its weights lie in, whatever they are called, as paths from its folder.

    A file that cannot be read as ONNX is by itself.
    """
    return tuple(sorted({onnx.name, *_external_data(onnx)}))


def graph_bytes(onnx: Path) -> int:
    """Bytes of an ONNX file and of the files that its weights lie in."""
    return sum(size_bytes(onnx.parent / name) for name in graph_files(onnx))


def check_source(onnx: Path, spec: EngineSpec) -> None:
    """Raise EngineUnavailable for a file that is no decoder with a KV cache that grows, whose weights are not whole or
    lie elsewhere, or that is of another precision.

    What cannot be read as ONNX is the backend's to say.
    """
    import onnx_ir as ir

    from trsp_deploy.tools.graphs.nodes import NoMatch, load

    for name in graph_files(onnx):
        _check_place(onnx, name)
    try:
        graph = load(onnx).graph
    except (NoMatch, FileNotFoundError):
        return
    for tensor in [value.const_value for value in graph.initializers.values()]:
        if isinstance(tensor, ir.ExternalTensor):
            file = Path(tensor.path)
            if not file.is_file() or file.stat().st_size < (tensor.offset or 0) + tensor.nbytes:
                raise EngineUnavailable(f"{onnx}: its weights are not whole: {file} is missing, or cut off")
    inputs, outputs = _bindings(graph.inputs), _bindings(graph.outputs)
    decoder_io.check_decoder(inputs, outputs)
    check_ranks(inputs)
    if spec.precision != "bf16":  # which is made of fp16, and of what is bf16 already
        decoder_io.check_precision(inputs, spec.graph_precision)
    check_cache(onnx, spec, inputs)


def _check_place(onnx: Path, name: str) -> None:
    """Raise EngineUnavailable for a file of a graph that lies elsewhere: it would be read, and copied, all the same.

    Nor may it have a second name, which may be anywhere: onnx_ir does not read it then, passes would be left out and no
    integer engine be built.
    """
    file = onnx.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise EngineUnavailable(f"{onnx}: its weights are in {shown(name)}, which is not within its folder")
    if name == onnx.name or not file.is_file():
        return
    link = "is a link out of the graph's folder" if leaves(onnx.parent, file) else ""
    if not link and file.stat().st_nlink > 1:
        link = "has a second name on the disk (a hard link)"
    if link:
        there, copy = (shlex.quote(str(path)) for path in (file, f"{file}.copy"))
        raise EngineUnavailable(f"{file}: {link}; `cp {there} {copy} && mv {copy} {there}` makes it a file of its own")


def _bindings(values: Sequence[ir.Value]) -> decoder_io.Bindings:
    return {
        value.name or "": (
            "" if value.dtype is None else str(value.dtype.numpy()),
            ()
            if value.shape is None
            else tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape),
        )
        for value in values
    }


def _external_data(path: Path) -> set[str]:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors(inner)

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return set()
    return {ExternalDataInfo(tensor).location for tensor in tensors(model.graph) if uses_external_data(tensor)}
