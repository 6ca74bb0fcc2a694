"""Stage 2: move the dropped layers' knowledge into the kept ones, then remove them.

Source: TRSP, arXiv 2505.18232, section 3.2: loss = LM loss + lambda_2 * sum over P of ||f_i(h) - h||.
A small penalty is not zero, so that form pays a jump in perplexity at the removal; it is measured and
reported. The `anneal` form lowers the dropped layers' branch gates from 1 to exactly 0 in the first part
of the training instead, so that removing them changes nothing. `train` removes first and trains afterwards, with the
same tokens, optimiser and loss: the control that every claim for a transfer has to beat (`tools/training/forms.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import (
    cast_for_storage,
    check_removal,
    count_weights,
    decoder_layers,
    load_config,
    load_model,
    load_tokenizer,
    make_storable,
    meta_model,
    remove_layers,
    stored_dtype,
)
from trsp_deploy.errors import ModelError
from trsp_deploy.model_code import copy_code
from trsp_deploy.recipe import Recipe, TransferSettings
from trsp_deploy.results import PrunedCheckpoint, perplexity_of
from trsp_deploy.tools.delivery.model_card import write_model_card
from trsp_deploy.tools.exporters.weights import open_weights
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.sources.models import ModelSource
from trsp_deploy.tools.training.checkpoints import Checkpoints, put_back, training_state
from trsp_deploy.tools.training.forms import FORMS, Form
from trsp_deploy.tools.training.heap import exact_heap, kept_heap
from trsp_deploy.tools.training.losses import TokenLosses
from trsp_deploy.tools.training.optimizers import clip_gradients, make_optimizer
from trsp_deploy.tools.training.parameters import (
    add_adapters,
    choose_trained,
    merge_adapters,
    recomputed_layers,
)
from trsp_deploy.tools.training.processes import Processes
from trsp_deploy.tools.training.shared import (
    TRAINING_DTYPES,
    autocast,
    batch_order,
    learning_rate,
    mean_loss,
    pick_device,
)
from trsp_deploy.tools.training.teacher import DenseStates


@dataclass(frozen=True)
class Trained:
    """What the training made of the dense model, whose layers are all still there."""

    adapted: Any  # the model under its adapters, which are to be merged; None where weights trained
    parameters: int
    refit: str
    unfitted_because: str
    lm_losses: tuple[float, ...]  # nats, one a step
    penalties: tuple[float, ...]
    tokens: int
    ppl_dense: float
    ppl_before_removal: float


def transfer_and_remove(
    *,
    dense: Path,
    source: ModelSource,
    plan: PruningPlan,
    train: torch.Tensor,
    validation: torch.Tensor,
    recipe: Recipe,
    out: Path,
    checkpoints: Checkpoints | None = None,
) -> PrunedCheckpoint:
    """Train, remove `plan.dropped`, and write a folder to `out` that plain transformers loads.

    dense: Hugging Face folder of the dense model; source: where it came from, for the model card.
    train, validation: (windows, sequence) int64 token ids; the latter are never trained on.
    checkpoints: where to go on from after a kill, and what to leave for the next; None keeps nothing.
    """
    processes = Processes(pick_device(recipe))
    model = load_model(dense, pick_device(recipe), TRAINING_DTYPES[recipe.weights])
    check_removal(model, plan.dropped)
    with _heap(recipe):
        trained = _train(model, plan, train, validation, recipe, processes, checkpoints)
    model = _whole(model, trained.adapted, dense, recipe, processes)
    result: PrunedCheckpoint | None = None
    if processes.main:
        result = _remove(model, plan, trained, validation, recipe, processes)
        _write(model, plan, dense, recipe, out)
        write_model_card(out, source, plan, recipe, result)
    finished = processes.from_main(result)
    assert finished is not None  # the main process has made it
    return finished


def _heap(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """Whoever computes each layer twice is short of memory, and a kept heap has gaps."""
    return exact_heap() if recipe.transfer.gradient_checkpointing is True else kept_heap()


def _train(
    model: PreTrainedModel,
    plan: PruningPlan,
    train: torch.Tensor,
    validation: torch.Tensor,
    recipe: Recipe,
    processes: Processes,
    checkpoints: Checkpoints | None,
) -> Trained:
    """Train the dense model in place, as far as the form wants it."""
    settings, parameters = recipe.transfer, count_weights(model).total
    batch_size = processes.forward_batch(settings)
    choose_trained(model, settings)
    losses = TokenLosses(model, settings.ce_weight, settings.kl_weight)
    ppl_dense = _perplexity(losses, validation, batch_size)
    training = Training(losses, train, recipe, processes, checkpoints)
    with recomputed_layers(model, settings.gradient_checkpointing), LayerGates(model, "branch") as gates:
        form = FORMS[settings.form](model, gates, plan.dropped, settings, processes)
        form.prepare(train, autocast(recipe, pick_device(recipe)), training.resumed)
        adapted = _adapters(model, recipe)
        training.run(form)
        form.finish()
        ppl_before_removal = _perplexity(losses, validation, batch_size)
    if training.lm_losses and not math.isfinite(ppl_before_removal):  # the last step's update did it
        raise _diverged("perplexity", ppl_before_removal, settings.steps - 1, settings)
    return Trained(
        adapted=adapted,
        parameters=parameters,
        refit=form.fitted,
        unfitted_because=form.unfitted_because,
        lm_losses=tuple(training.lm_losses),
        penalties=tuple(training.penalties),
        tokens=len(training.lm_losses) * settings.batch_size * train.shape[1],
        ppl_dense=ppl_dense,
        ppl_before_removal=ppl_before_removal,
    )


def _diverged(what: str, value: float, step: int, settings: TransferSettings) -> ModelError:
    return ModelError(
        f"the training's {what} is {value} at step {step + 1} of {settings.steps}, at a learning rate of "
        f"{settings.learning_rate:g}: a smaller --set transfer.learning_rate, or --set weights=fp32 with "
        "--set autocast=off, may keep it finite"
    )


def _remove(
    model: PreTrainedModel,
    plan: PruningPlan,
    trained: Trained,
    validation: torch.Tensor,
    recipe: Recipe,
    processes: Processes,
) -> PrunedCheckpoint:
    """Take the layers out, in place, and say what that came to."""
    remove_layers(model, plan.dropped)
    return PrunedCheckpoint(
        form=recipe.transfer.form,
        refit=trained.refit,
        unfitted_because=trained.unfitted_because,
        dropped=plan.dropped,
        num_layers_dense=plan.num_layers,
        num_layers_pruned=len(decoder_layers(model)),
        parameters_dense=trained.parameters,
        parameters_pruned=count_weights(model).total,
        lm_loss=trained.lm_losses,
        penalty=trained.penalties,
        tokens=trained.tokens,
        ppl_dense=trained.ppl_dense,
        ppl_before_removal=trained.ppl_before_removal,
        ppl_after_removal=_perplexity(model, validation, processes.forward_batch(recipe.transfer)),
    )


def _write(model: PreTrainedModel, plan: PruningPlan, dense: Path, recipe: Recipe, out: Path) -> None:
    """A folder in the dense model's stored dtypes, with its tokenizer and its own code where it has some."""
    make_storable(model)
    cast_for_storage(model, stored_dtype(dense))
    if TRAINING_DTYPES[recipe.weights] not in (stored_dtype(dense), torch.float32):  # which holds all that is stored
        _take_back_rounding(model, plan.kept, dense, TRAINING_DTYPES[recipe.weights])
    model.save_pretrained(out)
    load_tokenizer(dense).save_pretrained(out)
    copy_code(dense, out)


