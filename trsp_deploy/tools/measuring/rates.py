"""What this machine can do at most: bytes read from memory and operations of a matrix product, a second, measured."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch

from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.recipe import Precision
from trsp_deploy.results import Rates
from trsp_deploy.tools.runners.huge_pages import in_huge_pages

ROUNDS = 7
READ_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def measure_rates(device: str) -> Rates | None:
    """The best of a few rounds on "cpu" or "cuda", all cores together; about a second.

    fp32 on a GPU is without TF32, as the engines are; halves are not measured on a CPU, where engines compute in fp32,
    nor bf16 on a GPU without it. Products in integers are not measured: what binds a phase is then assumed.
    None where torch cannot use the GPU, as engines may without it, or finds no room there: limits are then not known.
    """
    try:
        return fresh_rates(device)
    # Torch's own for a build without CUDA, and for a driver or memory that fails.
    except (AssertionError, RuntimeError):
        if device == "cpu":
            raise
        return None
    finally:
        if device == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the engines' processes want the room


@contextlib.contextmanager
def _as_many_threads_as_engines() -> Iterator[None]:
    """Let torch compute on every usable core, as engines do: OMP_NUM_THREADS and launchers may leave it one."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_as_many_threads_as_engines()
def fresh_rates(device: str) -> Rates:
    """The rates of this machine, measured now."""
    with in_huge_pages():  # as a CPU engine's weights are
        elements = torch.ones(READ_BYTES[device] // 4, device=device)
    read_s = _best(elements.sum, device)
    del elements
    products: dict[Precision, float] = {}
    precisions: list[Precision] = ["fp32"] if device == "cpu" else ["fp32", "fp16"]
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precisions.append("bf16")
    for precision in precisions:
        matrix = torch.ones(SIDE[device], SIDE[device], dtype=DTYPES[precision], device=device)
        products[precision] = 2 * SIDE[device] ** 3 / _best(functools.partial(torch.mm, matrix, matrix), device)
    return Rates(bytes_per_s=READ_BYTES[device] / read_s, operations_per_s=products)


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the quickest round; the first is left out."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
