"""The main job: model -> plan -> pruned checkpoint -> ONNX -> engines -> measurements -> report.

`prune_and_build` reads as the README's picture. Every part is a step of the run folder: what is finished and still
matches its inputs is reused, so each command can ask for the part it wants and gets what that depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedModel

from trsp_deploy.artifacts import RunFolder, fingerprint, provenance, size_bytes, write_json, writing
from trsp_deploy.decoder import check_prunable, load_model, load_tokenizer
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.reading import read_yaml
from trsp_deploy.recipe import EngineSpec, Float, Precision, Recipe, Strict, parse_drop
from trsp_deploy.results import (
    ROLES,
    Comparison,
    OnnxModel,
    Parity,
    Perplexity,
    PrunedCheckpoint,
    Role,
    Served,
    ZeroShot,
)
from trsp_deploy.stages import bench, build, evaluate, export, parity, report, selection, transfer, zeroshot
from trsp_deploy.tools.checkpoints import Checkpoints
from trsp_deploy.tools.comparisons import ComparisonReport
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.models import ModelSource, check_decoder_only, copy_model, resolve_model
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.processes import Processes
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.report import (
    SCHEMA_VERSION,
    ChoicesReport,
    EngineFigures,
    EngineReport,
    QualityReport,
    Report,
    choices_report,
    model_report,
    quality_report,
    removal_report,
    verdict,
)
from trsp_deploy.tools.runners import (
    EngineManifest,
    Runner,
    bound_to,
    check_can_build,
    check_can_run,
    open_engine,
)
from trsp_deploy.tools.runners.manifest import MANIFEST
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.requirements import package_version
from trsp_deploy.tools.served import SERVED, derive
from trsp_deploy.tools.subjects import RUN_MARK, Subject, find_subject
from trsp_deploy.tools.texts import Texts, documents_of, load_texts, split_windows, tokenize_windows
from trsp_deploy.tools.training import TRAINING_DTYPES, pick_device

AUTO_ENGINES = {
    "cpu": ("ort-cpu-fp32", "tensorrt-rtx-fp16"),
    "cuda": ("ort-cuda-fp16", "tensorrt-fp16", "tensorrt-rtx-fp16"),
}
PARITY_PROMPTS = (40, 23)  # tokens; unequal, so that left padding is part of the check
ENGINE_TOKENS = 512  # of calibration text that an engine's choices are made on


class Done(Strict):
    """Result of a step whose only result is its files."""


@dataclass(frozen=True)
class EngineOutcome:
    """How far one engine spec came on this machine."""

    spec: EngineSpec
    manifests: dict[Role, EngineManifest]  # empty when it could not be built
    reason: str | None  # why it was not built or cannot run; None when it runs


def prune_and_build(job: Pipeline) -> Report:
    """Run every stage that is not finished yet, and write the report."""
    job.plan()
    job.prune()
    job.export()
    job.check_onnx()
    job.build()
    job.check_engines()
    job.bench()
    job.evaluate()
    return job.report()


def default_folder(recipe: Recipe, say: Callable[[str], None]) -> Path:
    """`runs/<model>-drop<k>` for k layers: 25% and 8 of 32 are the same run. Resolves the model to count its layers."""
    if "RANK" in os.environ:
        raise RunError("--out is missing: several processes have to be told where they meet")
    source = resolve_model(recipe.model, say)
    layers = AutoConfig.from_pretrained(source.path, local_files_only=True).num_hidden_layers
    return Path("runs") / f"{Path(recipe.model).name}-drop{parse_drop(recipe.drop, layers)}"


def save_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Keep the resolved recipe in the run folder, for the commands that are given only the folder."""
    path = run.path / RUN_MARK
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if not run.main or (path.is_file() and path.read_bytes() == text.encode()):
        return
    run.outdate_manifest()
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load_recipe(run: Path) -> dict[str, Any]:
    """The values of the recipe that a run folder was made with; raises RunError when it is no run folder."""
    path = run / RUN_MARK
    if not path.is_file():
        raise RunError(f"{run}: no run of trsp-deploy ({RUN_MARK} is missing); make one with `trsp-deploy prune`")
    return read_yaml(path, RunError)


