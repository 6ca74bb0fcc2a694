"""Parse, make what is missing, report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from benchmarks.kept import judged
from benchmarks.pages import put_between_markers
from benchmarks.proof.found import COUNTS, cpu_of, met, page, read, read_here, verdict, write
from benchmarks.proof.subject import HOME, small_engine
from benchmarks.proof.trials import Kind, Trial, make
from trsp_deploy.errors import TrspError

PAGE = Path("docs/proof.md")
QUICK: dict[Kind, int] = {"same": 4, "same, loaded": 3, "slower": 4, "faster": 4}


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
    return (
        f"{trial.kind} {trial.number}: {trial.answer} ({'right' if trial.right else 'WRONG'}) in "
        f"{trial.elapsed_s:.0f} s, {trial.total.text('.3f', '')}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
