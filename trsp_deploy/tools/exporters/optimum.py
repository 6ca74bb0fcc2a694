"""PyTorch to ONNX through Optimum's exporter, which traces the model as TorchScript.

The model is traced without its weights, which the graph then gets from the checkpoint one at a time, on their way to
the disk: nothing is ever held whole. Optimum's own validation only warns, so it is left out: `stages/parity.py` is the
check. What is replaced of it and of others while it works has its reason written beside the replacement; the releases
that fit are pinned.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import nn
from transformers import PreTrainedModel

from trsp_deploy.decoder import decoder_layers
from trsp_deploy.errors import ModelError, first_line, named, one_line, passes_through
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import Float
from trsp_deploy.tools.exporters.weights import (
    DTYPES,
    Read,
    build_skeleton,
    open_weights,
    quick_model,
    save,
    try_on_ends,
    turn,
)

OPSET = 18
TASK = "text-generation-with-past"
OTHER = "`--set export.exporter=dynamo` traces it with torch alone"


def installed() -> bool:
    """Whether Optimum's exporter is there; transformers 5 has none."""
    return importlib.util.find_spec("optimum") is not None and (
        importlib.util.find_spec("optimum.exporters.onnx") is not None
    )


def simplifies() -> bool:
    """Whether onnxslim is there, which simplifies the graph; Optimum does not ask for it."""
    return importlib.util.find_spec("onnxslim") is not None


def export(model: Path, precision: Float, opset: int, slim: bool, out: Path) -> str | None:
    """Write a Hugging Face folder's model to the file `out`, its weights beside it, and its config into out's folder.

    slim: onnxslim simplifies the graph; where it cannot, that stays as it was traced, and a line that says so comes
    back. Raises ModelError when Optimum cannot export the architecture, what it traced is not all of the model, or what
    came out is no valid graph.
    """
    network = build_skeleton(model, DTYPES[precision])
    with _as_model_error(model):
        traced = _trace(model, network, opset, out)
    read = open_weights(model, network)
    weights = network.state_dict().keys() & {value.name for value in traced.graph.inputs}
    matrices = {name for name in weights if network.state_dict()[name].ndim > 1}
    transposed = turn(traced.graph, [value for value in traced.graph.inputs if value.name in matrices])
    # Simplifying reads vectors (a norm's ones, a bias of zeros); matrices stay inputs meanwhile, which it leaves alone.
    _fill(traced.graph, weights - matrices, read, transposed)
    traced, note = _slimmed(traced) if slim else (traced, None)
    _fill(traced.graph, matrices, read, transposed)
    save(traced, out)
    try:
        onnx.checker.check_model(out)
    except onnx.checker.ValidationError as problem:
        advice = "`--set export.slim=false` leaves onnxslim out" if slim and note is None else OTHER
        raise ModelError(f"{model}: its graph is no valid ONNX ({first_line(problem)}); {advice}") from problem
    return note


def knows(model: Path) -> bool:
    """Whether Optimum's exporter, which has to be installed, has a way for a folder's type of model."""
    import optimum.exporters.onnx.model_configs  # noqa: F401  # registers them
    from optimum.exporters.tasks import TasksManager

    kind = read_json(model / "config.json", ModelError).get("model_type")
    try:
        found = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        return False
    return TASK in found


