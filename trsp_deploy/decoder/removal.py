"""Layers removed, and the proof that it was only that.

A model rebuilt from the cut config must have the kept layers' weights and attributes, and the logits of the dense model
with the dropped layers skipped.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder.config import cut_config
from trsp_deploy.decoder.layers import (
    decoder_layers,
    kept_layers,
    layer_input,
    layer_list_place,
    layer_output,
    with_layer_output,
)
from trsp_deploy.decoder.loading import meta_model
from trsp_deploy.errors import ModelError, one_line, passes_through

PROBE_TOKENS = 16
# Largest difference of a probe's logits over their standard deviation. The two models run the same operations on the
# same weights: 0 was measured for every family. The rest is for a GPU that adds in another order, by rounding step.
PROBE_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.02}
FULL_PROBE_TOLERANCE = 1e-3
# What a model's own code raises where it is called as it was not made for.
CANNOT_RUN = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def check_prunable(model: PreTrainedModel) -> None:
    """Raise ModelError unless this model's layers can be gated and removed; cheap, for a call before any training.

    Layers must run once each, in order, and map hidden states to hidden states; then the first, the middle and the last
    layer are each removed by way of trial. The first or the last may be one of a kind (`fixed_ends`); where the middle
    one cannot go either, few sets of layers could. A whole plan is for `check_removal`.
    """
    name, layers = type(model).__name__, decoder_layers(model)
    try:
        calls = _layer_calls(model, layers)
    except CANNOT_RUN as problem:
        if passes_through(problem):
            raise
        raise ModelError(
            f"{name} cannot run on token ids alone, or not from a KV cache ({one_line(problem)[:300]})"
        ) from problem
    if [index for index, _ in calls] != 3 * list(range(len(layers))) or not all(same for _, same in calls):
        raise ModelError(
            f"{name}: its layers do not each run once, in order, from hidden states to hidden states of the same "
            "shape; this architecture is not supported"
        )
    if len(layers) > 1:
        tried = [(index, _why_fixed(model, index)) for index in sorted({0, len(layers) // 2, len(layers) - 1})]
        problems = [problem for _, problem in tried if problem is not None]
        if problems and (len(problems) == len(tried) or dict(tried)[len(layers) // 2] is not None):
            raise problems[0]


def fixed_ends(model: PreTrainedModel) -> frozenset[int]:
    """The first and the last layer where they cannot go alone, as one of another kind (ModernBERT's first)."""
    ends = {0, len(decoder_layers(model)) - 1}
    return frozenset(index for index in ends if len(ends) > 1 and _why_fixed(model, index) is not None)


def _why_fixed(model: PreTrainedModel, index: int) -> ModelError | None:
    """What keeps a layer from being removed alone; None where nothing does."""
    try:
        check_removal(model, [index])
    except ModelError as problem:
        return problem
    return None


@torch.no_grad()
def _layer_calls(model: PreTrainedModel, layers: nn.ModuleList) -> list[tuple[int, bool]]:
    """Which layer ran in the probe's three passes, and whether what left it had the shape of what entered."""
    calls: list[tuple[int, bool]] = []
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def note(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                calls.append((index, layer_output(output).shape == layer_input(args, kwargs).shape))

            hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        _probe_logits(model)
    return calls


def remove_layers(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Delete layers in place: the list, every layer number kept in a module, the layer count and per-layer lists.

    dropped: indices of the dense model. Raises ModelError as `check_removal` does, with the model untouched.
    """
    numbers = _checked_numbers(model, dropped)
    parent, name = layer_list_place(model)
    layers = getattr(parent, name)
    kept = kept_layers(dropped, len(layers))
    for (old, path, attribute), number in numbers.items():
        # The KV cache is addressed by these; a stale one exports without a word and fails at run time.
        setattr(layers[old].get_submodule(path), attribute, number)
    setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
    cut_config(model.config, kept, len(layers))


def check_removal(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Raise ModelError, one line, when the model would not survive the removal of `dropped`; the model is unchanged.

    The model is rebuilt twice, from its config and from the cut one as a reload would do, with the weights shared: that
    costs three forward passes over PROBE_TOKENS tokens each and no memory to speak of. Refused are configs that do not
    describe the weights, layers that change with their number, and layers that use the KV of one that goes.
    """
    _checked_numbers(model, dropped)


# (layer of the dense model, path of a module inside it, attribute)
Place = tuple[int, str, str]


def _checked_numbers(model: PreTrainedModel, dropped: Sequence[int]) -> dict[Place, int]:
    """Check a removal and return the layer numbers that it changes, with their new values."""
    everything = range(len(decoder_layers(model)))
    kept = kept_layers(dropped, len(everything))
    try:
        dense, cut = meta_model(copy.deepcopy(model.config), model.dtype), _reloaded_meta_model(model, kept)
        _share_weights(model, everything, dense)
        _share_weights(model, kept, cut)
        numbers = _changed_numbers(decoder_layers(dense), decoder_layers(cut), kept)
        _check_same_function(dense, cut, kept)
    except ModelError as problem:
        gone = ", ".join(str(index) for index in everything if index not in kept)
        raise ModelError(
            f"{type(model).__name__} without layers {gone}: {problem}; name other layers in a plan (--plan), or take "
            "another architecture"
        ) from problem
    return numbers


def _reloaded_meta_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """What a reload would make of the cut model, still without weights."""
    config = copy.deepcopy(model.config)
    try:
        cut_config(config, kept, len(decoder_layers(model)))
        # Through a file, as a reload: some configs recompute their patterns from a number and drop what is the default.
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            reloaded = type(config).from_pretrained(folder)
        reloaded.name_or_path = config.name_or_path  # where code of its own lies
        return meta_model(reloaded, model.dtype)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as problem:
        raise ModelError(f"its config cannot describe what is left ({one_line(problem)})") from problem


def _share_weights(model: PreTrainedModel, kept: Sequence[int], skeleton: PreTrainedModel) -> None:
    """Give `skeleton` the very weights of the model with its `kept` layers; ModelError when it has room for others."""
    parent, list_name = layer_list_place(model)
    layers = getattr(parent, list_name)
    setattr(parent, list_name, nn.ModuleList(layers[index] for index in kept))
    weights = model.state_dict()
    setattr(parent, list_name, layers)
    actual = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            is_, by_config = actual.get(name, "absent"), expected.get(name, "absent")
            raise ModelError(f"{name} is {is_} and by the config would be {by_config}")
    skeleton.load_state_dict(weights, assign=True)
    skeleton.to(model.device)


def _changed_numbers(dense: nn.ModuleList, cut: nn.ModuleList, kept: Sequence[int]) -> dict[Place, int]:
    """Layer numbers among the attributes of the kept layers' modules: where they are, and what they become.

    Raises ModelError when any other attribute changes: a sliding window, a rotary embedding, a constant.
    """
    new_index = {old: new for new, old in enumerate(kept)}
    numbers: dict[Place, int] = {}
    for new, old in enumerate(kept):
        before, after = _attributes(dense[old]), _attributes(cut[new])
        for path, name in sorted(before.keys() | after.keys()):
            was, becomes = before.get((path, name)), after.get((path, name))
            if was == becomes:
                continue
            # A layer's own number or another layer's may follow the layer; True and False are no numbers.
            if type(was) is not int or type(becomes) is not int or new_index.get(was) != becomes:
                attribute = f"{path}.{name}".lstrip(".")
                raise ModelError(
                    f"layer {old}, as layer {new} of the rest, would have {attribute} {becomes}, not {was}"
                )
            numbers[old, path, name] = becomes
    return numbers


def _attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """(module's path, attribute) -> value, for what is neither tensor nor module; a module's class is one of them.

    Without transformers' own mark of what it has initialised, which is on loaded models and not on built ones.
    """
    return {
        (path, name): value
        for path, module in layer.named_modules()
        for name, value in [*vars(module).items(), ("class", type(module).__name__)]
        if name != "_is_hf_initialized" and (_is_plain(value) or (isinstance(value, dict) and _is_plain_dict(value)))
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_plain_dict(value: dict[Any, Any]) -> bool:
    """Such as Zamba2's adapters by layer number."""
    return bool(value) and all(map(_is_plain, (*value.keys(), *value.values())))


@torch.no_grad()
def _check_same_function(dense: PreTrainedModel, cut: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise ModelError unless the cut model has the logits of the dense one with its dropped layers skipped."""
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(dense)):
            if index not in kept:
                hooks.enter_context(layer.register_forward_hook(_skip, with_kwargs=True))
        wanted = _probe_logits(dense)
    try:
        found = _probe_logits(cut)
    except CANNOT_RUN as problem:  # a model of convolutions and attention that is left without either
        if passes_through(problem):
            raise
        raise ModelError(f"what is left does not run ({one_line(problem)[:300]})") from problem
    error, scale = (found - wanted).abs().max(), wanted.std()
    if not torch.isfinite(scale):
        raise ModelError("its logits are not finite on random tokens: the model overflows; try fp32 weights")
    if not error <= scale * PROBE_TOLERANCE.get(dense.dtype, FULL_PROBE_TOLERANCE):  # nan is no success
        raise ModelError(
            f"a kept layer computes something else under its new number: the logits would be {error / scale:.2g} "
            "standard deviations from those with the same layers skipped"
        )


def _skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the layer is computed, so that the KV cache has its entry, and adds nothing."""
    return with_layer_output(output, layer_input(args, kwargs))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Random token ids (1, PROBE_TOKENS), the same at every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)


def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (1, PROBE_TOKENS + 1, vocabulary) float32: a probe's, then its last token's again, from a KV cache."""
    ids = _probe(model)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    return torch.cat([whole, last], dim=1).float()
