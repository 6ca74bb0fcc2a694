"""Build one engine from an ONNX file, and write what it is into a manifest beside it."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsp_deploy.artifacts import (
    ENGINE_MANIFEST,
    files_below,
    fingerprint,
    provenance,
    write_json,
    writing,
    writing_alone,
)
from trsp_deploy.errors import EngineUnavailable, ParityError, RecipeError, RunError, TextError, shown
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import BACKENDS, BuiltEngine, EngineManifest, bound_to, check_can_build, check_can_run
from trsp_deploy.tools.runners.agreement import agreement, logits_of, read_alone, ruled_out
from trsp_deploy.tools.runners.calibration import INT4_TEXTS, READ_TOKENS
from trsp_deploy.tools.runners.engine_folder import check_engine_folder, check_nothing_else
from trsp_deploy.tools.runners.graph_files import check_source, onnx_sha256, source_files
from trsp_deploy.tools.runners.inspection import compiled_graph, has_tokenizer, trtexec
from trsp_deploy.tools.runners.manifest import ReadText, SourceFile, check_manifest, read_manifest, spec_sha256
from trsp_deploy.tools.runners.passes import passes_version, source_runner
from trsp_deploy.tools.runners.requirements import package_version, release_torch_memory
from trsp_deploy.tools.runners.trt_log import BUILD_LOG, is_log
from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows

RANDOM_TOKENS = "random tokens"
HELD_PROMPT, HELD_TOKENS = 12, 4  # on which an engine is held against its graph
TRTEXEC = "trtexec.sh"  # builds the same engine with TensorRT's own program


@dataclass(frozen=True)
class Source:
    """What an engine is built from; files as paths from its folder."""

    onnx: str
    files: dict[str, SourceFile]
    spec_file: str | None
    text: ReadText | None


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
    source = Source(
        onnx=_from_folder(onnx, folder),
        files=source_files(onnx),
        spec_file=None if spec_file is None else _from_folder(spec_file.resolve(), folder),
        text=_text_of(spec, calibration, text_name),
    )
    with writing(folder) as partial, _log_of_failure(spec, partial, folder):
        partial.mkdir()
        built = BACKENDS[spec.backend].build(onnx, spec, partial, calibration)
        if spec.on_tensorrt:
            _write_trtexec(spec, built, partial, source.onnx, folder.resolve().name)
        manifest = _record(spec, source, built, partial, rebuild, began)
        if hold:
            manifest = _held(onnx, partial, manifest, calibration)
        write_json(partial / ENGINE_MANIFEST, manifest)
    return manifest


def build_alone(
    onnx: Path,
    spec: EngineSpec,
    out: Path,
    *,
    texts: str | None = None,
    tokenizer: Path | None = None,
    rebuild: str,
    spec_file: Path | None,
    say: Callable[[str], None],
) -> tuple[EngineManifest, bool]:
    """Make an engine of one ONNX file in a folder of its own, and hold it against its graph; no run is needed.

    out: a new or empty folder, or an engine's own, which is replaced where that is of another file, spec or text.
    texts: for the choices of a build, as `--calibration` takes them; None takes random tokens. tokenizer: its folder;
    None is the ONNX file's. rebuild, spec_file: as `build_engine` takes them. say: told where random tokens decide.
    Returns its manifest, and whether it is the engine that was there. Raises RecipeError for a folder that is not to be
    replaced or a text that cannot be read, and what `build_engine` raises.
    """
    check_engine_folder(out)
    if onnx.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"--out {out}: is replaced by the engine, and {onnx} lies in it; name another folder")
    calibration = _text_alone(onnx, spec, texts, tokenizer, say)
    with writing_alone(out) as place, quiet_libraries():
        known = finished(onnx, spec, place, calibration, spec_file=spec_file)
        if known is not None:
            return known, True
        check_nothing_else(place)
        named = texts or ""
        made = build_engine(
            onnx, spec, place, calibration, text_name=named, rebuild=rebuild, spec_file=spec_file, hold=True
        )
        return made, False


def _text_alone(
    onnx: Path, spec: EngineSpec, texts: str | None, tokenizer: Path | None, say: Callable[[str], None]
) -> np.ndarray | None:
    """The tokens that the engine's choices are made on; None for random ones, and where there are none to make."""
    if texts is None:
        if spec.reads_text:
            say(f"{spec.name}: makes its choices on random tokens; --calibration TEXTS lets it read a text")
        return None
    if not spec.reads_text:
        raise RecipeError(f"--calibration: {spec.name} is of {spec.precision}, whose build reads no text")
    folder = tokenizer or onnx.parent
    if tokenizer is None and not has_tokenizer(folder):
        raise RecipeError(f"--calibration: no tokenizer in {folder}; give its folder with --tokenizer")
    with quiet_libraries():
        return read_calibration(texts, folder)


