"""TensorRT's log: what it complains about, what would help, and which layers it compiled."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from trsp_deploy.errors import EngineUnavailable, one_line
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.graphs import decoder_io

BUILD_LOG = "build.log"

# Words of a failure -> what its user can do. Each was met with TensorRT-RTX 1.7 unless it says otherwise.
ADVICE = {
    "Attention operation was not supported by a dedicated kernel": "TensorRT fuses attention in fp16 and bf16 only, "
    "and up to a length that depends on the GPU: take precision fp16, or leave `cache_length` out, or make it smaller",
    # Of TensorRT 10.16 to 11.2, by NVIDIA/TensorRT-Model-Connect's issue 245; not met here.
    "live inputs": "this TensorRT does not compile attention with a mask over a long cache: upgrade it, or leave "
    "`cache_length` out",
    "Cannot compile for target(s)": "leave those capabilities out of `compute_capabilities`, or take precision fp16",
    "FP32 GEMM is not supported": "a rotary embedding multiplies in fp32, which TensorRT-RTX does not compile for 7.5: "
    "take an engine of `onnxruntime-cuda` or `tensorrt` for that card",
    "only supports Attention nodes with one output": "the cache is joined outside of Attention there: export the model "
    "without `present` outputs of that node",
    "GroupQueryAttention plugin": "that operator is ONNX Runtime's own: export the model without fused operators",
    "Plugin not found": "an operator that TensorRT does not know: export the model without fused operators",
    "Failed to open file": "the weights lie in a file beside the graph: keep the two together",
    "Failed to import initializer": "the file with the graph's weights is missing or damaged: export again",
    "violate shape constraints": "a profile asks for more than the graph allows: compare `profiles` with its inputs",
    "Dimensions with name": "TensorRT takes dimensions of one label to be equal, and a profile has them of "
    "other lengths: give the length of attention_mask, which is past and new tokens, a label of its own",
    "out of memory": "lower `workspace_gib` or the profiles' maxima",  # not met here: needs a GPU
}

# One compiled layer in a log of verbosity DETAILED. TensorRT-RTX 1.7 lists constants by themselves; TensorRT 10 has
# them among the inputs, and behind the outputs what its kinds of layer have besides (ParameterType, Weights).
LIST = r"(?: ?\{.*?\} ?)?"  # of tensors, in braces each
LAYER = re.compile(
    rf"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>{LIST})\]"
    rf"(?:, Constants: \[(?P<constants>{LIST})\])?, Outputs: \[(?P<outputs>{LIST})\](?P<rest>,.*|$)"
)
TENSOR = re.compile(
    r"Name: (?P<name>[^,]*)(?:, Location: \w+)?, Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>[^,}]*)"
)
TACTIC = re.compile(r"TacticName: ([^,]*)")
OWN_WEIGHTS = re.compile(r'(?:Weights|Bias): \{"Type": "(\w+)", "Count": (\d+)\}')
FED = ("input_ids", "attention_mask", decoder_io.POSITIONS, decoder_io.LOGITS_POSITIONS, decoder_io.WRITE_INDICES)
GRAPH = re.compile(r"_myl(\d+)_\d+$")
OF_PROFILE = re.compile(r" \[profile (\d+)\]")  # behind the names of tensors, from the second profile on
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")  # once for every profile
ATTENTION = "mha"  # in the name of every fused attention kernel
BITS = {"Int4": 4, "FP4": 4, "Int8": 8, "Bool": 8, "FP8": 8, "Half": 16, "BFloat16": 16, "Int64": 64}  # others: 32
WORDS = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}


class Layer(Strict):
    """One compiled layer: a kernel, or several that the compiler launches as one."""

    name: str
    kind: str
    profile: int  # of the spec's profiles, counted from 0
    kernel: str  # empty where it is chosen on the GPU
    precisions: tuple[str, ...]  # of what it reads, each once: activations, then constants
    reads: tuple[str, ...]  # names of tensors
    writes: tuple[str, ...]
    weight_bytes: int  # of its constants: what a decoding step reads for it


class BuildLog(Strict):
    """What a build says about the engine."""

    layers: tuple[Layer, ...] = ()  # profile after profile
    weight_bytes: int | None = None
    activation_bytes: tuple[int, ...] = ()  # of each profile

    def attention_kernels(self, profile: int = 0) -> int:
        """How many fused attention kernels a profile runs."""
        return sum(ATTENTION in layer.name for layer in self.of(profile))

    def written_in_place(self, profile: int = 0) -> set[str]:
        """Parts of the KV cache that one layer of a profile both reads and writes."""
        both = (set(layer.reads) & set(layer.writes) for layer in self.of(profile))
        return {name for names in both for name in names if name.startswith(decoder_io.PRESENT)}

    def of(self, profile: int) -> list[Layer]:
        """The layers of one profile."""
        return [layer for layer in self.layers if layer.profile == profile]


def is_log(path: Path) -> bool:
    """Whether a file was written by `logger`; one without a line may be."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            begin = file.read(len("[INTERNAL_ERROR] "))
    except OSError:
        return False
    return not begin or re.match(rb"\[(VERBOSE|INFO|WARNING|ERROR|INTERNAL_ERROR)\] ", begin) is not None


