"""How much memory the stages after training will need: exports, engines, and what judges them.

    later_stages(recipe, config, counts, built, run, "cpu")[0].needed_bytes

From the model's config and the engine specs alone; docs/memory.md has the formulae and what was measured. All are of
the dense model, the larger one. Pages of mapped files are left out, which the system takes back where it needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from trsp_deploy.decoder import WeightCounts, cache_per_token
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, Float, Recipe, Strict
from trsp_deploy.tools.graphs.stored import stored_by
from trsp_deploy.tools.resources import stage_names
from trsp_deploy.tools.resources.weights import tied, weights_bytes
from trsp_deploy.tools.runners import device_of

PROCESS_BYTES = 900_000_000  # of a process that has trained: libraries, and what the allocator keeps
CONTEXT_BYTES = 600_000_000  # of a GPU: CUDA's context and kernels; not measured
COPIES = 3  # of the largest matrix, while one is exported
LOGITS = 4  # a window's logits and what becomes of them until they are losses
# What a build holds at its highest, over its graph's weights, of which a tied LM head becomes a matrix of its own.
SESSION = 1.1  # ONNX Runtime's, which reads the graph and writes it optimised
QUANTISED = 1.35  # integers: the session that reads a text, what products read in it, and its second moments
COMPILED = 2.3  # TensorRT's builder: network and engine
BUILDER_BYTES = 800_000_000  # of its own

Device = Literal["cpu", "cuda"]


class LaterStage(Strict):
    """What one stage needs at its highest, where it runs."""

    stage: str
    device: Device
    needed_bytes: int


def later_stages(
    recipe: Recipe,
    config: Any,
    counts: WeightCounts,
    built: Sequence[EngineSpec],
    run: Sequence[EngineSpec],
    device: Device,
) -> tuple[LaterStage, ...]:
    """Every stage in the order of the job.

    config: transformers' config of the dense model; counts: its weights. built, run: the engines that are to be built
    and to run here. device: where PyTorch evaluates.
    """
    found = [
        LaterStage(stage=stage_names.export(precision), device="cpu", needed_bytes=_exported(counts, precision))
        for precision in dict.fromkeys(spec.graph_precision for spec in built)
    ]
    found += [
        LaterStage(stage=stage_names.build(spec.name), device="cpu", needed_bytes=_building(counts, spec))
        for spec in built
    ]
    found += [_running(recipe, config, counts, spec) for spec in run]
    if recipe.evaluation:
        # fp32 on a CPU, on a GPU as it is stored.
        width = 4 if device == "cpu" else (getattr(config, "dtype", None) or torch.float32).itemsize
        needed = _beside(device) + width * counts.total + _window_bytes(recipe, config, counts)
        found.append(LaterStage(stage=stage_names.EVALUATION, device=device, needed_bytes=needed))
    return tuple(found)


def _beside(device: Device) -> int:
    return PROCESS_BYTES if device == "cpu" else CONTEXT_BYTES


def _exported(counts: WeightCounts, precision: Float) -> int:
    """Of the export, and of the parity check after it, for which ONNX Runtime rearranges an fp32 graph's matrices.

    The export never holds the weights; of an fp16 graph a text is read in fp32 afterwards, one matrix at a time.
    """
    largest = max(counts.lm_head, counts.embeddings)
    return PROCESS_BYTES + max(COPIES * 4 * largest, 4 * counts.total if precision == "fp32" else 0)


def _building(counts: WeightCounts, spec: EngineSpec) -> int:
    """Of the passes, each proven in a session of ONNX Runtime's, and of what makes the engine."""
    graph = FLOAT_BYTES[spec.graph_precision] * (counts.total + (counts.lm_head if tied(counts) else 0))
    if spec.on_tensorrt:
        return PROCESS_BYTES + BUILDER_BYTES + round(COMPILED * graph)
    times = QUANTISED if spec.is_quantised else SESSION
    return PROCESS_BYTES + round(times * graph)


def _running(recipe: Recipe, config: Any, counts: WeightCounts, spec: EngineSpec) -> LaterStage:
    """An engine with the cache of the largest shape that is measured, or with a window's logits."""
    kept = stored_by(spec)
    tokens = [
        case.batch_size * (spec.cache_length or case.prompt_tokens + case.new_tokens) for case in recipe.bench.cases
    ]
    text = config.get_text_config()  # what is for images too has the decoder's in it
    per_token = cache_per_token(text) if hasattr(text, "num_attention_heads") else 0  # Mamba's state does not grow
    device = device_of(spec)
    # One that grows is written anew while it is read; on a CPU it is one memory with room to spare (runners/ort.py).
    caches = 2 if device == "cuda" and spec.cache_length is None else 1
    cache = round(caches * kept.cached * max(tokens) * len(counts.layers) * per_token)
    window = _window_bytes(recipe, config, counts) if recipe.evaluation or recipe.evaluate.tasks else 0
    needed = _beside(device) + weights_bytes(spec, counts) + max(cache, window)
    return LaterStage(stage=stage_names.run(spec.name), device=device, needed_bytes=needed)


def _window_bytes(recipe: Recipe, config: Any, counts: WeightCounts) -> int:
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or counts.lm_head // text.hidden_size
    return LOGITS * 4 * recipe.evaluate.context_length * int(vocabulary)
