"""The record of a model repository that `trsp-deploy triton` wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trsp_deploy.artifacts import MANIFEST, Provenance, Sealed, files_below, fingerprint
from trsp_deploy.errors import RunError
from trsp_deploy.reading import DAMAGED, read_record
from trsp_deploy.recipe import Backend, Name, Precision, RelativePath, Strict
from trsp_deploy.results import Role
from trsp_deploy.tools.runners.manifest import Bound, Version

SETTINGS = "serving.json"  # beside the engine of a model that generates text: what it is told
# As pip takes it, without what would end its quotes in the README's shell line or the Dockerfile's.
Requirement = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]*([=<>]{1,2}[0-9A-Za-z][0-9A-Za-z.+_-]*)?$")]


class ServedModel(Strict):
    """One model of a repository."""

    name: Name
    role: Role
    engine: str  # the spec's name
    backend: Backend
    backend_version: Version  # that the engine was built with
    precision: Precision
    packages: tuple[Requirement, ...]  # that the server's Python needs for it; none in a stock backend
    bound: Bound = Bound()  # where the engine may run
    compute_capabilities: tuple[str, ...] = ()  # of TensorRT-RTX: the GPUs that it is compiled for; none is its default
    serves: Literal["text", "steps"] = "text"
    max_batch: int  # texts, or sequences, at once
    max_length: int  # tokens of a text
    max_prompt: int | None = None  # tokens of a prompt, where the engine reads fewer at once than a text may have
    state_bytes: int = 0  # that the server keeps for each sequence
    cache_bytes: int = 0  # of keys and values at most, that the model itself keeps beside its weights
    files: dict[RelativePath, str]  # path below the model's folder -> SHA-256

    @property
    def limits(self) -> str:
        """What the model is, how much it takes and where it runs, in one line."""
        where = f"; runs {self.runs_on} alone" if self.runs_on else ""
        if self.serves == "text":
            cache = f"{self.cache_bytes / 1e6:.1f} MB of cache at most"
            prompts = "" if self.max_prompt is None else f" with prompts of at most {self.max_prompt}"
            texts = f"{self.max_batch} texts at once, {self.max_length} tokens each{prompts}"
            return f"{self.engine}, {texts}, {cache}{where}"
        size = f"{self.max_length} tokens and {self.state_bytes / 1e6:.1f} MB of state each"
        return f"{self.engine}, one step of a loop of your own, {self.max_batch} sequences at once, {size}{where}"

    @property
    def runs_on(self) -> str:
        """The GPUs, driver or processors that the engine is for, such as "on GPUs of compute capability sm89"; empty
        where it is for any."""
        if self.backend == "tensorrt-rtx":
            if not self.compute_capabilities:
                return "on TensorRT-RTX's GPUs but sm75"
            return f"on GPUs of compute capability {', '.join(self.compute_capabilities)}"
        if self.bound.gpu is not None:
            gpu = "sm80 and above" if self.bound.others == "ampere-plus" else self.bound.gpu
            driver = f" under NVIDIA driver {self.bound.driver}" if self.bound.driver else ""
            if self.bound.device is not None:
                return f"on {self.bound.device} ({gpu}){driver}"
            return f"on GPUs of compute capability {gpu}{driver}"
        return "on processors that add int8 products exactly (of x86 those with VNNI)" if self.bound.exact_int8 else ""


class RepositoryManifest(Sealed):
    """`MANIFEST.json` of a repository."""

    models: tuple[ServedModel, ...]
    packages: tuple[Requirement, ...]  # that the server's Python needs for all of them
    gpu: str | None  # compute capability that an engine was compiled on; each model's `bound` has all of it
    files: dict[RelativePath, str] = Field(default_factory=dict)  # beside the models: name -> SHA-256
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
    if not (folder / MANIFEST).exists():
        raise RunError(f"{folder}: no repository of `trsp-deploy triton` ({MANIFEST} is missing)")
    again = f"delete the folder and write it again: trsp-deploy triton RUN --out {shlex.quote(str(folder))}"
    return read_record(folder / MANIFEST, RepositoryManifest, RunError, DAMAGED, again)


def fingerprints_below(folder: Path) -> dict[str, str]:
    """A model's files: path below its folder -> SHA-256."""
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files_below(folder)}
