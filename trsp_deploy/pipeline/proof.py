"""What is measured of a run: parity with PyTorch, speed, quality. Each figure is a step, by what it was taken of."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trsp_deploy.artifacts import provenance
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.pipeline.engines import Engines
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.recipe import EngineSpec, Precision
from trsp_deploy.results import ROLES, Comparison, Parity, Perplexity, Role, ZeroShot
from trsp_deploy.stages import bench, evaluate, export, parity, zeroshot
from trsp_deploy.tools.judging.comparisons import ComparisonReport
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.reports.record import ChoicesReport, QualityReport, choices_report, quality_report
from trsp_deploy.tools.runners import Runner, open_engine
from trsp_deploy.tools.training.shared import pick_device

Measured = TypeVar("Measured")
PARITY_PROMPTS = (40, 23)  # tokens; unequal, so that left padding is part of the check


class Proof:
    """The dense model and the pruned one beside each other."""

    def __init__(self, inputs: Inputs, pruning: Pruning, engines: Engines) -> None:
        self.inputs = inputs
        self.pruning = pruning
        self.engines = engines
        self.run = inputs.run
        self.recipe = inputs.recipe
        self.failed: dict[str, str] = {}  # engine that was to run here -> what it does not do, and why

    @functools.cache
    def check_onnx(self) -> tuple[Parity, ...]:
        """PyTorch against every ONNX model, before engines are built from it; raises ParityError."""
        return tuple(
            self._parity("onnx", role, precision, self.run.path / model.folder, self._open_onnx)
            for (role, precision), model in self.engines.export().items()
        )

    @functools.cache
    def check_engines(self) -> tuple[Parity, ...]:
        """PyTorch against every engine that runs here; raises ParityError."""

        def both(spec: EngineSpec) -> list[Parity]:
            return [
                self._parity(spec.name, role, spec.precision, self.engines.path(spec, role), open_engine)
                for role in ROLES
            ]

        found = self._of_each("cannot be checked against PyTorch", both)
        return tuple(parity for pair in found.values() for parity in pair)

    @functools.cache
    def bench(self) -> dict[str, Comparison]:
        """Latency of dense and pruned on every engine that runs here, by engine name."""
        return self._of_each("cannot be timed", self._measure)

    @functools.cache
    def compared(self, name: str) -> ComparisonReport:
        """What the bench of one engine found, by the engine's name."""
        spec = next(spec for spec in self.engines.specs if spec.name == name)
        return bench.derive(*self.engines.pair(spec), self.bench()[name])

    @functools.cache
    def evaluate(self) -> dict[str, dict[Role, Perplexity]]:
        """Perplexity of dense and pruned on every evaluation text, by name."""
        return {name: {role: self._perplexity(name, role) for role in ROLES} for name in self.recipe.evaluation}

    @functools.cache
    def engine_quality(self, spec: EngineSpec) -> dict[str, QualityReport]:
        """Perplexity of dense and pruned through an engine that runs here, by text."""
        found = {}
        for name in self.recipe.evaluation:
            try:
                ppl = {role: self._engine_perplexity(spec, name, role) for role in ROLES}
            except EngineUnavailable as problem:  # such as windows that are longer than its profiles
                self.inputs.say(f"{spec.name}: its perplexity on {name} is not measured ({problem})")
                continue
            found[name] = quality_report(ppl["dense"], ppl["pruned"])
        return found

    @functools.cache
    def engine_choices(self, spec: EngineSpec) -> ChoicesReport | None:
        """Choice tasks through an engine that runs here; None where the recipe asks for none, or it cannot."""
        if not self.recipe.evaluate.tasks:
            return None
        try:
            return choices_report(*(self._engine_zero_shot(spec, role) for role in ROLES))
        except EngineUnavailable as problem:  # such as items that are longer than its profiles
            self.inputs.say(f"{spec.name}: its accuracy is not measured ({problem})")
            return None

    def _of_each(self, lack: str, measure: Callable[[EngineSpec], Measured]) -> dict[str, Measured]:
        """A measurement of every engine that runs here; one that fails at it leaves the others theirs.

        lack: what is said of such an engine.
        """
        found: dict[str, Measured] = {}
        for outcome in self.engines.build():
            name = outcome.spec.name
            if outcome.reason is not None or name in self.failed:
                continue
            try:
                found[name] = measure(outcome.spec)
            except EngineUnavailable as problem:  # such as shapes beyond its profiles, or a GPU that is full
                self.failed[name] = f"{lack}: {problem}"
                self.inputs.say(f"{name}: {self.failed[name]}")
        return found

    def _parity(
        self, subject: str, role: Role, precision: Precision, folder: Path, open_it: Callable[[Path], Runner]
    ) -> Parity:
        def work() -> Parity:
            reference = self._reference(role)  # before the engine is opened: never both in memory
            with open_it(folder) as runner:
                return parity.check_parity(reference, runner, subject, role, precision)

        return self.run.step(
            f"parity-{subject}-{role}-{precision}",
            work,
            Parity,
            settings={"prompts": PARITY_PROMPTS, "tolerance": parity.TOLERANCES[precision]},
            inputs={
                "model": self.pruning.ready(role),
                "engine": folder,
                "text": self.inputs.calibration_texts().fingerprint,
            },
        )

    def _open_onnx(self, folder: Path) -> Runner:
        return parity.open_graph(folder / export.FILE)

    @functools.cache
    def _reference(self, role: Role) -> parity.Reference:
        train, _ = self.inputs.calibration_windows()
        ids = train.flatten()[: sum(PARITY_PROMPTS)].tolist()
        prompts = [ids[: PARITY_PROMPTS[0]], ids[PARITY_PROMPTS[0] :]]
        with quiet_libraries():
            return parity.make_reference(self.pruning.ready(role), prompts)

    def _measure(self, spec: EngineSpec) -> Comparison:
        dense, pruned = self.engines.pair(spec)
        machine = provenance().model_dump_json(include={"cpu", "cores", "gpus"})
        return self.run.step(
            f"bench-{spec.name}",
            lambda: bench.compare_engines(dense, pruned, spec.name, self.recipe.bench, self.recipe.seed),
            Comparison,
            settings=self.recipe.bench,
            inputs={
                "dense": dense.path,
                "pruned": pruned.path,
                "machine": hashlib.sha256(machine.encode()).hexdigest(),
            },
        )

    def _perplexity(self, name: str, role: Role) -> Perplexity:
        texts = self.inputs.evaluation_texts(name)

        def work() -> Perplexity:
            windows, documents = self.inputs.evaluation_windows(name)
            with quiet_libraries():
                return evaluate.evaluate_perplexity(
                    self.pruning.ready(role), windows, name, role, texts.origin, self.recipe, documents
                )

        return self.run.step(
            f"evaluate-{name}-{role}",
            work,
            Perplexity,
            settings={**self._text_settings, "device": str(pick_device(self.recipe))},  # decides the precision
            inputs={"model": self.pruning.ready(role), "text": texts.fingerprint},
        )

    def _engine_perplexity(self, spec: EngineSpec, name: str, role: Role) -> Perplexity:
        texts, folder = self.inputs.evaluation_texts(name), self.engines.path(spec, role)

        def work() -> Perplexity:
            windows, documents = self.inputs.evaluation_windows(name)
            with open_engine(folder) as runner:
                return evaluate.evaluate_engine(runner, windows, name, role, texts.origin, spec.name, documents)

        return self.run.step(
            f"evaluate-{spec.name}-{name}-{role}",
            work,
            Perplexity,
            settings=self._text_settings,
            inputs={"engine": folder, "text": texts.fingerprint},
        )

    def _engine_zero_shot(self, spec: EngineSpec, role: Role) -> ZeroShot:
        settings, folder = self.recipe.evaluate, self.engines.path(spec, role)

        def work() -> ZeroShot:
            with open_engine(folder) as runner:
                return zeroshot.evaluate_zero_shot_engine(
                    runner, self.pruning.ready(role), settings.tasks, settings.task_items, role
                )

        return self.run.step(
            f"zero-shot-{spec.name}-{role}",
            work,
            ZeroShot,
            settings=settings.model_dump(include={"tasks", "task_items"}),
            inputs={"engine": folder},
        )

    @property
    def _text_settings(self) -> dict[str, Any]:
        return self.recipe.evaluate.model_dump(include={"context_length", "max_tokens"})
