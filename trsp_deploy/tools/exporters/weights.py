"""A Hugging Face folder's weights while its model is exported: never all of them in memory.

model = build_skeleton(folder, torch.float16)     # can be traced; its weights take a few bytes each
read = open_weights(folder, model)
read("model.decoder.layers.0.fc1.weight")         # this one alone, from the folder
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from trsp_deploy.decoder import build_model, load_config, load_model
from trsp_deploy.errors import ModelError

Read = Callable[[str], torch.Tensor]


def build_skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's model in eval mode with one number, repeated, for each weight; its buffers are real."""
    from transformers.modeling_utils import no_init_weights  # elsewhere in transformers 5, which this is not for

    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = build_model(load_config(folder), dtype=dtype)
    model.config.dtype = dtype
    model.tie_weights()  # again: an empty weight that is assigned is copied
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    made: dict[nn.Parameter, nn.Parameter] = {}  # weights that are one stay one
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in made:
                number = torch.zeros((), dtype=weight.dtype)
                made[weight] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
            module.register_parameter(name, made[weight])
    quick = _WithoutProducts()  # in the model alone: the passes after tracing calculate with its constants
    model.register_forward_pre_hook(lambda *_: quick.begin())
    model.register_forward_hook(lambda *_: quick.end(), always_call=True)
    return model.eval()


class _WithoutProducts(TorchDispatchMode):
    """While it is entered a matrix product is zeros of the right shape: all that a trace asks of it.

    Of weights that are one number, repeated, BLAS would make matrices first; and fp16 products of a CPU are slow.
    """

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            left, right = args  # (rows, inner), (inner, columns)
        elif func is torch.ops.aten.addmm.default:
            _, left, right = args
        else:
            return func(*args, **(kwargs or {}))
        return left.new_zeros(left.shape[0], right.shape[1])


def open_weights(folder: Path, model: PreTrainedModel) -> Read:
    """A function that reads one of the model's weights or saved buffers by name, in the dtype that it has in the model.

    Where the folder calls weights what the model does, give or take the prefix of a model without its head, only what
    is asked for is read. Folders of other names are loaded whole, as transformers maps them. What is returned raises
    ModelError where a weight has not the shape that the config asks for.
    """
    files = _files(folder)
    places: dict[str, tuple[Path, str]] = {}
    for name, names in _aliases(model).items():
        key = next((key for key in _keys(names, model.base_model_prefix) if key in files), None)
        if key is None:
            return load_model(folder, dtype=model.dtype).state_dict().__getitem__
        places[name] = files[key], key
    state = model.state_dict()

    def read(name: str) -> torch.Tensor:
        path, key = places[name]
        with safe_open(path, framework="pt") as file:  # opened for one tensor: what is mapped counts as memory
            weight = file.get_tensor(key).to(state[name].dtype, copy=True)
        if weight.shape != state[name].shape:
            shapes = f"is {tuple(weight.shape)} and by the config would be {tuple(state[name].shape)}"
            raise ModelError(f"{path}: {key} {shapes}")
        return weight

    return read


def _files(folder: Path) -> dict[str, Path]:
    """The file that holds each stored tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {key: folder / name for key, name in json.loads(index.read_bytes())["weight_map"].items()}
    whole = folder / "model.safetensors"
    with safe_open(whole, framework="pt") as file:
        return dict.fromkeys(file.keys(), whole)


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """All names of the weight that a name stands for, a tied head's the embedding's first."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def _keys(names: list[str], prefix: str) -> Iterator[str]:
    yield from names
    for name in names:
        yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"
