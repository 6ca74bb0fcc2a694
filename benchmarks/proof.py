"""Can the comparison be believed? Trials whose truth is known, on a small engine: `make bench-proof`.

    python -m benchmarks.proof            # the trials that are missing, under two hours on 2 cores; then the table
    python -m benchmarks.proof --quick    # a few of each, about ten minutes; keeps nothing
    python -m benchmarks.proof --report   # the table and docs/proof.md from what is there

- *same*: an engine against itself, on the machine as it is and under a background load. Any claim is wrong.
- *slower*: every call of one of the two is made 5% longer (it waits in it). Found when "not slower" fails in 60 s.
- *faster*: every call of dense is made 20% longer. Confirmed when "at least 15% faster" passes in 60 s.

Every trial is a line of benchmarks/results/proof-<cpu>.jsonl with each replicate's log ratios; what stands there is not
made again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.kept import results_path
from benchmarks.pages import markdown, put_between_markers
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import BenchSettings, ExportSettings, Strict
from trsp_deploy.results import PHASES, Comparison, Phase
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.bench_worker import PLANTED
from trsp_deploy.tools.comparisons import compare
from trsp_deploy.tools.goals import least_speedup, settled_all
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring import measure
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.statistics import Ratio, replicate_ratios

HOME = Path("runs/bench-proof")
PAGE = Path("docs/proof.md")
VOCABULARY = 4096
SAME_S, PLANTED_S = 30.0, 59.0  # budgets

Kind = Literal["same", "same, loaded", "slower", "faster"]
COUNTS: dict[Kind, int] = {"same": 20, "same, loaded": 20, "slower": 30, "faster": 30}
QUICK: dict[Kind, int] = {"same": 4, "same, loaded": 3, "slower": 4, "faster": 4}
PLANTS: dict[Kind, tuple[float, float]] = {  # by how much dense and pruned are slowed down
    "same": (0, 0),
    "same, loaded": (0, 0),
    "slower": (0, 0.05),
    "faster": (0.2, 0),
}
WANTED: dict[Kind, float] = {"slower": 1.0, "faster": 1.15}
TARGETS: dict[str, tuple[float, Literal["at least", "at most"], str]] = {
    "same_wrong_share": (0.05, "at most", "an engine against itself: share of comparisons that claim a difference"),
    "slower_found_share": (0.95, "at least", "5% slower: share of comparisons that find it"),
    "slower_longest_s": (60, "at most", "5% slower: seconds of the longest comparison"),
    "faster_confirmed_share": (0.95, "at least", "20% faster: share that confirm it against a requirement of 15%"),
}


class Trial(Strict):
    """One comparison and what it said."""

    kind: Kind
    number: int
    machine: Provenance
    answer: str  # the claim, or the verdict on the requirement
    right: bool
    elapsed_s: float
    replicates: dict[Phase, tuple[float, ...]]  # log ratio of each
    control: dict[Phase, tuple[float, ...]]
    found: dict[Phase, Ratio]
    load: float  # mean number of runnable processes


def main() -> int:
    """Parse, make, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof")
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind; keeps nothing")
    parser.add_argument("--report", action="store_true", help="make no trial")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        trials = [] if options.quick else read()
        if not options.report:
            trials = run(QUICK if options.quick else COUNTS, trials, keep=not options.quick)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped; finished trials are kept, the same command goes on", file=sys.stderr)
        return 130
    if not options.quick:
        put_between_markers(PAGE, "\n\n".join([table(trials), where(trials)]), "proof")
    print(table(trials))
    print(json.dumps(verdict(trials)))
    return 0


def run(counts: dict[Kind, int], trials: list[Trial], keep: bool) -> list[Trial]:
    """Make what is missing, the kinds in turn, so that a stopped run has some of each."""
    there = {(trial.kind, trial.number) for trial in trials}
    missing = [(kind, n) for n in range(max(counts.values())) for kind in counts if n < counts[kind]]
    missing = [each for each in missing if each not in there]
    engine = small_engine()
    began = time.perf_counter()
    for done, (kind, number) in enumerate(missing):
        left = (
            ""
            if not done
            else f", about {(time.perf_counter() - began) / done * (len(missing) - done) / 60:.0f} min left"
        )
        trial = make(kind, number, engine)
        trials = [*trials, trial]
        total = trial.found["total"]
        print(
            f"[{done + 1}/{len(missing)}] {kind} {number}: {trial.answer} ({'right' if trial.right else 'WRONG'}) in "
            f"{trial.elapsed_s:.0f} s, {total.ratio:.3f} ({total.low:.3f} to {total.high:.3f}){left}",
            flush=True,
        )
        if keep:
            with results_path("proof", trial.machine.cpu, "jsonl").open("a", encoding="utf-8") as file:
                file.write(trial.model_dump_json() + "\n")
    return trials