@torch.no_grad()
def _take_back_rounding(model: PreTrainedModel, kept: Sequence[int], dense: Path, trained_in: torch.dtype) -> None:
    """Put the stored number back wherever training left what loading had made of it: all of what did not train.

    model: in the stored dtypes; kept: what its layers are in `dense`, of which one weight at a time is read.
    """
    layers = decoder_layers(model)
    place = next(path for path, module in model.named_modules() if module is layers)
    stored_as = {
        f"{place}.{new}.{name}": f"{place}.{old}.{name}"
        for new, old in enumerate(kept)
        for name in layers[new].state_dict()
    }
    read = open_weights(dense, meta_model(load_config(dense), stored_dtype(dense)))
    for name, weight in model.state_dict().items():
        stored = read(stored_as.get(name, name)).to(weight.dtype)
        weight.copy_(torch.where(weight == stored.to(trained_in).to(weight.dtype), stored, weight))


def _adapters(model: PreTrainedModel, recipe: Recipe) -> Any:
    """Put adapters on the model where the recipe wants them; None where it does not."""
    rank = recipe.transfer.lora_rank
    return None if rank is None else add_adapters(model, rank, recipe.seed)


def _whole(model: PreTrainedModel, adapted: Any, dense: Path, recipe: Recipe, processes: Processes) -> PreTrainedModel:
    """The trained model in one piece with its adapters merged; of a sharded one the main process alone gets that."""
    if processes.sharded:
        weights = processes.whole_weights(model)
        if not processes.main:
            return model
        model = load_model(dense, "cpu", TRAINING_DTYPES[recipe.weights])
        adapted = _adapters(model, recipe)
        model.load_state_dict(weights)
    if adapted is not None:
        merge_adapters(adapted)
    return model


def _perplexity(model: PreTrainedModel | TokenLosses, windows: torch.Tensor, batch_size: int) -> float:
    return perplexity_of(mean_loss(model, windows, batch_size))


