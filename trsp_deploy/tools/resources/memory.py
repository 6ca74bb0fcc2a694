"""How much memory selection and transfer will need on the training device, before weights are loaded; of a GPU's job in
main memory, too.

    estimate = MemoryEstimate(config, "cuda", fast_bf16=True)
    [stage.peak.total_bytes for stage in estimate.stages(recipe)]

A stage has a few moments at which memory is high, each a sum of weights, gradients, optimiser state, the teacher's
hidden states, activations, the loss with its logits, and the normal equations of a fold or refit; the highest counts.
Activations are counted by a rehearsal without data (`rehearsal.py`), all else is arithmetic here; docs/memory.md has
the formulae.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trsp_deploy.decoder import cache_per_token, count_weights, decoder_layers, meta_model
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import FLOAT_BYTES, Recipe, Strict, parse_drop
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.closed_form.span import spans_at_a_time
from trsp_deploy.tools.methods.fold import SHORTLIST
from trsp_deploy.tools.resources.rehearsal import (
    Rehearsal,
    Step,
    gate_step,
    measuring_step,
    rehearse,
    transfer_step,
)
from trsp_deploy.tools.training.losses import SLICE_BYTES
from trsp_deploy.tools.training.self_calibration import USUAL_SHARE
from trsp_deploy.tools.training.self_calibration import batch_size as writing_batch_size
from trsp_deploy.tools.training.shared import TRAINING_DTYPES

Stage = Literal["selection", "transfer"]

# Of everything: holes that the allocator cannot fill. glibc, which keeps freed blocks below 32 MB, left 4 to 22%
# (docs/memory.md); for torch's allocator on a GPU it is a guess.
SLACK_SHARE = {"cpu": 0.23, "cuda": 0.08}
LIBRARIES_BYTES = 64_000_000  # kernels' scratch and what libraries set up at their first use; 40 MB were measured
SLICES = 3  # of logits at a time: a slice's logits and probabilities, and the gradient of the one before
WRITING_SCORES = 5  # logits, scores, and what softmax and sampling make of them
TEACHER_SLICES = 2  # the dense model's logits and probabilities
MOMENT_8BIT_BYTES = 1 + 4 / 256  # a parameter: 8 bits, and an fp32 scale for each 256 of them
SHARD_BYTES = 5 * 10**9  # of transformers' save_pretrained
DOUBLE = 8  # equations are in float64


class Moment(Strict):
    """One high of a stage: bytes on a device, by what they are for."""

    name: str
    weights_bytes: int
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    teacher_bytes: int = 0
    activations_bytes: int = 0
    loss_bytes: int = 0
    refit_bytes: int = 0
    slack_bytes: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose."""
        parts: dict[str, int] = self.model_dump(exclude={"name"})
        return parts

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


