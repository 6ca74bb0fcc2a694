"""Pickled weights (`pytorch_model.bin`) once to safetensors: `trsp-deploy convert`.

Nothing else in the toolkit reads a pickle that came from elsewhere. Here it is read by torch's own unpickler for
weights, which knows tensors and plain containers alone and refuses whatever would call something.
"""

from __future__ import annotations

import itertools
import pickle
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from trsp_deploy.artifacts import share_weights, storage_errors, writing, writing_alone
from trsp_deploy.decoder import load_config
from trsp_deploy.errors import ModelError, first_line, machine_reason
from trsp_deploy.model_code import CODE, copy_code
from trsp_deploy.reading import read_json, user_path
from trsp_deploy.tools.sources.hub import hub_errors, hub_problem
from trsp_deploy.tools.sources.model_folders import PYTORCH_BINS, check_decoder_only, check_folder, goes_along
from trsp_deploy.tools.sources.models import COMPANIONS, conversions, quiet_retries
from trsp_deploy.tools.sources.names import HUB_ID, SHORT_NAMES, not_delivered
from trsp_deploy.tools.sources.packaged import alone

INDEX = "pytorch_model.bin.index.json"


def convert(name: str, out: Path | None, progress: Callable[[str], None]) -> Path:
    """Write a model folder with safetensors in place of the pickles of another; returns it.

    name: a folder, a short name or a hub id. out: must not be there yet; None keeps a hub model where its name finds
    it from then on, and what is there already is not made again.
    Raises ModelError when there is no such model, it has no pickles, or one holds more than tensors.
    """
    if out is not None and out.exists():
        raise ModelError(f"--out {out}: is there already; name a folder that is not")
    if out is None and user_path(name).is_dir():
        raise ModelError(f"model '{name}': is a folder; name one for its safetensors with --out DIR")
    folder = _source(name, progress)
    if out is not None:
        with writing_alone(out) as place:
            _write(folder, name, place, progress)
        return out
    out = conversions(SHORT_NAMES.get(name, name)) / folder.name  # the commit
    with alone(out.with_name(f".{out.name}.lock"), progress):
        if not out.is_dir():
            _write(folder, name, out, progress)
    return out


def _write(folder: Path, name: str, out: Path, progress: Callable[[str], None]) -> None:
    shards = _shards(folder)
    if not shards:
        raise ModelError(f"model '{name}': has no pytorch_model.bin to convert")
    check_decoder_only(folder)
    with writing(out) as partial:
        partial.mkdir()
        for file in folder.iterdir():
            if COMPANIONS.fullmatch(file.name) and goes_along(folder, file):
                shutil.copyfile(file, partial / file.name)
        copy_code(folder, partial)
        weights: dict[str, Any] = {}
        for shard in shards:
            progress(f"reading {shard.name}")
            weights |= _tensors(shard)
        _check_whole(folder, weights)
        _save(weights, partial, tied=getattr(load_config(folder), "tie_word_embeddings", True))
        check_folder(partial)


def _shards(folder: Path) -> list[Path]:
    """The files that transformers would read: a single one, else those of the index; others may be of another save."""
    single, index = folder / "pytorch_model.bin", folder / INDEX
    if single.is_file():
        return [single]
    named = read_json(index, ModelError).get("weight_map") if index.is_file() else None
    if isinstance(named, dict):
        files = {file for file in map(str, named.values()) if PYTORCH_BINS.fullmatch(file)}
        return sorted(folder / file for file in files if (folder / file).is_file())
    return sorted(path for path in folder.iterdir() if PYTORCH_BINS.fullmatch(path.name) and path.suffix == ".bin")


def _source(name: str, progress: Callable[[str], None]) -> Path:
    folder = user_path(name)
    if folder.is_dir():
        return folder
    repo = SHORT_NAMES.get(name, name)
    if HUB_ID.fullmatch(repo) is None:
        raise ModelError(f"model '{name}': no such folder, no short name and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    progress(f"fetching {repo}")
    patterns = ["pytorch_model*.bin*", "*.json", "*.txt", "*.model", "*.jinja", "README.md", CODE]
    try:
        with storage_errors(Path(HF_HUB_CACHE)), quiet_retries():
            return Path(snapshot_download(repo, allow_patterns=patterns))
    except hub_errors() as problem:
        raise ModelError(not_delivered(name, f"{hub_problem(problem)}; give a folder that holds it")) from problem


def _check_whole(folder: Path, weights: Collection[str]) -> None:
    """Raise ModelError where the index of several shards names tensors that none of them has."""
    index = folder / INDEX
    named = read_json(index, ModelError).get("weight_map") if index.is_file() else {}
    if not isinstance(named, dict):
        raise ModelError(f"{index}: its weight_map is no mapping of tensors to files")
    missing = [name for name in named if name not in weights]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ModelError(f"{folder}: lacks {missing[0]}{more}, which {index.name} names in {named[missing[0]]}")


def _tensors(shard: Path) -> dict[str, Any]:
    import torch

    try:
        try:  # mapped, a shard costs no memory until it is written
            found = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form of before torch 1.6 cannot be mapped
            found = torch.load(shard, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as problem:
        if machine_reason(problem) is not None:
            raise
        reason = first_line(problem)
        raise ModelError(f"{shard}: holds more than tensors, or is damaged ({reason}); nothing was run") from problem
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ModelError(f"{shard}: is no mapping of names to tensors, so it holds no model's weights")
    return found


def _save(weights: dict[str, Any], folder: Path, tied: bool) -> None:
    """tied: whether the config ties the head to the embedding."""
    from huggingface_hub import save_torch_state_dict

    by_place: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        by_place.setdefault((weight.data_ptr(), weight.dtype, weight.shape), []).append(name)
    for names in by_place.values():
        # Tied weights are one tensor under two names: transformers wants the embedding's and ties the head to it.
        tables = [name for name in names if tied and re.search(r"embed(?!_out)|wte", name)]
        for name in set(names) - {tables[0] if tables else names[0]}:
            same = weights.pop(name)
            if not tables:
                weights[name] = same.clone()  # of what else is shared, both names are written
    parts: dict[int, list[str]] = {}  # of one storage, such as keys and values that were split
    for name, weight in weights.items():
        parts.setdefault(weight.untyped_storage().data_ptr(), []).append(name)
    for name in itertools.chain.from_iterable(names for names in parts.values() if len(names) > 1):
        weights[name] = weights[name].clone()
    save_torch_state_dict(weights, folder, safe_serialization=True, metadata={"format": "pt"})
    share_weights(folder)
