"""Which lines of the package the tests run, those of the processes that they start included: `make coverage`.

    python -m benchmarks.coverage              # the tests of `make test` and `make test-breadth`, then the table
    python -m benchmarks.coverage tests/unit   # some of them, as pytest takes it
    python -m benchmarks.coverage --report     # what was measured last

Settings stand in pyproject.toml, the data in .coverage. Prints coverage.py's table and ends with one JSON line. What
they run is kept, by package, in benchmarks/results/coverage.json, and CONTRIBUTING.md says it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import coverage

from benchmarks import targets
from benchmarks.kept import RESULTS
from benchmarks.pages import put_between_markers
from benchmarks.targets import at_least
from trsp_deploy.artifacts import Provenance, provenance, write_json
from trsp_deploy.recipe import Strict

TARGETS = {"lines_percent": at_least(90)}
KEPT = RESULTS / "coverage.json"
PAGE = Path("CONTRIBUTING.md")
LEAST = 3  # packages that the page names
OFFLINE = "not slow and not network and not faults"
RUNS = (  # pytest's arguments: beside each other, and alone
    ["--numprocesses", "auto", "--dist", "loadfile", "-m", f"{OFFLINE} and not alone"],
    ["-m", f"{OFFLINE} and alone"],
)


class Lines(Strict):
    """Of a package, without those below it."""

    all: int
    run: int


class Covered(Strict):
    """What the tests ran."""

    machine: Provenance
    passed: bool  # every test that was not skipped
    packages: dict[str, Lines]  # folder -> its modules' lines

    @property
    def lines(self) -> int:
        """Of all packages."""
        return sum(package.all for package in self.packages.values())

    @property
    def percent(self) -> float:
        """Of all packages' lines."""
        return 100 * sum(package.run for package in self.packages.values()) / self.lines


def main(arguments: list[str] | None = None) -> int:
    """Run the tests under coverage.py and report; pytest's exit code, the first that is not 0, else 2 where the default
    tests miss the target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="default: all of these")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    codes = [0] if options.report else list(measure([options.tests] if options.tests else RUNS))
    try:
        files = table()
    except coverage.exceptions.NoDataError:
        print("error: .coverage: nothing was measured here; `make coverage` does", file=sys.stderr)
        return 1
    found = Covered(machine=provenance(), passed=not any(codes), packages=packages(files))
    line = verdict(found.percent)
    print(json.dumps(line))
    if options.report or options.tests:
        return next(filter(None, codes), 0)
    write_json(KEPT, found)
    put_between_markers(PAGE, page(found), "coverage")
    return next(filter(None, codes), 0 if all(line["met"].values()) else 2)


def measure(runs: Iterable[list[str]]) -> Iterator[int]:
    """Leave .coverage behind; pytest's exit code of every run."""
    tool = [sys.executable, "-m", "coverage"]
    subprocess.run([*tool, "erase"], check=True)
    for arguments in runs:
        yield subprocess.run([*tool, "run", "-m", "pytest", "-q", *arguments], check=False).returncode
    subprocess.run([*tool, "combine", "--quiet"], check=True)


def table() -> dict[str, dict[str, Any]]:
    """coverage.py's table on stdout; the same by file, as its JSON has it."""
    measured = coverage.Coverage()
    measured.load()
    measured.report(sort="cover")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(file))
        files: dict[str, dict[str, Any]] = json.loads(file.read_bytes())["files"]
    return files


def packages(files: Mapping[str, dict[str, Any]]) -> dict[str, Lines]:
    """The lines of every package."""
    there, run = Counter[str](), Counter[str]()
    for name, file in files.items():
        package = Path(name).parent.as_posix()
        there[package] += file["summary"]["num_statements"]
        run[package] += file["summary"]["covered_lines"]
    return {package: Lines(all=there[package], run=run[package]) for package in sorted(there)}


def verdict(lines_percent: float) -> dict[str, Any]:
    """The line for scripts."""
    return targets.verdict("coverage", TARGETS, {"lines_percent": lines_percent})


def page(found: Covered) -> str:
    """Markdown: the whole, and the packages with the least."""
    share = {name: 100 * package.run / package.all for name, package in found.packages.items() if package.all}
    lowest = sorted(share, key=lambda name: share[name])[:LEAST]
    return (
        f"{found.percent:.1f}% of {found.lines:,} lines, on {(found.machine.time or '')[:10]} with Python "
        f"{found.machine.python} on {found.machine.cpu}{'' if found.passed else ', and not every test passed'}; "
        f"lowest: {', '.join(f'`{name}/` {share[name]:.1f}%' for name in lowest)}."
    )


if __name__ == "__main__":
    sys.exit(main())
