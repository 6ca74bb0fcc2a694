"""Who is timed: PyTorch, and engines of a random model with profiles for the shapes that are asked."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.gpu.plan import SETTLING, Plan, Shape, shapes
from benchmarks.gpu.torch_runner import TorchRunner
from trsp_deploy.decoder import DecoderSize
from trsp_deploy.errors import EngineUnavailable, TrspError
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, ExportSettings, Range, ShapeProfile, read_engine_spec
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import Runner, check_can_build, check_can_run, open_engine
from trsp_deploy.tools.runners.requirements import cuda_devices

ENGINES = ("ort-cuda-fp16", "tensorrt-fp16", "tensorrt-fp16-static", "tensorrt-rtx-fp16", "tensorrt-rtx-fp16-static")
CONTENDERS = ("torch-eager", "torch-compiled", *ENGINES)
TINY_CONTENDERS = ("torch-eager", "torch-compiled", "ort-cpu-fp32")


def is_torch(contender: str) -> bool:
    """Whether it is PyTorch itself, not an engine."""
    return contender.startswith("torch-")


def random_opt(folder: Path, layers: int, plan: Plan, device: str) -> Path:
    """Write an OPT of the plan's widths with drawn weights to `folder`, in fp16 where the device is a GPU."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        num_hidden_layers=layers,
        hidden_size=plan.hidden_size,
        ffn_dim=plan.ffn_dim,
        num_attention_heads=plan.heads,
        vocab_size=plan.vocabulary,
        max_position_embeddings=plan.positions,
        word_embed_proj_dim=plan.hidden_size,
        dtype="float16" if device == "cuda" else "float32",
    )
    with torch.device(device):  # a GPU draws 6.7 billion numbers in a second, a CPU in minutes
        model = OPTForCausalLM._from_config(config, dtype=torch.float16 if device == "cuda" else torch.float32)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()  # engines allocate beside torch: what it keeps for itself is out of their reach
    return folder


def open_contender(
    name: str, model: Path, size: DecoderSize, plan: Plan, device: str
) -> tuple[AbstractContextManager[Runner], dict[Shape, str]]:
    """A contender, to be entered, and the shapes that it is not asked for, with the reason."""
    if is_torch(name):
        return TorchRunner(model, device, plan, compiled=name == "torch-compiled"), {}
    spec = load_engine_spec(name)
    if not spec.profiles:
        return _engine(model, spec), {}
    unfit = beyond_memory(spec, plan, size, cuda_devices()[0].memory_bytes)
    return _engine(model, with_profiles(spec, plan, unfit)), unfit


@contextlib.contextmanager
def _engine(model: Path, spec: EngineSpec) -> Iterator[Runner]:
    """Export, build and open; of 13 GB of weights no copy stays on the disk longer than it is needed."""
    onnx, engine = model.with_name("onnx"), model.with_name("engine")
    with quiet_libraries():
        export_onnx(model, spec.graph_precision, ExportSettings(), onnx)
    shutil.rmtree(model)
    build_engine(onnx / FILE, spec, engine)
    shutil.rmtree(onnx)
    with open_engine(engine) as runner:
        yield runner


def beyond_memory(spec: EngineSpec, plan: Plan, size: DecoderSize, memory_bytes: int) -> dict[Shape, str]:
    """Shapes whose cache cannot be beside the weights on a GPU of that memory, and the words for it.

    A cache that grows is there twice, with a quarter to spare, and one of fixed length once (runners/trt.py).
    """
    width = FLOAT_BYTES[spec.graph_precision]
    token = width * size.cache_per_token * len(size.weights.layers)
    found = {}
    for shape in shapes(plan):
        tokens = 2.5 * shape.past if spec.cache_length is None else plan.positions
        need = width * size.weights.total + shape.batch * tokens * token
        if need > memory_bytes:
            found[shape] = f"weights and cache need {need / 1e9:.0f} GB, the GPU has {memory_bytes / 1e9:.0f}"
    return found


def with_profiles(spec: EngineSpec, plan: Plan, left_out: Collection[Shape] = ()) -> EngineSpec:
    """A TensorRT spec with profiles for a plan instead of its own, which end at batch 8 and prompts of 256.

    left_out: shapes without a profile. TensorRT sets scratch memory aside for the largest shape there is, so one that
    can never run would take the memory of those that can.
    Raises EngineUnavailable when no shape is left, EngineSpecError when the plan does not fit the spec.
    """
    kept = [shape for shape in shapes(plan) if shape not in left_out]
    if not kept:
        raise EngineUnavailable(f"{spec.name}: no shape of the plan fits the GPU's memory")
    profiles = [
        profile for batch in dict.fromkeys(shape.batch for shape in kept) for profile in _profiles(batch, kept, plan)
    ]
    length = None
    if spec.cache_length is not None:
        length, profiles = plan.positions, [profile.model_copy(update={"past": None}) for profile in profiles]
    values = {**spec.model_dump(), "cache_length": length, "profiles": [each.model_dump() for each in profiles]}
    return read_engine_spec(values, f"{spec.name} for the bench's plan")


def _profiles(batch: int, kept: list[Shape], plan: Plan) -> Iterator[ShapeProfile]:
    """One for the prompts of a batch, and one for decoding behind them."""
    prompts = [shape.past for shape in kept if shape.batch == batch]
    yield ShapeProfile(
        batch=_range(batch, batch, batch),
        sequence=_range(min(prompts), max(prompts), max(prompts)),
        past=_range(0, 0, 1),  # 1 is the smallest maximum there is
    )
    pasts = [shape.past for shape in kept if shape.batch == batch and shape.phase == "decode"]
    if pasts:
        yield ShapeProfile(
            batch=_range(batch, batch, batch),
            sequence=_range(1, 1, 8),  # some exports fail to build with 1 alone
            past=_range(min(pasts), sorted(pasts)[len(pasts) // 2], max(pasts) + SETTLING + plan.steps),
        )


def _range(least: int, best: int, most: int) -> Range:
    return Range(min=least, opt=best, max=most)


def absent(contenders: Iterable[str]) -> dict[str, str]:
    """Contenders that cannot run here, and what keeps them."""
    return {name: reason for name in contenders if (reason := _why_not(name)) is not None}


def _why_not(contender: str) -> str | None:
    import torch

    try:
        if is_torch(contender):
            return None if torch.cuda.is_available() else "no CUDA device for torch"
        spec = load_engine_spec(contender)
        check_can_build(spec)
        check_can_run(spec)
    except TrspError as problem:
        return str(problem)
    return None
