"""How one layer is put together: which linear modules it has, in which order they run, which feed the residual stream.

Found by running the layer and by trying what was found, not by name, so that a new architecture needs no entry.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trsp_deploy.decoder import body, decoder_layers, layer_input, layer_output

PROBE_TOKENS = 16  # of a window that show how a layer is put together


@dataclass(frozen=True)
class LayerCall:
    """What a model called a layer with. Nothing but the states depends on the text, where nothing is padded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The states that the layer was called with, (batch, sequence, hidden)."""
        return layer_input(self.args, self.kwargs)

    def without_states(self) -> LayerCall:
        """The same call for other states of its shape, which `run` then needs; its own are given up."""
        none = self.hidden.new_empty(0)
        if self.args:
            return LayerCall((none, *self.args[1:]), self.kwargs)
        return LayerCall(self.args, {**self.kwargs, "hidden_states": none})

    def run(self, layer: nn.Module, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output (batch, sequence, hidden) for the call's own states, or for others of the same shape."""
        args, kwargs = self.args, self.kwargs
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs = {**kwargs, "hidden_states": hidden}
        return layer_output(layer(*args, **kwargs))


@dataclass(frozen=True)
class Group:
    """Linear modules that read one input; a module that adds to the residual stream is a group of its own."""

    modules: tuple[nn.Linear | Conv1D, ...]
    # The layer returns rest + scale * output, with 1 but for models with a residual multiplier (Granite); None where it
    # makes more of the output.
    scale: float | None = None

    @property
    def writes(self) -> bool:
        """Whether the output is added to the residual stream as it is."""
        return self.scale is not None

    @property
    def has_bias(self) -> bool:
        """Of all its modules, or of none."""
        return self.modules[0].bias is not None

    @property
    def features(self) -> int:
        """What an output is a linear map of: the modules' inputs, and a 1 where they have a bias."""
        return in_width(self.modules[0]) + self.has_bias

    @property
    def outputs(self) -> int:
        """Outputs of all modules side by side."""
        return sum(map(out_width, self.modules))


@dataclass
class Watch:
    """What entered and left some modules when they ran last, and how often each ran."""

    inputs: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    order: list[nn.Linear | Conv1D] = field(default_factory=list)

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """The modules' forward hook."""
        self.inputs[module], self.outputs[module] = args[0], output
        self.order.append(module)


def in_width(module: nn.Linear | Conv1D) -> int:
    """Number of input features."""
    return module.nx if isinstance(module, Conv1D) else module.in_features


def out_width(module: nn.Linear | Conv1D) -> int:
    """Number of output features."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


@torch.no_grad()
def add_to_weights(modules: Sequence[nn.Linear | Conv1D], solution: torch.Tensor) -> None:
    """Add S (inputs, outputs of all modules side by side) to the weights, and its last row to the biases, if any."""
    widths = [out_width(module) for module in modules]
    for module, part in zip(modules, solution.to(modules[0].weight.device).split(widths, dim=1), strict=True):
        if module.bias is not None:
            module.bias.copy_(module.bias.double() + part[-1])
            part = part[:-1]
        # Linear stores (out, in), Conv1D (in, out).
        module.weight.copy_(module.weight.double() + (part if isinstance(module, Conv1D) else part.T))


@torch.no_grad()
def layer_calls(model: PreTrainedModel, input_ids: torch.Tensor) -> list[LayerCall]:
    """Each layer's call in a forward pass over input_ids (batch, sequence) int64."""
    calls: dict[int, LayerCall] = {}

    def keep(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = LayerCall(args, kwargs)

    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(model)):
            hooks.enter_context(layer.register_forward_pre_hook(functools.partial(keep, index), with_kwargs=True))
        body(model)(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    return [calls[index] for index in sorted(calls)]


@contextlib.contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[Watch]:
    """Within the block, what enters and leaves the modules is kept."""
    watch = Watch()
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(watch.keep))
        yield watch