def make(kind: Kind, number: int, engine: Path) -> Trial:
    """One comparison of the engine with itself, slowed down as the kind says."""
    dense, pruned = ({PLANTED: str(share)} if share else {} for share in PLANTS[kind])
    budget_s = SAME_S if kind not in WANTED else PLANTED_S
    goals = [least_speedup("total", WANTED[kind], "the bench", cases=1)] if kind in WANTED else []
    settings = BenchSettings(prompt_tokens=(64,), new_tokens=16, budget_s=budget_s)
    with background_load() if kind == "same, loaded" else contextlib.nullcontext():
        comparison = measure(
            {"dense": engine, "pruned": engine},
            f"{kind} {number}",
            VOCABULARY,
            settings,
            number,
            decided=(lambda replicates: settled_all(goals, replicates)) if goals else None,
            environment={"dense": dense, "again": dense, "pruned": pruned},
        )
    found = compare(comparison)
    answer = goals[0].outcome(comparison.replicates).word if goals else found.claim
    expected = {"slower": "fail", "faster": "pass"}.get(kind, "INCONCLUSIVE")
    return Trial(
        kind=kind,
        number=number,
        machine=provenance(),
        answer=answer,
        right=answer == expected,
        elapsed_s=comparison.elapsed_s,
        replicates={phase: _ratios(comparison, phase)[0] for phase in PHASES},
        control={phase: _ratios(comparison, phase)[1] for phase in PHASES},
        found={phase: found.of(phase).speedup for phase in PHASES},
        load=0.0 if found.machine is None else found.machine.load,
    )


def _ratios(comparison: Comparison, phase: Phase) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ratios, control = replicate_ratios(comparison.replicates, 0, phase)
    return tuple(round(value, 5) for value in ratios), tuple(round(value, 5) for value in control or [])


def small_engine() -> Path:
    """A random Llama of 8 layers on ONNX Runtime, 1 ms a token on 2 cores: short calls, where noise is worst."""
    folder = HOME / "engine"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=2048,
        )
        with quiet_libraries():
            AutoModelForCausalLM.from_config(config).save_pretrained(HOME / "model")
            with writing(HOME / "onnx") as partial:
                export_onnx(HOME / "model", "fp32", ExportSettings(), partial)
            build_engine(HOME / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), folder)
    return folder


@contextlib.contextmanager
def background_load() -> Iterator[None]:
    """A neighbour that computes in bursts of up to two seconds, half of the time, on one core."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.proof_load"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


# -- what came of it ---------------------------------------------------------------------------------------------------


def read() -> list[Trial]:
    """The trials of this machine that are there."""
    path = results_path("proof", provenance().cpu, "jsonl")
    if not path.exists():
        return []
    return [Trial.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(trials: list[Trial]) -> dict[str, float | None]:
    """One number for each target; None where there is no trial of its kind."""

    def share(wanted: bool, *kinds: Kind) -> float | None:
        right = [trial.right for trial in trials if trial.kind in kinds]
        return round(float(np.mean(np.array(right) == wanted)), 3) if right else None

    slower = [trial.elapsed_s for trial in trials if trial.kind == "slower"]
    return {
        "same_wrong_share": share(False, "same", "same, loaded"),
        "slower_found_share": share(True, "slower"),
        "slower_longest_s": round(max(slower), 1) if slower else None,
        "faster_confirmed_share": share(True, "faster"),
    }


def verdict(trials: list[Trial]) -> dict[str, Any]:
    """The line for scripts; what is not measured is not met."""
    values = figures(trials)

    def met(name: str) -> bool:
        value, (bound, sense, _) = values[name], TARGETS[name]
        return value is not None and (value >= bound if sense == "at least" else value <= bound)

    return {
        "bench": "proof",
        "figures": values,
        "targets": {name: bound for name, (bound, _, _) in TARGETS.items()},
        "met": {name: met(name) for name in TARGETS},
    }


def table(trials: list[Trial]) -> str:
    """What each kind of trial said, and the targets."""
    rows = []
    for kind in COUNTS:
        found = [trial for trial in trials if trial.kind == kind]
        if not found:
            continue
        answers = [trial.answer for trial in found]
        widths = [trial.found["total"].half_width for trial in found]
        middle = math.exp(float(np.mean([math.log(trial.found["total"].ratio) for trial in found])))
        rows.append(
            [
                kind,
                str(len(found)),
                ", ".join(f"{answer} {answers.count(answer)}" for answer in sorted(set(answers))),
                f"{sum(trial.right for trial in found)}",
                f"{middle:.3f}",
                f"{np.median(widths):.1%}",
                f"{np.median([trial.elapsed_s for trial in found]):.0f} s",
            ]
        )
    head = ["trials", "number", "answers", "right", "mean speed-up", "median half-width", "median time"]
    outcome = verdict(trials)
    goals = []
    for name, (bound, sense, meaning) in TARGETS.items():
        value = outcome["figures"][name]
        state = "not measured" if value is None else "met" if outcome["met"][name] else "**not met**"
        goals.append([meaning, f"{sense} {bound:g}", "–" if value is None else f"{value:g}", state])
    return "\n\n".join([markdown(head, rows), markdown(["figure", "target", "measured", ""], goals)])


def where(trials: list[Trial]) -> str:
    """The machine, in a line."""
    if not trials:
        return "No trial has been made on this machine."
    machine = trials[-1].machine
    return f"Measured on {machine.cpu}, {machine.cores} cores; onnxruntime {machine.packages.get('onnxruntime')}."


if __name__ == "__main__":
    raise SystemExit(main())
