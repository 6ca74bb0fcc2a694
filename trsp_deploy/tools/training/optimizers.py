"""What updates the weights in stage 2: AdamW with moments in 32, 16 or 8 bits, and bf16 weights that lose no update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trsp_deploy.errors import RecipeError
from trsp_deploy.recipe import TransferSettings

MAX_NORM = 1.0  # of the gradient
SLICE = 1 << 24  # weights that are updated at once in fp32: 64 MB a tensor


def make_optimizer(module: nn.Module, settings: TransferSettings, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over what trains in `module`, without weight decay; sharded: whether its weights are (FSDP)."""
    if sharded and settings.optimizer != "adamw":
        raise RecipeError(f"transfer.optimizer {settings.optimizer}: does not work with FSDP; valid: adamw")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw-8bit":
        eight_bit: torch.optim.Optimizer = _adamw_8bit()(trained, lr=settings.learning_rate, weight_decay=0.0)
        return eight_bit
    if any(parameter.dtype == torch.bfloat16 for parameter in trained):
        return RoundingAdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    # fused: one pass over the weights instead of a dozen, which a CPU feels most.
    return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer) -> float:
    """Scale all gradients down to a common norm of MAX_NORM where it is larger; gives what it was, to all processes."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    found = norm.item()
    if found > MAX_NORM:  # most steps are below it: no pass over the gradients for a factor of 1
        nn.utils.clip_grads_with_norm_(trained, MAX_NORM, norm)
    return found


class RoundingAdamW(torch.optim.AdamW):
    """AdamW for bf16 weights: updated in fp32, weights and both moments then rounded to bf16 at random.

    bf16 has 8 significant bits. Rounded to the nearest, a weight of 1 keeps no update below 0.002, so that at the rates
    of a transfer norms never move, and a second moment that decays by 0.1% a step never decays. Rounded up or down in
    proportion (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551) they move as far as in fp32 on average, for no
    more memory.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not for this use."""
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, index, group)

    def _update(self, parameter: nn.Parameter, gradient: torch.Tensor, index: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, where it is after `load_state_dict` too: nothing waits for it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        draws = rounding_draws(int(state["step"]), index, parameter.device)
        whole = [_local(tensor).view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        steps, gradient = state["step"], _local(gradient).reshape(-1)
        for begin in range(0, len(gradient), SLICE):
            kept = [tensor[begin : begin + SLICE] for tensor in whole]
            exact = [tensor.float() for tensor in kept]  # the tensors themselves where they are fp32 already
            weight, average, square = exact
            adamw(
                [weight],
                [gradient[begin : begin + SLICE].float()],
                [average],
                [square],
                max_exp_avg_sqs=[],
                state_steps=[steps.to(parameter.device, copy=True)],  # a GPU's kernel reads it, and each slice adds 1
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for tensor, updated in zip(kept, exact, strict=True):
                if tensor.dtype == torch.bfloat16:
                    tensor.copy_(rounded_at_random(updated, draws))
        steps += 1


def _adamw_8bit() -> Any:
    """bitsandbytes' AdamW with moments in 8 bits, and bf16 weights rounded as above."""
    try:
        from bitsandbytes import optim
    except ImportError as problem:
        raise RecipeError(
            "transfer.optimizer adamw-8bit: bitsandbytes is not installed; pip install 'trsp_deploy[train]', or adamw"
        ) from problem

    class Rounding8Bit(optim.AdamW8bit):  # type: ignore[misc]  # bitsandbytes has no types
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            if p.dtype != torch.bfloat16:
                super().update_step(group, p, gindex, pindex)
                return
            draws = rounding_draws(int(self.state[p]["step"]), pindex, p.device)
            # In a tensor of its own: a parameter whose dtype changes loses what DDP hears of its gradients by.
            wide = nn.Parameter(p.detach().float(), requires_grad=False)
            wide.grad = p.grad.float()
            self.state[wide] = self.state[p]
            try:
                super().update_step(group, wide, gindex, pindex)
            finally:
                del self.state[wide]
            wide.grad = None  # as large as what rounding takes
            p.copy_(rounded_at_random(wide.detach(), draws))

    return Rounding8Bit


def rounding_draws(step: int, index: int, device: torch.device) -> torch.Generator:
    """What the rounding of the optimiser's parameter `index` is drawn from at a step.

    By these alone, so that the replicas of a parameter stay alike, and a training that goes on from a checkpoint draws
    what it would have drawn.
    """
    return torch.Generator(device).manual_seed((step << 20) + index)


def rounded_at_random(values: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """bf16 of finite fp32 `values`: one of each value's two neighbours, so likely that the mean is the value."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    # bf16 is the upper half of fp32: noise carries into it as often as the lower half is large.
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