def read_log(path: Path) -> BuildLog:
    """Read a build log of verbosity DETAILED; empty when there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    weights = WEIGHTS.search(text)
    found = [match for line in text.splitlines() if (match := LAYER.search(line))]
    listed = [match for match in found if match["constants"] is not None]
    return BuildLog(
        layers=_listed(listed) if listed else _mixed(found),
        weight_bytes=int(weights[1]) if weights else None,
        activation_bytes=tuple(int(size) for size in ACTIVATIONS.findall(text)),
    )


def _listed(found: list[re.Match[str]]) -> tuple[Layer, ...]:
    """Layers as TensorRT-RTX tells of them: one compiled graph a profile, not numbered from 0 throughout."""
    numbers = sorted({_graph(match) for match in found})
    return tuple(
        _layer(match, numbers.index(_graph(match)), _tensors(match["inputs"]), _tensors(match["constants"]))
        for match in found
    )


def _mixed(found: list[re.Match[str]]) -> tuple[Layer, ...]:
    """Layers as TensorRT 10 tells of them: what nobody writes and nobody feeds is a constant.

    A profile may be several compiled graphs, and is told by the names of the tensors that a graph reads or writes.
    """
    written = {tensor["name"] for match in found for tensor in _tensors(match["outputs"])}
    profiles: dict[int, int] = {}
    for match in found:
        marks = [int(number) for number in OF_PROFILE.findall(match["inputs"] + match["outputs"])]
        profiles[_graph(match)] = max([profiles.get(_graph(match), 0), *marks])
    layers = []
    for match in found:
        reads: list[re.Match[str]] = []
        constants: list[re.Match[str]] = []
        for tensor in _tensors(match["inputs"]):
            name = tensor["name"]
            fed = name in FED or name.startswith(decoder_io.PAST)
            (reads if name in written or fed else constants).append(tensor)
        layers.append(_layer(match, profiles[_graph(match)], reads, constants))
    return tuple(layers)


def _graph(match: re.Match[str]) -> int:
    number = GRAPH.search(match["name"])
    return int(number[1]) if number else 0


def _tensors(part: str) -> list[re.Match[str]]:
    return list(TENSOR.finditer(OF_PROFILE.sub("", part)))


def _layer(match: re.Match[str], profile: int, reads: list[re.Match[str]], constants: list[re.Match[str]]) -> Layer:
    tactic, own = TACTIC.search(match["rest"]), OWN_WEIGHTS.findall(match["rest"])
    types = [*(_dtype(tensor["dtype"]) for tensor in (*reads, *constants)), *(kind for kind, _ in own)]
    return Layer(
        name=match["name"],
        kind=match["kind"],
        profile=profile,
        kernel=tactic[1].strip() if tactic else "",
        precisions=tuple(dict.fromkeys(types)),
        reads=tuple(tensor["name"] for tensor in reads),
        writes=tuple(tensor["name"] for tensor in _tensors(match["outputs"])),
        weight_bytes=sum(map(_bytes, constants)) + sum(int(count) * BITS.get(kind, 32) // 8 for kind, count in own),
    )


def _dtype(text: str) -> str:
    """A tensor's type out of its format: "Half", "Row major linear FP16 format"."""
    words = [WORDS.get(word.upper(), word) for word in text.split()]
    return next((word for word in words if word in BITS or word == "Float"), words[0] if words else "")


def _bytes(tensor: re.Match[str]) -> int:
    count = math.prod(int(length) for length in tensor["shape"].split(",") if length)
    return count * BITS.get(_dtype(tensor["dtype"]), 32) // 8


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The one logger of this process: TensorRT keeps the first that it is given and ignores later ones."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors in memory, and while a build runs everything in its file."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._file: Any = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if self._file is not None:
                print(f"[{severity.name}] {message}", file=self._file)

        @contextlib.contextmanager
        def into(self, path: Path) -> Iterator[None]:
            self.errors.clear()
            with path.open("w", encoding="utf-8") as self._file:
                try:
                    yield
                finally:
                    self._file = None

        def complaint(self, otherwise: str = "no reason was logged") -> str:
            """The errors since the last call, once each, and what would help, as one line."""
            lines = list(dict.fromkeys(one_line(error) for error in self.errors))
            self.errors.clear()
            return with_advice("; ".join(lines) or otherwise)

    return Log()


def with_advice(reason: str) -> str:
    """A failure's reason, and what its user can do where that is known."""
    known = next((advice for words, advice in ADVICE.items() if words.lower() in reason.lower()), None)
    return reason if known is None else f"{reason}; {known}"


def made(log: Any, failure: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; TensorRT reports a failure as None or as a null factory, with the reason in its log."""
    try:
        result = make()
    except (TypeError, RuntimeError) as problem:
        raise EngineUnavailable(f"TensorRT: {failure}: {log.complaint(one_line(problem))}") from problem
    if result is None:
        raise EngineUnavailable(f"TensorRT: {failure}: {log.complaint()}")
    return result


def deserialized(log: Any, failure: str, runtime: Any, path: Path) -> Any:
    """The engine of a file. Raises EngineUnavailable, which begins with `failure`, for what is none here.

    The file is mapped until TensorRT has its own copy: read, it would lie in memory as a whole beside that.
    """
    if not path.stat().st_size:  # nothing to map
        raise EngineUnavailable(f"TensorRT: {failure}: the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return made(log, failure, lambda: runtime.deserialize_cuda_engine(content))