def check_traceable(model: Path, opset: int) -> None:
    """Raise ModelError where Optimum cannot trace the model; takes seconds, no weights, for a call before training."""

    def attempt(config: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _trace(model, quick_model(config, torch.float32), opset, Path(folder) / "model.onnx")

    with _as_model_error(model):
        try_on_ends(model, attempt)


@contextlib.contextmanager
def _as_model_error(model: Path) -> Iterator[None]:
    """Turn whatever an architecture that Optimum does not fit runs into, shapes among it, into a ModelError."""
    try:
        yield
    except Exception as problem:
        if passes_through(problem):
            raise
        reason = one_line(problem)[:200]
        raise ModelError(f"{model}: Optimum cannot export it to ONNX ({reason}); {OTHER}") from problem


def _check_whole(model: Path, network: PreTrainedModel, inputs: set[str | None]) -> None:
    """Raise ModelError where the traced graph lacks weights of layers, such as of experts that no token was sent to."""
    wanted: dict[nn.Parameter, list[str]] = {}  # a weight that is one by several names is traced under any of them
    for name, weight in network.named_parameters(remove_duplicate=False):
        wanted.setdefault(weight, []).append(name)
    inside = set(decoder_layers(network).parameters())
    missing = [names[0] for weight, names in wanted.items() if weight in inside and not inputs.intersection(names)]
    if missing:
        raise ModelError(
            f"{model}: Optimum's trace left out {len(missing)} weights of its layers, such as {missing[0]} (experts "
            "that the example sent no token to?), so that the graph is not the model"
        )


def _trace(model: Path, network: PreTrainedModel, opset: int, out: Path) -> ir.Model:
    """Write the graph with every weight as an input of the weight's name, and the model's config beside it.

    Returns the graph. Raises ModelError where it lacks some of the layers' weights, else whatever the exporter does.
    """
    # Loads half of transformers, and its loggers must be quiet before it speaks.
    from optimum.exporters.onnx import model_configs, model_patcher, onnx_export_from_model

    attention = model_patcher.original_scaled_dot_product_attention
    # Folding would multiply out weights, and inputs that are not kept as such are merged where they look alike.
    weightless = functools.partial(torch.onnx.export, export_params=False, keep_initializers_as_inputs=True)
    with (
        _replaced(model_patcher, "original_scaled_dot_product_attention", _additive_masks(attention)),
        _replaced(torch.onnx, "export", weightless),
        _never_bound(model_configs),
    ):
        network.config.use_cache = True
        onnx_export_from_model(
            network,
            out.parent,
            opset=opset,
            task=TASK,
            do_validation=False,
            no_post_process=True,  # of a graph with its weights: two equal ones become one
            do_constant_folding=False,
        )
    traced = ir.load(out)
    _check_whole(model, network, {value.name for value in traced.graph.inputs})
    return traced


def _slimmed(traced: ir.Model) -> tuple[ir.Model, str | None]:
    """The traced graph, simplified by onnxslim; as it is, and a line, where that fails, be it after a long training."""
    from onnxslim import slim
    from onnxslim.third_party.onnx_graphsurgeon.ir.tensor import Variable

    # Half of a traced graph says what the other half has said. onnxslim finds that too, in more time.
    CommonSubexpressionEliminationPass()(traced)
    try:
        with _replaced(Variable, "__eq__", _by_name_first(Variable.__eq__)):
            return ir.from_proto(slim(ir.to_proto(traced))), None
    except Exception as problem:  # of a library that knows many patterns; what it was given is whole still
        if passes_through(problem):
            raise
        return (
            traced,
            f"onnxslim cannot simplify the graph ({named(problem)}): it stays as it was traced, and is slower",
        )


def _fill(graph: ir.Graph, names: set[str], read: Read, transposed: set[str]) -> None:
    """Turn inputs that are weights into initializers, which are read when they are asked for."""
    for value in [value for value in graph.inputs if value.name in names]:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        load = functools.partial(_tensor, read, value.name, value.name in transposed)
        value.const_value = ir.LazyTensor(load, dtype=value.dtype, shape=value.shape, name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)


def _tensor(read: Read, name: str, transposed: bool) -> ir.TensorProtocol:
    weight = read(name)
    return ir.tensor((weight.t() if transposed else weight).contiguous().numpy(), name=name)


@contextlib.contextmanager
def _replaced(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _never_bound(configs: ModuleType) -> Iterator[None]:
    """Keep the partials in the bodies of Optimum's classes from being bound, as Python 3.14 binds them, like methods.

    Optimum 2.1 calls `self.NORMALIZED_CONFIG_CLASS(config)`; bound, that hands the export config on as the model's.
    """
    name = "NORMALIZED_CONFIG_CLASS"
    with contextlib.ExitStack() as held:
        for config in [found for found in vars(configs).values() if isinstance(found, type)]:
            if isinstance(partial := vars(config).get(name), functools.partial):
                held.enter_context(_replaced(config, name, staticmethod(partial)))
        yield


def _by_name_first(equal: Callable[[Any, object], bool]) -> Callable[[Any, object], bool]:
    """Whether two tensors are equal, which their names mostly deny.

    onnxslim looks for each input among all tensors and compares makers, users and shapes of every pair. As matrices are
    inputs meanwhile, that took a quarter of an export of SmolLM2-135M.
    """
    return lambda tensor, other: tensor.name == getattr(other, "name", None) and equal(tensor, other)


def _additive_masks(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention whose boolean masks become masks of the query's own dtype.

    torch's ONNX exporter turns them into fp32 ones and adds those to fp16 scores: an invalid graph (GPT-2, GPT-NeoX,
    Phi). A finite minimum instead of -inf also keeps rows of padding, where everything is masked, free of NaN.
    """

    def additive(query: torch.Tensor, *args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("scale") is None:
            kwargs["scale"] = int(query.shape[-1]) ** -0.5  # a constant, where tracing would compute it at every step
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            lowest = torch.tensor(torch.finfo(query.dtype).min, dtype=query.dtype)
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype), lowest)
        return attention(query, *args, attn_mask=attn_mask, **kwargs)

    return additive
