"""ONNX models and engines, of the dense model and of the pruned one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from trsp_deploy.artifacts import Finished, Made, RunFolder, Step, StepRecord, fingerprint, size_bytes, steps, writing
from trsp_deploy.artifacts.differences import changed_settings
from trsp_deploy.errors import EngineSpecError, EngineUnavailable, RecipeError
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.pipeline.runs import saved_recipe
from trsp_deploy.reading import user_path
from trsp_deploy.recipe import EngineSpec, ExportSettings, Float, engine_name, named_by_file
from trsp_deploy.results import ROLES, OnnxModel, Role
from trsp_deploy.stages import build, export
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.library import load_engine_spec, wanted_engines
from trsp_deploy.tools.measuring.subjects import Subject, find_subject
from trsp_deploy.tools.runners import EngineManifest, bound_to, check_can_build, check_can_run
from trsp_deploy.tools.runners.calibration import INT4_TEXTS, READ_TOKENS
from trsp_deploy.tools.runners.manifest import Bound
from trsp_deploy.tools.runners.passes import passes_version
from trsp_deploy.tools.runners.requirements import package_version

GRAPH = "onnx"  # what steps call an exported graph where others are of an engine


@dataclass(frozen=True)
class EngineOutcome:
    """How far one engine spec came on this machine."""

    spec: EngineSpec
    manifests: dict[Role, EngineManifest]  # empty when it could not be built
    reason: str | None  # why it was not built or cannot run; None when it runs


class Engines:
    """Export and build, for every engine spec of the recipe."""

    def __init__(self, inputs: Inputs, pruning: Pruning) -> None:
        self.inputs = inputs
        self.pruning = pruning
        self.run = inputs.run
        self.recipe = inputs.recipe
        # A wrong name is found before anything slow begins.
        self.specs = specs_of(inputs.recipe.engines, self._spec)
        _check_names([spec.name for spec in self.specs], inputs.recipe.evaluation)

    def _spec(self, name: str) -> EngineSpec:
        """The spec of one of the recipe's engines; of a file that is not here, what the run has built by it."""
        found = self.inputs.engine(name)
        gone = named_by_file(found) and not user_path(found).is_file()
        if not gone or (built := self._built_by(name)) is None:
            return load_engine_spec(found)
        self.inputs.say(f"engine '{name}': no such file here; going on with the run's copy of its spec")
        return built

    def _built_by(self, file: str) -> EngineSpec | None:
        """The spec of a file that the run's recipe names, as its records have it, which `clean` leaves."""
        before = saved_recipe(self.run)
        if before is None or file not in before.engines:
            return None
        for record in filter(None, (self.run.record(steps.build(engine_name(file), role)) for role in ROLES)):
            with contextlib.suppress(ValidationError):  # of an earlier version
                return EngineSpec.model_validate(record.result.get("spec"))
        return None

    def export(self) -> dict[tuple[Role, Float], OnnxModel]:
        """Every ONNX model that an engine of the recipe can be built from here."""
        precisions = dict.fromkeys(spec.graph_precision for spec in self.buildable())
        return {(role, precision): self.onnx(role, precision) for precision in precisions for role in ROLES}

    @cached_method
    def onnx(self, role: Role, precision: Float) -> OnnxModel:
        """One exported model."""
        folder = self._onnx(role, precision).path
        models = {each: self.pruning.ready(each) for each in ROLES}
        model = models[role]
        prints = {each: fingerprint(path) for each, path in models.items()}
        exporter = self._exporter(precision, self.run, prints, self.run.holds)
        before = self.run.record(steps.export(role, precision))
        by = exporter if before is None else before.settings.get("exporter")
        if by != exporter and self.recipe.export.exporter == "auto":
            self.inputs.say(f"export: {folder} was made by {by}, and `auto` is {exporter} here; made again")

        def work() -> OnnxModel:
            text = self._calibration() if self._guard(precision) else None
            with writing(self.run.path / folder) as partial:
                external = export.export_onnx(model, precision, self.recipe.export, partial, text, self.inputs.say)
                size = size_bytes(partial / export.FILE) + sum(size_bytes(partial / name) for name in external)
            return OnnxModel(
                role=role,
                precision=precision,
                folder=folder,
                size_bytes=size,
                external_data=external,
                exporter=export.chosen(self.recipe.export, model),
            )

        return self.run.do(self._export_step(role, precision, lambda: exporter), work, OnnxModel)

    def buildable(self) -> list[EngineSpec]:
        """The recipe's engines that this machine can build."""
        return buildable(self.specs)

    def not_buildable(self) -> dict[str, str]:
        """Why this machine cannot build the others, by name."""
        reasons = {spec.name: why_not(check_can_build, spec) for spec in self.specs}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def build(self) -> list[EngineOutcome]:
        """Every engine of the recipe that can be built here, dense and pruned."""
        return [self.engine(spec) for spec in self.specs]

    @cached_method
    def engine(self, spec: EngineSpec) -> EngineOutcome:
        """Build one engine for both models; what cannot be built or run is an outcome with its reason."""
        reason = why_not(check_can_build, spec)
        if reason is not None:
            self.inputs.say(f"{spec.name}: unavailable ({reason})")
            return EngineOutcome(spec, {}, reason)
        try:
            manifests = {role: self._build(spec, role) for role in ROLES}
        except EngineUnavailable as problem:
            self.inputs.say(f"{spec.name}: unavailable ({problem})")
            return EngineOutcome(spec, {}, str(problem))
        for role, manifest in manifests.items():
            if manifest.in_floats is not None:
                self.inputs.say(f"{spec.name}, {role}: {manifest.in_floats}")
        return EngineOutcome(spec, manifests, why_not(check_can_run, spec))

    def pair(self, spec: EngineSpec) -> tuple[Subject, Subject]:
        """The two engines of one spec, to be measured."""
        dense, pruned = (find_subject(self.path(spec, role), role, None) for role in ROLES)
        return dense, pruned

    def ask(self, found: Finished) -> None:
        """Enter the exports and builds that need not be done again, into what is told of the steps before them."""
        if steps.DENSE not in found.left:  # none is of this model, and the text that some read takes it as `dense/`
            return
        for spec in self.buildable():
            for role in ROLES:
                self._ask(found, spec, role)

    def _ask(self, found: Finished, spec: EngineSpec, role: Role) -> None:
        precision = spec.graph_precision

        def exporter() -> str:
            models = {each: found.left.get(steps.model(each)) for each in ROLES}
            return self._exporter(precision, found.run, models, found.run.has_outputs)

        found.ask(self._export_step(role, precision, exporter))
        found.ask(self._build_step(spec, role))

    def path(self, spec: EngineSpec, role: Role) -> Path:
        """The engine's folder, there or not."""
        return self.run.layout.engine(spec.name, role)

    def made(self, spec: EngineSpec, role: Role) -> Made:
        """The engine, as an input of what is measured of it."""
        return Made(steps.build(spec.name, role), self.run.layout.below(self.path(spec, role)))

    def _build(self, spec: EngineSpec, role: Role) -> EngineManifest:
        model = self.onnx(role, spec.graph_precision)
        folder = self.path(spec, role)
        return self.run.do(
            self._build_step(spec, role),
            lambda: build.build_engine(
                self.run.path / model.folder / export.FILE,
                spec,
                folder,
                self._calibration() if spec.reads_text else None,
                text_name=self.recipe.public.calibration.name,
            ),
            EngineManifest,
        )

    def _export_step(self, role: Role, precision: Float, exporter: Callable[[], str]) -> Step:
        onnx = self._onnx(role, precision)
        return Step(
            onnx.step,
            lambda: self._export_settings(precision, exporter()),
            lambda: {"model": self.inputs.made(role), **self._guard(precision)},
            onnx.path,
            ExportSettings,
        )

    def _build_step(self, spec: EngineSpec, role: Role) -> Step:
        engine = self.made(spec, role)
        return Step(
            engine.step,
            lambda: spec.settings,
            lambda: {"onnx": self._onnx(role, spec.graph_precision), **self._build_inputs(spec)},
            engine.path,
            EngineSpec,
        )

    def _onnx(self, role: Role, precision: Float) -> Made:
        """An exported model, as an input of what is built of it."""
        return Made(steps.export(role, precision), self.run.layout.below(self.run.layout.onnx(role, precision)))

    def _export_settings(self, precision: Float, exporter: str | None) -> dict[str, Any]:
        return {**self.recipe.export.model_dump(), "exporter": exporter, "precision": precision}

    def _exporter(
        self,
        precision: Float,
        run: RunFolder,
        models: Mapping[Role, str | None],
        holds: Callable[[StepRecord], bool],
    ) -> str:
        """The exporter that the recipe means in a run, which may be a sweep's.

        `auto` is the one by which both graphs were made, as long as they hold and are of these models, wherever the run
        is by now: a pair by two exporters would differ in more than its layers.
        models: fingerprints of what is exported; None of one that is to be made.
        """
        settings = self.recipe.export
        if settings.exporter != "auto":
            return settings.exporter
        made: set[str | None] = set()
        for role, model in models.items():
            record = run.record(steps.export(role, precision))
            by = None if record is None else record.settings.get("exporter")
            same = record is not None and not changed_settings(
                record.settings, self._export_settings(precision, by), ExportSettings
            )
            made.add(by if record and same and record.inputs.get("model") == model and holds(record) else None)
        kept = made.pop() if len(made) == 1 else None
        return kept or export.chosen(settings)

    def _guard(self, precision: Float) -> dict[str, str]:
        """The text that shows what of an fp16 graph has to stay in fp32, as an input of its export."""
        return {"calibration": self._calibration_sha256()} if precision == "fp16" else {}

    def _build_inputs(self, spec: EngineSpec) -> dict[str, str]:
        """What an engine is made of beside its graph."""
        inputs = {"backend": package_version(spec.backend), "passes": passes_version(spec)}
        if (bound := bound_to(spec)) != Bound():  # another machine wants another engine
            inputs["machine"] = bound.told()
        if spec.reads_text:
            inputs["calibration"] = self._calibration_sha256()
        return inputs

    def _calibration(self) -> np.ndarray:
        """(texts, tokens) of calibration text, for a graph or an engine that has choices to make."""
        train, _ = self.inputs.texts.calibration_windows()
        tokens: np.ndarray = train.flatten().numpy()
        length = min(len(tokens), READ_TOKENS)
        texts = min(len(tokens) // length, INT4_TEXTS)  # what needs fewer reads fewer
        return tokens[: texts * length].reshape(texts, length)

    def _calibration_sha256(self) -> str:
        """SHA-256 of the calibration tokens: which parts of a text are read depends on the seed and the windows."""
        return hashlib.sha256(self._calibration().tobytes()).hexdigest()


def _check_names(engines: Sequence[str], texts: Collection[str]) -> None:
    """Raise where two measurements would be steps of one name, of which each takes the other's record away."""
    if GRAPH in engines:
        raise EngineSpecError(f"engine '{GRAPH}': is what the exported graph is called; give its file another name")
    called: dict[str, tuple[str | None, str]] = {}
    for engine, text in itertools.product((None, *engines), texts):
        other, its_text = called.setdefault(steps.evaluate(text, "", engine), (engine, text))
        if (other, its_text) != (engine, text):
            through = "" if other is None else f" through {other}"
            raise RecipeError(
                f"evaluation '{its_text}'{through}: is what engine {engine} on text '{text}' is called; give it "
                "another name"
            )


def specs_of(engines: Sequence[str], load: Callable[[str], EngineSpec] = load_engine_spec) -> list[EngineSpec]:
    """The specs of engines' names and files, `auto` being what this machine is for; raises EngineSpecError."""
    names = wanted_engines(engines)
    specs = [load(name) for name in names]
    counts = Counter(spec.name for spec in specs)
    twice = [name for name, spec in zip(names, specs, strict=True) if counts[spec.name] > 1]
    if twice:  # they would share a folder
        raise EngineSpecError(f"engines {' and '.join(twice)} have the same name; rename one file")
    return specs


def buildable(specs: Sequence[EngineSpec]) -> list[EngineSpec]:
    """Those that this machine can build."""
    return [spec for spec in specs if why_not(check_can_build, spec) is None]


def runnable(specs: Sequence[EngineSpec]) -> list[EngineSpec]:
    """Those that this machine can build and run."""
    return [spec for spec in buildable(specs) if why_not(check_can_run, spec) is None]


def why_not(check: Callable[[EngineSpec], None], spec: EngineSpec) -> str | None:
    try:
        check(spec)
    except EngineUnavailable as problem:
        return str(problem)
    return None
