"""An engine that `trsp-deploy triton` put into a repository, and what belongs to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trsp_deploy.artifacts import ENGINE_MANIFEST, fingerprint
from trsp_deploy.errors import EngineUnavailable, ModelError, RunError
from trsp_deploy.reading import read_json
from trsp_deploy.tools.model_repository.lint.finding import Finding, Say
from trsp_deploy.tools.model_repository.manifest import SETTINGS
from trsp_deploy.tools.runners.manifest import Bound, EngineManifest, read_manifest
from trsp_deploy.tools.runners.requirements import adds_int8_exactly, cuda_devices, driver_version, package_version
from trsp_deploy.tools.serving.text import read_tokenizer


def against_manifest(version: Path, error: Say) -> Iterator[Finding]:
    """Findings about a model that `trsp-deploy triton` wrote: its engine and what belongs to it."""
    settings, engine = version / SETTINGS, version / "engine"
    if not settings.is_file():
        return
    tokenizer = version / "tokenizer.json"
    if not tokenizer.is_file():
        yield error(f"{version.name}/tokenizer.json is missing")
    else:
        try:
            read_tokenizer(tokenizer)
        except ModelError as problem:
            yield error(str(problem))
    if not (engine / ENGINE_MANIFEST).is_file():
        yield error(f"{version.name}/engine/{ENGINE_MANIFEST} is missing")
        return
    try:
        manifest = read_manifest(engine)
    except EngineUnavailable as problem:
        yield error(str(problem))
        return
    for file, expected in manifest.files.items():
        if not (engine / file).is_file():
            yield error(f"{version.name}/engine/{file} is missing")
        elif fingerprint(engine / file) != expected:
            yield error(f"{version.name}/engine/{file} is not the file that was built (SHA-256)")
    yield from _machine(manifest, error)
    try:
        max_batch = read_json(settings, RunError, f"{version.name}/{SETTINGS}").get("max_batch")
    except RunError as problem:
        yield error(str(problem))
        return
    if not isinstance(max_batch, int):
        yield error(f"{version.name}/{SETTINGS} says no `max_batch`")
        return
    most = max((profile.batch.max for profile in manifest.spec.profiles), default=None)
    if most is not None and max_batch > most:
        yield error(f"{max_batch} texts at once, and the engine's profiles end at a batch of {most}")


def _machine(manifest: EngineManifest, error: Say) -> Iterator[Finding]:
    """Whether the engine is for the package, processor, GPU and driver that are here, where there are any."""
    try:
        version = package_version(manifest.spec.backend)
    except EngineUnavailable:
        version = manifest.backend_version  # nothing to compare with: the server is elsewhere
    if version != manifest.backend_version:
        yield error(f"the engine was built with {manifest.spec.backend} {manifest.backend_version}, here is {version}")
    here = Bound(exact_int8=adds_int8_exactly())
    with contextlib.suppress(EngineUnavailable):
        device = cuda_devices()[0]
        gpu = {"gpu": device.compute_capability, "device": device.name, "driver": driver_version()}
        here = here.model_copy(update=gpu)
    misfit = manifest.bound.misfit(here)
    if misfit is not None:
        yield error(f"the engine was built {misfit}")
    wanted = manifest.spec.compute_capabilities
    if here.gpu is not None and wanted and here.gpu not in [name.lower() for name in wanted]:
        yield error(f"the engine was built for GPUs of compute capability {', '.join(wanted)}, here is {here.gpu}")
