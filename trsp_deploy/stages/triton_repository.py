"""A Triton model repository around an engine: a folder that `tritonserver --model-repository` can be pointed at."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trsp_deploy.artifacts import (
    MANIFEST,
    RunLayout,
    fingerprint,
    provenance,
    storage_errors,
    write_json,
    writing,
    writing_alone,
)
from trsp_deploy.artifacts.layout import check_no_model, run_that_owns
from trsp_deploy.artifacts.storage import remove
from trsp_deploy.decoder import max_positions
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import LONGEST_NAME, EngineSpec
from trsp_deploy.results import Role
from trsp_deploy.tools.model_repository.config import WARMUP_TEXT, WARMUP_TOKENS
from trsp_deploy.tools.model_repository.generating_model import packages_of, write_generating_model
from trsp_deploy.tools.model_repository.manifest import SETTINGS, RepositoryManifest, ServedModel, read_repository
from trsp_deploy.tools.model_repository.readme import CONTAINER, dockerfile, readme
from trsp_deploy.tools.model_repository.step_model import check_can_step, is_step_model, write_step_model
from trsp_deploy.tools.runners import read_manifest
from trsp_deploy.tools.runners.generation import prompt_tokens
from trsp_deploy.tools.runners.manifest import check_files
from trsp_deploy.tools.serving.text import read_tokenizer

README, DOCKERFILE = "README.md", "Dockerfile"
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
        _check_is_ours(place)
        for engine in engines.values():
            if step:
                check_can_step(engine)
            check_files(engine, read_manifest(engine))
        length = _checked_length(engines, model_folder, max_length)
        named = [names[role] for role in engines]
        steps = {f"{name}_step" for name in named}
        written = _checked_names(place, {*named, *(steps if step else ())})
        outdated = _outdated_steps(place, steps - written)
        others = _others(place, written | outdated)
        needed = {names[role]: packages_of(read_manifest(engine)) for role, engine in engines.items()}
        together = _together(place, needed | {model.name: model.packages for model in others})
        models = []
        with _staging(place) as staging:
            for role, engine in engines.items():
                name = names[role]
                with writing(place / name, staging) as folder:
                    made = write_generating_model(
                        engine, role, name, folder, model_folder, max_length=length, max_batch=max_batch, say=say
                    )
                models.append(made)
                if step:
                    with writing(place / f"{name}_step", staging) as folder:
                        models.append(write_step_model(engine, role, f"{name}_step", folder, length, max_batch))
            for name in outdated:
                remove((place / name).replace(staging / f".{name}.former"))
        return _record(place, (*models, *others), together)


def _check_is_ours(out: Path) -> None:
    """Raise RunError where a file of somebody else's would be replaced."""
    for file in (README, DOCKERFILE):
        if (out / file).exists() and not (out / MANIFEST).is_file():
            raise RunError(f"--out {out}: has a {file} that is not of a model repository of ours; name another folder")


def _checked_length(engines: dict[Role, Path], model_folder: Path, max_length: int | None) -> int:
    """Tokens of one text; raises RunError for more than model and engines take, or fewer than the warm-up has."""
    longest = _longest_text(engines, model_folder)
    if max_length is not None and max_length > longest:
        raise RunError(f"--max-length {max_length}: the model and its engines take {longest} tokens")
    length = max_length or longest
    _check_warmup(model_folder, length, [read_manifest(engine).spec for engine in engines.values()])
    return length


def _checked_names(out: Path, names: set[str]) -> set[str]:
    """The names; raises RunError for one that Triton does not take, or whose place is taken."""
    for name in sorted(names, key=len):
        if NAME.fullmatch(name) is None:
            raise RunError(f"--name '{name}': letters, digits, dots, dashes and underscores, a letter or digit first")
        if len(name) > LONGEST_NAME:
            raise RunError(f"--name: a model would be '{name}', of {len(name)} characters; at most {LONGEST_NAME}")
    for name in sorted(names):
        _check_replaceable(out, name)
    return names


def _record(out: Path, models: tuple[ServedModel, ...], packages: tuple[str, ...]) -> RepositoryManifest:
    """Write what lies beside the models, the manifest last: it has the SHA-256 of the others, which are made of it."""
    manifest = RepositoryManifest(
        models=models,
        packages=packages,
        gpu=next((model.bound.gpu for model in models if model.bound.gpu is not None), None),
        container=CONTAINER,
        provenance=provenance(),
    )
    _write_text(out / DOCKERFILE, dockerfile(manifest))
    _write_text(out / README, readme(manifest))
    beside = {name: fingerprint(out / name) for name in (DOCKERFILE, README)}
    manifest = manifest.model_copy(update={"files": beside})
    write_json(out / MANIFEST, manifest)
    return manifest


def _check_replaceable(out: Path, name: str) -> None:
    """Raise RunError where a model would take the place of what no earlier call has made."""
    folder = out / name
    if (out / MANIFEST).is_file() and name in {model.name for model in read_repository(out).models}:
        return
    # Of a call that was killed before the repository's manifest.
    left = (folder / "1" / SETTINGS).is_file() or (name.endswith("_step") and is_step_model(folder))
    if folder.exists() and not left and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder}: is no model of a repository of ours, and would be replaced; choose another --name")


def _check_warmup(model_folder: Path, max_length: int, specs: Sequence[EngineSpec]) -> None:
    """Raise RunError where the text that the server runs before its first request would not fit."""
    file = model_folder / "tokenizer.json"
    if not file.is_file():
        return  # which is said where it is needed
    encoded = read_tokenizer(file).encode(WARMUP_TEXT)
    prompt = len(prompt_tokens(encoded.ids, encoded.special_tokens_mask))
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
