"""A Hugging Face folder's weights while its model is exported: never all of them in memory.

model = build_skeleton(folder, torch.float16)     # can be traced; its weights take a few bytes each
read = open_weights(folder, model)
read("model.decoder.layers.0.fc1.weight")         # this one alone, from the folder
save(graph, out)                                  # whose weights are read so
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from trsp_deploy.decoder import build_model, cut_config, load_config, load_model, without_weights
from trsp_deploy.errors import ModelError
from trsp_deploy.recipe import Float

DTYPES: dict[Float, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
Read = Callable[[str], torch.Tensor]
ALIGNMENT = 65536  # bytes: external data that begins at a page is mapped instead of read


def build_skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's model in eval mode with one number, repeated, for each weight; its buffers are real."""
    model = quick_model(load_config(folder), dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def try_on_ends(folder: Path, attempt: Callable[[Any], None]) -> None:
    """Call `attempt` with the config of the folder's first layer and last, which stand for all; where that fails, with
    the whole one, for a model that is cut so may be none."""
    config = load_config(folder)
    ends, count = copy.deepcopy(config), config.num_hidden_layers
    try:
        cut_config(ends, sorted({0, count - 1}), count)
        attempt(ends)
    except Exception:  # whatever a config that is cut leads to, and what the whole one does too
        attempt(config)


def quick_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A config's model as `hollow_model`, whose matrix products are zeros."""
    model = hollow_model(config, dtype)
    quick = WithoutProducts()  # in the model alone: the passes after tracing calculate with its constants
    model.register_forward_pre_hook(lambda *_: quick.begin())
    model.register_forward_hook(lambda *_: quick.end(), always_call=True)
    return model


def hollow_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A config's model in eval mode with one number, repeated, for each weight; its buffers are real."""
    with without_weights():
        model = build_model(config, dtype=dtype)
    model.config.dtype = dtype
    model.tie_weights()  # again: an empty weight that is assigned is copied
    made: dict[nn.Parameter, nn.Parameter] = {}  # weights that are one stay one
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in made:
                number = torch.zeros((), dtype=weight.dtype)
                made[weight] = nn.Parameter(number.expand(weight.shape), requires_grad=False)
            module.register_parameter(name, made[weight])
    return model.eval()


class WithoutProducts(TorchDispatchMode):
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


def turn(graph: ir.Graph, matrices: Iterable[ir.Value]) -> set[str]:
    """Declare matrices that the graph only uses transposed in that form; returns their names.

    An optimiser would read them to transpose them, and hold them from then on.
    """
    turned = set()
    for value in matrices:
        nodes = value.consumers()
        if nodes and all(_turns(node) for node in nodes):
            assert value.name is not None and value.shape is not None
            for node in nodes:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)
            value.shape = ir.Shape(value.shape[::-1])
            turned.add(value.name)
    return turned


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (1, 0)


def save(graph: ir.Model, out: Path) -> None:
    """Write a graph to the file `out`, and its weights beside it, each of them read as it is written."""
    ir.save(graph, out, external_data=f"{out.name}_data", alignment=ALIGNMENT)


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
