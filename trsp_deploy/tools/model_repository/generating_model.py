"""A Triton model that generates text: a Python backend around an engine and the toolkit's own loop (tools/serving).

Everything that it needs lies in its folder, the toolkit's code too: the server needs no `trsp_deploy`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from trsp_deploy.artifacts import ENGINE_MANIFEST, fingerprint, leaves, link_tree
from trsp_deploy.artifacts.fingerprints import SIGNED
from trsp_deploy.decoder import end_tokens
from trsp_deploy.errors import EngineUnavailable, ModelError
from trsp_deploy.recipe import EngineSpec, Strict
from trsp_deploy.results import Role
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.model_repository.config import WARMUP, generation_config, parse_config
from trsp_deploy.tools.model_repository.manifest import SETTINGS, ServedModel, fingerprints_below
from trsp_deploy.tools.model_repository.vendor import model_file, vendor
from trsp_deploy.tools.runners import device_of, open_engine, read_manifest
from trsp_deploy.tools.runners.manifest import EngineManifest
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import Rotation, texts_can_move
from trsp_deploy.tools.serving.engine import batches
from trsp_deploy.tools.serving.loop import MOST_WAITING


class Settings(Strict):
    """What the model is told, in its `serving.json`."""

    max_batch: int  # texts at once
    max_length: int  # tokens of a text
    max_prompt: int | None  # tokens of a prompt, where the engine reads fewer at once than a text may have
    end_tokens: tuple[int, ...]
    rotations: tuple[Rotation, ...]  # ways in which keys are turned that move


def write_generating_model(
    engine: Path,
    role: Role,
    name: str,
    folder: Path,
    model_folder: Path,
    *,
    max_length: int,
    max_batch: int,
    say: Callable[[str], None],
) -> ServedModel:
    """Write the model `name` into `folder` and return its record. The engine's files are hard links.

    model_folder: has the tokenizer. max_length: tokens of a text at most. max_batch: texts at once.
    say: told of fewer texts at once than max_batch, and why.
    Raises ModelError without a tokenizer, EngineUnavailable for an engine that cannot be read, or run where only that
    tells how many texts it takes, and RunError without Triton's schema.
    """
    manifest = read_manifest(engine)
    alone, rotations = batching(engine)
    if alone is not None and max_batch > 1:
        say(f"--max-batch {max_batch}: {name}'s engine {manifest.spec.name} serves one text at a time: {alone}")
        max_batch = 1
    tokenizer = model_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{model_folder}: has no tokenizer.json, so a server cannot read text")
    settings = Settings(
        max_batch=max_batch,
        max_length=max_length,
        max_prompt=_max_prompt(manifest.spec, max_length),
        end_tokens=tuple(end_tokens(model_folder)),
        rotations=rotations,
    )
    config = generation_config(name, "KIND_CPU" if device_of(manifest.spec) == "cpu" else "KIND_GPU", MOST_WAITING)
    parse_config(config, f"{name}/config.pbtxt")
    _write_files(folder, config, settings, tokenizer)
    _link_engine(engine, manifest, folder / "1" / "engine")
    return _record(name, role, manifest, settings, folder)


def _write_files(folder: Path, config: str, settings: Settings, tokenizer: Path) -> None:
    """Write everything but the engine: the config, the warm-up's inputs, and the one version that there is."""
    version = folder / "1"
    version.mkdir(parents=True)
    link_tree(tokenizer, version / "tokenizer.json")
    told = settings.model_dump(mode="json", exclude_none=True)
    (version / SETTINGS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (version / "model.py").write_bytes(model_file().read_bytes())
    vendor(version / "vendor")
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "warmup").mkdir()
    for file, data in WARMUP.items():
        (folder / "warmup" / file).write_bytes(data)


def _record(name: str, role: Role, manifest: EngineManifest, settings: Settings, folder: Path) -> ServedModel:
    """What the repository's manifest says of the model that lies in `folder`."""
    spec = manifest.spec
    # A cache of fixed length is there whole, however long a text may be; one that grows has a place more than a text.
    places = decoder_io.cache_length(manifest.inputs) or settings.max_length + 1
    return ServedModel(
        name=name,
        role=role,
        engine=spec.name,
        backend=spec.backend,
        backend_version=manifest.backend_version,
        precision=spec.precision,
        packages=packages_of(manifest),
        bound=manifest.bound,
        compute_capabilities=spec.compute_capabilities,
        max_batch=settings.max_batch,
        max_length=settings.max_length,
        max_prompt=settings.max_prompt,
        cache_bytes=settings.max_batch * places * decoder_io.cache_bytes(manifest.inputs),
        files=fingerprints_below(folder),
    )


def _max_prompt(spec: EngineSpec, max_length: int) -> int | None:
    """Tokens of a prompt, which an engine reads in one call; None where they are as many as a text has room for."""
    limit = spec.longest_prompt
    return None if limit is None or limit >= max_length - 1 else limit


def packages_of(engine: EngineManifest) -> tuple[str, ...]:
    """What the server's Python needs for an engine."""
    backend = engine.spec.backend
    package = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": "onnxruntime-gpu"}.get(backend, backend)
    wanted = [f"{package}=={engine.backend_version}", "tokenizers", "pydantic>=2.12", "pyyaml", "numpy"]
    if backend.startswith("tensorrt"):  # its runner has torch's memory and streams
        wanted.append("torch")
    return tuple(wanted)


def batching(engine: Path) -> tuple[str | None, tuple[Rotation, ...]]:
    """Why no text can join others in an engine, None where they can, and how keys that are moved for it are turned.

    They can where its cache is written in place and keys do not depend on their place there: what turns them is told
    each token's position, or is known, so that it can be made good. Where positions are the graph's own affair (ALiBi's
    bias comes from the mask, Gemma counts places of the cache) a text is moved to see.
    """
    manifest = read_manifest(engine)
    path = engine / manifest.file
    if not batches(manifest):
        backend = manifest.spec.backend
        return "its graph gets padded texts wrong" if backend == "onnxruntime-cpu" else f"{backend} does so far", ()
    if not any(each.key == decoder_io.IN_PLACE for each in onnx.load(path, load_external_data=False).metadata_props):
        return "its attention was not fused", ()
    try:
        rotations = engine_rotations(path)
    except EngineUnavailable as problem:  # keys that move could not be turned on
        return str(problem), ()
    if rotations or "position_ids" in manifest.inputs:
        return None, rotations
    with open_engine(engine) as runner:
        assert isinstance(runner, OrtRunner)
        return None if texts_can_move(runner) else "its graph counts places of the cache", ()


def _link_engine(engine: Path, manifest: EngineManifest, target: Path) -> None:
    """Give an engine's own files a place in a repository. What else lies in its folder, or is linked there, is nobody's
    to ship; neither is what only other programs read and is not as it was built."""
    beside = {name for name, sha256 in manifest.beside.items() if _is_there(engine, name, sha256)}
    signature = {SIGNED} if _is_there(engine, SIGNED) else set()
    for name in sorted({ENGINE_MANIFEST, *manifest.files, *beside, *signature}):
        link_tree((engine / name).resolve(), target / name)


def _is_there(engine: Path, name: str, sha256: str | None = None) -> bool:
    path = engine / name
    return path.is_file() and not leaves(engine, path) and sha256 in (None, fingerprint(path))
