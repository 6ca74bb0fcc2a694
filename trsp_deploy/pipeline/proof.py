"""What is measured of a run: parity with PyTorch, speed, quality. Each figure is a step, by what it was taken of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trsp_deploy.artifacts import Finished, Step, steps
from trsp_deploy.errors import EngineUnavailable, TextError
from trsp_deploy.pipeline.engines import GRAPH, Engines
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.recipe import BenchSettings, EngineSpec, EvaluateSettings, Precision, task_name
from trsp_deploy.results import ROLES, Comparison, Parity, Perplexity, PerplexityParity, Role, Served, ZeroShot
from trsp_deploy.stages import bench, evaluate, export, parity, zeroshot
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.judging.comparisons import ComparisonReport
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.reports.baselines import this_machine
from trsp_deploy.tools.reports.quality import ChoicesReport, QualityReport, choices_report, quality_report
from trsp_deploy.tools.runners import Runner, open_engine
from trsp_deploy.tools.runners.agreement import PERPLEXITY_TOLERANCES, TOLERANCES, Reference
from trsp_deploy.tools.runners.half_range import write_widened
from trsp_deploy.tools.sources.texts import Texts
from trsp_deploy.tools.training.shared import pick_device
from trsp_deploy.tools.triton_server.served import of_another_engine

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

    @cached_method
    def check_onnx(self) -> tuple[Parity, ...]:
        """PyTorch against every ONNX model, before engines are built from it; raises ParityError.

        A graph in fp16 that only bf16 engines are made of is read in fp32, for its numbers may pass fp16's range.
        """
        exported = self.engines.export()
        built = {(spec.graph_precision, spec.precision) for spec in self.engines.buildable()}
        return tuple(
            self._parity(
                GRAPH,
                role,
                precision,
                self.run.path / model.folder,
                self._open_onnx,
                widened={each for graph, each in built if graph == precision} == {"bf16"},
            )
            for (role, precision), model in exported.items()
        )

    @cached_method
    def check_engines(self) -> tuple[Parity, ...]:
        """PyTorch against every engine that runs here; raises ParityError."""

        def both(spec: EngineSpec) -> list[Parity]:
            return [
                self._parity(spec.name, role, spec.precision, self.engines.path(spec, role), open_engine)
                for role in ROLES
            ]

        found = self._of_each("cannot be checked against PyTorch", both)
        return tuple(parity for pair in found.values() for parity in pair)

    @cached_method
    def bench(self) -> dict[str, Comparison]:
        """Latency of dense and pruned on every engine that runs here, by engine name."""
        return self._of_each("cannot be timed", self._measure)

    @cached_method
    def compared(self, name: str) -> ComparisonReport:
        """What the bench of one engine found, by the engine's name."""
        spec = next(spec for spec in self.engines.specs if spec.name == name)
        return bench.derive(*self.engines.pair(spec), self.bench()[name])

    @cached_method
    def evaluate(self) -> dict[str, dict[Role, Perplexity]]:
        """Perplexity of dense and pruned on every evaluation text, by name."""
        found = {name: {role: self._perplexity(name, role) for role in ROLES} for name in self.recipe.evaluation}
        self.inputs.texts.keep_evaluation()
        return found

    @cached_method
    def engine_perplexity(self, spec: EngineSpec) -> dict[str, dict[Role, Perplexity]]:
        """Perplexity of dense and pruned through an engine that runs here, by text, as far as it reads them."""
        found: dict[str, dict[Role, Perplexity]] = {name: {} for name in self.recipe.evaluation}
        for role in ROLES:
            waiting = list(found)
            while waiting:
                with self._opened_once(spec, role) as opened:
                    while waiting:
                        name = waiting.pop(0)
                        try:
                            found[name][role] = self._engine_perplexity(spec, name, role, opened)
                        except EngineUnavailable as problem:  # such as windows that are longer than its profiles
                            self.inputs.say(f"{spec.name}: its perplexity on {name} is not measured ({problem})")
                            del found[name]
                            break  # the others are read by an engine that nothing has happened to
        return found

    @cached_method
    def check_perplexity(self, spec: EngineSpec) -> tuple[PerplexityParity, ...]:
        """An engine's perplexity against PyTorch's, of each model on each text that it reads; raises ParityError."""
        rounded = str(pick_device(self.recipe)) != "cpu"
        return tuple(
            parity.check_perplexity(self._perplexity(text, role), found, spec.name, spec.precision, rounded)
            for text, both in self.engine_perplexity(spec).items()
            for role, found in both.items()
        )

    @cached_method
    def engine_quality(self, spec: EngineSpec) -> dict[str, QualityReport]:
        """What the cut costs through an engine that runs here, by text; raises ParityError where the engine itself
        costs more than its precision explains, for a ratio of two damaged models hides what is damaged in both."""
        self.check_perplexity(spec)
        return {
            name: quality_report(both["dense"], both["pruned"]) for name, both in self.engine_perplexity(spec).items()
        }

    @cached_method
    def engine_choices(self, spec: EngineSpec) -> ChoicesReport | None:
        """Choice tasks through an engine that runs here; None where the recipe asks for none, or it cannot."""
        answers = self.engine_answers(spec)
        try:
            return choices_report(answers["dense"], answers["pruned"]) if answers else None
        except TextError as problem:  # dense has no item right: what else was found has its report all the same
            self.inputs.say(f"{spec.name}: its accuracy is not compared ({problem})")
            return None

    @cached_method
    def engine_answers(self, spec: EngineSpec) -> dict[Role, ZeroShot]:
        """Item by item; empty where the recipe asks for no tasks, or the engine cannot."""
        if not self.recipe.evaluate.tasks:
            return {}
        try:
            return {role: self._engine_zero_shot(spec, role) for role in ROLES}
        except (EngineUnavailable, TextError) as problem:  # such as items that are longer than its profiles
            self.inputs.say(f"{spec.name}: its accuracy is not measured ({problem})")
            return {}

    @cached_method
    def served(self) -> Served | None:
        """What `bench-server` measured of this run's engines as they are now; says what is left out."""
        path = self.run.layout.served
        if not path.is_file():
            return None
        try:
            found = Served.model_validate_json(path.read_bytes())
        except ValidationError:
            self.inputs.say(f"{path}: is no measurement of this version; it is left out of the report")
            return None
        role = of_another_engine(found.engine, found.engines, self.run.layout)
        if role is not None:
            self.inputs.say(f"{path}: is of another {role} engine; `trsp-deploy bench-server` measures this one")
            return None
        return found

    def answers(self) -> dict[str, Perplexity | ZeroShot]:
        """What quality is derived from, in PyTorch and through each engine that was timed: losses of every window and
        document, and whether each item was answered rightly; by the step that has it."""
        found: dict[str, Perplexity | ZeroShot] = {
            steps.evaluate(text, role): ppl for text, both in self.evaluate().items() for role, ppl in both.items()
        }
        for spec in (spec for spec in self.engines.specs if spec.name in self.bench()):
            for text, both in self.engine_perplexity(spec).items():
                found |= {steps.evaluate(text, role, spec.name): ppl for role, ppl in both.items()}
            found |= {steps.zero_shot(spec.name, role): score for role, score in self.engine_answers(spec).items()}
        return found

    def ask(self, found: Finished) -> None:
        """Enter the measurements that need not be made again, into what is told of the steps before them."""
        for name, role in itertools.product(self.recipe.evaluation, ROLES):
            found.ask(self._perplexity_step(name, role))
        for spec in self.engines.specs:
            found.ask(self._bench_step(spec))
            for name, role in itertools.product(self.recipe.evaluation, ROLES):
                found.ask(self._engine_perplexity_step(spec, name, role))
            for role in ROLES:
                found.ask(self._zero_shot_step(spec, role))

    def _perplexity_step(self, name: str, role: Role) -> Step:
        return Step(
            steps.evaluate(name, role),
            lambda: self._reference_settings,
            lambda: {"model": self.inputs.made(role), "text": self.inputs.texts.evaluation(name).fingerprint},
            schema=EvaluateSettings,
        )

    def _bench_step(self, spec: EngineSpec) -> Step:
        return Step(
            steps.bench(spec.name),
            lambda: self._bench_settings,
            lambda: {**{role: self.engines.made(spec, role) for role in ROLES}, "machine": _machine_sha256()},
            schema=BenchSettings,
        )

    def _engine_perplexity_step(self, spec: EngineSpec, name: str, role: Role) -> Step:
        return Step(
            steps.evaluate(name, role, spec.name),
            lambda: self._text_settings,
            # An export need not hold the tokenizer, so that the same engine may read a text as other tokens.
            lambda: {
                "engine": self.engines.made(spec, role),
                "text": self.inputs.texts.evaluation(name).fingerprint,
                "tokenizer": self.inputs.made("dense"),
            },
            schema=EvaluateSettings,
        )

    def _zero_shot_step(self, spec: EngineSpec, role: Role) -> Step:
        return Step(
            steps.zero_shot(spec.name, role),
            lambda: self._task_settings,
            lambda: {
                "engine": self.engines.made(spec, role),
                "tokenizer": self.inputs.made(role),
                **self._own_items(),
            },
            schema=EvaluateSettings,
        )

    def _own_items(self) -> dict[str, str]:
        own = (task for task in self.inputs.texts.tasks() if isinstance(task, Texts))
        return {f"items of {task_name(task.name)}": task.fingerprint for task in own}

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
        self,
        subject: str,
        role: Role,
        precision: Precision,
        folder: Path,
        open_it: Callable[[Path], Runner],
        widened: bool = False,
    ) -> Parity:
        """widened: `folder` holds a graph, which is read in fp32."""

        def work() -> Parity:
            reference = self._reference(role)  # before the engine is opened: never both in memory
            with contextlib.ExitStack() as stack:
                where = stack.enter_context(self._widened(folder)) if widened else folder
                runner = stack.enter_context(open_it(where))
                return parity.check_parity(reference, runner, subject, role, precision)

        return self.run.step(
            steps.parity(subject, role, precision),
            work,
            Parity,
            settings={
                "prompts": PARITY_PROMPTS,
                "tolerance": TOLERANCES[precision],
                "ppl_tolerance": PERPLEXITY_TOLERANCES[precision],
                **({"widened": True} if widened else {}),
            },
            inputs={
                "model": self.pruning.ready(role),
                "engine": folder,
                "text": self.inputs.texts.calibration().fingerprint,
            },
        )

    @contextlib.contextmanager
    def _widened(self, folder: Path) -> Iterator[Path]:
        """A folder, for as long as it is needed, with an exported fp16 graph that computes in fp32.

        Of a killed process it stays, as large as the model, and `clean` knows it by its name.
        """
        with tempfile.TemporaryDirectory(prefix=".fp32.", suffix=".partial", dir=self.run.path) as scratch:
            write_widened(folder / export.FILE, Path(scratch) / export.FILE)
            yield Path(scratch)

    def _open_onnx(self, folder: Path) -> Runner:
        return parity.open_graph(folder / export.FILE)

    @cached_method
    def _reference(self, role: Role) -> Reference:
        train, _ = self.inputs.texts.calibration_windows()
        ids = train.flatten()[: sum(PARITY_PROMPTS)].tolist()
        first = len(ids) * PARITY_PROMPTS[0] // sum(PARITY_PROMPTS)  # of a shorter text, too, each prompt has some
        prompts = [ids[:first], ids[first:]]
        with quiet_libraries():
            return parity.make_reference(self.pruning.ready(role), prompts)

    def _measure(self, spec: EngineSpec) -> Comparison:
        dense, pruned = self.engines.pair(spec)
        return self.run.do(
            self._bench_step(spec),
            lambda: bench.compare_engines(
                dense, pruned, spec.name, self.recipe.bench, self.recipe.seed, (), self.inputs.say
            ),
            Comparison,
        )

    def _perplexity(self, name: str, role: Role) -> Perplexity:
        origin = self.inputs.texts.evaluation(name).origin  # what is wrong with a text is said before a model is made
        self.inputs.texts.check_lengths()
        model = self.pruning.ready(role)

        def work() -> Perplexity:
            windows, documents = self.inputs.texts.evaluation_windows(name)
            with quiet_libraries():
                return evaluate.evaluate_perplexity(model, windows, name, role, origin, self.recipe, documents)

        return self.run.do(self._perplexity_step(name, role), work, Perplexity)

    @contextlib.contextmanager
    def _opened_once(self, spec: EngineSpec, role: Role) -> Iterator[Callable[[], Runner]]:
        """An engine that is opened where it is first asked for, and stays so."""
        with contextlib.ExitStack() as held:
            yield functools.cache(lambda: held.enter_context(open_engine(self.engines.path(spec, role))))

    def _engine_perplexity(self, spec: EngineSpec, name: str, role: Role, opened: Callable[[], Runner]) -> Perplexity:
        self.pruning.ready("dense")
        origin = self.inputs.texts.evaluation(name).origin

        def work() -> Perplexity:
            windows, documents = self.inputs.texts.evaluation_windows(name)
            return evaluate.evaluate_engine(opened(), windows, name, role, origin, spec.name, documents)

        return self.run.do(self._engine_perplexity_step(spec, name, role), work, Perplexity)

    def _engine_zero_shot(self, spec: EngineSpec, role: Role) -> ZeroShot:
        folder = self.engines.path(spec, role)
        model = self.pruning.ready(role)

        def work() -> ZeroShot:
            with open_engine(folder) as runner:
                return zeroshot.evaluate_zero_shot_engine(
                    runner, model, self.inputs.texts.tasks(), self.recipe.evaluate.task_items, role, spec.longest_prompt
                )

        return self.run.do(self._zero_shot_step(spec, role), work, ZeroShot)

    @property
    def _bench_settings(self) -> dict[str, Any]:
        """How to time; a slow-down that was planted is part of it, so that its times are taken for no others."""
        slowed = bench.slowed_on_purpose()
        return {**self.recipe.bench.model_dump(mode="json"), **({"slowed": slowed} if slowed else {})}

    @property
    def _text_settings(self) -> dict[str, Any]:
        return self.recipe.evaluate.model_dump(include={"context_length", "max_tokens"})

    @property
    def _reference_settings(self) -> dict[str, Any]:
        return {**self._text_settings, "device": str(pick_device(self.recipe))}  # decides the precision

    @property
    def _task_settings(self) -> dict[str, Any]:
        read = self.recipe.evaluate  # by name: where a file of items lies is no part of what is asked
        return {"tasks": [task_name(task) for task in read.tasks], "task_items": read.task_items}


def _machine_sha256() -> str:
    """SHA-256 of what decides how fast an engine is: as a baseline's times, a run's hold where it is the same."""
    return hashlib.sha256(this_machine().model_dump_json().encode()).hexdigest()