class Training:
    """The steps of stage 2: made on the dense model, run with a form, from the first step or from a checkpoint."""

    def __init__(
        self,
        losses: TokenLosses,
        windows: torch.Tensor,
        recipe: Recipe,
        processes: Processes,
        checkpoints: Checkpoints | None,
    ) -> None:
        """Works out what the dense model teaches, where the recipe asks for it: the model still has to be dense."""
        self.lm_losses: list[float] = []  # nats, one a step
        self.penalties: list[float] = []  # before lambda_2, one a step
        self._losses = losses
        self._windows = windows
        self._recipe = recipe
        self._settings = recipe.transfer
        self._processes = processes
        self._checkpoints = checkpoints
        self._device = pick_device(recipe)
        self._rows = self._rows_by_step()
        self._state = None if checkpoints is None else checkpoints.load()
        self._dense: DenseStates | None = None
        left = self._rows if self._state is None else self._rows[len(self._state["lm_losses"]) :]
        if self._settings.kl_weight and left:
            order = torch.tensor(list(dict.fromkeys(torch.cat(self._rows).tolist())))  # each once, the first use counts
            batch_size = processes.forward_batch(self._settings)
            with autocast(recipe, self._device):
                self._dense = DenseStates(losses, windows, order, batch_size, torch.cat(left))

    @property
    def resumed(self) -> bool:
        """Whether `run` goes on from a checkpoint."""
        return self._state is not None

    def _rows_by_step(self) -> list[torch.Tensor]:
        """Indices of the windows that this process trains on, step by step: all known beforehand."""
        settings = self._settings
        steps = 0 if settings.form == "none" else settings.steps
        order = batch_order(len(self._windows), settings.batch_size, self._recipe.seed)
        return [self._processes.local_rows(rows, "transfer.batch_size") for rows in itertools.islice(order, steps)]

    def run(self, form: Form) -> None:
        """Train the model in place."""
        if not self._rows:
            return
        form.gates.values.requires_grad_(False)
        module = self._processes.wrap(self._losses)
        optimizer = make_optimizer(module, self._settings, self._processes.sharded)
        self._restore(form, optimizer)
        done, began = len(self.lm_losses), time.perf_counter()
        with Meter("transfer", len(self._rows), done) as meter:
            for step in range(done, len(self._rows)):
                self._step(module, form, optimizer, step)
                self._save_if_due(form, optimizer)
                tokens = (step + 1 - done) * self._settings.batch_size * self._windows.shape[1]
                rate = tokens / (time.perf_counter() - began)
                meter.advance(f"loss {self.lm_losses[-1]:.3f} penalty {self.penalties[-1]:.3g} {rate:.0f} tokens/s")

    def _step(self, module: torch.nn.Module, form: Form, optimizer: torch.optim.Optimizer, step: int) -> None:
        settings, rows = self._settings, self._rows[step]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate(step, settings.steps, settings.warmup_share)
        form.before_step(step)
        lm, penalty = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        for part in rows.split(settings.forward_batch):
            share = len(part) / len(rows)
            with autocast(self._recipe, self._device):
                dense = None if self._dense is None else self._dense[part].to(self._device)
                found = module(self._windows[part].to(self._device), dense)
            penalty = form.penalty()
            (share * (found.total + settings.weight * penalty)).backward()
            lm += share * found.lm
        lm_loss, norm = self._processes.mean(lm).item(), clip_gradients(optimizer)
        for what, value in (("loss", lm_loss), ("gradient", norm)):
            if not math.isfinite(value):  # before the weights are not either, and saved to go on from
                raise _diverged(what, value, step, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # here, so that gradients and activations never add up
        self.lm_losses.append(round(lm_loss, 5))
        self.penalties.append(round(penalty.item(), 5))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_if_due(self, form: Form, optimizer: torch.optim.Optimizer) -> None:
        if self._checkpoints is None or not self._processes.from_main(self._checkpoints.due()):
            return
        state = training_state(self._losses.model, optimizer, self._processes.sharded)
        if self._processes.main:
            self._checkpoints.save(
                {
                    **state,
                    "moved": form.moved(),
                    "random": torch.get_rng_state(),
                    "lm_losses": self.lm_losses,
                    "penalties": self.penalties,
                }
            )

    def _restore(self, form: Form, optimizer: torch.optim.Optimizer) -> None:
        state, self._state = self._state, None  # three times the weights, of no use once they are put back
        if state is None:
            return
        put_back(state, self._losses.model, optimizer, self._processes.sharded)
        for weight, saved in zip(form.moved(), state["moved"], strict=True):
            weight.copy_(saved)
        torch.set_rng_state(state["random"])
        self.lm_losses, self.penalties = state["lm_losses"], state["penalties"]
