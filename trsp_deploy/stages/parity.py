"""PyTorch, ONNX and engine must agree, or the run stops.

The reference generates greedily in fp32 PyTorch from two prompts of unequal length (left-padded); the engine
is fed the same tokens, prefill first and then step by step through its own KV cache, and its logits are compared
at every position. An engine picks another token only where the reference itself holds a tie within the tolerance.

Logits of few positions find what is wrong for every text. Errors that each are within the tolerance and all point one
way show in those positions' perplexity. What goes wrong for some texts, and how much a quantisation costs in all, the
perplexity of the evaluation texts shows: each engine's is held against PyTorch's of the same model and tokens.
"""

from __future__ import annotations

import contextlib
import gc
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special
import torch

from trsp_deploy.decoder import load_widened
from trsp_deploy.errors import ParityError, ShapeUnavailable
from trsp_deploy.recipe import Precision
from trsp_deploy.results import Parity, Perplexity, PerplexityParity, Role, perplexity_of
from trsp_deploy.tools.runners import Runner
from trsp_deploy.tools.runners.generation import left_padded
from trsp_deploy.tools.runners.ort import OrtRunner

# Largest |difference of logits| over the standard deviation of the reference's logits. fp32 engines differ in the
# order of their sums only: 2e-5 was measured on SmolLM2-135M. fp16 rounds every product to 11 bits: 0.005 to 0.08 were
# measured, PyTorch's own fp16 among them; bf16 has three bits fewer, and no engine of it has run. Integer engines are
# made from a graph that has passed as fp32, so what is left to find is a quantisation gone wrong: 0.5 to 0.8 (int8) and
# 2.4 (int4) were measured. A wrong mask, position or cache costs more than 1.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.25, "bf16": 1.0, "int8": 1.5, "int4": 4.0}
NEW_TOKENS = 12
# Share by which perplexity may be off PyTorch's of the same model, either way. fp32 on a CPU was off by 8e-6 at most on
# SmolLM2-135M and 50 made-up models of other families; by 0.5% and 0.7% where a graph turned keys otherwise than the
# model (LongRoPE). 16-bit floats: on prompts and what follows them by 0.2% (fp16) and 0.6% (bf16) at most, with the
# tests' tiny models; no engine was measured on a text. int8 was off by 2% on SmolLM2-135M, and 110 times it where
# products overflowed; int4 by 13% with an LM head of 8 bits, by 30% with one of 4. Such a small model is the hard case.
PERPLEXITY_TOLERANCES: dict[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.02, "int8": 0.1, "int4": 0.5}


@dataclass(frozen=True)
class Reference:
    """What fp32 PyTorch makes of the prompts."""

    input_ids: np.ndarray  # (batch, prompt) int64, left-padded
    attention_mask: np.ndarray  # (batch, prompt) int64
    tokens: np.ndarray  # (batch, new) int64: greedy continuation
    logits: np.ndarray  # (batch, prompt + new, vocabulary) float32


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
    logits = _logits(reference, runner)
    result = compare(reference, logits, subject, role, precision)
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


def _logits(reference: Reference, runner: Runner) -> np.ndarray:
    """The engine's logits for the reference's tokens, (batch, prompt + new, vocabulary).

    An engine for one text at a time, or for texts without padding, reads the prompts one after the other, as it will
    read users' texts; what stands for padding is 0 then. One that breaks off in the middle is none of those.
    """
    with contextlib.suppress(ShapeUnavailable):
        return _fed(runner, reference.input_ids, reference.attention_mask, reference.tokens)
    logits = np.zeros_like(reference.logits)
    for row, mask in enumerate(reference.attention_mask):
        prompt = reference.input_ids[row : row + 1, mask == 1]
        found = _fed(runner, prompt, np.ones_like(prompt), reference.tokens[row : row + 1])
        logits[row, -found.shape[1] :] = found[0]
    return logits


def _fed(runner: Runner, input_ids: np.ndarray, attention_mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits (batch, prompt + new, vocabulary) of prompts and of what is given as following them."""
    parts = [runner.prefill(input_ids, attention_mask)]
    for step in range(tokens.shape[1]):
        parts.append(runner.decode(tokens[:, step : step + 1]))
    return np.concatenate(parts, axis=1)


def compare(reference: Reference, logits: np.ndarray, subject: str, role: Role, precision: Precision) -> Parity:
    """Compare an engine's logits (batch, prompt + new, vocabulary) with the reference's."""
    new = reference.tokens.shape[1]
    seen = (
        np.concatenate([reference.attention_mask, np.ones((len(reference.tokens), new), dtype=np.int64)], axis=1) == 1
    )
    expected, actual = reference.logits[seen], logits[seen]  # (positions, vocabulary): padding holds nothing
    spread = float(expected.std())
    error = float(np.abs(actual - expected).max()) / spread  # NaN stays NaN and fails below
    top_two = np.partition(expected, -2, axis=-1)[:, -2:]
    margin = (top_two[:, 1] - top_two[:, 0]) / spread
    tolerance = TOLERANCES[precision]
    differs = actual.argmax(-1) != expected.argmax(-1)
    wrong = differs & (margin > 2 * tolerance)
    off = _nats(logits, reference, seen) - _nats(reference.logits, reference, seen)
    # Of integers so few tokens say too little: theirs is held against whole texts.
    bound = PERPLEXITY_TOLERANCES[precision] if precision in ("fp32", "fp16", "bf16") else None
    near = bound is None or abs(off) <= math.log1p(bound)
    return Parity(
        subject=subject,
        role=role,
        precision=precision,
        max_error=error,
        tolerance=tolerance,
        tokens_compared=len(differs),
        tokens_equal=int((~differs).sum()),
        ppl_ratio=perplexity_of(off),
        ppl_tolerance=bound,
        passed=bool(error <= tolerance and not wrong.any() and near),
    )


def _nats(logits: np.ndarray, reference: Reference, seen: np.ndarray) -> float:
    """Mean loss of each next token of the prompts and of what follows them, by logits of the reference's shape.

    seen: (batch, prompt + new), where there is no padding.
    """
    ids = np.concatenate([reference.input_ids, reference.tokens], axis=1)  # (batch, prompt + new)
    known = seen[:, :-1]
    before, after = logits[:, :-1][known], ids[:, 1:][known]  # (tokens, vocabulary), (tokens,)
    return float(np.mean(scipy.special.logsumexp(before, axis=-1) - before[np.arange(len(after)), after]))


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
