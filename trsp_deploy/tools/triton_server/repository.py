"""The record of a model repository that `trsp-deploy triton` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from trsp_deploy.artifacts import MANIFEST, Provenance
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Name, RelativePath, Strict
from trsp_deploy.results import Role


class ServedModel(Strict):
    """One model of a repository."""

    name: Name
    role: Role
    engine: str  # the spec's name
    serves: Literal["text", "steps"] = "text"
    max_batch: int  # texts, or sequences, at once
    max_length: int  # tokens of a text
    state_bytes: int = 0  # that the server keeps for each sequence
    files: dict[RelativePath, str]  # path below the model's folder -> SHA-256

    @property
    def limits(self) -> str:
        """What it is and how much it takes, in a line."""
        if self.serves == "text":
            return f"{self.engine}, {self.max_batch} texts at once, {self.max_length} tokens each"
        size = f"{self.max_length} tokens and {self.state_bytes / 1e6:.1f} MB of state each"
        return f"{self.engine}, one step of a loop of your own, {self.max_batch} sequences at once, {size}"


class RepositoryManifest(Strict):
    """`MANIFEST.json` of a repository."""

    models: tuple[ServedModel, ...]
    packages: tuple[str, ...]  # that the server's Python needs
    gpu: str | None  # compute capability that the engine is bound to
    container: str  # image of Triton that the README's command takes
    provenance: Provenance

    @property
    def texts(self) -> dict[Role, ServedModel]:
        """The models that text is asked of; raises RunError where two have one role and cannot be told apart."""
        found: dict[Role, ServedModel] = {}
        for model in self.models:
            if model.serves == "text" and found.setdefault(model.role, model) is not model:
                raise RunError(
                    f"'{found[model.role].name}' and '{model.name}' are both {model.role}: a comparison is of one "
                    "dense and one pruned model; write them to a repository of their own"
                )
        return found


def read_repository(folder: Path) -> RepositoryManifest:
    """Read a repository's manifest; raises RunError when there is none or it is damaged."""
    try:
        return RepositoryManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as problem:
        raise RunError(f"{folder}: no repository of `trsp-deploy triton` ({MANIFEST} is missing)") from problem
    except ValidationError as problem:
        raise RunError(f"{folder / MANIFEST}: written by another version, or damaged; write it again") from problem
