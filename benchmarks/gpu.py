"""Time engines on a GPU against PyTorch and against what the GPU's memory allows; latency needs no trained weights.

    make gpu                                     # tests that need a GPU, then this
    python -m benchmarks.gpu --only tensorrt-fp16
    python -m benchmarks.gpu --tiny              # the CPU and a tiny model: shows that it works, keeps nothing

A random OPT-6.7B with 32 layers and with 24, fp16: a prompt of 2048, then decoding at several past lengths and batches.
Every contender and depth is a process of its own and a line of benchmarks/results/gpu.jsonl; what stands there for this
machine, these versions, the same engine spec and plan is not measured again, so that a run of limited time goes on
where the last one ended; what failed for want of anything but memory is tried again. Takes 55 GB of disk for temporary
files, four times the weights. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import ValidationError

from benchmarks.pages import markdown
from trsp_deploy.artifacts import Provenance, provenance, seal, writing
from trsp_deploy.decoder import DecoderSize, decoder_size
from trsp_deploy.errors import NO_MEMORY, EngineUnavailable, TrspError
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, ExportSettings, Range, ShapeProfile, Strict, read_engine_spec
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.limits import decode_bytes
from trsp_deploy.tools.prctl import end_with_parent
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import Runner, check_can_build, check_can_run, open_engine
from trsp_deploy.tools.runners.passes import VERSION as PASSES
from trsp_deploy.tools.runners.requirements import cuda_devices

RESULTS = Path("benchmarks/results/gpu.jsonl")
ENGINES = ("ort-cuda-fp16", "tensorrt-fp16", "tensorrt-fp16-static", "tensorrt-rtx-fp16", "tensorrt-rtx-fp16-static")
CONTENDERS = ("torch-eager", "torch-compiled", *ENGINES)
TINY_CONTENDERS = ("torch-eager", "torch-compiled", "ort-cpu-fp32")
TARGETS = {"bandwidth_share": 0.8, "speedup_over_limit": 0.95}
VERSION = "2"  # raise when what is timed changes: every line is then measured anew
SETTLING = 2  # decoding steps before those that count: compiling, capturing a CUDA graph


class Plan(Strict):
    """What is measured."""

    layers: tuple[int, int]  # dense, and after a quarter was removed
    hidden_size: int
    ffn_dim: int
    heads: int
    vocabulary: int
    positions: int
    prompt: int
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int = 16  # decoding steps of one sample
    rounds: int = 7  # samples


FULL = Plan(
    layers=(32, 24),
    hidden_size=4096,
    ffn_dim=16384,
    heads=32,
    vocabulary=50272,
    positions=2048,
    prompt=2048,
    pasts=(128, 1024, 1900),
    batches=(1, 8, 64),
)
TINY = Plan(
    layers=(4, 3),
    hidden_size=64,
    ffn_dim=128,
    heads=4,
    vocabulary=384,
    positions=64,
    prompt=32,
    pasts=(8, 16),
    batches=(1, 2),
    steps=2,
    rounds=2,
)


class Shape(NamedTuple):
    """What one sample times."""

    phase: Literal["prefill", "decode"]
    batch: int
    past: int  # tokens in the cache before; of a prompt, its length

    def __str__(self) -> str:
        return f"prompt {self.past}" if self.phase == "prefill" else f"{self.batch} x past {self.past}"


def shapes(plan: Plan) -> list[Shape]:
    """Every shape of a plan: its prompt, then decoding."""
    steps = [Shape("decode", batch, past) for batch in plan.batches for past in plan.pasts]
    return [Shape("prefill", 1, plan.prompt), *steps]


class Sample(Strict):
    """Seconds of one shape; one that failed has the reason instead."""

    phase: Literal["prefill", "decode"]
    batch: int
    past: int
    seconds: tuple[float, ...] = ()  # a prompt, or a decoding step
    reason: str | None = None
    fits: bool = True  # false where the reason is memory: another time it would be the same

    @property
    def shape(self) -> Shape:
        """What it times."""
        return Shape(self.phase, self.batch, self.past)


class Line(Strict):
    """One contender at one depth."""

    key: str  # of all that it depends on (`key_of`)
    contender: str
    layers: int
    machine: Provenance
    bandwidth_bytes_per_s: float
    bytes_of_a_step: float  # that decoding at batch 1 and the shortest past has to read
    samples: tuple[Sample, ...]

    @property
    def done(self) -> bool:
        """Whether measuring it again would tell nothing new."""
        return all(sample.seconds or not sample.fits for sample in self.samples)


def main() -> int:
    """Measure what is missing, print the table."""
    options = _parse()
    plan, device = (TINY, "cpu") if options.tiny else (FULL, "cuda")
    if options.measure:
        return _work(options.measure, options.layers, plan, device)
    contenders = TINY_CONTENDERS if options.tiny else CONTENDERS
    keys = {key_of(name, layers, plan): (name, layers) for name in contenders for layers in plan.layers}
    lines = {} if options.tiny else {line.key: line for line in _read() if line.key in keys}
    reasons = {} if options.tiny else _absent(name for name in contenders if options.only in name)
    failed = []
    for key, (name, layers) in _missing(keys, lines, options.only):
        if name in reasons:
            continue
        print(f"measuring {name}, {layers} layers", file=sys.stderr, flush=True)
        found = _in_a_process(name, layers, options.tiny)
        if isinstance(found, str):
            reasons[name] = f"{layers} layers: {found}"
            failed.append(name)
            continue
        lines[key] = found
        if not options.tiny:
            _keep(found)
    here = [lines[key] for key in keys if key in lines]
    print(text(here, plan, reasons))
    print(json.dumps(verdict(here, plan, failed)))
    return 0


def _missing(keys: dict[str, tuple[str, int]], lines: dict[str, Line], only: str) -> list[tuple[str, tuple[str, int]]]:
    """What is to be measured; what failed before comes last, so that it cannot keep the others from their turn."""
    missing = [(key, what) for key, what in keys.items() if only in what[0] and not (key in lines and lines[key].done)]
    return sorted(missing, key=lambda each: each[0] in lines)


# -- one measurement ---------------------------------------------------------------------------------------------------


def measure(contender: str, layers: int, plan: Plan, device: str) -> Line:
    """Make the model, build what the contender needs, and time every shape; raises EngineUnavailable."""
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        model = _random_opt(Path(scratch) / "model", layers, plan, device)
        size = decoder_size(model)
        opened, unfit = _contender(contender, model, size, plan, device)
        with opened as runner:
            samples = tuple(_sample(runner, shape, plan, unfit.get(shape)) for shape in shapes(plan))
    return Line(
        key=key_of(contender, layers, plan),
        contender=contender,
        layers=layers,
        machine=provenance(),
        bandwidth_bytes_per_s=measure_bandwidth(device),
        bytes_of_a_step=decode_bytes(size, "fp16" if device == "cuda" else "fp32", 1, plan.pasts[0]),
        samples=samples,
    )


def _contender(
    name: str, model: Path, size: DecoderSize, plan: Plan, device: str
) -> tuple[AbstractContextManager[Runner], dict[Shape, str]]:
    """A contender, to be entered, and the shapes that it is not asked for, with the reason."""
    if _is_torch(name):
        return TorchRunner(model, device, plan, compiled=name == "torch-compiled"), {}
    spec = load_engine_spec(name)
    if not spec.profiles:
        return _engine(model, spec), {}
    unfit = beyond_memory(spec, plan, size, cuda_devices()[0].memory_bytes)
    return _engine(model, with_profiles(spec, plan, unfit)), unfit


def _is_torch(contender: str) -> bool:
    return contender.startswith("torch-")


def _sample(runner: Runner, shape: Shape, plan: Plan, unfit: str | None) -> Sample:
    """Time one shape; whatever stops it is its reason, and the next shape goes on. unfit: why it is not tried."""
    if unfit is not None:
        return Sample(**shape._asdict(), reason=unfit, fits=False)
    try:
        return Sample(**shape._asdict(), seconds=_time(runner, shape, plan))
    except (EngineUnavailable, MemoryError, RuntimeError) as problem:  # torch's out of memory is the last
        return Sample(**shape._asdict(), reason=_one_line(problem), fits=not _is_about_memory(problem))


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]


def _is_about_memory(problem: BaseException | None) -> bool:
    while problem is not None:
        if isinstance(problem, MemoryError) or NO_MEMORY.search(str(problem)):
            return True
        problem = problem.__cause__
    return False


def _time(runner: Runner, shape: Shape, plan: Plan) -> tuple[float, ...]:
    random = np.random.default_rng(0)
    ids = random.integers(plan.vocabulary, size=(shape.batch, shape.past))
    mask = np.ones_like(ids)
    decoding = shape.phase == "decode"
    seconds = []
    for _ in range(plan.rounds + 1):
        began = time.perf_counter()
        runner.prefill(ids, mask, last_only=True)
        if decoding:
            for _ in range(SETTLING):
                runner.decode(ids[:, :1])
            began = time.perf_counter()
            for _ in range(plan.steps):
                runner.decode(ids[:, :1])
        seconds.append((time.perf_counter() - began) / (plan.steps if decoding else 1))
    return tuple(seconds[1:])  # the first warms up, and compiles what compiles late


def _random_opt(folder: Path, layers: int, plan: Plan, device: str) -> Path:
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


# -- what was found ----------------------------------------------------------------------------------------------------


def figures(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> dict[str, float | None]:
    """Best engine's share of the bandwidth at batch 1, and the least speed-up over its limit; None where none ran.

    There is no least speed-up as long as an engine is lacking.
    """
    engines = [line for line in lines if not _is_torch(line.contender)]
    shares = [share for line in engines if line.layers == plan.layers[0] and (share := share_of_bandwidth(line, plan))]
    kept = [part for line in engines if (part := _kept(line, lines, plan)) is not None]
    return {
        "bandwidth_share": max(shares, default=None),
        "speedup_over_limit": None if lacking(lines, plan, failed) else min(kept, default=None),
    }


def lacking(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> list[str]:
    """Engines that were measured or tried here, and the depth at which they have no decoding step at batch 1."""
    engines = [name for name in dict.fromkeys([*(line.contender for line in lines), *failed]) if not _is_torch(name)]
    there = {(line.contender, line.layers) for line in lines if _step(line, plan) is not None}
    return [f"{name}, {layers} layers" for name in engines for layers in plan.layers if (name, layers) not in there]


def verdict(lines: list[Line], plan: Plan, failed: Collection[str] = ()) -> dict[str, Any]:
    """The line for scripts; what did not run is not met. failed: contenders whose process came to nothing."""
    found = figures(lines, plan, failed)
    return {
        "bench": "gpu",
        "figures": {name: None if value is None else round(value, 3) for name, value in found.items()},
        "targets": TARGETS,
        "met": {name: value is not None and value >= TARGETS[name] for name, value in found.items()},
        "lacking": lacking(lines, plan, failed),
    }


def share_of_bandwidth(line: Line, plan: Plan) -> float | None:
    """Bytes that a step at batch 1 has to read over what the memory moves meanwhile."""
    seconds = _step(line, plan)
    return None if seconds is None else line.bytes_of_a_step / seconds / line.bandwidth_bytes_per_s


def _kept(line: Line, lines: list[Line], plan: Plan) -> float | None:
    """Speed-up of the shorter model over its limit, from the longer one's line."""
    dense, pruned = plan.layers
    other = next((found for found in lines if (found.contender, found.layers) == (line.contender, pruned)), None)
    if line.layers != dense or other is None:
        return None
    before, after = _step(line, plan), _step(other, plan)
    if before is None or after is None:
        return None
    return before / after / (line.bytes_of_a_step / other.bytes_of_a_step)


