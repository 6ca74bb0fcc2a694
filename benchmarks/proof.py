"""Can the comparison be believed? Trials whose truth is known, on a small engine: `make bench-proof`.

    python -m benchmarks.proof            # the trials that are missing, under two hours on 2 cores; then the table
    python -m benchmarks.proof --quick    # a few of each, about ten minutes; keeps nothing
    python -m benchmarks.proof --report   # the table and docs/proof.md from what is there

- *same*: an engine against itself, on the machine as it is and under a background load. Any claim is wrong.
- *slower*: every call of one of the two is made 5% longer (it waits in it). Found when "not slower" fails in 60 s.
- *faster*: every call of dense is made 20% longer. Confirmed when "at least 15% faster" passes in 60 s.

Every trial is a line of benchmarks/results/proof-<cpu>.jsonl with each replicate's log ratios, of which its answer is
derived. What stands there is not made again, so a stopped run goes on. Trials of earlier code stay, are counted as
such, and are made again with --redo-stale.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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

from benchmarks import targets
from benchmarks.code import code_digest
from benchmarks.kept import every_machine, judged, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.errors import EngineUnavailable, TrspError
from trsp_deploy.recipe import BenchSettings, EngineSpec, ExportSettings, Strict
from trsp_deploy.results import PHASES, Comparison, Phase
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.judging.comparisons import claim, compare
from trsp_deploy.tools.judging.goals import Goal, least_speedup, settled_all
from trsp_deploy.tools.judging.statistics import Ratio, replicate_ratios, widened
from trsp_deploy.tools.judging.verdicts import judge
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring.bench_worker import PLANTED
from trsp_deploy.tools.measuring.samples import measure
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners.manifest import bound_to, check_manifest, read_manifest, spec_sha256
from trsp_deploy.tools.runners.requirements import package_version

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
RIGHT: dict[Kind, str] = {"same": "INCONCLUSIVE", "same, loaded": "INCONCLUSIVE", "slower": "fail", "faster": "pass"}
# Where a comparison's code begins, below trsp_deploy/; what it imports belongs to it, but for what decides no trial.
CODE = (
    "tools/measuring/samples.py",
    "tools/measuring/bench_worker.py",
    "tools/judging/comparisons.py",
    "tools/judging/goals.py",
)
NO_INFLUENCE = frozenset(
    {"__init__", "artifacts", "errors", "limits", "manifest", "prctl", "progress", "recipe", "requirements"}
)
PACKAGES = ("onnxruntime", "numpy")  # that a trial runs
TARGETS = {
    "same_wrong_share": at_most(0.05, "an engine against itself: share of comparisons that claim a difference"),
    "slower_found_share": at_least(0.95, "5% slower: share of comparisons that find it"),
    "slower_longest_s": at_most(60, "5% slower: seconds of the longest comparison"),
    "faster_confirmed_share": at_least(0.95, "20% faster: share that confirm it against a requirement of 15%"),
}


class Terms(Strict):
    """What a trial asks, and how."""

    planted: tuple[float, float]
    wanted: float | None
    settings: BenchSettings


class Trial(Strict):
    """One comparison's samples; what they say is derived."""

    kind: Kind
    number: int
    machine: Provenance
    elapsed_s: float
    replicates: dict[Phase, tuple[float, ...]]  # log ratio of each
    control: dict[Phase, tuple[float, ...]]
    load: float  # mean number of runnable processes
    terms: Terms | None = None  # None, and no code, where a trial is older than these
    code: str = ""  # digest

    @functools.cached_property
    def found(self) -> dict[Phase, Ratio]:
        """Speed-ups with their intervals."""
        return {phase: widened(logs, self.control[phase] or None).found for phase, logs in self.replicates.items()}

    @functools.cached_property
    def answer(self) -> str:
        """The claim, or the verdict on the requirement."""
        count = len(self.replicates["total"])
        goal = goal_of(self.kind)
        if goal is None:
            return claim(list(self.found.values()), count)
        return judge(goal.requirement, self.found["total"], count).word

    @property
    def right(self) -> bool:
        """Whether the answer is the truth."""
        return self.answer == RIGHT[self.kind]

    @property
    def stale(self) -> bool:
        """Whether it was made by other code, or asked otherwise, than now."""
        return (self.code, self.terms) != (comparison_digest(), terms_of(self.kind))

    @property
    def foreign(self) -> bool:
        """Whether it was made on other cores or with other packages than this process has."""
        here = provenance()
        same = [self.machine.packages.get(name) == here.packages.get(name) for name in PACKAGES]
        return self.machine.cores != here.cores or not all(same)


