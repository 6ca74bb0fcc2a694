"""A Triton model repository around an engine: a folder that `tritonserver --model-repository` can be pointed at."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from trsp_deploy.artifacts import (
    ENGINE_MANIFEST,
    MANIFEST,
    RunLayout,
    files_below,
    fingerprint,
    leaves,
    link_tree,
    provenance,
    storage_errors,
    write_json,
    writing,
    writing_alone,
)
from trsp_deploy.artifacts.fingerprints import SIGNED
from trsp_deploy.artifacts.layout import check_no_model, run_that_owns
from trsp_deploy.artifacts.storage import remove
from trsp_deploy.decoder import end_tokens, max_positions
from trsp_deploy.errors import EngineUnavailable, ModelError, RunError
from trsp_deploy.recipe import LONGEST_NAME, EngineSpec
from trsp_deploy.results import Role
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.model_repository.config import (
    WARMUP,
    WARMUP_TEXT,
    WARMUP_TOKENS,
    generation_config,
    parse_config,
)
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel, read_repository
from trsp_deploy.tools.model_repository.readme import CONTAINER, dockerfile, readme
from trsp_deploy.tools.model_repository.step_model import check_can_step, write_step_model
from trsp_deploy.tools.model_repository.vendor import model_file, vendor
from trsp_deploy.tools.runners import device_of, open_engine, read_manifest
from trsp_deploy.tools.runners.manifest import EngineManifest, check_files
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import Rotation, texts_can_move
from trsp_deploy.tools.serving.engine import batches
from trsp_deploy.tools.serving.loop import MOST_WAITING
from trsp_deploy.tools.serving.text import read_tokenizer

README, DOCKERFILE = "README.md", "Dockerfile"
SETTINGS = "serving.json"  # of the model that generates, beside its engine
SAME_FOLDER = {"onnxruntime-gpu": "onnxruntime"}  # packages that install into another's place
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
    say: Callable[[str], None] = lambda _: None,
) -> RepositoryManifest:
    """Write a repository with a model for each role; what is there under the same names is replaced.

    engines: engine folders. model_folder: has the tokenizer. names: of the models in the repository.
    max_length: tokens of one text; None is as many as model and engines take.
    step: the bare engines too, as `<name>_step`; without it such a model of an earlier call is removed.
    say: told of a model that serves fewer texts at once than max_batch, and why.
    Raises RunError for a name that Triton does not take, an engine that cannot be served so, too long texts, or while
    another command writes there.
    """
    if RunLayout(out).is_run or RunLayout(out).is_sweep:
        raise RunError(f"--out {out}: is a run; name another folder")
    check_no_model(out)
    if (run := run_that_owns(out / DOCKERFILE)) is not None:
        raise RunError(f"--out {out}: is a part of the run {run.root}; name another folder")
    with writing_alone(out, within=True) as place:
        return _write(engines, model_folder, names, place, max_batch, max_length, step=step, say=say)


def _write(
    engines: dict[Role, Path],
    model_folder: Path,
    names: dict[Role, str],
    out: Path,
    max_batch: int,
    max_length: int | None,
    *,
    step: bool,
    say: Callable[[str], None],
) -> RepositoryManifest:
    for file in (README, DOCKERFILE):
        if (out / file).exists() and not (out / MANIFEST).is_file():
            raise RunError(f"--out {out}: has a {file} that is not of a model repository of ours; name another folder")
    for engine in engines.values():
        if step:
            check_can_step(engine)
        check_files(engine, read_manifest(engine))
    longest = _longest_text(engines, model_folder)
    if max_length is not None and max_length > longest:
        raise RunError(f"--max-length {max_length}: the model and its engines take {longest} tokens")
    max_length = max_length or longest
    _check_warmup(model_folder, max_length, [read_manifest(engine).spec for engine in engines.values()])
    named = [names[role] for role in engines]
    written = {*named, *(f"{name}_step" for name in named if step)}
    for name in sorted(written, key=len):
        if NAME.fullmatch(name) is None:
            raise RunError(f"--name '{name}': letters, digits, dots, dashes and underscores, a letter or digit first")
        if len(name) > LONGEST_NAME:
            raise RunError(f"--name: a model would be '{name}', of {len(name)} characters; at most {LONGEST_NAME}")
    for name in sorted(written):
        _check_replaceable(out, name)
    outdated = _outdated_steps(out, {f"{name}_step" for name in named} - written)
    others = _others(out, written | outdated)
    needed = {names[role]: _packages(read_manifest(engine)) for role, engine in engines.items()}
    packages = _together(out, needed | {model.name: model.packages for model in others})
    models = []
    with _staging(out) as staging:
        for role, engine in engines.items():
            name = names[role]
            with writing(out / name, staging) as folder:
                models.append(_write_model(engine, role, model_folder, name, folder, max_batch, max_length, say))
            if step:
                with writing(out / f"{name}_step", staging) as folder:
                    models.append(_write_step(engine, role, f"{name}_step", folder, max_batch, max_length))
        for name in outdated:
            remove((out / name).replace(staging / f".{name}.former"))
    every = (*models, *others)
    manifest = RepositoryManifest(
        models=every,
        packages=packages,
        gpu=next((model.bound.gpu for model in every if model.bound.gpu is not None), None),
        container=CONTAINER,
        provenance=provenance(),
    )
    _write_text(out / DOCKERFILE, dockerfile(manifest))
    manifest = manifest.model_copy(update={"files": {DOCKERFILE: fingerprint(out / DOCKERFILE)}})
    write_json(out / MANIFEST, manifest)
    _write_text(out / README, readme(manifest))
    return manifest


def _check_replaceable(out: Path, name: str) -> None:
    """Raise RunError where a model would take the place of what no earlier call has made."""
    folder = out / name
    if (out / MANIFEST).is_file() and name in {model.name for model in read_repository(out).models}:
        return
    # Of a call that was killed before the repository's manifest.
    left = (folder / "1" / SETTINGS).is_file() or (name.endswith("_step") and (folder / "config.pbtxt").is_file())
    if folder.exists() and not left and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder}: is no model of a repository of ours, and would be replaced; choose another --name")


def _check_warmup(model_folder: Path, max_length: int, specs: Sequence[EngineSpec]) -> None:
    """Raise RunError where the text that the server runs before its first request would not fit."""
    file = model_folder / "tokenizer.json"
    if not file.is_file():
        return  # which is said where it is needed
    prompt = len(read_tokenizer(file).encode(WARMUP_TEXT).ids)
    needed = prompt + WARMUP_TOKENS
    if needed > max_length:
        raise RunError(
            f"--max-length {max_length}: the server's warm-up, '{WARMUP_TEXT}' and {WARMUP_TOKENS} new tokens, has "
            f"{needed}; that many at least"
        )
    for spec in specs:
        if spec.longest_prompt is not None and spec.longest_prompt < prompt:
            raise RunError(
                f"engine '{spec.name}': reads prompts of {spec.longest_prompt} tokens at most; the server's warm-up, "
                f"'{WARMUP_TEXT}', has {prompt}: build one whose profiles hold that many"
            )


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Where models are made, and what they replace is put: Triton takes every folder of a repository for a model, and
    does not start where one is none. What a killed call left is removed first.

    Beside the repository; in it where nothing can be moved there from outside, as where it is a disk of its own.
    """
    with storage_errors(out):
        for left in (*out.glob(".*.partial"), *out.glob(".*.former")):
            if left.is_dir():
                remove(left)
    beside = _beside(out)
    try:
        yield beside or out
    finally:
        if beside is not None:
            with contextlib.suppress(OSError):  # it holds a model that could not be put back
                beside.rmdir()


