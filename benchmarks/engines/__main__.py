"""Time our engines against their peers in one run, and against what the machine's memory allows.

    make bench-engines             # everything, about a quarter of an hour on 2 cores
    make bench-engines QUICK=1     # two rounds, few tokens: shows that it works

SmolLM2-135M dense unless stated, batch 1, a prompt of 128 tokens. Every contender is a process of its own; blocks of
all take turns, forwards and backwards, so that drift of the machine hits all alike; who is compared with whom stands
side by side, and a ratio is the median over rounds, with its bootstrap interval. Prints a table and ends with one JSON
line; raw samples go to benchmarks/results/engines-CPU.json (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.engines.figures import Found, figures, processor_name, verdict
from benchmarks.engines.race import race
from benchmarks.engines.tables import markdown_text, short_text, text
from benchmarks.kept import every_machine, judged, keep, results_path
from benchmarks.pages import put_between_markers
from trsp_deploy.artifacts import provenance
from trsp_deploy.errors import TrspError
from trsp_deploy.tools.runners.requirements import adds_int8_exactly

DOC, README = Path("docs/engines.md"), Path("README.md")


def main() -> int:
    """Measure and report."""
    options = _parse()
    try:
        if options.report:
            machines = [each for (each,) in every_machine("engines", Found)]
            put_between_markers(DOC, "\n\n".join(map(markdown_text, machines)), "engines")
            put_between_markers(README, "\n\n".join(map(short_text, machines)), "engines")
            here = processor_name(provenance().cpu, adds_int8_exactly())
            found = judged(machines, lambda each: each.processor, lambda each: verdict(figures(each))["met"], here)
        else:
            found = race(options.peers, options.quick)
        print(text(found))
        print(json.dumps(verdict(figures(found))))
        if not options.report and not options.quick:  # after the table, which a full disk does not refuse
            keep(results_path("engines", found.processor), found)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Our engines against others.")
    parser.add_argument("--quick", action="store_true", help="two rounds, few tokens: shows that it works")
    parser.add_argument("--report", action="store_true", help="write the last run's table into the docs; time nothing")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="Python of the environment with onnxruntime-genai and llama-cpp-python",
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
