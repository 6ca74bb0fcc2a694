"""Stage 2: move the doomed layers' knowledge into the kept ones, then remove them.

Source: TRSP, arXiv 2505.18232, section 3.2: loss = LM loss + lambda_2 * sum over P of ||f_i(h) - h||.
A small penalty is not zero, so that form pays a jump in perplexity at the removal; it is measured and
reported. The `anneal` form lowers the doomed layers' branch gates from 1 to exactly 0 in the first part
of the training instead, so that removing them changes nothing. `train` removes first and trains afterwards, with the
same tokens, optimiser and loss: the control that every claim for a transfer has to beat.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import (
    count_weights,
    decoder_layers,
    load_model,
    load_tokenizer,
    next_token_logits,
    remove_layers,
    stored_dtype,
)
from trsp_deploy.recipe import Recipe, TransferSettings
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods.fold import fold_dropped_layers
from trsp_deploy.tools.model_card import write_model_card
from trsp_deploy.tools.models import ModelSource
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training import TRAINING_DTYPES, autocast, batches, learning_rate, mean_loss, pick_device


def transfer_and_remove(
    dense: Path,
    source: ModelSource,
    plan: PruningPlan,
    train: torch.Tensor,
    validation: torch.Tensor,
    recipe: Recipe,
    out: Path,
) -> PrunedCheckpoint:
    """Train, remove `plan.dropped`, and write a folder to `out` that plain transformers loads.

    dense: Hugging Face folder of the dense model; source: where it came from, for the model card.
    train, validation: (windows, sequence) int64 token ids; the latter are never trained on.
    """
    device = pick_device(recipe)
    model = load_model(dense, device, TRAINING_DTYPES[recipe.weights])
    batch_size = recipe.transfer.batch_size
    parameters_dense = count_weights(model).total
    ppl_dense = math.exp(mean_loss(model, validation, batch_size))
    teacher = Teacher(model) if recipe.transfer.kl_weight else None
    if recipe.transfer.fold:
        fold_dropped_layers(model, plan.dropped, train, batch_size)
    with LayerGates(model, "branch") as gates:
        if recipe.transfer.fold or recipe.transfer.form == "train":
            gates.closed.update(plan.dropped)
        losses, penalties = _train(model, gates, plan.dropped, train, recipe, device, teacher)
        ppl_before = math.exp(mean_loss(model, validation, batch_size))
    remove_layers(model, plan.dropped)
    ppl_after = math.exp(mean_loss(model, validation, batch_size))
    result = PrunedCheckpoint(
        form=recipe.transfer.form,
        dropped=plan.dropped,
        num_layers_dense=plan.num_layers,
        num_layers_pruned=len(decoder_layers(model)),
        parameters_dense=parameters_dense,
        parameters_pruned=count_weights(model).total,
        lm_loss=losses,
        penalty=penalties,
        tokens=len(losses) * batch_size * train.shape[1],
        ppl_dense=ppl_dense,
        ppl_before_removal=ppl_before,
        ppl_after_removal=ppl_after,
    )
    model.to("cpu", stored_dtype(dense)).save_pretrained(out)
    load_tokenizer(dense).save_pretrained(out)
    write_model_card(out, source, plan, recipe, result)
    return result


def _train(
    model: PreTrainedModel,
    gates: LayerGates,
    doomed: Sequence[int],
    train: torch.Tensor,
    recipe: Recipe,
    device: str,
    teacher: Teacher | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Run stage 2 in place; returns LM loss and penalty by step. The gates are left as the form ends."""
    settings = recipe.transfer
    if settings.form == "none":
        return (), ()
    if settings.form in ("l1", "l2"):
        gates.watched.update(doomed)
    gates.values.requires_grad_(False)
    parameters = _trainable(model, settings)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    batch = batches(train, settings.batch_size, recipe.seed)
    losses, penalties = [], []
    began = time.perf_counter()
    with Meter("transfer", settings.steps) as meter:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate(step, settings.steps, settings.warmup_share)
            if settings.form == "anneal":
                _anneal(gates, doomed, step, settings)
            with autocast(recipe, device):
                lm_loss, loss = _losses(model, next(batch).to(device), teacher, settings)
            penalty = _penalty(gates, settings.form)
            optimizer.zero_grad(set_to_none=True)
            (loss + settings.weight * penalty).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(round(lm_loss.item(), 5))
            penalties.append(round(penalty.item(), 5))
            rate = len(losses) * settings.batch_size * train.shape[1] / (time.perf_counter() - began)
            meter.advance(f"loss {losses[-1]:.3f} penalty {penalties[-1]:.3g} {rate:.0f} tokens/s")
    if settings.form == "anneal":
        gates.closed.update(doomed)
    return tuple(losses), tuple(penalties)


class Teacher:
    """The dense model's next-token distribution, from a frozen copy of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def log_probabilities(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, sequence - 1, vocabulary) float32 for input_ids (batch, sequence)."""
        return next_token_logits(self._model, input_ids).log_softmax(-1)


def _losses(
    model: PreTrainedModel, input_ids: torch.Tensor, teacher: Teacher | None, settings: TransferSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LM loss, and the weighted sum of LM loss and divergence from the dense model, in nats a token."""
    log_probabilities = next_token_logits(model, input_ids).log_softmax(-1).flatten(0, 1)  # (tokens, vocabulary)
    lm_loss = torch.nn.functional.nll_loss(log_probabilities, input_ids[:, 1:].flatten())
    loss = settings.ce_weight * lm_loss
    if teacher is not None:
        wanted = teacher.log_probabilities(input_ids).flatten(0, 1)
        divergence = torch.nn.functional.kl_div(log_probabilities, wanted, log_target=True, reduction="batchmean")
        loss = loss + settings.kl_weight * divergence
    return lm_loss, loss


def _trainable(model: PreTrainedModel, settings: TransferSettings) -> list[torch.nn.Parameter]:
    model.requires_grad_(settings.train == "all")
    decoder_layers(model).requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _anneal(gates: LayerGates, doomed: Sequence[int], step: int, settings: TransferSettings) -> None:
    """Lower the doomed gates linearly from 1 to 0 over the first `anneal_share` of the steps."""
    annealing_steps = max(1, round(settings.anneal_share * settings.steps))
    if step >= annealing_steps:
        gates.closed.update(doomed)  # a gate at 0 is the layer removed: no need to compute it
        return
    with torch.no_grad():
        gates.values[list(doomed)] = 1.0 - (step + 1) / (annealing_steps + 1)


def _penalty(gates: LayerGates, form: str) -> torch.Tensor:
    """Sum over the doomed layers of the norm of f(h) - h over the whole tensor, as the paper's code has it.

    The l1 norm is divided by sqrt(number of elements), so that one lambda_2 means the same in both forms.
    """
    total = torch.zeros((), device=gates.values.device)
    for change in gates.changes.values():  # (batch, sequence, hidden)
        if form == "l2":
            total = total + torch.linalg.vector_norm(change.float())
        else:
            total = total + torch.linalg.vector_norm(change.float(), ord=1) / math.sqrt(change.numel())
    return total