def _beside(out: Path) -> Path | None:
    """A new folder beside a repository, from which files can be moved into it; None where there can be none."""
    place = out.resolve()
    beside = place.parent / f".{place.name}.partial"
    trial = beside / ".trial"
    try:
        remove(beside)
        beside.mkdir()
        trial.touch()
        trial.replace(out / trial.name).unlink()  # of two mounts of one disk nothing else tells
    except OSError:
        with contextlib.suppress(OSError):
            remove(beside)
        return None
    return beside


def _write_text(path: Path, text: str) -> None:
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _together(out: Path, needed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The packages of all models, by name; raises RunError where one Python cannot have them all."""
    chosen: dict[str, tuple[str, str]] = {}  # what is installed once -> package and the model that wants it
    for model, packages in needed.items():
        for package in packages:
            name = re.split(r"[=<>]", package)[0]
            there, wants_it = chosen.setdefault(SAME_FOLDER.get(name, name), (package, model))
            if there != package:
                raise RunError(
                    f"--out {out}: '{wants_it}' needs {there} and '{model}' {package}, and one server's Python cannot "
                    "have both; write them to folders of their own, or build one of the engines again"
                )
    return tuple(package for package, _ in chosen.values())


def _packages(engine: EngineManifest) -> tuple[str, ...]:
    """What the server's Python needs for an engine."""
    backend = engine.spec.backend
    package = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": "onnxruntime-gpu"}.get(backend, backend)
    wanted = [f"{package}=={engine.backend_version}", "tokenizers", "pydantic>=2.12", "pyyaml", "numpy"]
    if backend.startswith("tensorrt"):  # its runner has torch's memory and streams
        wanted.append("torch")
    return tuple(wanted)


def _others(out: Path, written: set[str]) -> list[ServedModel]:
    """Models that an earlier call has put there under other names."""
    if not (out / MANIFEST).is_file():
        return []
    return [model for model in read_repository(out).models if model.name not in written and (out / model.name).is_dir()]


def _outdated_steps(out: Path, names: set[str]) -> set[str]:
    """Of these names the step models of an earlier call: they would answer with other weights than their namesakes."""
    return {model.name for model in _others(out, set()) if model.serves == "steps" and model.name in names}


def _longest_text(engines: dict[Role, Path], model_folder: Path) -> int:
    """Tokens that a text may have, its prompt among them: the model's positions, and what engines were built for."""
    limits = [max_positions(model_folder), *(read_manifest(engine).spec.longest_text for engine in engines.values())]
    return min(limit for limit in limits if limit is not None)


def _max_prompt(spec: EngineSpec, max_length: int) -> int | None:
    """Tokens of a prompt, which an engine reads in one call; None where they are as many as a text has room for."""
    limit = spec.longest_prompt
    return None if limit is None or limit >= max_length - 1 else limit


def _batching(engine: Path) -> tuple[str | None, tuple[Rotation, ...]]:
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


def _write_step(engine: Path, role: Role, name: str, folder: Path, sequences: int, max_length: int) -> ServedModel:
    state_bytes = write_step_model(engine, name, folder, max_length, sequences)
    manifest = read_manifest(engine)
    return ServedModel(
        name=name,
        role=role,
        engine=manifest.spec.name,
        backend=manifest.spec.backend,
        backend_version=manifest.backend_version,
        precision=manifest.spec.precision,
        packages=(),
        bound=manifest.bound,
        serves="steps",
        max_batch=sequences,
        max_length=max_length,
        state_bytes=state_bytes,
        files=_fingerprints(folder),
    )


def _write_model(
    engine: Path,
    role: Role,
    model_folder: Path,
    name: str,
    folder: Path,
    max_batch: int,
    max_length: int,
    say: Callable[[str], None],
) -> ServedModel:
    manifest = read_manifest(engine)
    spec = manifest.spec
    max_prompt = _max_prompt(spec, max_length)
    alone, rotations = _batching(engine)
    if alone is not None and max_batch > 1:
        say(f"--max-batch {max_batch}: {name}'s engine {spec.name} serves one text at a time: {alone}")
        max_batch = 1
    tokenizer = model_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{model_folder}: has no tokenizer.json, so a server cannot read text")
    config = generation_config(name, "KIND_CPU" if device_of(spec) == "cpu" else "KIND_GPU", MOST_WAITING)
    parse_config(config, f"{name}/config.pbtxt")
    version = folder / "1"
    version.mkdir(parents=True)
    _link_engine(engine, manifest, version / "engine")
    link_tree(tokenizer, version / "tokenizer.json")
    settings = {
        "max_batch": max_batch,
        "max_length": max_length,
        **({} if max_prompt is None else {"max_prompt": max_prompt}),
        "end_tokens": end_tokens(model_folder),
        "rotations": [rotation.model_dump(mode="json") for rotation in rotations],
    }
    (version / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (version / "model.py").write_bytes(model_file().read_bytes())
    vendor(version / "vendor")
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "warmup").mkdir()
    for file, data in WARMUP.items():
        (folder / "warmup" / file).write_bytes(data)
    return ServedModel(
        name=name,
        role=role,
        engine=spec.name,
        backend=spec.backend,
        backend_version=manifest.backend_version,
        precision=spec.precision,
        packages=_packages(manifest),
        bound=manifest.bound,
        compute_capabilities=spec.compute_capabilities,
        max_batch=max_batch,
        max_length=max_length,
        max_prompt=max_prompt,
        cache_bytes=max_batch * (max_length + 1) * decoder_io.cache_bytes(manifest.inputs),
        files=_fingerprints(folder),
    )


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


def _fingerprints(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files_below(folder)}
