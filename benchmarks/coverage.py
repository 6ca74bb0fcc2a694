"""Which lines of the package the tests run, those of the processes that they start included: `make coverage`.

    python -m benchmarks.coverage              # the default tests as `make test` runs them, then the table
    python -m benchmarks.coverage tests/unit   # some of them, as pytest takes it
    python -m benchmarks.coverage --report     # what was measured last

Settings stand in pyproject.toml, the data in .coverage. Prints coverage.py's table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator

import coverage

from benchmarks import targets
from benchmarks.targets import at_least

TARGETS = {"lines_percent": at_least(90)}
DEFAULT = "not breadth and not slow and not network and not faults"
MAKE_TEST = (  # the arguments of its two runs
    ["--numprocesses", "auto", "--dist", "loadfile", "-m", f"{DEFAULT} and not alone"],
    ["-m", f"{DEFAULT} and alone"],
)


def main() -> int:
    """Run the tests under coverage.py and report; pytest's exit code, the first that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="default: the default tests")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    codes = [0] if options.report else list(measure([options.tests] if options.tests else MAKE_TEST))
    print(json.dumps(verdict(lines_percent())))
    return next(filter(None, codes), 0)


def measure(runs: Iterable[list[str]]) -> Iterator[int]:
    """Leave .coverage behind; pytest's exit code of every run."""
    tool = [sys.executable, "-m", "coverage"]
    subprocess.run([*tool, "erase"], check=True)
    for arguments in runs:
        yield subprocess.run([*tool, "run", "-m", "pytest", "-q", *arguments], check=False).returncode
    subprocess.run([*tool, "combine", "--quiet"], check=True)


def lines_percent() -> float:
    """coverage.py's table on stdout; its total."""
    measured = coverage.Coverage()
    measured.load()
    return measured.report(sort="cover")


def verdict(lines_percent: float) -> dict[str, object]:
    """The line for scripts."""
    return targets.verdict("coverage", TARGETS, {"lines_percent": lines_percent})


if __name__ == "__main__":
    sys.exit(main())
