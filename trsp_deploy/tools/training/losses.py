"""Next-token losses in slices of tokens: the logits of a whole batch never exist at once.

    module = TokenLosses(model, kl_weight=1.0)
    module(input_ids, dense_hidden).total.backward()

The vocabulary makes the logits the largest tensor of a training step: 1,020 tokens of SmolLM2-135M are 200 MB in fp32,
and a plain loss holds several such tensors. Here a slice of tokens goes through LM head, softmax and gradient before
the next one is touched, so backward has nothing left to do but a multiplication. F.linear_cross_entropy (torch 2.13)
does the same for class indices alone, and takes five times as long on a CPU (docs/decisions/0005).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, linear, nll_loss
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from trsp_deploy.decoder import body, forward_replaced
from trsp_deploy.errors import ModelError

# fp32 logits at a time. On a CPU a larger slice leaves the cache (128 tokens of SmolLM2 are best), on a GPU a smaller
# one leaves it idle.
SLICE_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
PROBE_TOKENS = 8
LARGE_LOGIT = 100.0  # beyond any cap


class Losses(NamedTuple):
    """Means over tokens in nats, each a scalar."""

    total: torch.Tensor  # ce_weight * lm + kl_weight * divergence; the only one with a gradient
    lm: torch.Tensor
    divergence: torch.Tensor  # from the dense model's next-token distribution; 0 without its hidden states


class TokenLosses(nn.Module):
    """A model with its loss as one module, so that DDP and FSDP see a whole training step as one forward."""

    def __init__(self, model: PreTrainedModel, ce_weight: float = 1.0, kl_weight: float = 0.0) -> None:
        """Finds out how the model makes logits of hidden states; raises ModelError when no way fits."""
        super().__init__()
        self.model = model
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        # The dense model's distribution needs the dense model's head, also once the head has learned something else.
        learns = kl_weight > 0 and any(parameter.requires_grad for parameter in self.head.parameters())
        self._dense_head = copy.deepcopy(self.head).requires_grad_(False) if learns else None
        self.linear_head = _head_is_linear(model)

    @property
    def head(self) -> nn.Linear:
        """The model's LM head."""
        return self.model.get_output_embeddings()

    @property
    def dense_head(self) -> nn.Linear:
        """The dense model's LM head: a copy where the model's own one learns."""
        return self.head if self._dense_head is None else self._dense_head

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the LM head sees at every token that has a next one: (batch, sequence - 1, hidden)."""
        return _last_hidden(self.model, input_ids)[:, :-1]

    def forward(self, input_ids: torch.Tensor, dense_hidden: torch.Tensor | None = None) -> Losses:
        """Losses of input_ids (batch, sequence); dense_hidden: `hidden` of the dense model for the same tokens."""
        hidden = self.hidden(input_ids).flatten(0, 1)  # (tokens, hidden)
        targets = input_ids[:, 1:].flatten()
        dense = None if dense_hidden is None else dense_hidden.flatten(0, 1)
        if not self.linear_head:
            return self._through_the_model(hidden, targets, dense)
        heads = (self.head.weight, self.head.bias, self.dense_head.weight, self.dense_head.bias)
        return Losses(*_SlicedLosses.apply(hidden, targets, dense, *heads, self.ce_weight, self.kl_weight))

    def _through_the_model(self, hidden: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor | None) -> Losses:
        """For logits that are scaled or capped: the model's own code, a slice at a time, again in backward."""
        sums = hidden.new_zeros(2, dtype=torch.float32)  # of both losses
        for part in _slices(len(hidden), self.head.weight):
            wanted = None if dense is None else dense[part]
            sums = sums + checkpoint(self._slice_sums, hidden[part], targets[part], wanted, use_reentrant=False)
        lm, divergence = sums / len(hidden)
        return Losses(self.ce_weight * lm + self.kl_weight * divergence, lm.detach(), divergence.detach())

    def _slice_sums(self, hidden: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor | None) -> torch.Tensor:
        log_p = _logits(self.model, hidden).float().log_softmax(-1)  # (slice, vocabulary)
        lm = nll_loss(log_p, targets, reduction="sum")
        if dense is None:
            return torch.stack([lm, torch.zeros_like(lm)])
        with torch.no_grad():
            log_q = _logits(self.model, dense.to(hidden.dtype), self.dense_head).float().log_softmax(-1)
        return torch.stack([lm, kl_div(log_p, log_q, log_target=True, reduction="sum")])


class _SlicedLosses(torch.autograd.Function):
    """Losses of a linear head, with their gradients, which are worked out in forward while a slice's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (tokens, hidden)
        targets: torch.Tensor,  # (tokens,)
        dense: torch.Tensor | None,  # (tokens, hidden)
        weight: torch.Tensor,  # (vocabulary, hidden)
        bias: torch.Tensor | None,
        dense_weight: torch.Tensor,
        dense_bias: torch.Tensor | None,
        ce_weight: float,
        kl_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the means of `Losses`; gradients go to hidden, weight and bias where they are wanted."""
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        grads = [
            torch.zeros_like(x) if x is not None and on else None
            for x, on in zip((hidden, weight, bias), wanted, strict=True)
        ]
        sums = hidden.new_zeros(2, dtype=torch.float32)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        # Off: it would turn each softmax into fp32, at twice the time, of logits that hold no more than bf16 anyway.
        with torch.autocast(device, enabled=False):
            head = _cast(dtype, weight, bias)
            dense_head = head if dense_weight is weight else _cast(dtype, dense_weight, dense_bias)
            for part in _slices(len(hidden), weight):
                states = hidden[part].to(dtype)
                dense_logits = None if dense is None else linear(dense[part].to(dtype), *dense_head)
                lm, divergence, grad_logits = _slice_losses(
                    linear(states, *head), targets[part, None], dense_logits, ce_weight, kl_weight
                )
                sums += torch.stack([lm, divergence])
                _add_gradients(grads, part, states, head[0], grad_logits)
        ctx.grads = [None if grad is None else grad.div_(len(hidden)) for grad in grads]
        lm, divergence = (sums / len(hidden)).unbind()
        ctx.mark_non_differentiable(lm, divergence)
        return ce_weight * lm + kl_weight * divergence, lm, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (None if grad is None else grad.mul_(grad_total) for grad in ctx.grads)
        return hidden, None, None, weight, bias, None, None, None, None


