"""Build one engine from an ONNX file, and write what it is into a manifest beside it."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from trsp_deploy.artifacts import ENGINE_MANIFEST, files_below, fingerprint, provenance, write_json, writing
from trsp_deploy.errors import EngineUnavailable, ParityError, RunError, TextError, shown
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.runners import BACKENDS, EngineManifest, bound_to, check_can_build, check_can_run
from trsp_deploy.tools.runners.agreement import agreement, logits_of, read_alone
from trsp_deploy.tools.runners.calibration import INT4_TEXTS, READ_TOKENS
from trsp_deploy.tools.runners.graph_files import check_source, onnx_sha256, source_files
from trsp_deploy.tools.runners.inspection import trtexec
from trsp_deploy.tools.runners.manifest import ReadText, check_manifest, read_manifest, spec_sha256
from trsp_deploy.tools.runners.passes import passes_version, source_runner
from trsp_deploy.tools.runners.requirements import package_version, release_torch_memory
from trsp_deploy.tools.runners.trt_log import BUILD_LOG, is_log
from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows

RANDOM_TOKENS = "random tokens"
HELD_PROMPT, HELD_TOKENS = 12, 4  # on which an engine is held against its graph
TRTEXEC = "trtexec.sh"  # builds the same engine with TensorRT's own program


def build_engine(
    onnx: Path,
    spec: EngineSpec,
    folder: Path,
    calibration: np.ndarray | None = None,
    *,
    text_name: str = "a text",
    rebuild: str | None = None,
    spec_file: Path | None = None,
    hold: bool = False,
) -> EngineManifest:
    """Build `spec`'s engine from an ONNX file into `folder`, whole or not at all.

    onnx: a decoder's model.onnx; external data lies where it says.
    calibration: (texts, sequence) int64 tokens of real text, by which an int8 engine chooses what has a scale for each
    token and an int4 engine rounds; None takes random ones. text_name: how the user named that text.
    rebuild: the command that does this again, for the manifest; None for a run's engine. spec_file: the YAML that
    `spec` was read from, which is looked at again whenever the engine is opened; None for a spec of a name.
    hold: run the engine, and its graph, on a few tokens before it is handed over, and keep how far its logits are off;
    a run's engines are held against PyTorch (stages/parity.py).
    folder: replaced if it exists. Holds the engine, manifest.json and, for TensorRT, build.log and trtexec.sh.
    Raises EngineUnavailable with the reason when this machine cannot build it or the backend refuses the graph
    (TensorRT's log is then kept as `<folder>-failed.log`, or by another name where that is somebody else's),
    EngineSpecError when the spec itself is at fault, RunError when there is no ONNX file, ParityError when an engine in
    floats that is held gives other logits than its graph, or any gives none, StorageError when the disk is full.
    """
    if not onnx.is_file():
        raise RunError(f"{onnx}: no ONNX file to build engine {spec.name} from; export it first")
    check_can_build(spec)
    check_source(onnx, spec)
    release_torch_memory()
    began = time.perf_counter()
    source, files = _from_folder(onnx, folder), source_files(onnx)
    with writing(folder) as partial, _log_of_failure(spec, partial, folder):
        partial.mkdir()
        built = BACKENDS[spec.backend].build(onnx, spec, partial, calibration)
        if spec.backend.startswith("tensorrt"):
            graph = next((file.name for file in partial.glob("*.onnx")), source)  # the passes' own, or the source
            line = trtexec(spec, built.inputs, graph, folder.resolve().name)
            (partial / TRTEXEC).write_text(f'#!/bin/sh\ncd "$(dirname "$0")" || exit\n{line}\n', encoding="utf-8")
        manifest = EngineManifest(
            name=spec.name,
            spec=spec,
            source=source,
            source_files=files,
            spec_file=None if spec_file is None else _from_folder(spec_file.resolve(), folder),
            text=_text_of(spec, calibration, text_name),
            passes_version=passes_version(spec),
            rebuild=rebuild,
            onnx_sha256=onnx_sha256(files),
            spec_sha256=spec_sha256(spec),
            backend_version=package_version(spec.backend),
            bound=bound_to(spec),
            file=built.file,
            files={name: fingerprint(partial / name) for name in built.files},
            beside={
                name: fingerprint(partial / name)
                for name in (file.relative_to(partial).as_posix() for file in files_below(partial))
                if name not in (*built.files, BUILD_LOG)
            },
            size_bytes=sum((partial / name).stat().st_size for name in built.files),
            build_s=time.perf_counter() - began,
            built_on=provenance(),
            inputs=built.inputs,
            outputs=built.outputs,
            passes=built.passes,
            half_range=built.half_range,
            longest_text=built.longest_text,
            padding=built.padding,
        )
        if hold:
            manifest = _held(onnx, partial, manifest, calibration)
        write_json(partial / ENGINE_MANIFEST, manifest)
    return manifest


def _held(onnx: Path, folder: Path, manifest: EngineManifest, calibration: np.ndarray | None) -> EngineManifest:
    """The manifest of an engine in `folder` with how far its logits are from its graph's, or why that is not known."""
    spec = manifest.spec
    try:
        check_can_run(spec)
        with source_runner(onnx, spec, folder) as graph:
            reference = read_alone(graph, _prompts(spec, graph.vocabulary, calibration), HELD_TOKENS)
        with BACKENDS[spec.backend].open(folder, manifest) as engine:
            logits = logits_of(reference, engine)
    except EngineUnavailable as problem:  # of the machine, or of shapes: the engine may be right
        return manifest.model_copy(update={"not_held": str(problem)})
    source_is_finite = np.isfinite(reference.logits).all()
    if not np.isfinite(logits).all():
        also = "" if source_is_finite else f", and so does {onnx}"
        raise ParityError(f"parity: {spec.name} gives logits that are no numbers{also}; nothing is kept of it")
    if not source_is_finite:  # fp16 that overflows, and the engine keeps such places in fp32
        return manifest.model_copy(update={"not_held": f"{onnx.name} itself gives logits that are no numbers"})
    found = agreement(reference, logits, spec.precision)
    # Integers may be far off and useful still, which only a text can tell.
    if not found.passed and (spec.precision in ("fp32", "fp16", "bf16") or math.isinf(found.ppl_ratio)):
        raise ParityError(
            f"parity: {spec.name} is {found.max_error:.3g} standard deviations from the logits of {onnx} (tolerance "
            f"{found.tolerance:g}), {found.tokens_equal} of {found.tokens_compared} greedy tokens equal; nothing is "
            "kept of it"
        )
    return manifest.model_copy(update={"agreement": found})


