"""A removed span folded into one projection of the layer before it: new weights, at no cost at run time.

Source: ReplaceMe, Shopkhoev et al. 2025, arXiv 2505.02819 (least-squares form); mts-ai/ReplaceMe, `lstsq.py`. The last
kept layer before the span returns Y + U W: U enters its output projection (`down_proj`, `fc2`, ...) with weight W, Y is
everything else. With X the hidden states that leave the span, the new weight is W + S,

    S = argmin ||U S - R||^2 + ridge ||S||^2,    R = X - (Y + U W)

ReplaceMe maps the projection's output, W T: the special case S = W (T - I), with hidden x hidden unknowns. Refitting
from U has intermediate x hidden of them at the same run-time cost and was 8 to 11% better on SmolLM2-135M.
The ridge pulls towards S = 0, the plain removal, so text that says nothing about a direction leaves it as it was. In a
parallel-residual layer U W is still added to the stream, so nothing changes; a bias is one more row of S.

The attention sink is treated apart: for sinks R = 0, so they leave the span as plain removal lets them, and the ridge
follows the scale of the other tokens. Why (SmolLM2-135M, loss on held-out text, dense 3.32 nats): layer 11 writes a
state of norm 25,500 at position 0, where the median is 135, and 18 layers then turn it by less than 1%. Left out of
the fit, the map is free in that direction and layers 12-19 cost 10.84 instead of 4.04: the sink comes out as noise, on
which every later token attends. Fitted to its true R, the map is ruined wherever the span holds the layer that writes
the sink (10-17: 7.4 to 8.9, against 5.5 this way), since no small M can be mapped to a massive state.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import ModelError
from trsp_deploy.tools.closed_form.equations import NormalEquations, check_tokens, sink_positions
from trsp_deploy.tools.closed_form.hidden_states import last_inputs, visit_layers
from trsp_deploy.tools.closed_form.layer_modules import PROBE_TOKENS, Group, add_to_weights, last_writer, layer_calls

RIDGE = 0.1  # relative to the mean square of the features over ordinary tokens
EQUATIONS_BYTES = 4 * 10**9  # of normal equations at a time; more spans than fit take a pass over the windows each time


@dataclass(frozen=True)
class SpanFit:
    """The equations that fold one span into the layer before it."""

    kept: int  # the layer that the map is folded into
    last: int  # last layer of the span
    equations: NormalEquations  # of the kept layer's output projection

    @property
    def projection(self) -> Group:
        """The module whose output the kept layer adds to the residual stream last: its weights become others."""
        return self.equations.group

    def add(self, entered: torch.Tensor, kept_out: torch.Tensor, span_out: torch.Tensor) -> None:
        """Take in a batch: U (tokens in any shape, width), Y + U W and X, both (batch, sequence, hidden)."""
        self.equations.add(entered, kept_out, span_out, sink_positions(kept_out) | sink_positions(span_out))


def fold_dropped_layers(
    model: PreTrainedModel,
    dropped: Sequence[int],
    windows: torch.Tensor,
    batch_size: int,
    ridge: float = RIDGE,
    autocast: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """Fold each run of consecutive `dropped` layers into the kept layer before it, in place; nothing is removed yet.

    model: the dense model. windows: (windows, sequence) int64, one forward pass as far as the last run, under
    `autocast`, or several where the equations of all runs together are too large; they are gathered and solved in
    fp64. Every run is fitted to the dense model's states, so several runs do not correct each other's error. A run from
    layer 0 on has nothing before it and is not folded: it goes as in a plain removal. Raises what `foldable_spans`
    does.
    """
    projections = foldable_spans(model, dropped, windows)
    # From the last one on: what is written into a layer changes no state that an earlier span is fitted to.
    waiting = sorted(projections)
    while waiting:
        count = spans_at_a_time(projections[waiting[-1]].features, model.config.hidden_size)
        together = {span: projections[span] for span in waiting[-count:]}
        for fit in fit_spans(model, together, windows, batch_size, autocast):
            write_fold(fit, ridge)
        del waiting[-count:]


def foldable_spans(
    model: PreTrainedModel, dropped: Sequence[int], windows: torch.Tensor
) -> dict[tuple[int, int], Group]:
    """The runs (first, last) of `dropped` that have a layer before them, each with that layer's output projection.

    Raises TextError when windows (windows, sequence) hold too few tokens, ModelError when the architecture cannot be
    folded.
    """
    return projections_before(model, [run for run in runs(dropped) if run[0] > 0], windows)


def projections_before(
    model: PreTrainedModel, spans: Sequence[tuple[int, int]], windows: torch.Tensor
) -> dict[tuple[int, int], Group]:
    """The output projection of the layer before each span (first, last); raises what `foldable_spans` does."""
    if spans:
        check_tokens(windows, model.config.hidden_size, "fit a projection", fewest_windows=1, ample=32)
    return {span: output_projection(model, span[0] - 1, windows[:2, :PROBE_TOKENS]) for span in spans}


def spans_at_a_time(features: int, hidden: int) -> int:
    """How many spans' normal equations, (features x features + hidden) in fp64, are held together; at least one."""
    return max(1, EQUATIONS_BYTES // (8 * features * (features + hidden)))


def runs(dropped: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive layers as (first, last): [4, 13, 14] -> [(4, 4), (13, 14)]."""
    groups = itertools.groupby(enumerate(sorted(dropped)), key=lambda pair: pair[1] - pair[0])
    members = [[layer for _, layer in group] for _, group in groups]
    return [(group[0], group[-1]) for group in members]


def fit_spans(
    model: PreTrainedModel,
    projections: Mapping[tuple[int, int], Group],
    windows: torch.Tensor,
    batch_size: int,
    autocast: contextlib.AbstractContextManager[None] | None = None,
) -> list[SpanFit]:
    """Gather the normal equations of every span (first, last) in one pass over windows (windows, sequence).

    projections: by span, that of the layer before it.
    Memory: one intermediate x intermediate matrix in float64 a span, 1 GB each at a width of 11,008.
    """
    fits = [
        SpanFit(first - 1, last, NormalEquations.empty(projection, torch.float64))
        for (first, last), projection in projections.items()
    ]
    kept_out: dict[int, torch.Tensor] = {}
    # The projection was found in full precision: in less, what a layer adds is not to be told from what it rounds.
    with (
        last_inputs({fit.kept: fit.projection.modules[0] for fit in fits}) as entered,
        autocast or contextlib.nullcontext(),
    ):

        def visit(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
            for fit in fits:
                if index == fit.kept:
                    kept_out[index] = leaving
                elif index == fit.last:
                    fit.add(entered[fit.kept], kept_out[fit.kept], leaving)

        visit_layers(model, windows, batch_size, visit, "fold: fit", last=max(fit.last for fit in fits))
    return fits


def write_fold(fit: SpanFit, ridge: float) -> None:
    """Add S to the projection's weight, and its last row to the bias where there is one."""
    add_to_weights(fit.projection.modules, fit.equations.solve(ridge))


@contextlib.contextmanager
def folded(fit: SpanFit, ridge: float) -> Iterator[None]:
    """Fold for the length of a `with` block and put the very same weights back."""
    (module,) = fit.projection.modules
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    try:
        write_fold(fit, ridge)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(before[name])


def output_projection(model: PreTrainedModel, index: int, probe: torch.Tensor) -> Group:
    """Find the module whose output layer `index` adds to the residual stream last; probe: a few (batch, sequence) ids.

    Raises ModelError with one line when the layer cannot be folded into (`layer_modules.py` says when).
    """
    found = last_writer(decoder_layers(model)[index], layer_calls(model, probe)[index])
    if found is None:
        raise ModelError(
            f"{type(model).__name__} cannot be folded: layer {index} does not end by adding a linear module's output "
            "to the residual stream; the other methods work"
        )
    return found