class Pipeline:
    """One run: its folder, its recipe, and a method for each stage; each is worked out once."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, plan_file: Path | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.run = run
        self.recipe = recipe
        self._plan_file = plan_file
        self._say = say
        if "RANK" in os.environ:  # `accelerate launch`; joining costs an import that a single process can do without
            self.run.from_main = Processes(pick_device(recipe)).from_main
        # What a user can get wrong is looked at before anything slow begins.
        self.specs = self._engine_specs()

    def _engine_specs(self) -> list[EngineSpec]:
        names: list[str] = []
        for name in self.recipe.engines:
            names += AUTO_ENGINES["cuda" if torch.cuda.is_available() else "cpu"] if name == "auto" else [name]
        return [load_engine_spec(name) for name in dict.fromkeys(names)]

    def _path(self, role: Role) -> Path:
        return self.run.path / role

    # -- inputs ----------------------------------------------------------------------------------------------------

    @functools.cache
    def dense(self) -> ModelSource:
        """The dense model, as the folder `dense/`."""
        source = self._found_by_main(lambda: resolve_model(self.recipe.model, self._say))
        self.run.step(
            "dense",
            lambda: self._copy_dense(source),
            Done,
            settings={"model": self.recipe.model},
            inputs={"model": Path(source.path)},
            outputs=["dense"],
        )
        return source

    def _found_by_main(self, find: Callable[[], ModelSource]) -> ModelSource:
        """What may have to be downloaded or unpacked is so once, by the main process."""
        source: ModelSource = self.run.from_main(find() if self.run.main else None)
        return source

    def _copy_dense(self, source: ModelSource) -> Done:
        with writing(self._path("dense")) as partial:
            copy_model(Path(source.path), partial)
        return Done()

    @functools.cache
    def num_layers(self) -> int:
        """Of the dense model."""
        self.dense()
        count: int = AutoConfig.from_pretrained(self._path("dense"), local_files_only=True).num_hidden_layers
        return count

    @functools.cache
    def _tokenizer(self) -> Any:
        self.dense()
        return load_tokenizer(self._path("dense"))

    @functools.cache
    def _calibration_texts(self) -> Texts:
        return load_texts(self.recipe.calibration.texts, "calibration")

    @functools.cache
    def _evaluation_texts(self, name: str) -> Texts:
        return load_texts(self.recipe.evaluation[name], "evaluation")

    @functools.cache
    def _calibration_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to train on and windows held out, (windows, context_length) each."""
        settings = self.recipe.calibration
        wanted = settings.max_windows + settings.validation_windows
        texts, source = self._calibration_texts(), f"--calibration {settings.texts}"
        windows = tokenize_windows(texts, self._tokenizer(), settings.context_length, wanted, source)
        return split_windows(windows, settings.validation_windows, self.recipe.seed)

    # -- pruning ---------------------------------------------------------------------------------------------------

    @functools.cache
    def plan(self) -> PruningPlan:
        """Which layers go, as `plan.json`: chosen, handed in, or edited by hand."""
        path = self.run.path / "plan.json"
        count = parse_drop(self.recipe.drop, self.num_layers())
        if self._plan_file is not None:
            return self._adopt(self._plan_file, path)
        record = self.run.record("plan")
        settings = self._plan_settings(count)
        known = record if record is not None and record.settings == settings and path.is_file() else None
        if known is not None and fingerprint(path) != known.outputs["plan.json"]:
            edited = read_plan(path, self.num_layers())
            self._say(f"plan.json was edited by hand: dropping {', '.join(map(str, edited.dropped))}")
            return edited
        inputs: dict[str, Path | str] = {
            "model": self._path("dense"),
            "calibration": self._calibration_texts().fingerprint,
        }
        checkpoints = self._checkpoints("plan", settings, inputs)
        plan = self.run.step(
            "plan",
            lambda: self._select(count, path, checkpoints),
            PruningPlan,
            settings=settings,
            inputs=inputs,
            outputs=["plan.json"],
            together=True,
        )
        if self.run.main:
            checkpoints.remove()
        return plan

    def plans(self, counts: tuple[int, ...]) -> dict[int, Path]:
        """A plan for each number of layers, as `plans/drop-K.json`, from one search; methods as the recipe says."""
        folder = self.run.path / "plans"
        settings = {**self._plan_settings(max(counts)), "counts": list(counts)}
        inputs: dict[str, Path | str] = {
            "model": self._path("dense"),
            "calibration": self._calibration_texts().fingerprint,
        }
        self.num_layers()  # `dense/` has to be there
        checkpoints = self._checkpoints("plans", settings, inputs)

        def work() -> Done:
            train, validation = self._calibration_windows()
            with quiet_libraries(), writing(folder) as partial:
                model = self._checked_model()
                origin = self._calibration_texts().origin
                found = selection.select_for_counts(model, train, validation, counts, self.recipe, origin, checkpoints)
                for count, plan in found.items():
                    write_json(partial / f"drop-{count}.json", plan)
            return Done()

        self.run.step("plans", work, Done, settings=settings, inputs=inputs, outputs=["plans"])
        checkpoints.remove()
        return {count: folder / f"drop-{count}.json" for count in counts}

    def _checked_model(self) -> PreTrainedModel:
        model = load_model(self._path("dense"), pick_device(self.recipe), TRAINING_DTYPES[self.recipe.weights])
        check_prunable(model)
        return model

    def _checkpoints(self, step: str, settings: dict[str, Any], inputs: Mapping[str, Path | str]) -> Checkpoints:
        """Where a killed training of this step goes on; only from what these very settings and inputs left."""
        key = self.run.key(step, settings=settings, inputs=inputs)
        return Checkpoints(self.run.path / "checkpoints" / step, key, self.recipe.checkpoint_s)

    def _plan_settings(self, count: int) -> dict[str, Any]:
        chosen = self.recipe.model_dump(
            mode="json", include={"seed", "device", "weights", "autocast", "calibration", "plan"}
        )
        return {**chosen, "num_dropped": count}

    def _adopt(self, source: Path, path: Path) -> PruningPlan:
        plan = read_plan(source, self.num_layers())
        if source.resolve() != path.resolve() and self.run.main:
            self.run.outdate_manifest()
            write_json(path, plan)
        return plan

    def _select(self, count: int, path: Path, checkpoints: Checkpoints) -> PruningPlan:
        train, validation = self._calibration_windows()
        with quiet_libraries():
            plan = selection.select_layers(
                self._checked_model(),
                train,
                validation,
                count,
                self.recipe,
                self._calibration_texts().origin,
                checkpoints,
            )
        if self.run.main:
            write_json(path, plan)
        return plan

    @functools.cache
    def prune(self) -> PrunedCheckpoint:
        """Transfer and removal: the checkpoint `pruned/`."""
        plan = self.plan()
        chosen = {"seed", "device", "autocast", "weights", "calibration", "transfer"}
        settings = self.recipe.model_dump(mode="json", include=chosen)
        inputs: dict[str, Path | str] = {
            "model": self._path("dense"),
            "plan": self.run.path / "plan.json",
            "calibration": self._calibration_texts().fingerprint,
        }
        checkpoints = self._checkpoints("prune", settings, inputs)
        result = self.run.step(
            "prune",
            lambda: self._transfer(plan, checkpoints),
            PrunedCheckpoint,
            settings=settings,
            inputs=inputs,
            outputs=["pruned"],
            together=True,
        )
        if not self.run.main:
            raise SystemExit(0)  # the rest is the main process's work
        checkpoints.remove()
        return result

    def _transfer(self, plan: PruningPlan, checkpoints: Checkpoints) -> PrunedCheckpoint:
        train, validation = self._calibration_windows()
        path = self._path("pruned")
        with quiet_libraries(), writing(path) if self.run.main else contextlib.nullcontext(path) as folder:
            return transfer.transfer_and_remove(
                self._path("dense"), self.dense(), plan, train, validation, self.recipe, folder, checkpoints
            )

    def _ready(self, role: Role) -> Path:
        """The role's Hugging Face folder, made when it is not there."""
        if role == "dense":
            self.dense()
        else:
            self.prune()
        return self._path(role)

    # -- export and engines ----------------------------------------------------------------------------------------

    def export(self) -> dict[tuple[Role, Float], OnnxModel]:
        """Every ONNX model that an engine of the recipe can be built from here."""
        precisions = dict.fromkeys(spec.graph_precision for spec in self.buildable())
        return {(role, precision): self.onnx(role, precision) for precision in precisions for role in ROLES}

    @functools.cache
    def onnx(self, role: Role, precision: Float) -> OnnxModel:
        """One exported model. The first engine's precision has the plain folder, `onnx/dense` and `onnx/pruned`."""
        plain = precision == self.specs[0].graph_precision
        folder = f"onnx/{role}" if plain else f"onnx/{role}-{precision}"
        model = self._ready(role)

        def work() -> OnnxModel:
            with writing(self.run.path / folder) as partial:
                external = export.export_onnx(model, precision, self.recipe.export, partial)
                size = size_bytes(partial / export.FILE) + sum(size_bytes(partial / name) for name in external)
            return OnnxModel(role=role, precision=precision, folder=folder, size_bytes=size, external_data=external)

        return self.run.step(
            f"export-{role}-{precision}",
            work,
            OnnxModel,
            settings={
                **self.recipe.export.model_dump(),
                "exporter": export.chosen(self.recipe.export),
                "precision": precision,
            },
            inputs={"model": model},
            outputs=[folder],
        )

    def buildable(self) -> list[EngineSpec]:
        """The recipe's engines that this machine can build."""
        return [spec for spec in self.specs if _why_not(check_can_build, spec) is None]

    def build(self) -> list[EngineOutcome]:
        """Every engine of the recipe that can be built here, dense and pruned."""
        return [self.engine(spec) for spec in self.specs]

    @functools.cache
    def engine(self, spec: EngineSpec) -> EngineOutcome:
        """Build one engine for both models; what cannot be built or run is an outcome with its reason."""
        reason = _why_not(check_can_build, spec)
        if reason is not None:
            self._say(f"{spec.name}: unavailable ({reason})")
            return EngineOutcome(spec, {}, reason)
        try:
            manifests = {role: self._build(spec, role) for role in ROLES}
        except EngineUnavailable as problem:
            self._say(f"{spec.name}: unavailable ({problem})")
            return EngineOutcome(spec, {}, str(problem))
        return EngineOutcome(spec, manifests, _why_not(check_can_run, spec))

    def _engine_path(self, spec: EngineSpec, role: Role) -> Path:
        return self.run.path / "engines" / spec.name / role

    def _build(self, spec: EngineSpec, role: Role) -> EngineManifest:
        model = self.onnx(role, spec.graph_precision)
        folder = self._engine_path(spec, role)
        inputs: dict[str, Path | str] = {
            "onnx": self.run.path / model.folder,
            "backend": package_version(spec.backend),
        }
        if spec.backend == "tensorrt":  # another GPU or driver wants another engine
            inputs["machine"] = bound_to(spec).model_dump_json()
        if spec.reads_text:
            inputs["calibration"] = self._calibration_texts().fingerprint
        return self.run.step(
            f"build-{spec.name}-{role}",
            lambda: build.build_engine(
                self.run.path / model.folder / export.FILE, spec, folder, self._engine_calibration(spec)
            ),
            EngineManifest,
            settings=spec,
            inputs=inputs,
            outputs=[folder.relative_to(self.run.path).as_posix()],
        )

    def _engine_calibration(self, spec: EngineSpec) -> np.ndarray | None:
        """(1, tokens) of calibration text for an engine that has choices to make; None for the others."""
        if not spec.reads_text:
            return None
        train, _ = self._calibration_windows()
        tokens: np.ndarray = train.flatten()[None, :ENGINE_TOKENS].numpy()
        return tokens

    # -- parity, speed, quality --------------------------------------------------------------------------------------

    @functools.cache
    def check_onnx(self) -> tuple[Parity, ...]:
        """PyTorch against every ONNX model, before engines are built from it; raises ParityError."""
        return tuple(
            self._parity("onnx", role, precision, self.run.path / model.folder, self._open_onnx)
            for (role, precision), model in self.export().items()
        )

    @functools.cache
    def check_engines(self) -> tuple[Parity, ...]:
        """PyTorch against every engine that runs here; raises ParityError."""
        specs = [outcome.spec for outcome in self.build() if outcome.reason is None]
        return tuple(
            self._parity(spec.name, role, spec.precision, self._engine_path(spec, role), open_engine)
            for spec in specs
            for role in ROLES
        )

    def _open_onnx(self, folder: Path) -> Runner:
        return OrtRunner(folder / export.FILE)

    def _parity(
        self, subject: str, role: Role, precision: Precision, folder: Path, open_it: Callable[[Path], Runner]
    ) -> Parity:
        def work() -> Parity:
            with open_it(folder) as runner:
                return parity.check_parity(self._reference(role), runner, subject, role, precision)

        return self.run.step(
            f"parity-{subject}-{role}-{precision}",
            work,
            Parity,
            settings={"prompts": PARITY_PROMPTS, "tolerance": parity.TOLERANCES[precision]},
            inputs={"model": self._ready(role), "engine": folder, "text": self._calibration_texts().fingerprint},
        )

    @functools.cache
    def _reference(self, role: Role) -> parity.Reference:
        train, _ = self._calibration_windows()
        ids = train.flatten()[: sum(PARITY_PROMPTS)].tolist()
        prompts = [ids[: PARITY_PROMPTS[0]], ids[PARITY_PROMPTS[0] :]]
        with quiet_libraries():
            return parity.make_reference(self._ready(role), prompts)

    @functools.cache
    def bench(self) -> dict[str, Comparison]:
        """Latency of dense and pruned on every engine that runs here, by engine name."""
        return {o.spec.name: self._measure(o.spec) for o in self.build() if o.reason is None}

    def _measure(self, spec: EngineSpec) -> Comparison:
        dense, pruned = self.pair(spec)
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

    def pair(self, spec: EngineSpec) -> tuple[Subject, Subject]:
        """The two engines of one spec, to be measured."""
        dense, pruned = (find_subject(self._engine_path(spec, role), role, None) for role in ROLES)
        return dense, pruned

    @functools.cache
    def compared(self, name: str) -> ComparisonReport:
        """What the bench of one engine found, by the engine's name."""
        spec = next(spec for spec in self.specs if spec.name == name)
        return bench.derive(*self.pair(spec), self.bench()[name])

    @functools.cache
    def evaluate(self) -> dict[str, dict[Role, Perplexity]]:
        """Perplexity of dense and pruned on every evaluation text, by name."""
        return {name: {role: self._perplexity(name, role) for role in ROLES} for name in self.recipe.evaluation}

    def _perplexity(self, name: str, role: Role) -> Perplexity:
        texts = self._evaluation_texts(name)

        def work() -> Perplexity:
            windows, documents = self._evaluation_windows(name)
            with quiet_libraries():
                return evaluate.evaluate_perplexity(
                    self._ready(role), windows, name, role, texts.origin, self.recipe, documents
                )

        return self.run.step(
            f"evaluate-{name}-{role}",
            work,
            Perplexity,
            settings=self._text_settings,
            inputs={"model": self._ready(role), "text": texts.fingerprint},
        )

    @property
    def _text_settings(self) -> dict[str, Any]:
        return self.recipe.evaluate.model_dump(include={"context_length", "max_tokens"})

    @functools.cache
    def _evaluation_windows(self, name: str) -> tuple[torch.Tensor, np.ndarray | None]:
        """(windows, context_length) token ids of an evaluation text, and which document each of them belongs to."""
        settings = self.recipe.evaluate
        texts = self._evaluation_texts(name)
        limit = None if settings.max_tokens is None else max(1, settings.max_tokens // settings.context_length)
        windows = tokenize_windows(texts, self._tokenizer(), settings.context_length, limit, f"--eval {name}")
        return windows, documents_of(texts, self._tokenizer(), windows.numel())

    @functools.cache
    def engine_quality(self, spec: EngineSpec) -> dict[str, QualityReport]:
        """Perplexity of dense and pruned through an engine that runs here, by text."""
        found = {}
        for name in self.recipe.evaluation:
            try:
                ppl = {role: self._engine_perplexity(spec, name, role) for role in ROLES}
            except EngineUnavailable as problem:  # such as windows that are longer than its profiles
                self._say(f"{spec.name}: its perplexity on {name} is not measured ({problem})")
                continue
            found[name] = quality_report(ppl["dense"], ppl["pruned"])
        return found

    def _engine_perplexity(self, spec: EngineSpec, name: str, role: Role) -> Perplexity:
        texts, folder = self._evaluation_texts(name), self._engine_path(spec, role)

        def work() -> Perplexity:
            windows, documents = self._evaluation_windows(name)
            with open_engine(folder) as runner:
                return evaluate.evaluate_engine(runner, windows, name, role, texts.origin, spec.name, documents)

        return self.run.step(
            f"evaluate-{spec.name}-{name}-{role}",
            work,
            Perplexity,
            settings=self._text_settings,
            inputs={"engine": folder, "text": texts.fingerprint},
        )

    @functools.cache
    def engine_choices(self, spec: EngineSpec) -> ChoicesReport | None:
        """Choice tasks through an engine that runs here; None where the recipe asks for none."""
        if not self.recipe.evaluate.tasks:
            return None
        return choices_report(*(self._engine_zero_shot(spec, role) for role in ROLES))

    def _engine_zero_shot(self, spec: EngineSpec, role: Role) -> ZeroShot:
        settings, folder = self.recipe.evaluate, self._engine_path(spec, role)

        def work() -> ZeroShot:
            with open_engine(folder) as runner:
                return zeroshot.evaluate_zero_shot_engine(
                    runner, self._ready(role), settings.tasks, settings.task_items, role
                )

        return self.run.step(
            f"zero-shot-{spec.name}-{role}",
            work,
            ZeroShot,
            settings=settings.model_dump(include={"tasks", "task_items"}),
            inputs={"engine": folder},
        )

    # -- the report --------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Gather what the stages found; write report.json, report.md and report.html, and the manifest of the run."""
        source, checkpoint = self.dense(), self.prune()
        quality = {name: quality_report(ppl["dense"], ppl["pruned"]) for name, ppl in self.evaluate().items()}
        engines = [self._engine_report(outcome) for outcome in self.build()]
        served = self._served()
        result = Report(
            schema_version=SCHEMA_VERSION,
            verdict=verdict(engines, quality, None if served is None else derive(served)),
            model=model_report(self.recipe.model, source.origin, check_decoder_only(self._path("dense")), checkpoint),
            removal=removal_report(checkpoint),
            quality=quality,
            engines=tuple(engines),
            served=None if served is None else derive(served),
            parity=self.check_onnx() + self.check_engines(),
            recipe=self.recipe,
            plan=self.plan(),
            provenance=provenance(),
        )
        self.run.outdate_manifest()
        report.write_report(result, self.bench(), self.run.path, served=served)
        self.run.write_manifest()
        return result

    def _served(self) -> Served | None:
        """What `bench-server` measured of this run's engines as they are now."""
        path = self.run.path / SERVED
        if not path.is_file():
            return None
        try:
            found = Served.model_validate_json(path.read_bytes())
        except ValidationError:
            self._say(f"{path}: is no measurement of this version; it is left out of the report")
            return None
        for role, sha256 in found.engines.items():
            manifest = self.run.path / "engines" / found.engine / role / MANIFEST
            if not manifest.is_file() or fingerprint(manifest) != sha256:
                self._say(f"{path}: is of another {role} engine; `trsp-deploy bench-server` measures this one")
                return None
        return found

    def _engine_report(self, outcome: EngineOutcome) -> EngineReport:
        spec = outcome.spec
        comparison = self.bench().get(spec.name)
        status: Literal["ran", "built", "unavailable"] = "ran"
        if not outcome.manifests:
            status = "unavailable"
        elif comparison is None:
            status = "built"
        figures = {
            role: EngineFigures(size_bytes=manifest.size_bytes, build_s=manifest.build_s)
            for role, manifest in outcome.manifests.items()
        }
        return EngineReport(
            name=spec.name,
            backend=spec.backend,
            precision=spec.precision,
            status=status,
            reason=outcome.reason,
            comparison=None if comparison is None else self.compared(spec.name),
            quality={} if comparison is None else self.engine_quality(spec),
            choices=None if comparison is None else self.engine_choices(spec),
            **figures,
        )


def _why_not(check: Callable[[EngineSpec], None], spec: EngineSpec) -> str | None:
    try:
        check(spec)
    except EngineUnavailable as problem:
        return str(problem)
    return None
