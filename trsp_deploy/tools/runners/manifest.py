"""The record beside every built engine, and the checks before it is opened."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trsp_deploy.artifacts import (
    ENGINE_MANIFEST,
    RUN_MARK,
    Provenance,
    RunLayout,
    Sealed,
    fingerprint,
    leaves,
    run_of_engine,
)
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.reading import DAMAGED, read_record
from trsp_deploy.recipe import AUTO_ENGINES, EngineSpec, RelativePath, Strict, Text, engine_name, kept_recipe
from trsp_deploy.tools.graphs.decoder_io import Bindings
from trsp_deploy.tools.graphs.fp16_range import HalfRange
from trsp_deploy.tools.runners.requirements import adds_int8_exactly, cuda_devices, driver_version

Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]*$")]  # of a package; it gets into shell lines


class PassOutcome(Strict):
    """What one graph pass did."""

    name: str
    changed: int = 0  # places; 0 where it was left out
    error: float | None = None  # largest difference of logits that it made, in their standard deviations
    reason: str | None = None  # why it was left out; None where it was not
    # Products that `keep_high_precision` left more bits -> share of their output that rounding would have lost.
    kept: dict[str, float] = Field(default_factory=dict)


KEEP = "keep-high-precision"
QUANTISE = "quantise"


def kept_products(kept: dict[str, float]) -> tuple[PassOutcome, ...]:
    """The outcome of a quantisation that left some products more bits; none where it left none."""
    return (PassOutcome(name=KEEP, changed=len(kept), kept=kept),) if kept else ()


def left_in_floats(names: Sequence[str]) -> tuple[PassOutcome, ...]:
    """The outcome of a quantisation that has no form for the weights of some products; none where it has for all."""
    if not names:
        return ()
    products = "the product" if len(names) == 1 else f"{len(names)} products, the first"
    reason = f"no form in integers for the weights of {products} '{names[0]}', which stay in floats"
    return (PassOutcome(name=QUANTISE, reason=reason),)


@dataclass(frozen=True)
class BuiltEngine:
    """What a backend's build leaves in the engine folder."""

    file: str  # the one to open
    files: tuple[str, ...]  # every one that running needs
    inputs: Bindings
    outputs: Bindings
    passes: tuple[PassOutcome, ...] = ()
    half_range: HalfRange | None = None  # of graphs in fp16
    longest_text: int | None = None  # tokens that the graph holds for
    padding: bool = True  # whether left padding leaves a text's logits what they are


class ReadText(Strict):
    """What a build read before it made choices: how to round weights, what stays in floats, what of fp16 in fp32."""

    name: str  # as the user named it; "random tokens" where nothing was named
    sha256: str | None = None  # of the tokens; None for random ones, which are the same every time


class SourceFile(Strict):
    """One file of the graph that an engine was built from, as it was then."""

    size_bytes: int
    mtime_ns: int
    sha256: str


class Agreement(Strict):
    """How far an engine's logits are from a reference's, for the same tokens (agreement.py)."""

    max_error: float  # largest difference, in standard deviations of the reference's logits
    tolerance: float
    tokens_compared: int
    tokens_equal: int  # whose likeliest next token is the same
    ppl_ratio: float  # over the reference's, of the prompts and what follows
    ppl_tolerance: float | None  # share that it may be off by; None where it is not judged
    passed: bool


class Bound(Strict):
    """Where an engine may run; None is anywhere."""

    gpu: str | None = None  # compute capability of the GPU that it was compiled on, such as "sm89"
    # Name of that GPU, where its spec asks for no others; None in what older versions wrote.
    device: str | None = None
    driver: str | None = None  # version of the NVIDIA driver
    others: Literal["none", "ampere-plus", "same-compute-capability"] = "none"  # GPUs beside that one
    exact_int8: bool = False  # to a processor that adds int8 products without overflow (`adds_int8_exactly`)

    def misfit(self, here: Bound) -> str | None:
        """What differs where `here` was asked of this machine; None where the engine may run."""
        if self.gpu is not None and here.gpu is not None and not self._serves(here.gpu):
            return f"for a GPU of compute capability {self.gpu}, here is {here.gpu}"
        if self.device is not None and here.device is not None and self.device != here.device:
            return (
                f"for {self.device}, here is {here.device} (`hardware_compatibility: same-compute-capability` in its "
                "spec allows both)"
            )
        if self.driver is not None and here.driver is not None and self.driver != here.driver:
            return f"under NVIDIA driver {self.driver}, here is {here.driver}"
        if self.exact_int8 and not here.exact_int8:
            return "for a processor with VNNI; on this one, without, its int8 products would overflow"
        return None

    def told(self) -> str:
        """As JSON, for the inputs of a run's step: without a device as older versions wrote it, so that what is bound
        to none is not made anew."""
        return self.model_dump_json(exclude={"device"} if self.device is None else None)

    def _serves(self, gpu: str) -> bool:
        if self.others == "ampere-plus":
            return int(gpu.removeprefix("sm")) >= 80
        return gpu == self.gpu


