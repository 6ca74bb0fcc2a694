"""How to build and run an engine: `engines/*.yaml`, named for hardware and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trsp_deploy.recipe.values import NUMBER, Count, Name, Positive, Strict

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]  # of an engine
Float = Literal["fp32", "fp16"]  # of an exported graph: integers and bf16 come in when an engine is built from it
FLOAT_BYTES: dict[Float, int] = {"fp32": 4, "fp16": 2}
Backend = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]


class Range(Strict):
    """min / opt / max of one dynamic dimension, as TensorRT's optimisation profiles want it."""

    min: Annotated[int, Field(ge=0), NUMBER]
    opt: Annotated[int, Field(ge=0), NUMBER]
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class ShapeProfile(Strict):
    """Shapes that one TensorRT optimisation profile covers."""

    batch: Range
    sequence: Range  # new tokens in one call: the prompt in prefill, 1 in decode
    past: Range | None = None  # tokens already in the KV cache; None where its length is fixed (`cache_length`)


class EngineSpec(Strict):
    """How to build and run one engine."""

    name: Name
    description: str
    backend: Backend
    precision: Precision
    profiles: tuple[ShapeProfile, ...] = ()  # TensorRT backends only, and needed there
    compute_capabilities: tuple[str, ...] = ()  # TensorRT-RTX: targets such as "sm89"; empty = every one it supports
    workspace_gib: Positive | None = None  # TensorRT backends: limit on scratch memory; None leaves the default
    cache_length: Count | None = None  # TensorRT backends: a KV cache of so many tokens, in place; None lets it grow
    cuda_graphs: bool = True  # TensorRT backends with `cache_length`: replay decoding as a CUDA graph
    weight_streaming_gib: Positive | None = None  # TensorRT backends: of weights on the GPU at once; None is all
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"  # TensorRT: other GPUs
    threads: Count | None = None  # ONNX Runtime CPU: intra-op threads; None = every core that it may use
    fuse: bool = True  # graph passes before the engine is made (tools/graphs); false leaves the graph be
    block_size: Literal[16, 32, 64, 128] = 32  # int8, int4: weights that share a scale
    # int8, int4: of the LM head's weights; 4 with int4 on ONNX Runtime, in floats 16 on TensorRT, 32 on ONNX Runtime.
    head_bits: Literal[4, 8, 16, 32] = 8
    embedding_bits: Literal[4, 8, 32] = 4  # int4 on ONNX Runtime: of the table of tokens; 32 leaves it in floats
    zero_points: bool = True  # int4 on ONNX Runtime: each block has its own; false is quicker without VNNI
    # int4, int8: products whose weights get 8 bits in the one and stay in floats in the other; so many of those whose
    # rounding costs most on the calibration text, or names of the graph's nodes.
    keep_high_precision: Annotated[int, Field(ge=0), NUMBER] | tuple[str, ...] = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What an engine depends on: everything but the words about it."""
        return self.model_dump(mode="json", exclude={"description"})

    @property
    def on_tensorrt(self) -> bool:
        """Whether TensorRT runs it, or TensorRT-RTX; else ONNX Runtime."""
        return self.backend.startswith("tensorrt")

    @property
    def is_quantised(self) -> bool:
        """Whether its weights are integers; what is not quantised stays in floats."""
        return self.precision in ("int8", "int4")

    @property
    def graph_precision(self) -> Float:
        """Precision of the ONNX graph that the engine is built from."""
        half = self.is_quantised and self.on_tensorrt
        return "fp16" if half or self.precision in ("fp16", "bf16") else "fp32"

    @property
    def longest_text(self) -> int | None:
        """Tokens that one text may have, its prompt among them; None where the engine sets no limit of its own."""
        if self.cache_length is not None:
            return self.cache_length
        return max((each.past.max + 1 for each in self._of_one if each.past is not None), default=None)

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of one text that can be read in one call; None where the engine sets no limit of its own."""
        empty = [each for each in self._of_one if each.past is None or each.past.min == 0]
        limits = [max((each.sequence.max for each in empty or self.profiles), default=None), self.longest_text]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def _of_one(self) -> tuple[ShapeProfile, ...]:
        """The profiles that hold one text alone; all of them where none does."""
        return tuple(each for each in self.profiles if each.batch.min <= 1) or self.profiles

    @property
    def reads_text(self) -> bool:
        """Whether a calibration text decides something in its build."""
        return self.is_quantised or self.graph_precision == "fp16"

    @property
    def ignored(self) -> str | None:
        """What is set and decides nothing, in words: harmless in an engine's manifest, a mistake in a file."""
        if self.threads is not None and self.backend != "onnxruntime-cpu":
            return f"`threads` is for backend onnxruntime-cpu, got {self.backend}"
        blocks = self.precision == "int4" or (self.precision == "int8" and not self.on_tensorrt)
        if not self._is_default("block_size") and not blocks:
            return f"`block_size` is for precision int4, and int8 on ONNX Runtime, got {self.precision}, {self.backend}"
        return None

    @model_validator(mode="after")
    def _fits_the_backend(self) -> EngineSpec:
        tensorrt = self.on_tensorrt
        if tensorrt and not self.profiles:
            raise ValueError(f"backend {self.backend} needs at least one entry under `profiles`")
        for name in ("profiles", "cache_length", "workspace_gib", "weight_streaming_gib"):
            if not tensorrt and getattr(self, name):
                raise ValueError(f"backend {self.backend} takes no `{name}`")
        if self.compute_capabilities and self.backend != "tensorrt-rtx":
            raise ValueError(f"`compute_capabilities` is for backend tensorrt-rtx, got {self.backend}")
        if not self.cuda_graphs and self.cache_length is None:
            raise ValueError("`cuda_graphs` is for TensorRT backends with `cache_length`")
        if self.hardware_compatibility != "none" and self.backend != "tensorrt":
            raise ValueError(f"`hardware_compatibility` is for backend tensorrt, got {self.backend}")
        if self.is_quantised and self.backend == "onnxruntime-cuda":
            raise ValueError(f"precision {self.precision} is not for backend {self.backend}")
        if self.keep_high_precision and not self.is_quantised:
            raise ValueError(f"`keep_high_precision` is for precision int8 and int4, got {self.precision}")
        self._head_fits()
        for name in ("embedding_bits", "zero_points"):
            if not self._is_default(name) and (tensorrt or self.precision != "int4"):
                raise ValueError(
                    f"`{name}` is for precision int4 on ONNX Runtime, got {self.precision}, {self.backend}"
                )
        if self.precision == "bf16" and not tensorrt:
            raise ValueError(
                f"precision bf16 is not for backend {self.backend}, as ONNX Runtime has no bf16 products on a CPU, "
                "where graphs are proven; fp16 and fp32 are for it, bf16 for tensorrt and tensorrt-rtx"
            )
        if self.precision == "int4" and tensorrt and self.block_size < 64:
            raise ValueError(f"backend {self.backend} reads 4-bit weights in a `block_size` of 64 or 128")
        for profile in self.profiles:
            if (profile.past is None) != (self.cache_length is not None):
                raise ValueError("give `past` in every profile, or `cache_length` and `past` in none")
            if self.cache_length is not None and profile.sequence.max > self.cache_length:
                raise ValueError(f"a profile reads {profile.sequence.max} tokens, and `cache_length` is less")
        return self

    def _is_default(self, name: str) -> bool:
        """Whether a setting is what it is where nobody sets it."""
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    def _head_fits(self) -> None:
        """Raise ValueError for an LM head whose weights this backend does not hold so."""
        if self._is_default("head_bits"):
            return
        floats = 8 * FLOAT_BYTES[self.graph_precision]  # of what is not quantised
        valid = [8, floats] if self.is_quantised else []
        if self.precision == "int4" and not self.on_tensorrt:
            valid.append(4)
        if self.head_bits not in valid:
            said = f"takes {', '.join(map(str, sorted(valid)))}" if valid else "has none"
            raise ValueError(f"`head_bits` {self.head_bits}: precision {self.precision} on {self.backend} {said}")


def named_by_file(name: str) -> bool:
    """Whether an engine spec, or a recipe, is named by its own YAML file and not as one that comes with the toolkit."""
    return Path(name).suffix in (".yaml", ".yml")


def engine_name(engine: str) -> str:
    """What a recipe's engine is called: of a file, which need not be there any more, by its stem."""
    return Path(engine).stem if named_by_file(engine) else engine
