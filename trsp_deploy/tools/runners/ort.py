"""ONNX Runtime, on the CPU or through its CUDA provider.

The KV cache never leaves the device. A graph with fused attention (tools/graphs) writes it in place:
`past_key_values.*` and `present.*` are one memory, allocated once and longer than the text. From any other graph a
step's `present.*` are bound as the next step's `past_key_values.*`. This module imports no torch, so that a measuring
process stays small.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trsp_deploy.errors import ShapeUnavailable
from trsp_deploy.recipe import Backend
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.denormals import as_zero
from trsp_deploy.tools.runners.huge_pages import in_huge_pages
from trsp_deploy.tools.runners.manifest import EngineManifest
from trsp_deploy.tools.runners.ort_session import bindings_of, create_session, one_line_errors
from trsp_deploy.tools.runners.requirements import load_package

DEVICES: dict[Backend, str] = {"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"}
CHUNK = 256  # tokens: room behind the prompt in a cache that is written in place


def open_engine(folder: Path, manifest: EngineManifest) -> OrtRunner:
    """A runner for a built engine."""
    spec = manifest.spec
    optimised = spec.backend == "onnxruntime-cpu"
    return OrtRunner(
        folder / manifest.file,
        backend=spec.backend,
        threads=spec.threads,
        optimised=optimised,
        padding=manifest.padding,
    )


class OrtRunner(Runner):
    """Generates with ONNX Runtime from an engine or from any decoder's ONNX file.

    model: the ONNX file. backend: "onnxruntime-cpu" or "onnxruntime-cuda".
    threads: intra-op threads; None takes every core that this process may use.
    optimised: the file is a built CPU engine, whose graph needs no optimisation any more.
    lean: hold as little memory as can be, at the price of time.
    brief: a few tokens are run, too few to be worth moving the weights into huge pages.
    padding: whether the graph hides padding; batches that have some are refused where it does not.
    """

    def __init__(
        self,
        model: Path,
        *,
        backend: Backend = "onnxruntime-cpu",
        threads: int | None = None,
        optimised: bool = False,
        lean: bool = False,
        brief: bool = False,
        padding: bool = True,
    ) -> None:
        self.model = model
        self.backend = backend
        self.threads = threads
        self.optimised = optimised
        self.lean = lean
        self.brief = brief
        self.padding = padding
        self._session: Any = None
        self._inputs: decoder_io.Bindings = {}
        self._in_place = False
        self._fixed: int | None = None  # tokens in a cache of fixed length
        self._longest: int | None = None  # tokens of the longest text that the graph holds for
        self._binding: Any = None  # an IOBinding; with the cache in place it is made once and holds the cache
        self._cache: dict[str, Any] = {}  # input name -> OrtValue (batch, heads, past or capacity, head_dim)
        self._capacity = 0  # tokens that the cache has room for, where it is written in place
        self._outputs: decoder_io.Bindings = {}
        self._logits: np.ndarray | None = None  # (batch, positions, vocabulary), bound
        self._tokens: dict[str, np.ndarray] = {}  # bound
        self._attention_mask: np.ndarray | None = None  # (batch, past)

    def __enter__(self) -> Self:
        worth_it = self.backend == "onnxruntime-cpu" and not self.lean and not self.brief
        with in_huge_pages() if worth_it else contextlib.nullcontext():
            self._session = create_session(
                self.model, self.backend, self.threads, optimised=self.optimised, lean=self.lean
            )
        self._inputs = bindings_of(self._session.get_inputs())
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._in_place = decoder_io.IN_PLACE in metadata
        self._longest = int(metadata[decoder_io.LONGEST]) if decoder_io.LONGEST in metadata else None
        self._outputs = bindings_of(self._session.get_outputs())
        decoder_io.check_decoder(self._inputs, self._outputs)
        decoder_io.check_logits(self._outputs)
        self._fixed = decoder_io.cache_length(self._inputs)
        return self

    def twin(self) -> OrtRunner:
        """A second runner over this one's session, with a cache of its own; it ends with this one."""
        other = OrtRunner(
            self.model,
            backend=self.backend,
            threads=self.threads,
            optimised=self.optimised,
            padding=self.padding,
        )
        other._session, other._inputs, other._outputs = self._session, self._inputs, self._outputs
        other._in_place, other._fixed, other._longest = self._in_place, self._fixed, self._longest
        return other

    @property
    def in_place(self) -> bool:
        """Whether the graph writes its cache in place, and the cache may be longer than the text."""
        return self._in_place and self._fixed is None

    @property
    def cache(self) -> dict[str, Any]:
        """The cache as OrtValues (batch, heads, capacity, head_dim), by input name."""
        return self._cache

    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate a cache of this many rows and places in place of the current one; its contents are undefined."""
        self._capacity = capacity
        shapes = self._cache_shapes(batch, capacity)
        self._cache = {name: self._allocate(shape, dtype) for name, (dtype, shape) in shapes.items()}
        self._bind_cache()

    def step(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Append tokens to each row of a cache that the caller manages.

        input_ids: (batch, tokens). attention_mask: (batch, length), the new tokens among it.
        Returns logits of the last one (batch, 1, vocabulary) float32.
        """
        return self._step(input_ids, attention_mask, keep=1)

    @property
    def longest_text(self) -> int | None:
        return min((limit for limit in (self._fixed, self._longest) if limit is not None), default=None)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: the width of the logits."""
        return int(self._outputs["logits"][1][-1])

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = {}
        self._attention_mask = self._logits = None
        self._binding = self._session = None

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        batch, sequence = input_ids.shape
        self.allocate(batch, (self._fixed or sequence + CHUNK) if self._in_place else 0)
        return self._step(input_ids, attention_mask, keep=1 if last_only else 0)

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        value, device = load_package(self.backend).OrtValue, DEVICES[self.backend]
        if self._fixed is not None:  # all of it is read: what is not written yet is masked, and has to be a number
            return value.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
        return value.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, device, 0)

    def feeds(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Everything that a session is fed which is driven from outside, to read a prompt from its beginning."""
        shapes = self._cache_shapes(len(input_ids), 0)
        cache = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
        return cache | decoder_io.token_inputs(self._inputs, input_ids, attention_mask)

    def _cache_shapes(self, batch: int, past: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        inputs = {name: self._inputs[name] for name in decoder_io.cache_inputs(self._inputs)}
        return {
            name: (dtype, decoder_io.input_shape(name, shape, batch=batch, sequence=0, past=past))
            for name, (dtype, shape) in inputs.items()
        }

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        if self._attention_mask is None:
            raise RuntimeError("decode comes after prefill")
        return self._step(input_ids, decoder_io.extended(self._attention_mask, input_ids))

    def _step(self, input_ids: np.ndarray, attention_mask: np.ndarray, keep: int = 0) -> np.ndarray:
        decoder_io.check_longest(self.model, self._longest, attention_mask.shape[1])
        decoder_io.check_padding(self.model, self.padding, attention_mask)
        if self._in_place and attention_mask.shape[1] > self._capacity:
            self._grow()
        tokens = decoder_io.token_inputs(self._inputs, input_ids, attention_mask, keep)
        for name, value in tokens.items():
            self._binding.bind_cpu_input(name, value)
        self._tokens = tokens  # bound in place: they must outlive the run
        kept = tokens.get(decoder_io.LOGITS_POSITIONS)
        logits = self._bind_logits(len(input_ids), input_ids.shape[1] if kept is None else len(kept))
        with one_line_errors(f"ONNX Runtime stopped in {self.model}"), as_zero():
            self._session.run_with_iobinding(self._binding)
        if not self._in_place:
            present = self._binding.get_outputs()[:-1]
            self._cache = dict(zip(self._cache, present, strict=True))
            self._bind_cache()
        self._attention_mask = attention_mask
        wanted = logits[:, -keep:] if keep else logits  # (batch, sequence or keep, vocabulary)
        return wanted.astype(np.float32)  # a copy: the buffer is written again by the next step

    def _bind_logits(self, batch: int, positions: int) -> np.ndarray:
        """The host memory that a run writes logits into, (batch, positions, vocabulary); kept from step to step."""
        shape = (batch, positions, self.vocabulary)
        if self._logits is None or self._logits.shape != shape:
            # By address: asking the binding for its outputs makes an object of every one of them, 0.1 ms a step.
            self._logits = np.empty(shape, dtype=self._outputs["logits"][0])
            address, dtype = self._logits.ctypes.data, self._logits.dtype.type
            self._binding.bind_output("logits", "cpu", 0, dtype, shape, address)
        return self._logits

    def _bind_cache(self) -> None:
        """Read `past_key_values.*` from the cache, and write `present.*` into it or into memory of its own."""
        self._binding, self._logits = self._session.io_binding(), None
        for name, value in self._cache.items():
            self._binding.bind_ortvalue_input(name, value)
            if self._in_place:
                self._binding.bind_ortvalue_output(decoder_io.present(name), value)
            else:
                self._binding.bind_output(decoder_io.present(name), DEVICES[self.backend])

    def _grow(self) -> None:
        """Move the cache into twice the room, so that a text of n tokens is moved log n times.

        Raises ShapeUnavailable where the cache has a fixed length.
        """
        if self._fixed is not None:
            raise ShapeUnavailable(f"{self.model}: its cache holds {self._fixed} tokens, and the text is longer")
        ort = load_package(self.backend)
        filled, self._capacity = self._capacity, max(2 * self._capacity, CHUNK)
        for name, value in self._cache.items():
            old = value.numpy()  # (batch, heads, filled, head_dim)
            new = np.zeros((*old.shape[:2], self._capacity, old.shape[3]), dtype=old.dtype)
            new[:, :, :filled] = old
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(new, DEVICES[self.backend], 0)
        self._bind_cache()
