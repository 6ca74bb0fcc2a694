"""The record of a model repository that `trsp-deploy triton` wrote."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from trsp_deploy.artifacts import Provenance
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import Role

MANIFEST = "MANIFEST.json"


class ServedModel(Strict):
    """One model of a repository."""

    name: str
    role: Role
    engine: str  # the spec's name
    max_batch: int  # texts at once
    max_length: int  # tokens of a text
    files: dict[str, str]  # path below the model's folder -> SHA-256


class RepositoryManifest(Strict):
    """`MANIFEST.json` of a repository."""

    models: tuple[ServedModel, ...]
    packages: tuple[str, ...]  # that the server's Python needs
    gpu: str | None  # compute capability that the engine is bound to
    provenance: Provenance


def read_repository(folder: Path) -> RepositoryManifest:
    """Read a repository's manifest; raises RunError when there is none or it is damaged."""
    try:
        return RepositoryManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as problem:
        raise RunError(f"{folder}: no repository of `trsp-deploy triton` ({MANIFEST} is missing)") from problem
    except ValidationError as problem:
        raise RunError(f"{folder / MANIFEST}: written by another version, or damaged; write it again") from problem