def _prompts(spec: EngineSpec, vocabulary: int, calibration: np.ndarray | None) -> list[list[int]]:
    """Two of unequal length that the spec's profiles hold: of the calibration text, or else random tokens."""
    shapes = next((each.sequence for each in spec.profiles if each.sequence.max > 1), None)
    longest = HELD_PROMPT if shapes is None else min(max(HELD_PROMPT, shapes.min), shapes.max)
    shorter = max(longest // 2, 1 if shapes is None else shapes.min)
    if calibration is None:
        tokens = np.random.default_rng(0).integers(vocabulary, size=longest + shorter)
    else:
        tokens = np.resize(calibration, longest + shorter)
    return [tokens[:longest].tolist(), tokens[longest:].tolist()]


def finished(
    onnx: Path,
    spec: EngineSpec,
    folder: Path,
    calibration: np.ndarray | None = None,
    *,
    spec_file: Path | None = None,
) -> EngineManifest | None:
    """The manifest of the engine in `folder` where `build_engine` with these arguments would make it again; else None.

    The same files in another place make another engine: where its own lie is looked at when it is opened. Raises
    RunError when there is no ONNX file, EngineUnavailable where the backend is not installed.
    """
    if not onnx.is_file():
        raise RunError(f"{onnx}: no ONNX file to build engine {spec.name} from; export it first")
    version, bound = package_version(spec.backend), bound_to(spec)
    try:
        manifest = read_manifest(folder)
        check_manifest(folder, manifest, version, bound)
    except EngineUnavailable:
        return None
    read, files = _text_of(spec, calibration, ""), source_files(onnx)
    beside = {name: fingerprint(folder / name) for name in manifest.beside if (folder / name).is_file()}
    same = (
        manifest.spec.settings == spec.settings
        and manifest.passes_version == passes_version(spec)
        and manifest.bound == bound
        and (manifest.text and manifest.text.sha256) == (read and read.sha256)
        and manifest.beside == beside
        and manifest.source == _from_folder(onnx, folder)
        and manifest.spec_file == (None if spec_file is None else _from_folder(spec_file.resolve(), folder))
        and manifest.source_files.keys() == files.keys()  # an older version's knows none
        and manifest.onnx_sha256 == onnx_sha256(files)
    )
    return manifest if same else None


def _from_folder(file: Path, folder: Path) -> str:
    """A file as a path from an engine's folder: of a link its own place, for it may be turned elsewhere, and by the
    names there the weights beside a graph are known."""
    return os.path.relpath(file.parent.resolve() / file.name, folder.resolve())


def _text_of(spec: EngineSpec, calibration: np.ndarray | None, name: str) -> ReadText | None:
    if not spec.reads_text:
        return None
    if calibration is None:
        return ReadText(name=RANDOM_TOKENS)
    return ReadText(name=name, sha256=hashlib.sha256(calibration.tobytes()).hexdigest())


def read_calibration(texts: str, tokenizer: Path) -> np.ndarray:
    """(texts, tokens) int64 of a text, for an engine that no run is built for.

    texts: as `--calibration` takes them. tokenizer: a Hugging Face folder. Raises TextError and ModelError.
    """
    from trsp_deploy.decoder import load_tokenizer

    words, found = load_tokenizer(tokenizer), load_texts(texts, "calibration")
    try:
        windows = tokenize_windows(found, words, READ_TOKENS, INT4_TEXTS)
    except TextError as problem:  # which names a setting of recipes, and there is none here
        raise TextError(
            f"--calibration {shown(texts)}: holds fewer than the {READ_TOKENS} tokens that an engine makes its choices "
            "on; give more text, or none for random tokens"
        ) from problem
    tokens: np.ndarray = windows.numpy()
    return tokens


@contextmanager
def _log_of_failure(spec: EngineSpec, partial: Path, folder: Path) -> Iterator[None]:
    """Save a failed build's log from the removal of its folder, and remove an older one after a success."""
    if not spec.backend.startswith("tensorrt"):
        yield
        return
    kept = _place_for_log(folder)
    try:
        yield
    except EngineUnavailable as problem:
        log = partial / BUILD_LOG
        if not log.exists():
            raise
        shutil.copyfile(log, kept)
        raise EngineUnavailable(f"{problem} (log: {kept})") from problem
    with suppress(OSError):  # the engine is whole
        kept.unlink()


def _place_for_log(folder: Path) -> Path:
    """`<folder>-failed.log`, or with a number the first that is free, or an earlier build's: a user's file stays."""
    ends = ("", *(f"-{number}" for number in range(2, 100)))
    paths = [folder.with_name(f"{folder.name}{end}-failed.log") for end in ends]
    return next((path for path in paths if not os.path.lexists(path) or is_log(path)), paths[-1])
