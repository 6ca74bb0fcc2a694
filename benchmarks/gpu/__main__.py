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
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.gpu.contenders import CONTENDERS, TINY_CONTENDERS, absent, open_contender, random_opt
from benchmarks.gpu.found import Line, Sample, keep, key_of, read, text, verdict
from benchmarks.gpu.plan import FULL, SETTLING, TINY, Plan, Shape, shapes
from benchmarks.gpu.torch_runner import measure_bandwidth
from trsp_deploy.artifacts import provenance
from trsp_deploy.decoder import decoder_size
from trsp_deploy.errors import NO_MEMORY, EngineUnavailable, RunError, TrspError, one_line
from trsp_deploy.tools.graphs.stored import in_floats
from trsp_deploy.tools.judging.limits import decode_bytes
from trsp_deploy.tools.prctl import end_with_parent
from trsp_deploy.tools.runners import Runner


def main() -> int:
    """Measure what is missing, print the table."""
    options = _parse()
    plan, device = (TINY, "cpu") if options.tiny else (FULL, "cuda")
    if options.measure:
        return _work(options.measure, options.layers, plan, device)
    contenders = TINY_CONTENDERS if options.tiny else CONTENDERS
    if not any(options.only in name for name in contenders):
        problem = RunError(f"--only '{options.only}': no contender's name holds it; there are {', '.join(contenders)}")
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    keys = {key_of(name, layers, plan): (name, layers) for name in contenders for layers in plan.layers}
    lines = {} if options.tiny else {line.key: line for line in read() if line.key in keys}
    reasons = {} if options.tiny else absent(name for name in contenders if options.only in name)
    failed, code = [], 0
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
            try:
                keep(found)
            except TrspError as problem:  # a full disk: what is shown below is all that is known of it
                print(f"error: {problem}", file=sys.stderr)
                code = problem.exit_code
                break
    here = [lines[key] for key in keys if key in lines]
    print(text(here, plan, reasons))
    print(json.dumps(verdict(here, plan, failed)))
    return code


def _missing(keys: dict[str, tuple[str, int]], lines: dict[str, Line], only: str) -> list[tuple[str, tuple[str, int]]]:
    """What is to be measured; what failed before comes last, so that it cannot keep the others from their turn."""
    missing = [(key, what) for key, what in keys.items() if only in what[0] and not (key in lines and lines[key].done)]
    return sorted(missing, key=lambda each: each[0] in lines)


def measure(contender: str, layers: int, plan: Plan, device: str) -> Line:
    """Make the model, build what the contender needs, and time every shape; raises EngineUnavailable."""
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        model = random_opt(Path(scratch) / "model", layers, plan, device)
        size = decoder_size(model)
        opened, unfit = open_contender(contender, model, size, plan, device)
        with opened as runner:
            samples = tuple(_sample(runner, shape, plan, unfit.get(shape)) for shape in shapes(plan))
    return Line(
        key=key_of(contender, layers, plan),
        contender=contender,
        layers=layers,
        machine=provenance(),
        bandwidth_bytes_per_s=measure_bandwidth(device),
        bytes_of_a_step=decode_bytes(size, in_floats("fp16" if device == "cuda" else "fp32"), 1, plan.pasts[0]),
        samples=samples,
    )


def _sample(runner: Runner, shape: Shape, plan: Plan, unfit: str | None) -> Sample:
    """Time one shape; whatever stops it is its reason, and the next shape goes on. unfit: why it is not tried."""
    if unfit is not None:
        return Sample(**shape._asdict(), reason=unfit, fits=False)
    try:
        return Sample(**shape._asdict(), seconds=_time(runner, shape, plan))
    except (EngineUnavailable, MemoryError, RuntimeError) as problem:  # torch's out of memory is the last
        return Sample(**shape._asdict(), reason=one_line(problem)[:300], fits=not _is_about_memory(problem))


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
            print(one_line(problem)[:300], file=replies)
            return problem.exit_code
    return 0


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