def _step(line: Line, plan: Plan) -> float | None:
    """Median seconds of a decoding step at batch 1 and the shortest past."""
    return _median(line, Shape("decode", 1, plan.pasts[0]))


def _median(line: Line, shape: Shape) -> float | None:
    sample = next((sample for sample in line.samples if sample.shape == shape), None)
    return median(sample.seconds) if sample is not None and sample.seconds else None


def text(lines: list[Line], plan: Plan, absent: dict[str, str]) -> str:
    """The table: milliseconds, and what kept a contender or a shape out."""
    body, reasons = [], []
    for line in lines:
        share = share_of_bandwidth(line, plan)
        cells = [_ms(_median(line, shape)) for shape in shapes(plan)]
        body.append([line.contender, str(line.layers), *cells, "-" if share is None else f"{share:.0%}"])
        where = f"{line.contender}, {line.layers} layers"
        reasons += [f"{where}, {sample.shape}: {sample.reason}" for sample in line.samples if sample.reason]
    head = ["contender", "layers", *map(str, shapes(plan)), "bandwidth"]
    reasons += [f"{name}: not run ({reason})" for name, reason in absent.items()]
    return "\n".join([markdown(head, body), "Milliseconds, medians; - has its reason below.", *reasons])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


# -- processes ---------------------------------------------------------------------------------------------------------