def _slice_losses(
    logits: torch.Tensor, index: torch.Tensor, dense_logits: torch.Tensor | None, ce_weight: float, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of both losses over a slice, and the gradient of their weighted sum by the logits, in the logits' dtype.

    logits, dense_logits: (slice, vocabulary), the latter used up; index: (slice, 1), the tokens that came.
    """
    p = logits.softmax(-1)
    log_sum = _log_sum(logits, p)
    lm = log_sum.sum() - logits.gather(1, index).float().sum()
    divergence = torch.zeros_like(lm)
    at_target = ce_weight * (p.gather(1, index).float() - 1)  # in fp32: bf16 cannot tell p = 0.999 from 1
    if dense_logits is not None:
        q = dense_logits.softmax(-1)
        divergence = (log_sum - _log_sum(dense_logits, q)).sum()
        divergence = divergence + (dense_logits.sub_(logits)).mul_(q).sum(dtype=torch.float32)
        at_target += kl_weight * (p.gather(1, index).float() - q.gather(1, index).float())
        grad_logits = p.mul_(ce_weight + kl_weight).sub_(q, alpha=kl_weight)
    else:
        grad_logits = p if ce_weight == 1 else p.mul_(ce_weight)
    return lm, divergence, grad_logits.scatter_(1, index, at_target.to(grad_logits.dtype))


def _log_sum(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Log of the sum of exponentials of each row (slice,), by way of the largest entry, which never underflows."""
    return logits.amax(-1).float() - p.amax(-1).float().log()


def _add_gradients(
    grads: list[torch.Tensor | None], part: slice, states: torch.Tensor, weight: torch.Tensor, grad_logits: torch.Tensor
) -> None:
    """Add what a slice gives to the gradients of hidden states, head weight and head bias, where they are wanted."""
    hidden, head, bias = grads
    if hidden is not None:
        hidden[part] = grad_logits @ weight
    if head is not None:
        head += grad_logits.T @ states
    if bias is not None:
        bias += grad_logits.sum(0, dtype=torch.float32)


def _cast(
    dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _slices(tokens: int, weight: torch.Tensor) -> Iterator[slice]:
    size = max(1, SLICE_BYTES[weight.device.type] // (4 * len(weight)))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return body(model)(input_ids=input_ids, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, hidden: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """What the model makes of last hidden states (tokens, hidden): its own forward, with the layers left out."""

    def known(*_: Any, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        # BERT asks for cross attentions too, which a decoder alone has none of.
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])

    own = model.get_output_embeddings()
    path = next(path for path, module in model.named_modules() if module is own)
    weights = {f"{path}.{name}": parameter for name, parameter in (head or own).named_parameters()}
    arguments = {"input_ids": torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device), "use_cache": False}
    with forward_replaced([body(model)], lambda *_: known):
        return torch.func.functional_call(model, weights, kwargs=arguments).logits[0]


@torch.no_grad()
def _head_is_linear(model: PreTrainedModel) -> bool:
    """Whether the LM head alone makes logits of last hidden states, as opposed to the head and code around it.

    Raises ModelError when neither way gives the logits of the model's own forward.
    """
    head = model.get_output_embeddings()
    input_ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    wanted = model(input_ids=input_ids, use_cache=False).logits[0]
    hidden = _last_hidden(model, input_ids)[0]
    if _same(head(hidden), wanted):
        return not _is_capped(model, head, hidden, wanted)
    if _same(_logits(model, hidden), wanted):
        return False
    raise ModelError(
        f"{type(model).__name__}: its logits do not follow from its last hidden states; it is not supported"
    )


def _is_capped(model: PreTrainedModel, head: nn.Module, hidden: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether large logits are not the head's own: near zero a soft cap (Gemma 2) is less than bf16 rounds off."""
    try:
        if not _same(_logits(model, hidden), wanted):
            return False  # the model does not go through its body (OPT), so larger states cannot be tried
    except AttributeError:  # or asks it for more than states (GPT-2)
        return False
    large = hidden * (LARGE_LOGIT / wanted.float().abs().max().clamp(min=1e-6)).to(hidden.dtype)
    return not _same(head(large), _logits(model, large))


def _same(logits: torch.Tensor, wanted: torch.Tensor) -> bool:
    # A model that overflows is not judged here: nan is the same as nan. GPT-J's are fp32 of a product in bf16.
    largest = wanted.nan_to_num(posinf=0, neginf=0).abs().max().item()
    tolerance = 4 * max(torch.finfo(each.dtype).eps for each in (logits, wanted)) * largest
    return logits.shape == wanted.shape and torch.allclose(
        logits.float(), wanted.float(), rtol=0, atol=tolerance, equal_nan=True
    )