def _write_trtexec(spec: EngineSpec, built: BuiltEngine, folder: Path, source: str, name: str) -> None:
    """Write the script that builds the engine again with TensorRT's own program.

    folder: the engine's, which will be called `name`. source: its ONNX file, as a path from there.
    """
    line = trtexec(spec, built.inputs, compiled_graph(_beside(built, folder), source), name)
    (folder / TRTEXEC).write_text(f'#!/bin/sh\ncd "$(dirname "$0")" || exit\n{line}\n', encoding="utf-8")


def _record(
    spec: EngineSpec, source: Source, built: BuiltEngine, folder: Path, rebuild: str | None, began: float
) -> EngineManifest:
    """The manifest of the engine that lies in `folder`. began: as `time.perf_counter` had it."""
    return EngineManifest(
        name=spec.name,
        spec=spec,
        source=source.onnx,
        source_files=source.files,
        spec_file=source.spec_file,
        text=source.text,
        passes_version=passes_version(spec),
        rebuild=rebuild,
        onnx_sha256=onnx_sha256(source.files),
        spec_sha256=spec_sha256(spec),
        backend_version=package_version(spec.backend),
        bound=bound_to(spec),
        file=built.file,
        files={name: fingerprint(folder / name) for name in built.files},
        beside={name: fingerprint(folder / name) for name in _beside(built, folder)},
        size_bytes=sum((folder / name).stat().st_size for name in built.files),
        build_s=time.perf_counter() - began,
        built_on=provenance(),
        inputs=built.inputs,
        outputs=built.outputs,
        passes=built.passes,
        half_range=built.half_range,
        longest_text=built.longest_text,
        padding=built.padding,
    )


def _beside(built: BuiltEngine, folder: Path) -> list[str]:
    """What lies in an engine's folder for other programs, its log aside."""
    names = (file.relative_to(folder).as_posix() for file in files_below(folder))
    return [name for name in names if name not in (*built.files, BUILD_LOG)]


def _held(onnx: Path, folder: Path, manifest: EngineManifest, calibration: np.ndarray | None) -> EngineManifest:
    """The manifest of an engine in `folder` with how far its logits are from its graph's, or why that is not known."""
    spec = manifest.spec
    try:
        check_can_run(spec)
        with source_runner(onnx, spec, folder) as graph:
            reference = read_alone(graph, _prompts(spec, graph.vocabulary, calibration), HELD_TOKENS)
        with BACKENDS[spec.backend].open(folder, manifest) as engine:
            logits = logits_of(reference, engine, one_by_one=manifest.inputs["input_ids"][1][0] == 1)
    except EngineUnavailable as problem:  # of the machine, or of shapes: the engine may be right
        return manifest.model_copy(update={"not_held": _lasting(str(problem), folder)})
    both, seen = ruled_out(reference, logits), reference.seen
    source_is_finite = (np.isfinite(reference.logits) | both)[seen].all()
    if not (np.isfinite(logits) | both)[seen].all():
        also = "" if source_is_finite else f", and so does {onnx}"
        raise ParityError(f"parity: {spec.name} gives logits that are no numbers{also}; nothing is kept of it")
    if not source_is_finite:  # fp16 that overflows, and the engine keeps such places in fp32
        return manifest.model_copy(update={"not_held": f"{onnx.name} itself gives logits that are no numbers"})
    found = agreement(reference, logits, spec.precision, of_text=calibration is not None)
    # Integers may be far off and useful still, which only a text can tell.
    if not found.passed and (not spec.is_quantised or math.isinf(found.ppl_ratio)):
        raise ParityError(
            f"parity: {spec.name} is {found.max_error:.3g} standard deviations from the logits of {onnx} (tolerance "
            f"{found.tolerance:g}), {found.tokens_equal} of {found.tokens_compared} greedy tokens equal; nothing is "
            "kept of it"
        )
    return manifest.model_copy(update={"agreement": found})


def _lasting(reason: str, folder: Path) -> str:
    """A reason without the folder of an engine that is being made, which has another name by the time it is read."""
    return re.sub(rf"{re.escape(str(folder))}/(fp32-[^/]+/)?", "", reason)


def _prompts(spec: EngineSpec, vocabulary: int, calibration: np.ndarray | None) -> list[list[int]]:
    """Two of unequal length that the spec's profiles hold: of the calibration text, or else random tokens."""
    held = [min(max(HELD_PROMPT, each.sequence.min), each.sequence.max) for each in spec.profiles]
    longest = min(held, key=lambda length: abs(length - HELD_PROMPT), default=HELD_PROMPT)
    least = [each.sequence.min for each in spec.profiles if each.sequence.min <= longest <= each.sequence.max]
    shorter = max(longest // 2, min(least, default=1))
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
    if not spec.on_tensorrt:
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
