"""A Triton model repository around an engine: a folder that `tritonserver --model-repository` can be pointed at."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import onnx

from trsp_deploy.artifacts import MANIFEST, files_below, fingerprint, link_tree, provenance, write_json, writing
from trsp_deploy.decoder import max_positions
from trsp_deploy.errors import EngineUnavailable, ModelError, RunError
from trsp_deploy.results import Role
from trsp_deploy.tools.graphs.decoder_io import IN_PLACE
from trsp_deploy.tools.runners import device_of, open_engine, read_manifest
from trsp_deploy.tools.runners.generation import end_tokens
from trsp_deploy.tools.runners.manifest import EngineManifest, check_files
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import Rotation, texts_can_move
from trsp_deploy.tools.serving.engine import batches
from trsp_deploy.tools.serving.readme import CONTAINER, readme, step_readme
from trsp_deploy.tools.serving.step_model import check_can_step, write_step_model
from trsp_deploy.tools.serving.vendor import model_file, vendor
from trsp_deploy.tools.triton_server.config import WARMUP, generation_config, parse_config
from trsp_deploy.tools.triton_server.repository import RepositoryManifest, ServedModel, read_repository

ON_GPU = ("onnxruntime-gpu", "tensorrt")  # packages whose engines need one
# What MatMulInteger multiplies is rounded with one scale for all texts of a step.
SHARED_SCALE = "An int8 engine's answer, with one seed too, may differ with what others ask at the same time."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_repository(
    engines: dict[Role, Path],
    model_folder: Path,
    names: dict[Role, str],
    out: Path,
    max_batch: int,
    max_length: int | None = None,
    *,
    step: bool = False,
) -> RepositoryManifest:
    """Write a repository with a model for each role; what is there under the same names is replaced.

    engines: engine folders. model_folder: has the tokenizer. names: of the models in the repository.
    max_length: tokens of one text; None is as many as model and engines take.
    step: the bare engines too, as `<name>_step`.
    Raises RunError for a name that Triton does not take, an engine that cannot be served so, or too long texts.
    """
    if (out / "README.md").exists() and not (out / MANIFEST).is_file():
        raise RunError(f"--out {out}: has a README.md that is not of a model repository of ours; name another folder")
    for engine in engines.values():
        if step:
            check_can_step(engine)
        check_files(engine, read_manifest(engine))
    longest = _longest_text(engines, model_folder)
    if max_length is not None and max_length > longest:
        raise RunError(f"--max-length {max_length}: the model and its engines take {longest} tokens")
    max_length = max_length or longest
    models = []
    for role, engine in engines.items():
        name = names[role]
        if NAME.fullmatch(name) is None:
            raise RunError(f"--name '{name}': letters, digits, dots, dashes and underscores, a letter or digit first")
        models.append(_write_model(engine, role, model_folder, name, out, max_batch, max_length))
        if step:
            models.append(_write_step(engine, role, f"{name}_step", out, max_batch, max_length))
    first = read_manifest(next(iter(engines.values())))
    others = _others(out, {model.name for model in models})
    before = read_repository(out) if others else None
    manifest = RepositoryManifest(
        models=(*models, *others),
        packages=_packages(first, before.packages if before else ()),
        gpu=first.bound.gpu or (before.gpu if before else None),
        container=CONTAINER,
        provenance=provenance(),
    )
    write_json(out / MANIFEST, manifest)
    limits = [f"`{model.name}`: {model.limits}" for model in manifest.models]
    if first.spec.precision == "int8" and any(model.max_batch > 1 for model in models):
        limits.append(SHARED_SCALE)
    with writing(out / "README.md") as partial:
        on_gpu = any(package.startswith(ON_GPU) for package in manifest.packages)
        text = readme([model.name for model in models], manifest.packages, on_gpu, manifest.gpu, limits)
        if step:
            text += step_readme(models[0].name, models[1].name, max_length, first.backend_version)
        partial.write_text(text, encoding="utf-8")
    return manifest


def _packages(engine: EngineManifest, others: Sequence[str]) -> tuple[str, ...]:
    """What the server's Python needs for an engine, and for models that an earlier call has put beside it."""
    backend = engine.spec.backend
    package = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": "onnxruntime-gpu"}.get(backend, backend)
    wanted = [f"{package}=={engine.backend_version}", "tokenizers", "pydantic>=2.12", "pyyaml", "numpy"]
    if backend.startswith("tensorrt"):  # its runner has torch's memory and streams
        wanted.append("torch")
    names = {re.split(r"[=<>]", each)[0] for each in wanted}
    return (*wanted, *(each for each in others if re.split(r"[=<>]", each)[0] not in names))


