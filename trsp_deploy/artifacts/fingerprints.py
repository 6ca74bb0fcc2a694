"""What an artefact is: the SHA-256 of its files, and of what a record says."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import model_validator

from trsp_deploy.artifacts.layout import ENGINE_MANIFEST
from trsp_deploy.recipe import Strict

SIGNATURE = ".sig"  # behind a manifest's name
SIGNED = f"{ENGINE_MANIFEST}{SIGNATURE}"  # in an engine's folder; it may come, go and change with the engine as it was

# A file that was written to longer ago than this gets another time if it is written to again: disks tell times apart by
# up to 2 s (FAT).
SETTLED_NS = 2_000_000_000

_known: dict[_State, str] = {}  # of this process: one reads an unchanged file once, however large it is


class Sealed(Strict):
    """A record whose file ends with the SHA-256 of what it says, so that a changed byte is found when it is read.

    Take the key `sha256` out to edit one by hand; files that never had it are taken as they are.
    """

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "sha256" not in values:
            return values
        said = {name: value for name, value in values.items() if name != "sha256"}
        if values["sha256"] != seal(said):
            raise ValueError("is not what was written (its SHA-256 is another)")
        return said


def seal(said: Mapping[str, Any]) -> str:
    """SHA-256 over all that a record says."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 over a file, or over the sorted names and contents of a folder's files, but not its own signature."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / SIGNED):
            digest.update(os.fsencode(f"{file.relative_to(path).as_posix()} {fingerprint(file)}\n"))
        return digest.hexdigest()
    return _file_sha256(path)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        state = _state(os.fstat(file.fileno()))
        known = _known.get(state)
        if known is not None:
            return known
        settled = time.time_ns() - state.mtime_ns > SETTLED_NS
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if settled and _state(os.fstat(file.fileno())) == state:
            _known[state] = found
    return found


class _State(NamedTuple):
    """What a file is known again by, under whatever name; one that is written to has another."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


def _state(stat: os.stat_result) -> _State:
    return _State(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def known_files() -> list[tuple[int, int, int, int, str]]:
    """What this process knows of files: device, inode, bytes, time of writing, SHA-256; for another to take over."""
    return [(*state, sha256) for state, sha256 in _known.items()]


def take_known(files: Iterable[tuple[int, int, int, int, str]]) -> None:
    """Know what another process of this machine knows of files (`known_files`); those that have changed are read."""
    _known.update({_State(*state): sha256 for *state, sha256 in files})


def files_below(path: Path) -> list[Path]:
    """A file itself, or every file and link below a folder, in order; links are named and not followed."""
    if path.is_symlink() or path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())


def leaves(folder: Path, path: Path) -> bool:
    """Whether `path`, which is written as one below `folder`, is outside it once links are followed, or nowhere."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return True


def size_bytes(path: Path) -> int:
    """Bytes in a file or below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
