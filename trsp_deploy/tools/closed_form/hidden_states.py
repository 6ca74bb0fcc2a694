"""Hidden states on their way through the layers, shown to a visitor as they pass and kept by nobody.

visit_layers(model, windows, batch_size, lambda index, entering, leaving: ..., "block influence")
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder import body, decoder_layers, layer_input, layer_output
from trsp_deploy.tools.progress import Meter

# (layer index, entering (batch, sequence, hidden), leaving (batch, sequence, hidden))
Visitor = Callable[[int, torch.Tensor, torch.Tensor], None]


@torch.no_grad()
def visit_layers(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int,
    visit: Visitor,
    description: str,
    last: int | None = None,
) -> None:
    """Run `windows` (windows, sequence) through the model once and call `visit` at every layer of every batch.

    Layers come in the order in which they run: the last layer's call is the last of its batch. The LM head is not
    computed, since no visitor sees its logits, and neither are layers behind `last`, where it is given.
    """
    device = next(model.parameters()).device
    with contextlib.ExitStack() as hooks, Meter(description, len(windows)) as meter:
        for index, layer in enumerate(decoder_layers(model)):
            shown = functools.partial(_show, visit, index)
            hooks.enter_context(layer.register_forward_hook(shown, with_kwargs=True))
        if last is not None:  # hooks run in their order: after the visitor's
            hooks.enter_context(decoder_layers(model)[last].register_forward_hook(_stop))
        for part in windows.split(batch_size):
            with contextlib.suppress(_Stopped):
                body(model)(input_ids=part.to(device), use_cache=False)
            meter.advance(by=len(part))


class _Stopped(Exception):
    """No layer further on is looked at."""


def _stop(layer: nn.Module, args: tuple[Any, ...], output: Any) -> NoReturn:
    raise _Stopped


def _show(
    visit: Visitor, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    visit(index, layer_input(args, kwargs), layer_output(output))


@contextlib.contextmanager
def last_inputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, the yielded dict holds what entered each module last, under the module's key."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(key: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[key] = args[0]

    with contextlib.ExitStack() as hooks:
        for key, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(keep, key)))
        yield inputs
        inputs.clear()
