"""An engine folder as a batch that texts can join, with nothing imported that only building needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.manifest import EngineManifest, bound_to, check_manifest, read_manifest
from trsp_deploy.tools.runners.requirements import package_version
from trsp_deploy.tools.runners.running_batch import OneText, Rotation, RunningBatch
from trsp_deploy.tools.serving.loop import Batch


@contextlib.contextmanager
def open_batch(folder: Path, max_batch: int, max_length: int, rotations: Sequence[Rotation] = ()) -> Iterator[Batch]:
    """Load an engine; raises EngineUnavailable when it is not whole, not for this machine, or cannot batch.

    rotations: of the graph's keys, as `tools/runners/rotation.py` reads them.
    """
    manifest = read_manifest(folder)
    check_manifest(folder, manifest, package_version(manifest.spec.backend), bound_to(manifest.spec))
    with _runner(folder, manifest) as runner:
        if batches(manifest):
            from trsp_deploy.tools.runners.ort import OrtRunner

            assert isinstance(runner, OrtRunner)
            if runner.in_place:
                yield RunningBatch(runner, max_batch, max_length, rotations)
                return
        yield OneText(runner, max_length)


def batches(manifest: EngineManifest) -> bool:
    """Whether texts can come and go in one batch of such an engine, where its graph writes the cache in place."""
    return manifest.spec.backend == "onnxruntime-cpu" and manifest.padding


def _runner(folder: Path, manifest: EngineManifest) -> Runner:
    if not manifest.spec.on_tensorrt:
        from trsp_deploy.tools.runners import ort

        return ort.open_engine(folder, manifest)
    from trsp_deploy.tools.runners import trt

    return trt.open_engine(folder, manifest)
