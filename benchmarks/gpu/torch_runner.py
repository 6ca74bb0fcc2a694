"""The PyTorch contender as a runner, so that it is timed as engines are; and what the memory of its device moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.gpu.plan import Plan
from trsp_deploy.tools.runners import Runner


class TorchRunner(Runner):
    """The model as transformers runs it; compiled: with a cache of fixed length and CUDA graphs."""

    def __init__(self, model: Path, device: str, plan: Plan, *, compiled: bool) -> None:
        self._folder = model
        self._device = device
        self._plan = plan
        self._compiled = compiled
        self._config: Any = None
        self._read: Any = None  # a prompt
        self._step: Any = None  # a token
        self._cache: Any = None
        self._mask: Any = None  # (batch, positions) of ones, beside a cache of fixed length
        self._past = 0

    def __enter__(self) -> Self:
        import torch
        from transformers import OPTForCausalLM

        model = OPTForCausalLM.from_pretrained(self._folder, dtype="auto").to(self._device).eval()
        self._config = model.config
        self._read = self._step = last_logits(model)
        if self._compiled:
            # Made for each batch alone, as what is made for any is slower; and in one piece or not at all: a break in
            # the graph would cost every step.
            self._step = torch.compile(self._read, mode="reduce-overhead", dynamic=False, fullgraph=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read = self._step = self._cache = self._mask = None

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        from transformers import DynamicCache

        self._past = 0
        if self._compiled:
            self._allocate(len(input_ids))
        else:
            self._cache = DynamicCache()
        return self._run(self._read, input_ids, keep=1 if last_only else 0)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        return self._run(self._step, input_ids, keep=0)

    def _allocate(self, batch: int) -> None:
        """A cache of fixed length, the last prompt's where it fits: CUDA graphs are captured anew at a new address.

        What the last prompt left in it is masked.
        """
        import torch
        from transformers import StaticCache

        if self._mask is not None and len(self._mask) == batch:
            return
        self._cache = self._mask = None
        self._cache = StaticCache(config=self._config, max_cache_len=self._plan.positions)
        self._mask = torch.ones(batch, self._plan.positions, dtype=torch.int64, device=self._device)

    def _run(self, logits: Any, input_ids: np.ndarray, keep: int) -> np.ndarray:
        import torch

        # A slice's copy: strides that tell of what it was cut from would be compiled for again.
        ids = torch.from_numpy(input_ids.copy()).to(self._device)
        places = torch.arange(self._past, self._past + ids.shape[1], device=self._device)
        with torch.inference_mode():
            # Left to itself, OPT derives mask and positions from how much of the cache is filled: it waits for the GPU
            # to hear it, and gets shapes that change at every step.
            found = logits(
                keep,
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=places[None],
                cache_position=places,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._past += ids.shape[1]
        result: np.ndarray = found.float().cpu().numpy()
        return result


def last_logits(model: Any) -> Callable[..., Any]:
    """The model as a function of `keep` and its inputs; returns logits (batch, keep, vocabulary), of all where it is 0.

    OPT has no `logits_to_keep`: its own forward pass runs the LM head on every position.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def logits(keep: int, **inputs: Any) -> Any:
        hidden = decoder(**inputs).last_hidden_state  # (batch, sequence, hidden)
        return head(hidden[:, -keep:])

    return logits


def measure_bandwidth(device: str) -> float:
    """Bytes a second that the device's memory moves: the best of ten copies, what is read and what is written."""
    import torch

    source = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)