def bound_to(spec: EngineSpec) -> Bound:
    """What an engine that is built here is bound to: TensorRT compiles for the GPU and driver at hand, TensorRT-RTX for
    the capabilities that its spec names, ONNX Runtime for none; int8 on a CPU is made for what that can add up."""
    if spec.backend == "onnxruntime-cpu" and spec.precision == "int8":
        return Bound(exact_int8=adds_int8_exactly())
    if spec.backend != "tensorrt":
        return Bound()
    try:
        gpu = cuda_devices()[0]
    except EngineUnavailable:
        return Bound()  # building and running say so themselves
    others = spec.hardware_compatibility
    # A slice of a GPU (MIG), or one of the same capability with other memory and clocks, is another device to TensorRT.
    device = gpu.name if others == "none" else None
    return Bound(gpu=gpu.compute_capability, device=device, driver=driver_version(), others=others)


class EngineManifest(Sealed):
    """An engine folder's `manifest.json`."""

    name: str
    spec: EngineSpec
    text: ReadText | None = None  # None where the build reads none, and in what older versions wrote
    passes_version: str | None = None  # of the code that changes graphs (passes.py)
    rebuild: str | None = None  # the command that built it; None of a run's engine
    source: Text | None = None  # that ONNX file, as a path from the engine's folder; None in what older versions wrote
    # It and the files that its weights lie in, as paths from its folder; none in what older versions wrote.
    source_files: dict[Text, SourceFile] = Field(default_factory=dict)
    spec_file: Text | None = None  # the spec's YAML, as a path from the engine's folder; None of one that is named
    onnx_sha256: str  # over the ONNX file and its external data
    spec_sha256: str
    backend_version: Version
    bound: Bound = Bound()
    file: RelativePath
    files: dict[RelativePath, str]  # that running needs: name -> SHA-256
    # For other programs, such as trtexec's command and graph; logs are not among them.
    beside: dict[RelativePath, str] = Field(default_factory=dict)
    size_bytes: int
    build_s: float
    built_on: Provenance
    inputs: Bindings
    outputs: Bindings
    passes: tuple[PassOutcome, ...] = ()
    half_range: HalfRange | None = None  # what computes in fp32 within an fp16 graph, and why
    longest_text: int | None = None  # tokens that the graph holds for, whatever its shapes allow; None is any number
    padding: bool = True  # whether left padding leaves a text's logits what they are; if not, it is refused
    # With the graph that it was built from; None of a run's engine, which is held against PyTorch, and of older ones.
    agreement: Agreement | None = None
    not_held: Text | None = None  # why it was not held against its graph where it was built

    @property
    def in_floats(self) -> str | None:
        """What of the weights has stayed in floats although integers were asked for; None where nothing has."""
        return next((outcome.reason for outcome in self.passes if outcome.name == QUANTISE), None)

    @property
    def doubt(self) -> str | None:
        """Why an engine may not compute what its graph does; None where it does, and of a run's engine."""
        if self.not_held is not None:
            return f"its logits are not held against the graph's: {self.not_held}"
        if self.agreement is not None and not self.agreement.passed:
            return (
                f"its logits are {self.agreement.max_error:.3g} standard deviations from the graph's, where "
                f"{self.agreement.tolerance:g} is much for {self.spec.precision}; compare their perplexity"
            )
        return None


