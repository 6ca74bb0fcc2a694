"""Time engines on a GPU against PyTorch and against what the GPU's memory allows; latency needs no trained weights.

    make gpu                                     # tests that need a GPU, then this
    python -m benchmarks.gpu --only tensorrt-fp16
    python -m benchmarks.gpu --tiny              # the CPU and a tiny model: shows that it works, keeps nothing

A random OPT-6.7B with 32 layers and with 24, fp16: a prompt of 2048, then decoding at several past lengths and batches.
Every contender and depth is a process of its own and a line of benchmarks/results/gpu.jsonl; what stands there for this
GPU and these versions is not measured again, so that a run of limited time goes on where the last one ended. Prints a
table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.pages import markdown
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.decoder import decoder_size
from trsp_deploy.errors import EngineUnavailable, TrspError
from trsp_deploy.recipe import ExportSettings, Strict
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.limits import decode_bytes
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import Runner, check_can_build, check_can_run, open_engine

RESULTS = Path("benchmarks/results/gpu.jsonl")
ENGINES = ("ort-cuda-fp16", "tensorrt-fp16", "tensorrt-fp16-static", "tensorrt-rtx-fp16", "tensorrt-rtx-fp16-static")
CONTENDERS = ("torch-eager", "torch-compiled", *ENGINES)
TARGETS = {"bandwidth_share": 0.8, "speedup_over_limit": 0.95}


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


class Sample(Strict):
    """Seconds of one shape; a shape that did not fit has the reason instead."""

    phase: str  # "prefill" or "decode"
    batch: int
    past: int  # tokens in the cache before; of a prompt, its length
    seconds: tuple[float, ...] = ()  # a prompt, or a decoding step
    reason: str | None = None


class Line(Strict):
    """One contender at one depth."""

    contender: str
    layers: int
    machine: Provenance
    bandwidth_bytes_per_s: float
    bytes_of_a_step: float  # that decoding at batch 1 and the shortest past has to read
    samples: tuple[Sample, ...]


def main() -> int:
    """Measure what is missing, print the table."""
    options = _parse()
    if options.measure:
        plan = TINY if options.tiny else FULL
        print(measure(options.measure, options.layers, plan, "cpu" if options.tiny else "cuda").model_dump_json())
        return 0
    plan = TINY if options.tiny else FULL
    contenders = ("torch-eager", "ort-cpu-fp32") if options.tiny else CONTENDERS
    lines = [] if options.tiny else _read()
    absent: dict[str, str] = {}
    for name in (name for name in contenders if options.only in name):
        reason = None if options.tiny else _why_not(name)
        for layers in plan.layers:
            if reason is not None or any(_same(line, name, layers) for line in lines):
                continue
            print(f"measuring {name}, {layers} layers", file=sys.stderr, flush=True)
            found, reason = _in_a_process(name, layers, options.tiny)
            if found is not None:
                lines.append(found)
                if not options.tiny:
                    RESULTS.parent.mkdir(parents=True, exist_ok=True)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(found.model_dump_json() + "\n")
        if reason is not None:
            absent[name] = reason
    here = [line for line in lines if options.tiny or line.machine.gpus == provenance().gpus]
    print(text(here, plan, absent))
    print(json.dumps(verdict(here, plan)))
    return 0


# -- one measurement ---------------------------------------------------------------------------------------------------


def measure(contender: str, layers: int, plan: Plan, device: str) -> Line:
    """Make the model, build what the contender needs, and time every shape; raises EngineUnavailable."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        folder = _random_opt(Path(scratch) / "model", layers, plan, device)
        size = decoder_size(folder)
        with _opened(contender, folder, Path(scratch), device, plan) as runner:
            shapes = [("prefill", 1, plan.prompt)]
            shapes += [("decode", batch, past) for batch in plan.batches for past in plan.pasts]
            for phase, batch, past in shapes:
                try:
                    samples.append(_time(runner, phase, batch, past, plan))
                except (EngineUnavailable, MemoryError, RuntimeError) as problem:  # torch's out of memory is the last
                    reason = " ".join(str(problem).split())[:200]
                    samples.append(Sample(phase=phase, batch=batch, past=past, reason=reason))
    return Line(
        contender=contender,
        layers=layers,
        machine=provenance(),
        bandwidth_bytes_per_s=measure_bandwidth(device),
        bytes_of_a_step=decode_bytes(size, "fp16" if device == "cuda" else "fp32", 1, plan.pasts[0]),
        samples=tuple(samples),
    )


def _time(runner: Runner, phase: str, batch: int, past: int, plan: Plan) -> Sample:
    random = np.random.default_rng(0)
    ids = random.integers(plan.vocabulary, size=(batch, past))
    mask = np.ones_like(ids)
    seconds = []
    for number in range(plan.rounds + 1):  # the first warms up, and compiles what compiles late
        began = time.perf_counter()
        runner.prefill(ids, mask, last_only=True)
        if phase == "decode":
            for _ in range(2):
                runner.decode(ids[:, :1])
            began = time.perf_counter()
            for _ in range(plan.steps):
                runner.decode(ids[:, :1])
        if number:
            seconds.append((time.perf_counter() - began) / (plan.steps if phase == "decode" else 1))
    return Sample(phase=phase, batch=batch, past=past, seconds=tuple(seconds))


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
    return folder


