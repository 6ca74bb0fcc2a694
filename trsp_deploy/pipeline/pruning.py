"""Which layers go (`plan.json`), and the checkpoint without them (`pruned/`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from trsp_deploy.artifacts import Finished, RunFolder, fingerprint, seal, write_json, writing
from trsp_deploy.artifacts.layout import PLANS
from trsp_deploy.decoder import check_prunable, load_model
from trsp_deploy.errors import PlanError
from trsp_deploy.pipeline.inputs import Done, Inputs
from trsp_deploy.recipe import parse_drop
from trsp_deploy.results import PrunedCheckpoint, Role
from trsp_deploy.stages import selection, transfer
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.sources.texts import jsonl, load_texts, tokenize_windows
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.self_calibration import self_generated_windows, write_texts
from trsp_deploy.tools.training.shared import TRAINING_DTYPES, pick_device

Result = TypeVar("Result", bound=BaseModel)


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
        inputs, given = self._model_and_text(), self._given_plan()
        return self._resumable(
            "plan",
            lambda checkpoints: self._write(given or self._select(checkpoints)),
            PruningPlan,
            settings=self._plan_settings,
            # Without it a plan that was handed in would pass for a choice of this run.
            inputs=inputs if given is None else {**inputs, "given": seal(given.model_dump(mode="json"))},
            output="plan.json",
            together=True,
        )

    def _given_plan(self) -> PruningPlan | None:
        """A person's plan: handed in now, or before, or edited by hand; None where layers are to be chosen here."""
        file = self._plan_file or (self._plan_path if self._is_kept() else None)
        return None if file is None else read_plan(file, self.inputs.num_layers())

    def _is_replaced(self) -> bool:
        """Whether another plan than the recorded one was handed in."""
        record = self.run.record("plan")
        if self._plan_file is None or record is None:
            return False
        return record.result != read_plan(self._plan_file, self.inputs.num_layers()).model_dump(mode="json")

    def _is_kept(self) -> bool:
        """Whether `plan.json` is a person's, edited or once handed in: it stays for other texts and models, too.

        Raises PlanError where settings that choose layers are others now: the person's choice or theirs?
        """
        path, record = self._plan_path, self.run.record("plan")
        if record is None or not path.is_file():
            return False
        edited = fingerprint(path) != record.outputs["plan.json"]
        if not edited and "given" not in record.inputs:
            return False
        before = {**record.settings, "calibration": {**record.settings["calibration"]}}
        before["calibration"].pop("texts", None)  # which older records name
        if before != self._plan_settings:
            mine = "was edited by hand, and settings that choose layers are others now"
            other = mine if edited else "was given, and settings that choose layers are others now"
            raise PlanError(
                f"{path}: {other}; keep it with `prune` and --plan {path}, or delete it to have them chosen anew"
            )
        dropped = ", ".join(map(str, read_plan(path, self.inputs.num_layers()).dropped))
        if edited:
            self.inputs.say(f"plan.json was edited by hand: dropping {dropped}")
        else:
            self.inputs.say(
                f"plan.json was given, not chosen here: dropping {dropped}; delete it to have layers chosen"
            )
        return True

    def plans(self, counts: tuple[int, ...]) -> dict[int, Path]:
        """A plan for each number of layers, as `plans/drop-K.json`, from one search; methods as the recipe says."""
        folder = self.run.path / PLANS

        def work(checkpoints: Checkpoints) -> Done:
            train, validation = self.inputs.calibration_windows()
            with quiet_libraries(), writing(folder) as partial:
                model = self._checked_model()
                origin = self.inputs.calibration_texts().origin
                found = selection.select_for_counts(model, train, validation, counts, self.recipe, origin, checkpoints)
                for count, plan in found.items():
                    write_json(partial / f"drop-{count}.json", plan)
            return Done()

        settings, inputs = self._sweep_settings(counts), self._model_and_text()
        self._resumable("plans", work, Done, settings=settings, inputs=inputs, output=PLANS)
        return {count: folder / f"drop-{count}.json" for count in counts}

    @functools.cache
    def self_generated(self) -> Path | None:
        """The text that the dense model wrote itself, `self-generated.jsonl`; None where none is wanted."""
        length = self.recipe.calibration.context_length
        tokens = self._self_generated_windows() * length
        if not tokens:
            return None
        path = self.run.path / "self-generated.jsonl"

        def work(checkpoints: Checkpoints) -> Done:
            with quiet_libraries(), writing(path) as partial:
                model = self._checked_model()
                tokenizer = self.inputs.tokenizer()
                documents = write_texts(model, tokenizer, tokens, length, self.recipe.seed, checkpoints)
                partial.write_text(jsonl(documents), encoding="utf-8")
            return Done()

        chosen = self._chosen("seed", "device", "weights")
        settings = {**chosen, "tokens": tokens, "context_length": length}
        inputs = {"model": self.inputs.path("dense")}
        self._resumable("self-generated", work, Done, settings=settings, inputs=inputs, output=path.name)
        return path

    @functools.cache
    def prune(self) -> PrunedCheckpoint:
        """Transfer and removal: the checkpoint `pruned/`."""
        plan, own = self.plan(), self.self_generated()
        inputs = {**self._model_and_text(), "plan": self._plan_path}
        result = self._resumable(
            "prune",
            lambda checkpoints: self._transfer(plan, own, checkpoints),
            PrunedCheckpoint,
            settings=self._prune_settings,
            inputs=inputs if own is None else {**inputs, "self-generated": own},
            output="pruned",
            together=True,
        )
        if not self.run.main:
            raise SystemExit(0)  # the rest is the main process's work
        self.run.from_main = lambda value: value  # nobody is left to tell
        return result

    def ready(self, role: Role) -> Path:
        """The role's Hugging Face folder, made when it is not there."""
        if role == "dense":
            self.inputs.dense()
        else:
            self.prune()
        return self.inputs.path(role)

    def finished(self, run: RunFolder | None = None, count: int | None = None) -> Finished:
        """The steps that need not be done again.

        run, count: another one with this recipe that drops `count` layers, such as a sweep's; None is this one.
        """
        found = Finished(run or self.run)
        found.ask("dense", lambda: {"model": self.recipe.model}, dict, "dense")
        if not self._is_replaced():
            found.ask(
                "plan",
                lambda: self._selection_settings(count or self._count),
                lambda: self._started_from(found),
                "plan.json",
            )
        if self._plan_file is None and "plan" in found.steps:
            found.left["plan"] = fingerprint(found.run.layout.plan)  # which a person may have edited
        found.ask(
            "prune",
            lambda: self._prune_settings,
            lambda: {**self._started_from(found), "plan": found.left.get("plan")},
            "pruned",
        )
        return found

    def unfinished(self) -> list[str]:
        """Of selection and transfer what has to be done."""
        done = self.finished().steps
        return [stage for stage, step in (("selection", "plan"), ("transfer", "prune")) if step not in done]

    def searched(self, counts: Sequence[int]) -> bool:
        """Whether the plans of a sweep need not be searched for again."""
        found = Finished(self.run)
        found.ask("dense", lambda: {"model": self.recipe.model}, dict, "dense")
        found.ask("plans", lambda: self._sweep_settings(counts), lambda: self._started_from(found), "plans")
        return "plans" in found.steps

    def _started_from(self, found: Finished) -> dict[str, str | None]:
        """`_model_and_text`, as far as it can be told before the model is there."""
        return {"model": found.left.get("dense"), "calibration": self.inputs.calibration_texts().fingerprint}

    def _resumable(
        self,
        step: str,
        work: Callable[[Checkpoints], Result],
        result_type: type[Result],
        *,
        settings: dict[str, Any],
        inputs: Mapping[str, Path | str],
        output: str,
        together: bool = False,
    ) -> Result:
        """A step of the run (`RunFolder.step`) that goes on where a killed one was, on the same settings and inputs.

        work: is handed what to go on from; the finished step leaves none of it behind.
        """
        key = self.run.key(step, settings=settings, inputs=inputs)
        checkpoints = Checkpoints(self.run.layout.checkpoints / step, key, self.recipe.checkpoint_s)
        result = self.run.step(
            step,
            lambda: work(checkpoints),
            result_type,
            settings=settings,
            inputs=inputs,
            outputs=[output],
            together=together,
        )
        if self.run.main:
            checkpoints.remove()
        return result

    def _select(self, checkpoints: Checkpoints) -> PruningPlan:
        train, validation = self.inputs.calibration_windows()
        with quiet_libraries():
            return selection.select_layers(
                self._checked_model(),
                train,
                validation,
                self._count,
                self.recipe,
                self.inputs.calibration_texts().origin,
                checkpoints,
            )

    def _write(self, plan: PruningPlan) -> PruningPlan:
        if self.run.main:
            write_json(self._plan_path, plan)
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
                dense=self.inputs.path("dense"),
                source=self.inputs.dense(),
                plan=plan,
                train=train,
                validation=validation,
                recipe=self.recipe,
                out=folder,
                checkpoints=checkpoints,
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

    def _model_and_text(self) -> dict[str, Path | str]:
        """What every choice and training starts from, as inputs of a step."""
        texts = self.inputs.calibration_texts()
        self.inputs.dense()  # the folder has to be there
        return {"model": self.inputs.path("dense"), "calibration": texts.fingerprint}

    @property
    def _plan_path(self) -> Path:
        return self.run.path / "plan.json"

    @functools.cached_property
    def _count(self) -> int:
        """How many layers go."""
        return parse_drop(self.recipe.drop, self.inputs.num_layers())

    @functools.cached_property
    def _plan_settings(self) -> dict[str, Any]:
        return self._selection_settings(self._count)

    @functools.cached_property
    def _prune_settings(self) -> dict[str, Any]:
        return self._chosen("seed", "device", "autocast", "weights", "calibration", "transfer")

    def _selection_settings(self, count: int) -> dict[str, Any]:
        chosen = self._chosen("seed", "device", "weights", "autocast", "calibration", "plan")
        # Text by the dense model is the transfer's: layers are chosen without.
        return {**chosen, "calibration": {**chosen["calibration"], "self_generated": 0.0}, "num_dropped": count}

    def _sweep_settings(self, counts: Sequence[int]) -> dict[str, Any]:
        return {**self._selection_settings(max(counts)), "counts": list(counts)}

    def _chosen(self, *keys: str) -> dict[str, Any]:
        """What the recipe says of these, as a record keeps it; not by which names: texts are inputs, as they are."""
        return self.recipe.model_dump(mode="json", include=set(keys), exclude={"calibration": {"texts"}})
