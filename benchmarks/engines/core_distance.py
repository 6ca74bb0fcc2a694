"""Prompts and tokens by how far apart two cores are, which on a virtual machine its host decides every few seconds.

    python -m benchmarks.engines.core_distance [--rounds 200]     # three minutes; needs `cc` and two cores

Threads hand each other what they computed, line by line of the cache. Cores that share a last-level cache do so in a
fraction of the time that others need (AMD's have one for every few cores), and a virtual core may run on either: the
guest does not see which, but the two times. So each round asks for the distance before and after each engine's prompt
and few tokens, and counts as near or far where all agree. It is the control for the int8 prompt of `make
bench-engines`, which does not tell them apart. Raw samples go to benchmarks/results/core-distance-CPU.json.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import targets
from benchmarks.engines import subjects
from benchmarks.engines.figures import PROMPT, paired_ratio, processor_name
from benchmarks.kept import keep, results_path
from benchmarks.pages import markdown
from benchmarks.targets import at_least
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.errors import EngineUnavailable, TrspError
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.requirements import adds_int8_exactly

SOURCE = Path(__file__).with_name("ping_pong.c")
KINDS = ("fp32", "int8")
FAR_NS = 80  # within one last-level cache 20 to 50 on processors of these years, beyond it 100 and more
WARM_ROUNDS, TOKENS = 3, 12
REST_S = 0.05  # the other engine's threads spin on after their prompt, and this one's would have to share the cores
Place = Literal["near", "far", "moved"]
PLACES: tuple[Place, ...] = ("near", "far", "moved")
TARGETS = {
    "int8_prefill_to_fp32_near": at_least(2.0, "int8 prompt over fp32's, both cores at one last-level cache"),
    "int8_prefill_to_fp32_far": at_least(2.0, "the same, cores at different ones"),
}


class Round(Strict):
    """One prompt of each kind, and the tokens after it."""

    prompt_s: dict[str, float]
    token_s: dict[str, float]  # median
    distances_ns: tuple[float, ...]  # before, between and after the engines

    @property
    def place(self) -> Place:
        """Where the cores were."""
        if max(self.distances_ns) < FAR_NS:
            return "near"
        return "far" if min(self.distances_ns) >= FAR_NS else "moved"


class Found(Strict):
    """What a run found."""

    machine: Provenance
    rounds: tuple[Round, ...]


def distance() -> Callable[[], float]:
    """What tells the first two cores' distance in nanoseconds; raises EngineUnavailable where it cannot be had."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise EngineUnavailable(f"a distance is between two cores, and this process may run on {len(cores)}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ping_pong.so"
        command = ["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            raise EngineUnavailable(f"{SOURCE.name} was not compiled: {problem}") from problem
        ask = ctypes.CDLL(str(library)).distance_ns
    ask.restype = ctypes.c_double

    def asked() -> float:
        ns = float(ask(*cores))
        if ns < 0:
            raise EngineUnavailable("the cores' distance was not measured: no thread could be started")
        return ns

    return asked


def measure(rounds: int) -> Found:
    """Time prompts in an order by lot."""
    far_apart, lot = distance(), random.Random(0)
    ids, token = np.random.default_rng(0).integers(5, 40_000, (1, PROMPT)), np.array([[5]])
    with open_engine(subjects.engine("dense", "fp32")) as fp32, open_engine(subjects.engine("dense", "int8")) as int8:
        runners = dict(zip(KINDS, (fp32, int8), strict=True))
        found = []
        for _ in range(WARM_ROUNDS + rounds):
            prompt_s, token_s, distances = {}, {}, [far_apart()]
            for kind in lot.sample(KINDS, len(KINDS)):
                time.sleep(REST_S)
                runner = runners[kind]
                prompt_s[kind] = _elapsed(functools.partial(runner.prefill, last_only=True), ids, np.ones_like(ids))
                steps = [_elapsed(runner.decode, token) for _ in range(TOKENS)]
                token_s[kind] = float(np.median(steps))
                distances.append(far_apart())
            found.append(Round(prompt_s=prompt_s, token_s=token_s, distances_ns=tuple(distances)))
    return Found(machine=provenance(), rounds=tuple(found[WARM_ROUNDS:]))


def _elapsed(step: Callable[..., object], *inputs: np.ndarray) -> float:
    began = time.perf_counter()
    step(*inputs)
    return time.perf_counter() - began


def text(rounds: Sequence[Round]) -> str:
    """The table for people: medians, and ratios of one round's times with their intervals over rounds."""
    head = ["what", "cores", "rounds", "distance ns", *(f"{kind} ms" for kind in KINDS), "fp32 over int8"]
    rows = []
    for what in ("prompt", "token"):
        for place in PLACES:
            there = [each for each in rounds if each.place == place]
            cells = [what, place, str(len(there)), *[targets.ABSENT] * 4]
            if there:
                times = [each.prompt_s if what == "prompt" else each.token_s for each in there]
                fp32_s, int8_s = ([each[kind] for each in times] for kind in KINDS)
                ratio, ns = paired_ratio(fp32_s, int8_s), [ns for each in there for ns in each.distances_ns]
                cells[3:] = [f"{np.median(ns):.0f}", *(f"{1e3 * np.median(kind):.2f}" for kind in (fp32_s, int8_s))]
                cells.append(f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
            rows.append(cells)
    return markdown(head, rows)


def verdict(rounds: Sequence[Round]) -> dict[str, Any]:
    """The line for scripts."""
    figures: dict[str, float | None] = {}
    for name, place in zip(TARGETS, PLACES, strict=False):
        there = [each.prompt_s for each in rounds if each.place == place]
        slow, quick = ([each[kind] for each in there] for kind in KINDS)
        figures[name] = paired_ratio(slow, quick).ratio if there else None
    return targets.verdict("core-distance", TARGETS, figures, decimals=3)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines.core_distance", description="Near and far cores."
    )
    parser.add_argument(
        "--rounds", type=int, default=200, help="one prompt of each engine and a few tokens in each (default 200)"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected 1 or more")
    try:
        found = measure(options.rounds)
        print(text(found.rounds))
        print(json.dumps(verdict(found.rounds)))
        keep(results_path("core-distance", processor_name(found.machine.cpu, adds_int8_exactly())), found)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
