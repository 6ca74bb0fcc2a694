"""A training step on tensors without data: the bytes it would hold, for any architecture, in a second or two.

PyTorch's fake tensors carry shapes and no numbers. Every operator of the step runs for its output's shape alone, so no
weights are needed and what autograd keeps is counted instead of guessed.

    rehearse(config, torch.bfloat16, False, (4, 2048), measuring_step).forward_bytes

Attention is taken as its fused kernels keep it (query, key, value, output: linear in the sequence; Dao et al.,
arXiv 2205.14135), whatever kernel the fake device would fall back to; a mask, where one is made, is quadratic.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from trsp_deploy.decoder import body, build_model, decoder_layers
from trsp_deploy.recipe import Strict, TransferSettings
from trsp_deploy.tools.gates import GateForm, LayerGates
from trsp_deploy.tools.training.parameters import choose_trained, recomputed_layers

FUSED = "trsp-fused"

Step = Callable[..., torch.Tensor]  # (..., attached, model, input_ids) -> a scalar


class Rehearsal(Strict):
    """Bytes alive beside the model's own weights."""

    kept_bytes: int  # when the last layer has run: what autograd keeps for the backward pass
    forward_bytes: int  # the most in the forward pass
    backward_bytes: int  # the most in the backward pass, the gradients that come into being included


def rehearse(
    config: Any, dtype: torch.dtype, autocast: bool, shape: tuple[int, int], step: Step, device: str = "cpu"
) -> Rehearsal:
    """Run a step forward and, when its loss has a gradient, backward, without data.

    dtype: of the weights; autocast: bf16 matrix products, as on `device`; shape: (batch, sequence).
    Raises whatever the model's own code trips over without data, as when shapes depend on it (mixtures of experts).
    """
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as attached:
        model = _without_data(config, dtype)
        live = attached.enter_context(LiveBytes([*model.parameters(), *model.buffers()]))
        if device == "cuda":
            attached.enter_context(_wide_norms())
        kept: list[int] = []
        decoder_layers(model)[-1].register_forward_hook(lambda *_: kept.append(live.now))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = step(attached, model, torch.zeros(shape, dtype=torch.int64))
        forward_bytes = live.peak
        live.peak = live.now
        if loss.requires_grad:
            loss.backward()
    return Rehearsal(kept_bytes=kept[0], forward_bytes=forward_bytes, backward_bytes=live.peak)


# -- steps: they end at the last hidden states, since what the loss needs is arithmetic; `attached` holds what they put
# -- on the model until the backward pass is over.


@torch.no_grad()
def measuring_step(_: ExitStack, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Held-out loss, and hidden states shown to a method: nothing is kept."""
    return _last_hidden(model, input_ids).sum()


def gate_step(form: GateForm, attached: ExitStack, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Stage 1: gates learn, weights are frozen."""
    model.requires_grad_(False)
    attached.enter_context(LayerGates(model, form))
    return _last_hidden(model, input_ids).sum()


def transfer_step(
    settings: TransferSettings, num_dropped: int, attached: ExitStack, model: PreTrainedModel, input_ids: torch.Tensor
) -> torch.Tensor:
    """Stage 2, its gates' forms included; which layers are dropped makes no difference, so the last ones are."""
    choose_trained(model, settings)
    attached.enter_context(recomputed_layers(model, settings.gradient_checkpointing))
    gates = attached.enter_context(LayerGates(model, "branch"))
    gates.values.requires_grad_(False)
    layers = decoder_layers(model)
    last = range(len(layers) - num_dropped, len(layers))
    gates.closed.update(last if settings.form == "train" else ())
    gates.watched.update(last if settings.form in ("l1", "l2") else ())
    if settings.lora_rank is not None:
        model.requires_grad_(False)
        for module in [module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]:
            _adapt(module, settings.lora_rank)
    loss = _last_hidden(model, input_ids).sum()
    for change in gates.changes.values():
        loss = loss + torch.linalg.vector_norm(change.float())
    return loss


def _adapt(module: nn.Linear | Conv1D, rank: int) -> None:
    """A low-rank adapter beside a linear module, in fp32 whatever the weights are, as peft has it."""
    inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.T.shape
    down, up = nn.Parameter(torch.empty(inputs, rank)), nn.Parameter(torch.empty(rank, outputs))
    module.register_forward_hook(lambda _, args, output: (output + args[0].float() @ down @ up).to(output.dtype))


def _last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = body(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def _without_data(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return build_model(copy.deepcopy(config), dtype=dtype, attn_implementation=FUSED).eval()
    except (ValueError, KeyError):  # an architecture with attention code of its own: it is counted as it is
        return build_model(copy.deepcopy(config), dtype=dtype).eval()


@contextlib.contextmanager
def _wide_norms() -> Iterator[None]:
    """CUDA's autocast computes LayerNorms in fp32; a CPU's leaves them in the dtype that they are in."""
    plain = nn.functional.layer_norm

    def wide(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):  # in the backward pass too, where a layer is computed again
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return plain(*args, **kwargs)

    nn.functional.layer_norm = wide
    try:
        yield
    finally:
        nn.functional.layer_norm = plain


class LiveBytes(TorchDispatchMode):
    """Sums the memory of the tensors that are alive: `now`, and the most so far, `peak`. `known` ones cost nothing."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        # A storage's address can be used again once it is gone, so the finalizer takes it off the list.
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.now -= self._alive.pop(address)


def _mask(*arguments: Any, allow_is_causal_skip: bool = True, **options: Any) -> torch.Tensor | None:
    """A mask (batch, 1, query, key) bool exactly where transformers would make one for torch's attention.

    It does so even for a plain causal model when it is called without `attention_mask`.
    """
    if allow_is_causal_skip:
        return None
    mask: torch.Tensor | None = sdpa_mask(*arguments, allow_is_causal_skip=False, **options)
    return mask


def _fused_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention (batch, heads, sequence, head_dim) -> (batch, sequence, heads, head_dim), as transformers calls it."""
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    # Models with mask code of their own (OPT) pass a float mask here and none to torch's attention.
    mask = attention_mask if attention_mask is not None and attention_mask.dtype == torch.bool else None
    if mask is not None:  # the kernel wants a float mask for each layer, and as many key heads as query heads
        mask = mask.to(query.dtype)
        key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out = attend(query, key, value, 0.0, mask is None, attn_mask=mask)[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused_attention)
AttentionMaskInterface.register(FUSED, _mask)
