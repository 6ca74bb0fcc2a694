"""One learnable scalar per layer, in the paper's form and in the residual-branch form.

Source: TRSP, arXiv 2505.18232, section 3.1 (the output form). The branch form gates what a layer *adds*:

    output  y = g * f(h)            the paper's; gates compound along a pre-norm residual stream
    branch  y = h + g * (f(h) - h)  1 is the dense model, 0 is the removed layer, both to the last bit
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers, forward_replaced, layer_input, layer_output, with_layer_output

GateForm = Literal["branch", "output"]


class LayerGates:
    """Gates attached to a model's layers for the length of a `with` block.

    values: (num_layers,) float32 parameter, all 1 at the start.
    closed: layers that are skipped altogether, as if removed; they cost no time.
    changes: layer -> f(h) - h of the last forward, for the layers in `watched`; (batch, sequence, hidden).
    entering: layer -> what entered it in the last forward that reached it, for the layers that are its keys.
    start: where a forward begins, at 0 or at a closed layer in `entering`: the layers before are passed over.
    """

    def __init__(self, model: PreTrainedModel, form: GateForm = "branch") -> None:
        self.form = form
        self._layers = decoder_layers(model)
        device = next(model.parameters()).device
        self.values = torch.nn.Parameter(torch.ones(len(self._layers), device=device))
        self.closed: set[int] = set()
        self.watched: set[int] = set()
        self.changes: dict[int, torch.Tensor] = {}
        self.entering: dict[int, torch.Tensor | None] = {}
        self.start = 0
        self._returned: dict[int, torch.Tensor | tuple[Any, ...]] = {}
        self._attached = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._attached.enter_context(forward_replaced(self._layers, self._gated))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attached.close()
        self.changes.clear()

    @property
    def open(self) -> list[int]:
        """Layers that are not closed, in order."""
        return [index for index in range(len(self._layers)) if index not in self.closed]

    def reset(self) -> None:
        """Set every gate back to 1; closed layers stay closed."""
        with torch.no_grad():
            self.values.fill_(1.0)

    def _gated(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._forward, index, forward)

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)  # (batch, sequence, hidden)
        passed_over, kept = index < self.start, self.entering.get(index)
        if index == self.start and kept is not None:
            hidden = kept
        elif index in self.entering and not passed_over:
            self.entering[index] = hidden
        if (index in self.closed or passed_over) and index in self._returned:
            return with_layer_output(self._returned[index], hidden)
        output = forward(*args, **kwargs)
        # What a layer returns beside the hidden states, with the tensors left out, so that a closed layer
        # can answer in the same form without being computed.
        self._returned[index] = (None,) * len(output) if isinstance(output, tuple) else hidden.new_empty(0)
        if index in self.closed:
            return with_layer_output(self._returned[index], hidden)
        result = layer_output(output)
        if index in self.watched:
            self.changes[index] = result - hidden
        gate = self.values[index].to(result.dtype)
        # lerp is exact at both ends: 1 returns the layer's output, 0 its input.
        gated = gate * result if self.form == "output" else torch.lerp(hidden.to(result.dtype), result, gate)
        return with_layer_output(output, gated)