def spec_sha256(spec: EngineSpec) -> str:
    """Fingerprint of what an engine spec asks for."""
    return _sha256(spec.model_dump_json())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> EngineManifest:
    """Read an engine folder's manifest; raises EngineUnavailable when there is none that can be read."""
    if RunLayout(folder).is_run:
        raise EngineUnavailable(f"{folder}: is a run; name one of its engines, such as {folder}/engines/NAME/pruned")
    if folder.is_file():
        raise EngineUnavailable(f"{folder}: is a file; name the folder of an engine, such as {folder.parent}")
    name = "NAME" if run_of_engine(folder) is None else folder.resolve().parent.name
    if not (folder / ENGINE_MANIFEST).exists():
        raise EngineUnavailable(f"{folder}: no engine here; {build_command(name, folder)}")
    try:
        return read_record(folder / ENGINE_MANIFEST, EngineManifest, EngineUnavailable, DAMAGED)
    except EngineUnavailable as problem:
        raise EngineUnavailable(f"{problem}; {build_command(name, folder)}") from problem


def check_manifest(folder: Path, manifest: EngineManifest, backend_version: str, here: Bound) -> None:
    """Raise EngineUnavailable when the files, the spec, the backend, the GPU or the driver are not the build's."""
    # As it was written: the spec of a later version has more keys, at their defaults.
    found = _sha256(manifest.spec.model_dump_json(exclude_unset=True))
    if found != manifest.spec_sha256:
        raise EngineUnavailable(
            f"engine {manifest.name}: the spec in its manifest has SHA-256 {found[:12]}…, it was built from "
            f"{manifest.spec_sha256[:12]}…; {rebuild(manifest, folder)}"
        )
    misfit = manifest.bound.misfit(here)
    if misfit is not None:
        raise EngineUnavailable(f"engine {manifest.name} was built {misfit}; {rebuild(manifest, folder)}")
    if manifest.backend_version != backend_version:
        raise EngineUnavailable(
            f"engine {manifest.name} was built with {manifest.spec.backend} {manifest.backend_version}, "
            f"here is {backend_version}; {rebuild(manifest, folder)}"
        )
    check_files(folder, manifest)


def check_files(folder: Path, manifest: EngineManifest) -> None:
    """Raise EngineUnavailable when a file is missing, is not the one that was built, or lies outside the folder."""
    if manifest.file not in manifest.files:
        raise EngineUnavailable(
            f"engine {manifest.name}: its manifest has no SHA-256 of {manifest.file}; {rebuild(manifest, folder)}"
        )
    for name, expected in manifest.files.items():
        path = folder / name
        if leaves(folder, path):
            raise EngineUnavailable(
                f"engine {manifest.name}: {path} is a link out of its folder; {rebuild(manifest, folder)}"
            )
        if not path.is_file():
            raise EngineUnavailable(f"engine {manifest.name}: {path} is missing; {rebuild(manifest, folder)}")
        found = fingerprint(path)
        if found != expected:
            raise EngineUnavailable(
                f"engine {manifest.name}: {path} has SHA-256 {found[:12]}…, its manifest says {expected[:12]}…; "
                f"{rebuild(manifest, folder)}"
            )


def rebuild(manifest: EngineManifest, folder: Path) -> str:
    """What to type to get an engine again."""
    if manifest.rebuild is not None:
        return f"build it again: {manifest.rebuild}"
    run = run_of_engine(folder)
    if manifest.source is None or (run is not None and run.is_run):
        return build_command(manifest.name, folder)
    onnx = os.path.normpath(folder / manifest.source)
    parts = ["trsp-deploy", "build", "--onnx", onnx, "--engine", manifest.name, "--out", str(folder)]
    return f"build it again: {shlex.join(parts)}"


def build_command(name: str, folder: Path) -> str:
    """What to type to get the engine in a folder again; RUN stands for a run that is not known, NAME for an engine."""
    run = run_of_engine(folder)
    if run is None or not run.is_run:
        return f"build it again: trsp-deploy build RUN --engine {shlex.quote(name)}"
    # `--engine` would make it the only one of the recipe, and a later report would be without the others.
    alone = "" if name in _engines_of(run) else f" --engine {shlex.quote(name)}"
    return f"build it again: trsp-deploy build {shlex.quote(str(run.root))}{alone}"


def _engines_of(run: RunLayout) -> set[str]:
    """Names of the engines that a run's recipe asks for, on one machine or another; none where it cannot be read."""
    recipe = kept_recipe(run.root / RUN_MARK)
    if recipe is None:
        return set()
    by_device = AUTO_ENGINES.values() if "auto" in recipe.engines else ()
    return set(map(engine_name, recipe.engines)).union(*by_device)
