"""Which layers go (`plan.json`), and the checkpoint without them (`pruned/`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from transformers import PreTrainedModel

from trsp_deploy.artifacts import (
    Finished,
    Made,
    RunFolder,
    Step,
    fingerprint,
    seal,
    share_weights,
    steps,
    write_json,
    writing,
)
from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.artifacts.layout import OWN_TEXT, PLAN, PLAN_BEFORE, PLANS
from trsp_deploy.decoder import check_prunable, load_config, load_model, meta_model
from trsp_deploy.errors import LeftToMain, PlanError
from trsp_deploy.launch import in_a_group
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.plan_origin import EDITED, GIVEN, chosen_alike, made_by_a_person, recorded_origin
from trsp_deploy.recipe import Recipe, Strict, parse_drop
from trsp_deploy.results import PrunedCheckpoint, Role
from trsp_deploy.stages import selection, transfer
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.resources import stage_names
from trsp_deploy.tools.sources.texts import jsonl, load_texts, tokenize_windows
from trsp_deploy.tools.training.checkpoints import Checkpoints, trains_with
from trsp_deploy.tools.training.forms import check_weights_are_whole
from trsp_deploy.tools.training.optimizers import make_optimizer
from trsp_deploy.tools.training.parameters import add_adapters
from trsp_deploy.tools.training.processes import Processes
from trsp_deploy.tools.training.self_calibration import check_can_write, self_generated_windows, write_texts
from trsp_deploy.tools.training.shared import TRAINING_DTYPES, pick_device

Result = TypeVar("Result", bound=BaseModel)


def _leave_together() -> None:
    """Leave the group of a launch, on all its processes at once: NCCL lets none go before the last one calls."""
    if in_a_group():
        torch.cuda.empty_cache()
        torch.distributed.destroy_process_group()


def _take_cores(device: str) -> None:
    """Let the main process of a launch compute with every core beside its GPU: a launcher leaves each process one
    thread, and a sharded model is put together, and held against the dense one, on the CPU while the others wait."""
    if device == "cuda" and in_a_group():
        torch.set_num_threads(usable_cores())


class Done(Strict):
    """Result of a step whose only result is its files."""


class Pruning:
    """Selection, transfer and removal."""

    def __init__(self, inputs: Inputs, plan_file: Path | None) -> None:
        self.inputs = inputs
        self.run = inputs.run
        self.recipe = inputs.recipe
        self._plan_file = plan_file

    @cached_method
    def plan(self) -> PruningPlan:
        """Which layers go, as `plan.json`: chosen, handed in, or edited by hand."""
        whose = self._persons_plan()  # which may be refused, and a changed model would be `dense/` by then
        self._get_model_and_text()
        plan = None if whose is None else read_plan(whose[1], self.inputs.model.num_layers())
        # Without it a person's plan would pass for a choice of this run.
        person = {} if plan is None or whose is None else {whose[0]: seal(plan.model_dump(mode="json"))}
        return self._resumable(
            self._plan_step(lambda: self._plan_settings, lambda: person),
            lambda checkpoints: self._choose(checkpoints) if plan is None else self._write(plan),
            PruningPlan,
            together=True,
        )

    def _plan_step(self, settings: Callable[[], dict[str, Any]], person: Callable[[], dict[str, str]]) -> Step:
        """person: the plan that a person has made, by how."""
        return Step(steps.PLAN, settings, lambda: {**self._model_and_text(), **person()}, PLAN, Recipe)

    def _persons_plan(self) -> tuple[str, Path] | None:
        """How a person made the plan, and where it lies: handed in now or before, or edited by hand; None of a chosen
        one. It stays for other texts and models.

        Raises PlanError where settings that choose layers are others now: the person's choice or theirs?
        """
        if self._plan_file is not None:
            return GIVEN, self._plan_file
        path, how = self.run.layout.plan, made_by_a_person(self.run)
        if how is None:
            return None
        if not chosen_alike(self.run, self._plan_settings):
            mine = "was edited by hand, and settings that choose layers are others now"
            other = mine if how == EDITED else "was given, and settings that choose layers are others now"
            raise PlanError(
                f"{path}: {other}; keep it with `prune` and --plan {path}, or delete it to have them chosen anew"
            )
        dropped = ", ".join(map(str, read_plan(path, self.inputs.model.num_layers()).dropped))
        said = "edited by hand" if how == EDITED else "given, not chosen here"
        self.inputs.say(f"{PLAN} was {said}: dropping {dropped}; delete it to have layers chosen")
        return how, path

    def _is_replaced(self) -> bool:
        """Whether another plan than the recorded one was handed in."""
        record = self.run.record(steps.PLAN)
        if self._plan_file is None or record is None:
            return False
        given = read_plan(self._plan_file, self.inputs.model.num_layers())
        try:
            return PruningPlan.model_validate(record.result) != given
        except ValidationError:  # of another version, whose step is done again
            return True

    def plans(self, counts: tuple[int, ...]) -> dict[int, Path]:
        """A plan for each number of layers, as `plans/drop-K.json`, from one search; methods as the recipe says."""
        layout = self.run.layout

        def work(checkpoints: Checkpoints) -> Done:
            train, validation = self.inputs.texts.calibration_windows()
            with quiet_libraries(), writing(self.run.path / PLANS) as partial:
                model = self._checked_model()
                origin = self.inputs.texts.calibration().origin
                found = selection.select_for_counts(model, train, validation, counts, self.recipe, origin, checkpoints)
                for count, plan in found.items():
                    write_json(partial / layout.plan_of_cut(count).name, plan)
            return Done()

        self._get_model_and_text()
        self._resumable(self._plans_step(counts), work, Done)
        return {count: layout.plan_of_cut(count) for count in counts}

    def _plans_step(self, counts: Sequence[int]) -> Step:
        return Step(steps.PLANS, lambda: self._sweep_settings(counts), self._model_and_text, PLANS, Recipe)

    @cached_method
    def self_generated(self) -> Path | None:
        """The text that the dense model wrote itself, `self-generated.jsonl`; None where none is wanted."""
        tokens, length = self._own_text_settings["tokens"], self.recipe.calibration.context_length
        if not tokens:
            return None
        path = self.run.layout.own_text

        def work(checkpoints: Checkpoints) -> Done:
            with quiet_libraries(), writing(path) as partial:
                model = self._checked_model()
                tokenizer = self.inputs.model.tokenizer()
                documents = write_texts(model, tokenizer, tokens, length, self.recipe.seed, checkpoints)
                partial.write_text(jsonl(documents), encoding="utf-8")
            return Done()

        self._resumable(self._own_text_step, work, Done)
        return path

    @property
    def _own_text_step(self) -> Step:
        return Step(
            steps.SELF_GENERATED,
            lambda: self._own_text_settings,
            lambda: {"model": self.inputs.made("dense")},
            OWN_TEXT,
            Recipe,
        )

    @cached_method
    def prune(self) -> PrunedCheckpoint:
        """Transfer and removal: the checkpoint `pruned/`.

        Raises LeftToMain in each process of a launch but the main one, once it is made.
        """
        plan, own = self.plan(), self.self_generated()

        def work(checkpoints: Checkpoints) -> PrunedCheckpoint:
            return self._transfer(plan, own, checkpoints)

        result = self._resumable(self._prune_step, work, PrunedCheckpoint, together=True)
        _leave_together()
        if not self.run.main:
            raise LeftToMain("the model is pruned, and the rest is the main process's work")
        self.inputs.texts.keep_calibration()
        self.inputs.texts.keep_evaluation_at_hand()
        self.run.from_main = lambda value: value  # nobody is left to tell
        return result

    @property
    def _prune_step(self) -> Step:
        def inputs() -> dict[str, Made | str]:
            found = {**self._model_and_text(), "plan": Made(steps.PLAN, PLAN)}
            if self._self_generated_windows():
                found["self-generated"] = Made(steps.SELF_GENERATED, OWN_TEXT)
            return found

        return Step(steps.PRUNE, lambda: self._prune_settings, inputs, self.inputs.made("pruned").path, Recipe)

    def ready(self, role: Role) -> Path:
        """The role's Hugging Face folder, made when it is not there."""
        if role == "dense":
            self.inputs.model.copied()
        else:
            self.prune()
        return self.inputs.path(role)

    def finished(self, run: RunFolder | None = None, count: int | None = None) -> Finished:
        """The steps that need not be done again.

        run, count: another one with this recipe that drops `count` layers, such as a sweep's; None is this one.
        """
        found = Finished(run or self.run)
        self._ask_dense(found)
        self._ask_plan(found, count)
        if steps.DENSE not in found.left:  # a text's windows take the model, which would be put in the other's place
            return found
        found.ask(self._own_text_step)
        if steps.SELF_GENERATED not in found.steps:
            found.left.pop(steps.SELF_GENERATED, None)  # written again, it may be another text
        found.ask(self._prune_step)
        return found

    def _ask_dense(self, found: Finished) -> None:
        """A model that is no folder here is what the run has of it."""
        found.ask(self.inputs.model.step(lambda: self.inputs.model.at_hand() or found.recorded(steps.DENSE, "model")))

    def _ask_plan(self, found: Finished, count: int | None) -> None:
        def settings() -> dict[str, Any]:
            return self._selection_settings(count or self._count)

        person = self._plan_file is None and made_by_a_person(found.run) is not None
        if person and chosen_alike(found.run, settings()):
            found.steps.add(steps.PLAN)
        elif not person and not self._is_replaced():  # a plan that was handed in before is the same as now
            found.ask(self._plan_step(settings, lambda: found.recorded(steps.PLAN, GIVEN, EDITED)))
        if self._plan_file is None and steps.PLAN in found.steps:
            found.left[steps.PLAN] = fingerprint(found.run.layout.plan)
        elif self._plan_file is None and recorded_origin(found.run.record(steps.PLAN)) is not None:
            found.left.pop(steps.PLAN, None)  # it was a person's and is gone: others may be chosen

    def unfinished(self) -> list[str]:
        """Of selection and transfer what has to be done."""
        done = self.finished().steps
        stages = {stage_names.SELECTION: steps.PLAN, stage_names.TRANSFER: steps.PRUNE}
        return [stage for stage, step in stages.items() if step not in done]

    def searched(self, counts: Sequence[int]) -> bool:
        """Whether the plans of a sweep need not be searched for again."""
        found = Finished(self.run)
        self._ask_dense(found)
        found.ask(self._plans_step(counts))
        return steps.PLANS in found.steps

    def _resumable(
        self, step: Step, work: Callable[[Checkpoints], Result], result_type: type[Result], *, together: bool = False
    ) -> Result:
        """A step of the run (`RunFolder.do`) that goes on where a killed one was, on the same settings and inputs.

        work: is handed what to go on from; the finished step leaves none of it behind.
        """
        checkpoints = Checkpoints(
            self.run.layout.checkpoints / step.name,
            self.run.key_of(step),
            self.recipe.checkpoint_s,
            packages=trains_with(self.recipe.transfer) if step.name == steps.PRUNE else (),
            say=self.inputs.say,
        )
        result = self.run.do(step, lambda: work(checkpoints), result_type, together=together)
        if self.run.main:
            checkpoints.remove()
        return result

    def _select(self, checkpoints: Checkpoints) -> PruningPlan:
        train, validation = self.inputs.texts.calibration_windows()
        with quiet_libraries():
            return selection.select_layers(
                self._checked_model(),
                train,
                validation,
                self._count,
                self.recipe,
                self.inputs.texts.calibration().origin,
                checkpoints,
            )

    def _choose(self, checkpoints: Checkpoints) -> PruningPlan:
        plan = self._select(checkpoints)
        if self.run.main:
            self._keep_aside(plan)
            # Beside it the new plan would seem edited by hand, if this is killed before its own record is there.
            self.run.layout.record(steps.PLAN).unlink(missing_ok=True)
        return self._write(plan)

    def _keep_aside(self, chosen: PruningPlan) -> None:
        """Keep another plan than the chosen one where no record can tell any more whether a person made it."""
        path, record = self.run.layout.plan, self.run.layout.record(steps.PLAN)
        if not path.is_file() or not record.is_file() or self.run.record(steps.PLAN) is not None:
            return
        with contextlib.suppress(PlanError):  # what cannot be read is kept too
            if read_plan(path, chosen.num_layers).dropped == chosen.dropped:
                return
        aside = path.with_name(PLAN_BEFORE)
        path.replace(aside)
        self.inputs.say(
            f"{PLAN} dropped other layers, by hand or not, which its damaged record does not tell: kept as {aside}"
        )

    def _write(self, plan: PruningPlan) -> PruningPlan:
        if self.run.main:
            write_json(self.run.layout.plan, plan)
        return plan

    def _transfer(self, plan: PruningPlan, own: Path | None, checkpoints: Checkpoints) -> PrunedCheckpoint:
        train, validation = self.inputs.texts.calibration_windows()
        if own is not None:
            texts, length = load_texts(str(own), "calibration"), self.recipe.calibration.context_length
            written = tokenize_windows(texts, self.inputs.model.tokenizer(), length, self._self_generated_windows())
            train = torch.cat([train[: self.recipe.calibration.max_windows - len(written)], written])
        path = self.inputs.path("pruned")
        with quiet_libraries(), writing(path) if self.run.main else contextlib.nullcontext(path) as folder:
            if self.run.main:
                _take_cores(pick_device(self.recipe))
            pruned = transfer.transfer_and_remove(
                dense=self.inputs.path("dense"),
                source=self.inputs.model.copied(),
                plan=plan,
                train=train,
                validation=validation,
                recipe=self.recipe,
                out=folder,
                checkpoints=checkpoints,
            )
            if self.run.main:
                share_weights(folder)
        return pruned

    def _self_generated_windows(self) -> int:
        """How many of the windows that the transfer reads the dense model writes; 0 where nothing reads them."""
        settings = self.recipe.transfer
        share = self.recipe.calibration.self_generated
        if not share or (settings.form == "none" and settings.closed_form == "none"):
            return 0
        train, _ = self.inputs.texts.calibration_windows()
        return self_generated_windows(share, self.recipe.calibration.max_windows, len(train))

    def _checked_model(self) -> PreTrainedModel:
        """The dense model, for what comes before the transfer."""
        self._check_training()
        model = load_model(self.inputs.path("dense"), pick_device(self.recipe), TRAINING_DTYPES[self.recipe.weights])
        check_prunable(model)
        return model

    def _check_training(self) -> None:
        """Raise what would be raised after hours of selection: a package is missing, FSDP or the model cannot do it."""
        settings = self.recipe.transfer
        if settings.lora_rank is not None:
            add_adapters(meta_model(load_config(self.inputs.path("dense"))), settings.lora_rank, self.recipe.seed)
        if self._self_generated_windows():
            length = self.recipe.calibration.context_length
            check_can_write(meta_model(load_config(self.inputs.path("dense"))), self.inputs.model.tokenizer(), length)
        if settings.form != "none":
            sharded = Processes(pick_device(self.recipe)).sharded
            check_weights_are_whole(settings, sharded)
            make_optimizer(torch.nn.Linear(1, 1), settings, sharded)

    def _get_model_and_text(self) -> None:
        """Have here what every choice starts from; of the two the texts are read first, for a model may be large."""
        self.inputs.texts.calibration()
        self.inputs.model.copied()

    def _model_and_text(self) -> dict[str, Made | str]:
        """What every choice and training starts from, as inputs of a step."""
        return {"model": self.inputs.made("dense"), "calibration": self.inputs.texts.calibration().fingerprint}

    @functools.cached_property
    def _count(self) -> int:
        """How many layers go."""
        return parse_drop(self.recipe.drop, self.inputs.model.num_layers())

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

    @functools.cached_property
    def _own_text_settings(self) -> dict[str, Any]:
        length = self.recipe.calibration.context_length
        chosen = self._chosen("seed", "device", "weights")
        return {**chosen, "tokens": self._self_generated_windows() * length, "context_length": length}

    def _chosen(self, *keys: str) -> dict[str, Any]:
        """What the recipe says of these, as a record keeps it; not by which names: texts are inputs, as they are."""
        return self.recipe.model_dump(mode="json", include=set(keys), exclude={"calibration": {"texts"}})