@torch.no_grad()
def linear_groups(layer: nn.Module, call: LayerCall) -> list[Group]:
    """The layer's linear modules in the order in which they run.

    call: a few tokens, in full precision. Modules that run more than once a call, for some of its tokens (experts), or
    that return more than their product (Llama 4's router) are left out.
    """
    with watched([module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]) as watch:
        call.run(layer)
    tokens = call.hidden.shape[:-1].numel()
    once = [
        module
        for module in watch.order
        if watch.order.count(module) == 1
        and watch.inputs[module].numel() == tokens * in_width(module)
        and isinstance(watch.outputs[module], torch.Tensor)
    ]
    scales = _writers(layer, call, once)
    groups: list[Group] = []
    for module in once:
        previous = groups[-1] if groups else None
        if (
            previous is not None
            and module not in scales
            and not previous.writes
            and watch.inputs[previous.modules[0]] is watch.inputs[module]
            and previous.has_bias == (module.bias is not None)
        ):
            groups[-1] = Group((*previous.modules, module))
        else:
            groups.append(Group((module,), scales.get(module)))
    return groups


def last_writer(layer: nn.Module, call: LayerCall) -> Group | None:
    """The module whose output the layer adds to the residual stream last; None when there is no such module."""
    writers = [group for group in linear_groups(layer, call) if group.writes]
    return writers[-1] if writers else None


def _writers(layer: nn.Module, call: LayerCall, modules: Sequence[nn.Linear | Conv1D]) -> dict[nn.Module, float]:
    """Scale of each module that adds to the residual stream.

    From the last to the first: with the later ones put to silence, what an earlier one adds comes out of the layer
    unchanged, as nothing is left that reads the stream behind it.
    """
    scales: dict[nn.Module, float] = {}
    with contextlib.ExitStack() as silence:
        for module in reversed(modules):
            if out_width(module) != call.hidden.shape[-1]:
                continue
            scale = _measured_scale(layer, module, call)
            if scale is not None:
                scales[module] = scale
                silence.enter_context(module.register_forward_hook(_zeros))
    return scales


def _zeros(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def _measured_scale(layer: nn.Module, module: nn.Linear | Conv1D, call: LayerCall) -> float | None:
    """The constant that the module's output is multiplied by on its way out of the layer; None when there is none.

    An amount added to the module's output must come out of the layer times one constant, with the rest unchanged. A
    norm behind the projection (OPT-350m, Gemma 2) or experts fail that.
    """
    plain = call.run(layer)
    # Of the size of an ordinary token's state, whatever the projection itself puts out (an idle one: zeros).
    amplitude = torch.linalg.vector_norm(plain.float(), dim=-1).median() / plain.shape[-1] ** 0.5
    added: list[torch.Tensor] = []

    def disturb(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        added.append(amplitude.to(output) * torch.randn(output.shape, generator=generator).to(output))
        return output + added[-1]

    with module.register_forward_hook(disturb):
        disturbed = call.run(layer)
    if len(added) != 1 or added[0].numel() != plain.numel():
        return None
    amount = added[0].reshape(plain.shape).double()
    change = disturbed.double() - plain.double()
    scale = ((change * amount).sum() / (amount * amount).sum()).item()
    error = torch.linalg.vector_norm(change - scale * amount, dim=-1)
    size = torch.linalg.vector_norm(plain.double(), dim=-1) + torch.linalg.vector_norm(amount, dim=-1)
    tolerance = max(1e-4, 4 * torch.finfo(plain.dtype).eps)  # half precision rounds the sum itself
    # Behind a norm nothing changes by more than it lets out, be that less than the tolerance: most of it is error then.
    explained = error.median() <= 0.5 * abs(scale) * torch.linalg.vector_norm(amount, dim=-1).median()
    return round(scale, 6) if scale > 0 and explained and bool((error <= tolerance * size).all()) else None
