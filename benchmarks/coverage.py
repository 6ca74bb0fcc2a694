"""Which lines of the package the tests run, those of the processes that they start included: `make coverage`.

    python -m benchmarks.coverage              # the default tests, which take half as long again; then the table
    python -m benchmarks.coverage tests/unit   # some of them, as pytest takes it
    python -m benchmarks.coverage --report     # what was measured last

Settings stand in pyproject.toml, the data in .coverage. Prints coverage.py's table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import coverage

TARGETS = {"lines_percent": 90.0}
LOW_PERCENT = 80.0  # modules below it are named
SCRATCH = Path(".coverage.json")


def main() -> int:
    """Run the tests under coverage.py and report; pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="default: the default tests")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    code = 0
    if not options.report:
        subprocess.run([sys.executable, "-m", "coverage", "erase"], check=True)
        code = subprocess.run(
            [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", *options.tests], check=False
        ).returncode
        subprocess.run([sys.executable, "-m", "coverage", "combine", "--quiet"], check=True)
    print(json.dumps(verdict()))
    return code


def verdict() -> dict[str, object]:
    """coverage.py's table on stdout; the line for scripts."""
    measured = coverage.Coverage()
    measured.load()
    measured.report(sort="cover")
    measured.json_report(outfile=str(SCRATCH))
    report = json.loads(SCRATCH.read_text(encoding="utf-8"))
    SCRATCH.unlink()
    percent = {name: file["summary"]["percent_statements_covered"] for name, file in report["files"].items()}
    figures = {"lines_percent": round(report["totals"]["percent_statements_covered"], 1)}
    low = {name: round(share, 1) for name, share in sorted(percent.items()) if share < LOW_PERCENT}
    return {
        "bench": "coverage",
        "figures": {**figures, "modules_below_80": low},
        "targets": TARGETS,
        "met": {name: figures[name] >= bound for name, bound in TARGETS.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