def _absent(contenders: Iterable[str]) -> dict[str, str]:
    """Contenders that cannot run here, and what keeps them."""
    return {name: reason for name in contenders if (reason := _why_not(name)) is not None}


def _why_not(contender: str) -> str | None:
    import torch

    try:
        if _is_torch(contender):
            return None if torch.cuda.is_available() else "no CUDA device for torch"
        spec = load_engine_spec(contender)
        check_can_build(spec)
        check_can_run(spec)
    except TrspError as problem:
        return str(problem)
    return None


def _in_a_process(contender: str, layers: int, tiny: bool) -> Line | str:
    """A contender's memory and its kernels' state are its own; returns its line, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", contender, "--layers", str(layers)]
    command += ["--tiny"] if tiny else []
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:  # here, so that a crash leaves no 40 GB behind
        environment = {**os.environ, "TMPDIR": scratch}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        return done.stdout.strip() or f"its process ended with {done.returncode}; the reason is above"
    return Line.model_validate_json(done.stdout)


def _work(contender: str, layers: int, plan: Plan, device: str) -> int:
    """What that process does: its line, or a sentence that says why there is none, is all that it writes to stdout."""
    end_with_parent()  # a bench that was killed must not leave one behind that holds the GPU
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # libraries that print must not get in between
        try:
            print(measure(contender, layers, plan, device).model_dump_json(), file=replies)
        except TrspError as problem:
            print(_one_line(problem), file=replies)
            return problem.exit_code
    return 0


# -- what is kept ------------------------------------------------------------------------------------------------------


def key_of(contender: str, layers: int, plan: Plan) -> str:
    """SHA-256 over all that a line depends on: only lines with the keys of here and now are reported."""
    spec = None if _is_torch(contender) else load_engine_spec(contender).model_dump(mode="json")
    said = {"bench": VERSION, "contender": contender, "layers": layers, "spec": spec, "passes": PASSES}
    machine = provenance().model_dump(include={"trsp_deploy", "packages", "cpu", "gpus"})
    return seal({**said, **machine, "plan": plan.model_dump()})


def _read() -> list[Line]:
    """The lines that are there; one that is none is left where it is, with a notice."""
    found = []
    for number, (_, line) in enumerate(_rows(), start=1):
        if line is None:
            print(f"{RESULTS}:{number}: not a line of this bench, or torn; left out", file=sys.stderr)
        else:
            found.append(line)
    return found


def _keep(line: Line) -> None:
    """Add a line, in the place of one with its key; a kill leaves the file as it was."""
    rows = [row for row, there in _rows() if there is None or there.key != line.key]
    with writing(RESULTS) as partial:
        partial.write_bytes(b"".join(row + b"\n" for row in [*rows, line.model_dump_json().encode()]))


def _rows() -> list[tuple[bytes, Line | None]]:
    """Rows of the file and what they say."""
    rows = RESULTS.read_bytes().splitlines() if RESULTS.is_file() else []
    return [(row, _parsed(row)) for row in rows]


def _parsed(row: bytes) -> Line | None:
    try:
        return Line.model_validate_json(row)
    except ValidationError:
        return None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="the CPU and a tiny model")
    parser.add_argument("--measure", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=FULL.layers[0], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # temporary files go before it does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what is measured is kept, the same command goes on")