def comparison_digest() -> str:
    """Hash of the code that compares."""
    return code_digest(*CODE, without=NO_INFLUENCE)


def terms_of(kind: Kind) -> Terms:
    """What a trial of this kind asks now."""
    budget_s = PLANTED_S if kind in WANTED else SAME_S
    settings = BenchSettings(prompt_tokens=(64,), new_tokens=16, budget_s=budget_s)
    return Terms(planted=PLANTS[kind], wanted=WANTED.get(kind), settings=settings)


def goal_of(kind: Kind) -> Goal | None:
    """The requirement that a comparison has to decide; None where it is to claim nothing."""
    return least_speedup("total", WANTED[kind], "the bench", cases=1) if kind in WANTED else None


def main() -> int:
    """Parse, make, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof")
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind; keeps nothing")
    parser.add_argument("--report", action="store_true", help="make no trial")
    parser.add_argument(
        "--redo-stale",
        action="store_true",
        help="make trials again of other code, packages or cores than there are now",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.report:
            trials = judged(read(), cpu_of, met)
        elif options.quick:
            trials = run(QUICK, [], keep=False)
        else:
            trials = run(COUNTS, read_here(), keep=True, redo=options.redo_stale)
        if not options.quick:
            put_between_markers(PAGE, "\n\n".join(map(page, read())), "proof")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped; finished trials are kept, the same command goes on", file=sys.stderr)
        return 130
    print(page(trials))
    print(json.dumps(verdict(trials)))
    return 0


def run(counts: dict[Kind, int], trials: list[Trial], keep: bool, redo: bool = False) -> list[Trial]:
    """Make what is missing, the kinds in turn, so that a stopped run has some of each.

    redo: what other code, packages or cores made is missing too; each is replaced once it is made again.
    """
    there = {(trial.kind, trial.number): trial for trial in trials}
    missing = to_make(counts, there, redo)
    engine = small_engine() if missing else HOME
    began = time.perf_counter()
    for done, (kind, number) in enumerate(missing):
        left_min = (time.perf_counter() - began) / max(1, done) * (len(missing) - done) / 60
        left = f", about {left_min:.0f} min left" if done else ""
        trial = there[kind, number] = make(kind, number, engine)
        print(f"[{done + 1}/{len(missing)}] {line(trial)}{left}", flush=True)
        if keep:
            write(list(there.values()))
    return list(there.values())


def to_make(counts: dict[Kind, int], there: dict[tuple[Kind, int], Trial], redo: bool) -> list[tuple[Kind, int]]:
    """The trials that `run` makes; says how many it leaves as other code has made them."""
    wanted = [(kind, n) for n in range(max(counts.values())) for kind in counts if n < counts[kind]]
    other = {each for each in wanted if each in there and (there[each].stale or there[each].foreign)}
    if other and not redo:
        print(f"{len(other)} trials are of other code, packages or cores than there are now (--redo-stale: make again)")
    return [each for each in wanted if each not in there or (redo and each in other)]


def line(trial: Trial) -> str:
    """What one trial said."""
    total = trial.found["total"]
    return (
        f"{trial.kind} {trial.number}: {trial.answer} ({'right' if trial.right else 'WRONG'}) in "
        f"{trial.elapsed_s:.0f} s, {total.ratio:.3f} ({total.low:.3f} to {total.high:.3f})"
    )


def write(trials: list[Trial]) -> None:
    """Keep this machine's trials; the file is replaced as a whole."""
    with writing(results_path("proof", provenance().cpu, "jsonl")) as partial:
        partial.write_text("".join(f"{trial.model_dump_json()}\n" for trial in trials), encoding="utf-8")