def _others(out: Path, written: set[str]) -> list[ServedModel]:
    """Models that an earlier call has put there under other names."""
    if not (out / MANIFEST).is_file():
        return []
    return [model for model in read_repository(out).models if model.name not in written and (out / model.name).is_dir()]


def _longest_text(engines: dict[Role, Path], model_folder: Path) -> int:
    """Tokens that a text may have, its prompt among them: the model's positions, and what engines were built for."""
    limits = [max_positions(model_folder)]
    for engine in engines.values():
        spec = read_manifest(engine).spec
        pasts = [profile.past.max + 1 for profile in spec.profiles if profile.past is not None]
        limits += [spec.cache_length] if spec.cache_length is not None else pasts and [max(pasts)]
    return min(limits)


def _batching(engine: Path) -> tuple[bool, tuple[Rotation, ...]]:
    """Whether texts can join others in an engine, and how keys that are moved for it have to be turned.

    They can where its cache is written in place and keys do not depend on their place there: what turns them is told
    each token's position, or is known, so that it can be made good. Where positions are the graph's own affair (ALiBi's
    bias comes from the mask, Gemma counts places of the cache) a text is moved to see.
    """
    manifest = read_manifest(engine)
    path = engine / manifest.file
    if not batches(manifest.spec):
        return False, ()
    if not any(each.key == IN_PLACE for each in onnx.load(path, load_external_data=False).metadata_props):
        return False, ()
    try:
        rotations = engine_rotations(path)
    except EngineUnavailable:  # keys that move could not be turned on
        return False, ()
    if rotations or "position_ids" in manifest.inputs:
        return True, rotations
    with open_engine(engine) as runner:
        assert isinstance(runner, OrtRunner)
        return texts_can_move(runner), ()


def _write_step(engine: Path, role: Role, name: str, out: Path, sequences: int, max_length: int) -> ServedModel:
    with writing(out / name) as folder:
        state_bytes = write_step_model(engine, name, folder, max_length, sequences)
        files = _fingerprints(folder)
    return ServedModel(
        name=name,
        role=role,
        engine=read_manifest(engine).spec.name,
        serves="steps",
        max_batch=sequences,
        max_length=max_length,
        state_bytes=state_bytes,
        files=files,
    )


def _write_model(
    engine: Path, role: Role, model_folder: Path, name: str, out: Path, max_batch: int, max_length: int
) -> ServedModel:
    spec = read_manifest(engine).spec
    joins, rotations = _batching(engine)
    max_batch = max_batch if joins else 1
    tokenizer = model_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{model_folder}: has no tokenizer.json, so a server cannot read text")
    config = generation_config(name, "KIND_CPU" if device_of(spec) == "cpu" else "KIND_GPU")
    parse_config(config, f"{name}/config.pbtxt")
    with writing(out / name) as folder:
        version = folder / "1"
        version.mkdir(parents=True)
        link_tree(engine, version / "engine")
        link_tree(tokenizer, version / "tokenizer.json")
        settings = {
            "max_batch": max_batch,
            "max_length": max_length,
            "end_tokens": end_tokens(model_folder),
            "rotations": [rotation.model_dump(mode="json") for rotation in rotations],
        }
        (version / "serving.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (version / "model.py").write_bytes(model_file().read_bytes())
        vendor(version / "vendor")
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        (folder / "warmup").mkdir()
        for file, data in WARMUP.items():
            (folder / "warmup" / file).write_bytes(data)
        files = _fingerprints(folder)
    return ServedModel(name=name, role=role, engine=spec.name, max_batch=max_batch, max_length=max_length, files=files)


def _fingerprints(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files_below(folder)}