class StageMemory(Strict):
    """What one stage needs: the highest of its moments."""

    stage: Stage
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment that needs the most."""
        return max(self.moments, key=lambda moment: moment.total_bytes)


class MemoryEstimate:
    """Estimates for one model on one kind of device, which need not be there.

    config: transformers' config of the dense model. device: "cpu" or "cuda". fast_bf16: whether `autocast: auto` means
    bf16 there. dropped: the plan's layers, once they are known.
    What was rehearsed for one recipe is not rehearsed again for the next.
    at_least: whether `stages` came to an architecture whose steps cannot be rehearsed without data, as most mixtures of
    experts; activations are then not in what it returns, weights, gradients and optimiser state are.
    """

    def __init__(self, config: Any, device: str, fast_bf16: bool, dropped: tuple[int, ...] | None = None) -> None:
        self.config = config
        self.device = device
        self.fast_bf16 = fast_bf16
        self.dropped = dropped
        self.at_least = False
        skeleton = meta_model(copy.deepcopy(config))
        self.counts = count_weights(skeleton)
        self._buffers_bytes = sum(buffer.nbytes for buffer in skeleton.buffers())
        self._linear = [_shape(module) for module in decoder_layers(skeleton)[0].modules() if _is_linear(module)]

    def stages(self, recipe: Recipe) -> tuple[StageMemory, StageMemory]:
        """Selection and transfer under a recipe; raises RecipeError when its `drop` does not suit the model."""
        return (
            StageMemory(stage="selection", moments=self._with_slack(self._selection(recipe))),
            StageMemory(stage="transfer", moments=self._with_slack(self._transfer(recipe))),
        )

    def host_stages(self, recipe: Recipe) -> tuple[StageMemory, ...]:
        """What the same stages need in main memory while they train on a GPU; on a CPU nothing beside `stages`."""
        if self.device == "cpu":
            return ()
        loading = Moment(name="loading", weights_bytes=self._loaded_bytes(recipe), slack_bytes=LIBRARIES_BYTES)
        kept = Moment(
            name="hidden states of all windows",
            weights_bytes=0,
            teacher_bytes=self._states_bytes(recipe, self._taught_windows(recipe)),
            refit_bytes=self._streams_bytes(recipe) if recipe.transfer.closed_form == "layers" else 0,
            slack_bytes=LIBRARIES_BYTES,
        )
        saving = self._saving(recipe).model_copy(update={"slack_bytes": LIBRARIES_BYTES})
        return (
            StageMemory(stage="selection", moments=(loading,)),
            StageMemory(stage="transfer", moments=(loading, kept, saving)),
        )

    def _loaded_bytes(self, recipe: Recipe) -> int:
        """Weights on their way to a GPU: those of the stored dtype are pages of their file, others are made here."""
        dtype = TRAINING_DTYPES[recipe.weights]
        return 0 if dtype == self._stored_dtype else self.counts.total * dtype.itemsize

    def _pruned_weights(self, recipe: Recipe) -> int:
        layers = self.counts.layers
        return self.counts.total - round(sum(layers) * self._num_dropped(recipe) / len(layers))

    @property
    def _stored_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(self.config, "dtype", None) or torch.float32
        return found

    def _with_slack(self, moments: list[Moment]) -> tuple[Moment, ...]:
        share = SLACK_SHARE[self.device]
        slack = [LIBRARIES_BYTES + math.ceil(share * moment.total_bytes) for moment in moments]
        return tuple(m.model_copy(update={"slack_bytes": size}) for m, size in zip(moments, slack, strict=True))

    # -- stage 1 -------------------------------------------------------------------------------------------------------

    def _selection(self, recipe: Recipe) -> list[Moment]:
        plan = recipe.plan
        held = {"weights_bytes": self._weights_bytes(recipe)}
        moments = [self._measuring(recipe, plan.batch_size, **held)]
        if plan.method == "trsp":
            # The gates' own gradients and moments are a few numbers a layer.
            step = self._rehearsed(recipe, plan.batch_size, gate_step, plan.gate)
            loss = self._loss_bytes(recipe, plan.batch_size)
            moments.append(_moment("gate update, forward", step.kept_bytes, step.forward_bytes, loss, **held))
            moments.append(_moment("gate update, backward", step.backward_bytes, 0, 0, **held))
        if plan.method == "sleb":  # of TRSP's own trials the gates' update takes more
            tokens = plan.batch_size * recipe.calibration.context_length
            entering = len(self.counts.layers) * tokens * self.config.hidden_size * self._width(recipe)
            trial = moments.pop()
            moments.append(trial.model_copy(update={"activations_bytes": trial.activations_bytes + entering}))
        if plan.method == "fold":
            moments.append(self._fold("trial folds", recipe, plan.batch_size, SHORTLIST, **held))
        return moments

    def _measuring(self, recipe: Recipe, batch_size: int, **held: int) -> Moment:
        """Held-out loss, without gradients."""
        step = self._rehearsed(recipe, batch_size, measuring_step)
        loss = self._loss_bytes(recipe, batch_size)
        return _moment("held-out loss", step.kept_bytes, step.forward_bytes, loss, **held)

    # -- stage 2 -------------------------------------------------------------------------------------------------------

    def _transfer(self, recipe: Recipe) -> list[Moment]:
        settings = recipe.transfer
        held = {"weights_bytes": self._weights_bytes(recipe), "teacher_bytes": self._teacher_bytes(recipe)}
        moments = [self._measuring(recipe, settings.forward_batch, **held)]
        if recipe.calibration.self_generated:
            moments.append(self._writing(recipe))
        if settings.closed_form == "span":
            together = min(self._spans(recipe), spans_at_a_time(self._fold_dim, self.config.hidden_size))
            fold = self._fold("fold", recipe, settings.forward_batch, together, **held)
            dense = sum(self.counts.layers) * self._width(recipe) if settings.form == "anneal" else 0  # kept meanwhile
            moments.append(fold.model_copy(update={"refit_bytes": fold.refit_bytes + dense}))
        if settings.closed_form == "layers":
            moments.append(self._refit(recipe, **held))
        if settings.closed_form != "none" and settings.form == "anneal":
            copies = sum(self.counts.layers) * self._width(recipe) + self._moves_bytes(recipe)
            moments.append(Moment(name="refitted weights beside the dense", refit_bytes=copies, **held))
        if settings.form != "none":
            moments += self._training(recipe, held)
        if self.device == "cpu":
            moments.append(self._saving(recipe))
        return moments

    def _saving(self, recipe: Recipe) -> Moment:
        """The pruned model in its stored dtype, whatever it trained in, and a shard of it, which is copied whole."""
        saved = self._stored_dtype.itemsize * self._pruned_weights(recipe)
        return Moment(name="saving", weights_bytes=saved, activations_bytes=min(saved, SHARD_BYTES))

    def _writing(self, recipe: Recipe) -> Moment:
        """The dense model writes text: its KV cache, of one layer twice as it grows, and next-token distributions."""
        length, layers = recipe.calibration.context_length, len(self.counts.layers)
        windows = math.ceil(recipe.calibration.self_generated * recipe.calibration.max_windows)
        batch = min(math.ceil(windows / USUAL_SHARE), writing_batch_size(length))
        per_token = cache_per_token(self.config) if hasattr(self.config, "num_attention_heads") else 0  # Mamba's state
        cache = (layers + 1) * batch * length * per_token * self._width(recipe)
        scores = WRITING_SCORES * 4 * batch * self.config.vocab_size
        return Moment(
            name="text by the dense model",
            weights_bytes=self._weights_bytes(recipe),
            activations_bytes=cache,
            loss_bytes=scores,
        )

    def _training(self, recipe: Recipe, held: dict[str, int]) -> list[Moment]:
        """The highs of a step: when the forward pass is done, on the way back, and when the optimiser has its turn."""
        settings, gradients = recipe.transfer, self._gradients_bytes(recipe)
        step = self._rehearsed(recipe, settings.forward_batch, transfer_step, settings, self._num_dropped(recipe))
        held = {**held, "optimizer_bytes": self._optimizer_bytes(recipe), "refit_bytes": self._moves_bytes(recipe)}
        # The loss works out the head's gradient while it has the logits, and adds to it slice by slice.
        head = 0 if settings.train == "layers" else 2 * self.counts.lm_head * self._width(recipe)
        slices = SLICES + (TEACHER_SLICES if settings.kl_weight else 0)
        loss = self._loss_bytes(recipe, settings.forward_batch, slices) + head
        # Gradients come into being as activations go; the last step's are gone before the forward pass, those of a
        # step's earlier passes are not.
        arisen = min(gradients, step.backward_bytes)
        back = step.backward_bytes - arisen
        earlier = gradients if settings.forward_batch < settings.batch_size else 0
        forward = _moment("forward", step.kept_bytes, step.forward_bytes, loss, **held)
        return [
            forward.model_copy(update={"gradients_bytes": earlier}),
            Moment(
                name="backward", gradients_bytes=max(arisen, earlier), activations_bytes=back, loss_bytes=head, **held
            ),
            Moment(name="optimiser step", gradients_bytes=gradients, **held),
        ]

    def _trained(self, recipe: Recipe) -> int:
        """Parameters that get gradients and optimiser state."""
        settings, layers = recipe.transfer, len(self.counts.layers)
        # Layers that were removed first get none; the others' are there until their gate has closed.
        share = (layers - self._num_dropped(recipe)) / layers if settings.form == "train" else 1
        if settings.lora_rank is not None:  # rank x (in + out) a linear module; Hu et al., arXiv 2106.09685
            ends = sum(inputs + outputs for inputs, outputs, _ in self._linear)
            return math.ceil(settings.lora_rank * ends * layers * share)
        others = self.counts.total - sum(self.counts.layers) if settings.train == "all" else 0
        return math.ceil(sum(self.counts.layers) * share) + others

    def _gradients_bytes(self, recipe: Recipe) -> int:
        width = 4 if recipe.transfer.lora_rank is not None else self._width(recipe)  # peft keeps adapters in fp32
        return self._trained(recipe) * width

    def _optimizer_bytes(self, recipe: Recipe) -> int:
        """Two moments a parameter, and LoRA's adapters themselves."""
        adapters = self._gradients_bytes(recipe) if recipe.transfer.lora_rank is not None else 0
        if recipe.transfer.optimizer == "adamw-8bit":
            return adapters + math.ceil(2 * self._trained(recipe) * MOMENT_8BIT_BYTES)
        return adapters + 2 * self._gradients_bytes(recipe)

    def _teacher_bytes(self, recipe: Recipe) -> int:
        """The dense model's hidden states, of which a GPU has a batch's; its LM head where the model's own learns."""
        settings, windows = recipe.transfer, self._taught_windows(recipe)
        if not windows:
            return 0
        states = self._states_bytes(recipe, windows if self.device == "cpu" else settings.forward_batch)
        return states + (self.counts.lm_head * self._width(recipe) if settings.train == "all" else 0)

    def _taught_windows(self, recipe: Recipe) -> int:
        """Windows whose dense hidden states are kept, in main memory."""
        settings = recipe.transfer
        if not settings.kl_weight or settings.form == "none":
            return 0
        return min(recipe.calibration.max_windows, settings.steps * settings.batch_size)

    def _states_bytes(self, recipe: Recipe, windows: int) -> int:
        """In bf16 (training/teacher.py)."""
        width: int = self.config.hidden_size
        return 2 * windows * recipe.calibration.context_length * width

    def _loss_bytes(self, recipe: Recipe, batch_size: int, slices: int = SLICES) -> int:
        """Slices of logits, the last hidden states and their gradient, and the head in bf16 under autocast."""
        tokens, width = batch_size * recipe.calibration.context_length, self._width(recipe)
        logits = min(SLICE_BYTES[self.device], 4 * tokens * self.config.vocab_size)
        states = 2 * tokens * self.config.hidden_size * width
        cast = 2 * self.counts.lm_head if self._autocast(recipe) and width > 2 else 0
        total: int = slices * logits + states + cast
        return total

    # -- both ----------------------------------------------------------------------------------------------------------

    def _fold(self, name: str, recipe: Recipe, batch_size: int, spans: int, **held: int) -> Moment:
        """Normal equations of spans, (dim x dim) and (dim x hidden), and what solving or filling one takes."""
        hidden, dim = self.config.hidden_size, self._fold_dim
        tokens = batch_size * recipe.calibration.context_length
        filling = dim * dim + tokens * (3 * dim + 4 * hidden)  # a batch's own product, its features and its residual
        solving = 2 * dim * dim + 2 * dim * hidden
        equations = spans * dim * (dim + hidden) + max(filling, solving)
        step = self._rehearsed(recipe, batch_size, measuring_step)
        return Moment(name=name, activations_bytes=step.forward_bytes, refit_bytes=DOUBLE * equations, **held)

    @property
    def _fold_dim(self) -> int:
        """Most features that a fold is fitted to."""
        hidden = self.config.hidden_size
        return max((inputs + bias for inputs, outputs, bias in self._linear if outputs == hidden), default=hidden)

    def _refit(self, recipe: Recipe, **held: int) -> Moment:
        """Normal equations of a group of modules, twice, and solving them; on a CPU the states of all windows too."""
        equations = max(5 * inputs * inputs + 6 * inputs * outputs for inputs, outputs, _ in self._linear)
        states = self._streams_bytes(recipe) if self.device == "cpu" else 0
        step = self._rehearsed(recipe, recipe.transfer.forward_batch, measuring_step)
        size = DOUBLE * equations + states + self._moves_bytes(recipe)
        return Moment(name="refit", activations_bytes=step.forward_bytes, refit_bytes=size, **held)

    def _streams_bytes(self, recipe: Recipe) -> int:
        """A refit's states of all windows, in main memory (closed_form/layers.py: Streams)."""
        tokens = recipe.calibration.max_windows * recipe.calibration.context_length
        inner = sum(outputs for _, outputs, _ in self._linear)
        streams: int = 3 * self.config.hidden_size + inner
        return tokens * streams * self._width(recipe)

    def _moves_bytes(self, recipe: Recipe) -> int:
        """What annealing a refit holds: the way from the dense to the refitted weights, of all that was refitted."""
        settings = recipe.transfer
        if settings.closed_form == "none" or settings.form != "anneal":
            return 0
        folded = self._spans(recipe) * max(inputs * outputs for inputs, outputs, _ in self._linear)
        held = 1 if self._width(recipe) == FLOAT_BYTES["fp32"] else 2  # what rounding keeps back, too
        return held * (sum(self.counts.layers) if settings.closed_form == "layers" else folded) * self._width(recipe)

    def _spans(self, recipe: Recipe) -> int:
        """Runs of layers that go; before they are chosen, the most there can be."""
        if self.dropped is not None:
            return sum(layer - 1 not in self.dropped for layer in self.dropped)
        if recipe.plan.method in ("uidl", "fold"):
            return 1
        count = self._num_dropped(recipe)
        return min(count, len(self.counts.layers) - count)

    def _num_dropped(self, recipe: Recipe) -> int:
        return parse_drop(recipe.drop, len(self.counts.layers)) if self.dropped is None else len(self.dropped)

    def _width(self, recipe: Recipe) -> int:
        size: int = TRAINING_DTYPES[recipe.weights].itemsize
        return size

    def _weights_bytes(self, recipe: Recipe) -> int:
        total: int = self.counts.total * self._width(recipe) + self._buffers_bytes
        return total

    def _rehearsed(self, recipe: Recipe, batch_size: int, step: Step, *options: Any) -> Rehearsal:
        length = recipe.calibration.context_length
        return self._rehearse(recipe.weights, self._autocast(recipe), batch_size, length, step, *options)

    def _autocast(self, recipe: Recipe) -> bool:
        return recipe.autocast == "auto" and self.fast_bf16

    @cached_method
    def _rehearse(
        self, weights: str, autocast: bool, batch_size: int, length: int, step: Step, *options: Any
    ) -> Rehearsal:
        shape = (batch_size, length)
        try:
            dtype, work = TRAINING_DTYPES[weights], functools.partial(step, *options)
            return rehearse(self.config, dtype, autocast, shape, work, self.device)
        except TrspError:
            raise
        except Exception:  # of the model's own code, for which it is no mistake to want data
            self.at_least = True
            return Rehearsal(kept_bytes=0, forward_bytes=0, backward_bytes=0)


def _moment(name: str, kept: int, highest: int, loss: int, **held: int) -> Moment:
    """A moment that holds what was kept and the loss, or had more than that on the way there."""
    return Moment(name=name, activations_bytes=max(kept, highest - loss), loss_bytes=loss, **held)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _shape(module: nn.Module) -> tuple[int, int, int]:
    """Inputs, outputs and whether there is a bias (1 or 0)."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf, 1
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features, int(module.bias is not None)
