"""PyTorch, ONNX and engine must agree, or the run stops.

The reference generates greedily in fp32 PyTorch from two prompts of unequal length (left-padded), and the engine's
logits for the same tokens are held against it (tools/runners/agreement.py).

Logits of few positions find what is wrong for every text. Errors that each are within the tolerance and all point one
way show in those positions' perplexity. What goes wrong for some texts, and how much a quantisation costs in all, the
perplexity of the evaluation texts shows: each engine's is held against PyTorch's of the same model and tokens.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import torch

from trsp_deploy.decoder import load_widened
from trsp_deploy.errors import ParityError
from trsp_deploy.recipe import Precision
from trsp_deploy.results import Parity, Perplexity, PerplexityParity, Role
from trsp_deploy.tools.runners import Runner
from trsp_deploy.tools.runners.agreement import PERPLEXITY_TOLERANCES, Reference, agreement, logits_of
from trsp_deploy.tools.runners.generation import left_padded
from trsp_deploy.tools.runners.ort import OrtRunner

NEW_TOKENS = 12


@torch.no_grad()
def make_reference(model_folder: Path, prompts: list[list[int]]) -> Reference:
    """Generate NEW_TOKENS greedily from each prompt in fp32 on the CPU, keeping every logit."""
    model = load_widened(model_folder)
    input_ids, mask = left_padded(prompts)
    ids, attention = torch.from_numpy(input_ids), torch.from_numpy(mask)
    logits, tokens, cache = [], [], None
    step = ids
    for _ in range(NEW_TOKENS + 1):
        positions = (attention.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        accepts = {"position_ids": positions} if _takes_positions(model) else {}
        output = model(input_ids=step, attention_mask=attention, past_key_values=cache, use_cache=True, **accepts)
        cache = output.past_key_values
        logits.append(output.logits.float())
        step = output.logits[:, -1:].argmax(-1)  # (batch, 1)
        tokens.append(step)
        attention = torch.cat([attention, torch.ones_like(step)], dim=1)
    del model, output, cache
    gc.collect()  # modules and the hooks that widen their weights hold each other
    return Reference(
        input_ids=input_ids,
        attention_mask=mask,
        tokens=torch.cat(tokens[:NEW_TOKENS], dim=1).numpy(),
        logits=torch.cat(logits, dim=1).numpy(),
    )


def open_graph(graph: Path) -> OrtRunner:
    """An exported graph on the CPU, as it is and in as little memory as can be."""
    return OrtRunner(graph, lean=True)


def _takes_positions(model: torch.nn.Module) -> bool:
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters


def check_parity(reference: Reference, runner: Runner, subject: str, role: Role, precision: Precision) -> Parity:
    """Feed the reference's tokens through an entered runner and compare; raises ParityError beyond the tolerance."""
    found = agreement(reference, logits_of(reference, runner), precision)
    result = Parity(subject=subject, role=role, precision=precision, **found.model_dump())
    if not np.isfinite(result.max_error):
        half = "" if precision in ("fp32", "bf16") else ": activations beyond fp16's 65504 do that; take precision fp32"
        raise ParityError(f"parity: {subject} ({role}, {precision}) gives logits that are no numbers{half}")
    if not result.passed:
        bound = "" if result.ppl_tolerance is None else f" (tolerance {result.ppl_tolerance:.1%})"
        raise ParityError(
            f"parity: {subject} ({role}, {precision}) is {result.max_error:.3g} standard deviations from PyTorch's "
            f"logits (tolerance {result.tolerance:g}), {result.tokens_equal} of {result.tokens_compared} greedy tokens "
            f"equal, perplexity {result.ppl_ratio:.4f} times PyTorch's{bound}; nothing made from it can be trusted"
        )
    return result


def check_perplexity(
    reference: Perplexity, found: Perplexity, subject: str, precision: Precision, rounded: bool = False
) -> PerplexityParity:
    """Hold an engine's perplexity against PyTorch's of the same model and tokens; raises ParityError beyond the
    tolerance.

    rounded: whether PyTorch computed in the stored dtype, as on a GPU, and so is as far off as 16-bit floats are.
    """
    tolerance = PERPLEXITY_TOLERANCES[precision]
    if rounded:
        tolerance = max(tolerance, PERPLEXITY_TOLERANCES["bf16"])
    # Of losses, not of perplexities, which may be beyond a float; NaN is not within any tolerance.
    off = sum(found.nll) / len(found.nll) - sum(reference.nll) / len(reference.nll)
    if not abs(off) <= math.log1p(tolerance):
        raise ParityError(
            f"parity: {subject} ({found.role}, {precision}) has perplexity {found.ppl:.2f} on {found.text}, PyTorch "
            f"{reference.ppl:.2f} on the same tokens (tolerance {tolerance:.1%}); nothing made from it can be trusted"
        )
    return PerplexityParity(
        subject=subject,
        role=found.role,
        precision=precision,
        text=found.text,
        ratio=math.exp(off),
        tolerance=tolerance,
    )