@contextlib.contextmanager
def _opened(contender: str, model: Path, scratch: Path, device: str, plan: Plan) -> Iterator[Runner]:
    if contender.startswith("torch-"):
        with TorchRunner(model, device, plan, compiled=contender == "torch-compiled") as torch_runner:
            yield torch_runner
        return
    spec = load_engine_spec(contender)
    with quiet_libraries():
        export_onnx(model, spec.graph_precision, ExportSettings(), scratch / "onnx")
    build_engine(scratch / "onnx" / FILE, spec, scratch / "engine")
    with open_engine(scratch / "engine") as runner:
        yield runner


class TorchRunner(Runner):
    """The model as transformers runs it; compiled: with a cache of fixed length and CUDA graphs."""

    def __init__(self, model: Path, device: str, plan: Plan, *, compiled: bool) -> None:
        self._folder = model
        self._device = device
        self._plan = plan
        self._compiled = compiled
        self._model: Any = None
        self._step: Any = None
        self._cache: Any = None
        self._past = 0

    def __enter__(self) -> Self:
        import torch
        from transformers import OPTForCausalLM

        self._model = OPTForCausalLM.from_pretrained(self._folder, dtype="auto").to(self._device).eval()
        self._step = torch.compile(self._model, mode="reduce-overhead") if self._compiled else self._model
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = self._step = self._cache = None

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        from transformers import DynamicCache, StaticCache

        self._past = 0
        if self._compiled:
            self._cache = StaticCache(config=self._model.config, max_cache_len=self._plan.positions)
        else:
            self._cache = DynamicCache()
        return self._run(self._model, input_ids, keep=1 if last_only else 0)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        return self._run(self._step, input_ids, keep=0)

    def _run(self, call: Any, input_ids: np.ndarray, keep: int) -> np.ndarray:
        import torch

        ids = torch.from_numpy(input_ids).to(self._device)
        places = torch.arange(self._past, self._past + ids.shape[1], device=self._device)
        with torch.inference_mode():
            found = call(
                input_ids=ids,
                past_key_values=self._cache,
                cache_position=places,
                use_cache=True,
                logits_to_keep=keep,
            )
        self._past += ids.shape[1]
        logits: np.ndarray = found.logits.float().cpu().numpy()
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


def figures(lines: list[Line], plan: Plan) -> dict[str, float | None]:
    """Best engine's share of the bandwidth at batch 1, and the least speed-up over its limit; None where none ran."""
    engines = [line for line in lines if not line.contender.startswith("torch-")]
    shares = [share for line in engines if line.layers == plan.layers[0] and (share := share_of_bandwidth(line, plan))]
    kept = [part for line in engines if (part := _kept(line, lines, plan)) is not None]
    return {
        "bandwidth_share": round(max(shares), 3) if shares else None,
        "speedup_over_limit": round(min(kept), 3) if kept else None,
    }


def verdict(lines: list[Line], plan: Plan) -> dict[str, Any]:
    """The line for scripts; what did not run is not met."""
    found = figures(lines, plan)
    met = {name: value is not None and value >= TARGETS[name] for name, value in found.items()}
    return {"bench": "gpu", "figures": found, "targets": TARGETS, "met": met}


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
    return _median(line, "decode", 1, plan.pasts[0])


def _median(line: Line, phase: str, batch: int, past: int) -> float | None:
    wanted = (sample for sample in line.samples if (sample.phase, sample.batch, sample.past) == (phase, batch, past))
    sample = next(wanted, None)
    return median(sample.seconds) if sample is not None and sample.seconds else None


def text(lines: list[Line], plan: Plan, absent: dict[str, str]) -> str:
    """The table: milliseconds, and what kept a contender out."""
    shapes = [(batch, past) for batch in plan.batches for past in plan.pasts]
    head = [
        "contender",
        "layers",
        f"prompt {plan.prompt}",
        *(f"{batch} x past {past}" for batch, past in shapes),
        "bandwidth",
    ]
    body = []
    for line in lines:
        share = share_of_bandwidth(line, plan)
        cells = [
            _ms(_median(line, "prefill", 1, plan.prompt)),
            *(_ms(_median(line, "decode", *shape)) for shape in shapes),
        ]
        body.append([line.contender, str(line.layers), *cells, "-" if share is None else f"{share:.0%}"])
    reasons = [f"{name}: not run ({reason})" for name, reason in absent.items()]
    return "\n".join([markdown(head, body), "Milliseconds, medians; - did not fit.", *reasons])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


# -- processes ---------------------------------------------------------------------------------------------------------


def _why_not(contender: str) -> str | None:
    """What keeps a contender from running here."""
    import torch

    try:
        if contender.startswith("torch-"):
            return None if torch.cuda.is_available() else "no CUDA device for torch"
        spec = load_engine_spec(contender)
        check_can_build(spec)
        check_can_run(spec)
    except TrspError as problem:
        return str(problem)
    return None


def _in_a_process(contender: str, layers: int, tiny: bool) -> tuple[Line | None, str | None]:
    """A contender's memory and its kernels' state are its own; returns its line, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", contender, "--layers", str(layers)]
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return None, f"its process ended with {done.returncode}; the reason is above"
    return Line.model_validate_json(done.stdout.splitlines()[-1]), None


def _read() -> list[Line]:
    if not RESULTS.is_file():
        return []
    return [Line.model_validate_json(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def _same(line: Line, contender: str, layers: int) -> bool:
    """Whether a line is what would be measured here now."""
    here = provenance()
    return (line.contender, line.layers, line.machine.gpus, line.machine.packages) == (
        contender,
        layers,
        here.gpus,
        here.packages,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="the CPU and a tiny model")
    parser.add_argument("--measure", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=FULL.layers[0], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
