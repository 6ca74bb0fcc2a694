"""Sequential refit: fit the kept layers to the dense model in closed form, one linear module after the other.

    refit_kept_layers(model, dropped, windows, batch_size=8)     # in place; remove_layers(model, dropped) comes after

From the layer before the first removed one onwards, each kept layer sees other states than it was trained on. Two
streams of states run through the model layer by layer: the dense model's, and the pruned one's with everything before
already refitted. In each kept layer, in the order in which they run, modules that share an input U (the pruned
stream's) get a weight W + S,

    S = argmin ||U S - R||^2 + ridge ||S||^2

where R is what the module lacks: for one that adds to the residual stream, the dense state that enters the next kept
layer minus what the layer returns now; for any other (query, key, value, gate, up), the dense module's own output minus
its output now. A layer is refitted after its dense weights have been used, so one model is enough. Nothing is added at
run time.

Mapping a removed span into the projection before it is ReplaceMe's idea (arXiv 2505.02819; `span.py`);
correcting each later module for the error of those before it is what GPTAQ (arXiv 2504.02692) does in quantisation.
Attention sinks are treated as in `span.py`: their R is 0. The ridge of each module is the one of RIDGES that
does best on windows held out from the fit, and a module that none of them improves there stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder import body, decoder_layers, kept_layers, layer_input
from trsp_deploy.errors import ModelError
from trsp_deploy.tools.closed_form.equations import NormalEquations, check_tokens, sink_positions
from trsp_deploy.tools.closed_form.layer_modules import (
    PROBE_TOKENS,
    Group,
    add_to_weights,
    layer_calls,
    linear_groups,
    watched,
)
from trsp_deploy.tools.progress import Meter

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # relative to the mean square of the features over ordinary tokens
HELD_OUT = 8  # one batch of this many is held out to choose the ridge


@torch.no_grad()
def refit_kept_layers(
    model: PreTrainedModel,
    dropped: Sequence[int],
    windows: torch.Tensor,
    batch_size: int,
    autocast: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """Refit, in place, every kept layer from the last one before the first of `dropped`; nothing is removed yet.

    model: the dense model. windows: (windows, sequence) int64; the cost is that of five forward passes over them at
    most. autocast: for the layers' own arithmetic; the equations are gathered in fp32 and solved in fp64.
    Memory beside the model: two states (windows, sequence, hidden) fp32 in main memory, and four intermediate x
    intermediate matrices in fp64 on the model's device. A layer 0 that is dropped leaves nothing before it to refit:
    the layers behind it take it all on.
    Raises TextError when the windows hold too few tokens, ModelError when a layer cannot be run on its own.
    """
    layers = decoder_layers(model)
    kept = kept_layers(dropped, len(layers))
    check_tokens(windows, model.config.hidden_size, "refit layers", fewest_windows=2, ample=64)
    batches = _whole_batches(windows, batch_size)
    streams = Streams(model, batches, autocast or contextlib.nullcontext())
    with Meter("refit", len(layers)) as meter:
        streams.leave_out(kept[0])
        for index, following in zip(kept, [*kept[1:], len(layers)], strict=True):
            if streams.parted or following > index + 1:
                streams.refit(index, following)
            else:
                streams.advance(index)
            meter.advance(f"layer {index}", by=following - index)


def _whole_batches(windows: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """At least two of them, one to fit to and one held out."""
    size = min(batch_size, len(windows) // 2)
    return windows[: len(windows) // size * size].split(size)


class Streams:
    """The dense and the pruned model's states in front of the same layer, batch by batch, in main memory."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[torch.Tensor], autocast: contextlib.AbstractContextManager[None]
    ) -> None:
        """batches: each (batch, sequence) int64, all of one shape, for which each layer's other arguments are kept."""
        self.parted = False  # until the first refit both are the same
        self._layers = decoder_layers(model)
        self._device = next(model.parameters()).device
        self._autocast = autocast
        self._calls = [call.without_states() for call in layer_calls(model, batches[0])]
        self._groups = [
            linear_groups(layer, call)
            for layer, call in zip(self._layers, layer_calls(model, batches[0][:, :PROBE_TOKENS]), strict=True)
        ]
        self._held_out = set(range(HELD_OUT - 1, len(batches), HELD_OUT)) or {len(batches) - 1}
        self._dense = [_entering(model, batch.to(self._device)).cpu() for batch in batches]
        self._pruned = self._dense

    def leave_out(self, first: int) -> None:
        """Send the dense stream alone through the layers in front of `first`, which are removed."""
        self._dense = [self._through(range(first), state) for state in self._dense]
        self.parted = first > 0

    def advance(self, index: int) -> None:
        """Send both streams through a layer in front of all cuts."""
        self._pruned = self._dense = [self._through([index], state) for state in self._dense]

    def refit(self, index: int, following: int) -> None:
        """Refit kept layer `index` to the dense states that enter `following`, and send both streams on."""
        # In front of the first cut the inner modules see what they always saw.
        groups = [group for group in self._groups[index] if group.writes or self.parted]
        targets, outputs = self._dense_pass(index, following, groups)
        for number, group in enumerate(groups):
            self._fit(index, group, targets if group.writes else outputs[number])
        self._pruned = [self._through([index], state) for state in self._pruned]
        self._dense, self.parted = targets, True

    def _dense_pass(
        self, index: int, following: int, groups: Sequence[Group]
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """The dense states that enter `following`, and what each inner group puts out in the dense layer `index`."""
        targets: list[torch.Tensor] = []
        outputs: list[list[torch.Tensor]] = [[] for _ in groups]
        with watched([module for group in groups for module in group.modules]) as watch:
            for state in self._dense:
                leaving = self._through([index], state)
                for group, kept in zip(groups, outputs, strict=True):
                    if not group.writes:
                        kept.append(_outputs(group, watch.outputs, leaving).cpu())
                targets.append(self._through(range(index + 1, following), leaving))
        return targets, outputs

    def _fit(self, index: int, group: Group, targets: Sequence[torch.Tensor]) -> None:
        """Refit one group to targets (batch, sequence, out), with everything before it in its final form."""
        fit, held_out = (NormalEquations.empty(group, torch.float32) for _ in range(2))
        with watched(group.modules) as watch:
            for number, (state, target) in enumerate(zip(self._pruned, targets, strict=True)):
                leaving, target = self._run(index, state.to(self._device)), target.to(self._device)
                now = leaving if group.writes else _outputs(group, watch.outputs, leaving)
                sinks = sink_positions(leaving) | (sink_positions(target) if group.writes else False)
                equations = held_out if number in self._held_out else fit
                equations.add(watch.inputs[group.modules[0]], now, target, sinks)
        solution = choose_solution(fit, held_out)
        if solution is not None:
            add_to_weights(group.modules, solution)

    def _run(self, index: int, state: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            return self._calls[index].run(self._layers[index], state)

    def _through(self, indices: Sequence[int] | range, state: torch.Tensor) -> torch.Tensor:
        state = state.to(self._device)
        for index in indices:
            state = self._run(index, state)
        return state.cpu()


def _outputs(group: Group, outputs: dict[nn.Module, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """What a group put out, side by side: (batch, sequence, out), also where a model flattens its tokens."""
    return torch.cat([outputs[module].reshape(*hidden.shape[:-1], -1) for module in group.modules], dim=-1)


def choose_solution(fit: NormalEquations, held_out: NormalEquations) -> torch.Tensor | None:
    """S in fp64 for the ridge that does best on the held-out tokens, fitted to all; None when none helps."""
    ridge = _best_ridge(fit, held_out)
    return None if ridge is None else (fit + held_out).solve(ridge)


def _best_ridge(fit: NormalEquations, held_out: NormalEquations) -> float | None:
    """The one of RIDGES whose fit lowers the error over the held-out tokens most; None where none lowers it."""
    values, vectors = torch.linalg.eigh(fit.gram)  # once for all ridges
    turned = vectors.T @ fit.cross

    def change(ridge: float) -> float:  # of the squared error over the held-out tokens
        solution = vectors @ (turned / (values.clamp(min=0) + fit.penalty(ridge))[:, None])
        return ((held_out.gram @ solution - 2 * held_out.cross) * solution).sum().item()

    changes = {ridge: change(ridge) for ridge in RIDGES}
    best = min(changes, key=changes.__getitem__)
    return best if changes[best] < 0 else None


class _Stopped(Exception):
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _entering(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The states (batch, sequence, hidden) that enter layer 0."""

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        raise _Stopped(layer_input(args, kwargs))

    try:
        with decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True):
            body(model)(input_ids=input_ids, use_cache=False)
    except _Stopped as stopped:
        return stopped.hidden
    raise ModelError(f"{type(model).__name__}: its first layer does not run, so it cannot be refitted")
