"""Build one engine from an ONNX file, and write what it is into a manifest beside it."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trsp_deploy.artifacts import files_below, fingerprint, provenance, write_json, writing
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.runners import BACKENDS, EngineManifest, bound_to, check_can_build
from trsp_deploy.tools.runners.inspection import trtexec
from trsp_deploy.tools.runners.manifest import MANIFEST, spec_sha256
from trsp_deploy.tools.runners.requirements import package_version, release_torch_memory
from trsp_deploy.tools.runners.trt_log import BUILD_LOG

TRTEXEC = "trtexec.sh"  # builds the same engine with TensorRT's own program


def build_engine(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None = None) -> EngineManifest:
    """Build `spec`'s engine from an ONNX file into `folder`, whole or not at all.

    onnx: a decoder's model.onnx; external data stands beside it under names that begin with the file's own.
    calibration: (texts, sequence) int64 tokens of real text, by which an int8 engine chooses what stays in blocks and
    an int4 engine rounds.
    folder: replaced if it exists. Holds the engine, manifest.json and, for TensorRT, build.log and trtexec.sh.
    Raises EngineUnavailable with the reason when this machine cannot build it or the backend refuses the graph
    (TensorRT's log is then kept as `<folder>-failed.log`), EngineSpecError when the spec itself is at fault, RunError
    when there is no ONNX file, StorageError when the disk is full.
    """
    if not onnx.is_file():
        raise RunError(f"{onnx}: no ONNX file to build engine {spec.name} from; export it first")
    check_can_build(spec)
    release_torch_memory()
    began = time.perf_counter()
    with writing(folder) as partial, _log_of_failure(partial, folder.with_name(f"{folder.name}-failed.log")):
        partial.mkdir()
        built = BACKENDS[spec.backend].build(onnx, spec, partial, calibration)
        if spec.backend.startswith("tensorrt"):
            graph = next((file.name for file in partial.glob("*.onnx")), onnx.name)  # the passes' own, or the source
            line = trtexec(spec, built.inputs, graph)
            (partial / TRTEXEC).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        manifest = EngineManifest(
            name=spec.name,
            spec=spec,
            onnx_sha256=onnx_sha256(onnx),
            spec_sha256=spec_sha256(spec),
            backend_version=package_version(spec.backend),
            bound=bound_to(spec),
            file=built.file,
            files={name: fingerprint(partial / name) for name in built.files},
            beside={
                file.name: fingerprint(file)
                for file in files_below(partial)
                if file.name not in (*built.files, BUILD_LOG)
            },
            size_bytes=sum((partial / name).stat().st_size for name in built.files),
            build_s=time.perf_counter() - began,
            built_on=provenance(),
            inputs=built.inputs,
            outputs=built.outputs,
            passes=built.passes,
            half_range=built.half_range,
        )
        write_json(partial / MANIFEST, manifest)
    return manifest


def onnx_sha256(onnx: Path) -> str:
    """SHA-256 over an ONNX file and its external data: above 2 GB the weights are not in the file itself."""
    digest = hashlib.sha256()
    for path in sorted(onnx.parent.glob(f"{onnx.name}*")):
        digest.update(f"{path.name} {fingerprint(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def _log_of_failure(partial: Path, kept: Path) -> Iterator[None]:
    """Save a failed build's log from the removal of its folder, and remove an older one after a success."""
    try:
        yield
    except EngineUnavailable as problem:
        log = partial / BUILD_LOG
        if not log.exists():
            raise
        shutil.copy(log, kept)
        raise EngineUnavailable(f"{problem} (log: {kept})") from problem
    kept.unlink(missing_ok=True)
