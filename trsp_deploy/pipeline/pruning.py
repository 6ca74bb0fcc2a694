"""Which layers go (`plan.json`), and the checkpoint without them (`pruned/`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp_deploy.artifacts import StepRecord, fingerprint, write_json, writing
from trsp_deploy.decoder import check_prunable, load_model
from trsp_deploy.errors import PlanError
from trsp_deploy.pipeline.inputs import Done, Inputs
from trsp_deploy.recipe import parse_drop
from trsp_deploy.results import PrunedCheckpoint, Role
from trsp_deploy.stages import selection, transfer
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.resources.memory import Stage
from trsp_deploy.tools.sources.texts import jsonl, load_texts, tokenize_windows
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.self_calibration import self_generated_windows, write_texts
from trsp_deploy.tools.training.shared import TRAINING_DTYPES, pick_device


class Pruning:
    """Selection, transfer and removal."""

    def __init__(self, inputs: Inputs, plan_file: Path | None) -> None:
        self.inputs = inputs
        self.run = inputs.run
        self.recipe = inputs.recipe
        self._plan_file = plan_file

    @functools.cache
    def plan(self) -> PruningPlan:
        """Which layers go, as `plan.json`: chosen, handed in, or edited by hand."""
        path = self.run.path / "plan.json"
        count = parse_drop(self.recipe.drop, self.inputs.num_layers())
        settings, record = self._plan_settings(count), self.run.record("plan")
        given = None if self._plan_file is None else read_plan(self._plan_file, self.inputs.num_layers())
        if given is not None and (record is None or record.result != given.model_dump(mode="json")):
            self.run.forget("plan")
        known = record if record is not None and record.settings == settings and path.is_file() else None
        if given is None and known is not None and fingerprint(path) != known.outputs["plan.json"]:
            edited = read_plan(path, self.inputs.num_layers())
            self.inputs.say(f"plan.json was edited by hand: dropping {', '.join(map(str, edited.dropped))}")
            return edited
        if given is None and known is None and self._is_edited(path, record):
            raise PlanError(
                f"{path}: was edited by hand, and settings that choose layers are others now; keep it with "
                f"--plan {path}, or delete it to have them chosen anew"
            )
        inputs: dict[str, Path | str] = {
            "model": self.inputs.path("dense"),
            "calibration": self.inputs.calibration_texts().fingerprint,
        }
        checkpoints = self._checkpoints("plan", settings, inputs)
        plan = self.run.step(
            "plan",
            lambda: self._write(given or self._select(count, checkpoints), path),
            PruningPlan,
            settings=settings,
            inputs=inputs,
            outputs=["plan.json"],
            together=True,
        )
        if self.run.main:
            checkpoints.remove()
        return plan

    @staticmethod
    def _is_edited(path: Path, record: StepRecord | None) -> bool:
        return record is not None and path.is_file() and fingerprint(path) != record.outputs["plan.json"]

    def plans(self, counts: tuple[int, ...]) -> dict[int, Path]:
        """A plan for each number of layers, as `plans/drop-K.json`, from one search; methods as the recipe says."""
        folder = self.run.path / "plans"
        settings = {**self._plan_settings(max(counts)), "counts": list(counts)}
        inputs: dict[str, Path | str] = {
            "model": self.inputs.path("dense"),
            "calibration": self.inputs.calibration_texts().fingerprint,
        }
        self.inputs.num_layers()  # `dense/` has to be there
        checkpoints = self._checkpoints("plans", settings, inputs)

        def work() -> Done:
            train, validation = self.inputs.calibration_windows()
            with quiet_libraries(), writing(folder) as partial:
                model = self._checked_model()
                origin = self.inputs.calibration_texts().origin
                found = selection.select_for_counts(model, train, validation, counts, self.recipe, origin, checkpoints)
                for count, plan in found.items():
                    write_json(partial / f"drop-{count}.json", plan)
            return Done()

        self.run.step("plans", work, Done, settings=settings, inputs=inputs, outputs=["plans"])
        checkpoints.remove()
        return {count: folder / f"drop-{count}.json" for count in counts}

    @functools.cache
    def self_generated(self) -> Path | None:
        """The text that the dense model wrote itself, `self-generated.jsonl`; None where none is wanted."""
        length = self.recipe.calibration.context_length
        tokens = self._self_generated_windows() * length
        if not tokens:
            return None
        path = self.run.path / "self-generated.jsonl"
        chosen = {"seed", "device", "weights"}
        described = {**self.recipe.model_dump(mode="json", include=chosen), "tokens": tokens, "context_length": length}
        inputs = {"model": self.inputs.path("dense")}
        checkpoints = self._checkpoints("self-generated", described, inputs)

        def work() -> Done:
            with quiet_libraries(), writing(path) as partial:
                model = self._checked_model()
                tokenizer = self.inputs.tokenizer()
                documents = write_texts(model, tokenizer, tokens, length, self.recipe.seed, checkpoints)
                partial.write_text(jsonl(documents), encoding="utf-8")
            return Done()

        self.run.step("self-generated", work, Done, settings=described, inputs=inputs, outputs=[path.name])
        if self.run.main:
            checkpoints.remove()
        return path

    @functools.cache
    def prune(self) -> PrunedCheckpoint:
        """Transfer and removal: the checkpoint `pruned/`."""
        plan, own = self.plan(), self.self_generated()
        settings = self._prune_settings()
        inputs: dict[str, Path | str] = {
            "model": self.inputs.path("dense"),
            "plan": self.run.path / "plan.json",
            "calibration": self.inputs.calibration_texts().fingerprint,
            **({} if own is None else {"self-generated": own}),
        }
        checkpoints = self._checkpoints("prune", settings, inputs)
        result = self.run.step(
            "prune",
            lambda: self._transfer(plan, own, checkpoints),
            PrunedCheckpoint,
            settings=settings,
            inputs=inputs,
            outputs=["pruned"],
            together=True,
        )
        if not self.run.main:
            raise SystemExit(0)  # the rest is the main process's work
        self.run.from_main = lambda value: value  # nobody is left to tell
        checkpoints.remove()
        return result

    def ready(self, role: Role) -> Path:
        """The role's Hugging Face folder, made when it is not there."""
        if role == "dense":
            self.inputs.dense()
        else:
            self.prune()
        return self.inputs.path(role)

    def _select(self, count: int, checkpoints: Checkpoints) -> PruningPlan:
        train, validation = self.inputs.calibration_windows()
        with quiet_libraries():
            return selection.select_layers(
                self._checked_model(),
                train,
                validation,
                count,
                self.recipe,
                self.inputs.calibration_texts().origin,
                checkpoints,
            )

    def unfinished(self) -> list[Stage]:
        """The stages whose result is not there, or is of other settings."""
        finished: dict[Stage, bool] = {
            "selection": self._is_of("plan", "plan.json", self._count_settings),
            "transfer": self._is_of("prune", "pruned", self._prune_settings),
        }
        return [stage for stage, done in finished.items() if not done]

    def _is_of(self, step: str, output: str, settings: Callable[[], dict[str, Any]]) -> bool:
        if not (self.run.path / output).exists():
            return False
        record = self.run.record(step)
        return record is not None and record.settings == settings()

    def _write(self, plan: PruningPlan, path: Path) -> PruningPlan:
        if self.run.main:
            write_json(path, plan)
        return plan

    def _transfer(self, plan: PruningPlan, own: Path | None, checkpoints: Checkpoints) -> PrunedCheckpoint:
        train, validation = self.inputs.calibration_windows()
        if own is not None:
            texts, length = load_texts(str(own), "calibration"), self.recipe.calibration.context_length
            written = tokenize_windows(texts, self.inputs.tokenizer(), length, self._self_generated_windows())
            train = torch.cat([train[: self.recipe.calibration.max_windows - len(written)], written])
        path = self.inputs.path("pruned")
        with quiet_libraries(), writing(path) if self.run.main else contextlib.nullcontext(path) as folder:
            return transfer.transfer_and_remove(
                self.inputs.path("dense"),
                self.inputs.dense(),
                plan,
                train,
                validation,
                self.recipe,
                folder,
                checkpoints,
            )

    def _self_generated_windows(self) -> int:
        """How many of the windows that the transfer reads the dense model writes; 0 where nothing reads them."""
        settings = self.recipe.transfer
        share = self.recipe.calibration.self_generated
        if not share or (settings.form == "none" and settings.closed_form == "none"):
            return 0
        train, _ = self.inputs.calibration_windows()
        return self_generated_windows(share, self.recipe.calibration.max_windows, len(train))

    def _checked_model(self) -> PreTrainedModel:
        model = load_model(self.inputs.path("dense"), pick_device(self.recipe), TRAINING_DTYPES[self.recipe.weights])
        check_prunable(model)
        return model

    def _checkpoints(self, step: str, settings: dict[str, Any], inputs: Mapping[str, Path | str]) -> Checkpoints:
        """Where a killed training of this step goes on; only from what these very settings and inputs left."""
        key = self.run.key(step, settings=settings, inputs=inputs)
        return Checkpoints(self.run.path / "checkpoints" / step, key, self.recipe.checkpoint_s)

    def _prune_settings(self) -> dict[str, Any]:
        chosen = {"seed", "device", "autocast", "weights", "calibration", "transfer"}
        return self.recipe.model_dump(mode="json", include=chosen)

    def _count_settings(self) -> dict[str, Any]:
        return self._plan_settings(parse_drop(self.recipe.drop, self.inputs.num_layers()))

    def _plan_settings(self, count: int) -> dict[str, Any]:
        chosen = self.recipe.model_dump(
            mode="json", include={"seed", "device", "weights", "autocast", "calibration", "plan"}
        )
        # Text by the dense model is the transfer's: layers are chosen without.
        return {**chosen, "calibration": {**chosen["calibration"], "self_generated": 0.0}, "num_dropped": count}