def make(kind: Kind, number: int, engine: Path) -> Trial:
    """One comparison of the engine with itself, slowed down as the kind says."""
    terms, goal = terms_of(kind), goal_of(kind)
    dense, pruned = ({PLANTED: str(share)} if share else {} for share in terms.planted)
    with background_load() if kind == "same, loaded" else contextlib.nullcontext():
        comparison = measure(
            {"dense": engine, "pruned": engine},
            f"{kind} {number}",
            VOCABULARY,
            terms.settings,
            number,
            decided=(lambda replicates: settled_all([goal], replicates)) if goal else None,
            environment={"dense": dense, "again": dense, "pruned": pruned},
        )
    beside = compare(comparison).machine
    return Trial(
        kind=kind,
        number=number,
        machine=provenance(),
        elapsed_s=comparison.elapsed_s,
        replicates={phase: _ratios(comparison, phase)[0] for phase in PHASES},
        control={phase: _ratios(comparison, phase)[1] for phase in PHASES},
        load=0.0 if beside is None else beside.load,
        terms=terms,
        code=comparison_digest(),
    )


def _ratios(comparison: Comparison, phase: Phase) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ratios, control = replicate_ratios(comparison.replicates, 0, phase)
    return tuple(round(value, 5) for value in ratios), tuple(round(value, 5) for value in control or [])


def small_engine() -> Path:
    """A random Llama of 8 layers on ONNX Runtime, 1 ms a token on 2 cores: short calls, where noise is worst."""
    folder, spec = HOME / "engine", load_engine_spec("ort-cpu-fp32")
    if not fits(folder, spec):
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
            build_engine(HOME / "onnx" / FILE, spec, folder)
    return folder


def fits(folder: Path, spec: EngineSpec) -> bool:
    """Whether an engine is there that would be built alike here and now."""
    try:
        manifest = read_manifest(folder)
        check_manifest(folder, manifest, package_version(spec.backend), bound_to(spec))
    except EngineUnavailable:
        return False
    return manifest.spec_sha256 == spec_sha256(spec)


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


def read() -> list[list[Trial]]:
    """The trials that are there, by machine; raises RunError when there are none."""
    return [trials for text in every_machine("proof", "jsonl") if (trials := _read(text))]


def read_here() -> list[Trial]:
    """This machine's."""
    path = results_path("proof", provenance().cpu, "jsonl")
    return _read(path.read_bytes()) if path.exists() else []


def _read(text: bytes) -> list[Trial]:
    return [Trial.model_validate_json(line) for line in text.splitlines()]


def cpu_of(trials: list[Trial]) -> str:
    """A machine's processor."""
    return trials[-1].machine.cpu


def figures(trials: list[Trial]) -> dict[str, float | None]:
    """One number for each target; None where there is no trial of its kind."""

    def share(wanted: bool, *kinds: Kind) -> float | None:
        right = [trial.right for trial in trials if trial.kind in kinds]
        return float(np.mean(np.array(right) == wanted)) if right else None

    slower = [trial.elapsed_s for trial in trials if trial.kind == "slower"]
    return {
        "same_wrong_share": share(False, "same", "same, loaded"),
        "slower_found_share": share(True, "slower"),
        "slower_longest_s": max(slower) if slower else None,
        "faster_confirmed_share": share(True, "faster"),
    }


def met(trials: list[Trial]) -> dict[str, bool]:
    """Which targets are met; what is not measured is not."""
    return targets.met(TARGETS, figures(trials))


def verdict(trials: list[Trial]) -> dict[str, Any]:
    """The line for scripts."""
    return targets.verdict("proof", TARGETS, figures(trials), machine=cpu_of(trials) if trials else None)


def page(trials: list[Trial]) -> str:
    """Markdown: one machine and its trials."""
    return "\n\n".join([where(trials), table(trials)])


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
    return "\n\n".join([markdown(head, rows), targets.table(TARGETS, figures(trials), "{:.4g}".format)])


def where(trials: list[Trial]) -> str:
    """The machine, with every number of cores and version that took part, and how much of it is of now."""
    if not trials:
        return "No trial has been made."
    machines = [trial.machine for trial in trials]
    cores = sorted({machine.cores for machine in machines})
    runtimes = sorted({machine.packages.get("onnxruntime", "?") for machine in machines})
    stale = sum(trial.stale for trial in trials)
    return (
        f"{cpu_of(trials)}, {' or '.join(map(str, cores))} cores, onnxruntime {' or '.join(runtimes)}; "
        f"{len(trials)} trials, {stale} of them made by earlier code."
    )


if __name__ == "__main__":
    raise SystemExit(main())
