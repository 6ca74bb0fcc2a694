"""Faults tried for real, counted: `make faults`.

    python -m benchmarks.faults              # runs tests/faults, about 40 minutes on 2 cores; then the table
    python -m benchmarks.faults -k killed    # some of them; what else was tried before stays in the table
    python -m benchmarks.faults --report     # the table and docs/faults.md from what is there

Each test notes what it tried (`record_property`). Its last outcome is a line of benchmarks/results/faults.jsonl as soon
as it has ended: a run that is stopped loses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.pages import markdown, put_between_markers
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import Strict

TESTS = Path("tests/faults")
RESULTS = Path("benchmarks/results/faults.jsonl")
PAGE = Path("docs/faults.md")
KINDS: dict[str, str] = {
    "kill -9": "`kill -9` of a run, then the same command",
    "Ctrl-C": "Ctrl-C",
    "Ctrl-C on a terminal": "Ctrl-C on a terminal: echo and cursor as before",
    "full disk": "full disk (tmpfs of 16 to 1,320 KB)",
    "file size limit": "`ulimit -f`",
    "read-only folder": "read-only file system",
    "few file descriptors": "`ulimit -n`",
    "little memory": "`ulimit -v`",
    "two runs, one folder": "two runs and more into one folder",
    "dead holder of the lock": "lock of a killed run",
    "flip": "a flipped bit",
    "truncate": "a file cut in half",
    "swap": "a file of another model in its place",
    "generated bad input": "generated bad input",
    "garbled files": "garbled ONNX graphs, configs and served engines",
}
TARGETS: dict[str, tuple[float, Literal["at least", "at most"], str]] = {
    "failed": (0, "at most", "tests that failed"),
    "kills": (40, "at least", "moments at which a run was killed"),
    "finished_steps_redone": (0, "at most", "finished steps that a rerun did again, after any fault"),
    "ctrl_c_longest_s": (2.0, "at most", "Ctrl-C: seconds until no process was left, the longest"),
    "damages": (60, "at least", "damaged files, each found and named"),
    "bad_inputs": (10_000, "at least", "generated bad inputs"),
    "garbled_files": (3_000, "at least", "garbled files read"),
}


class Tried(Strict):
    """One test and what it noted."""

    test: str
    outcome: Literal["passed", "failed", "skipped"]
    elapsed_s: float
    noted: dict[str, str]
    machine: Provenance

    def number(self, name: str) -> float:
        """A number that it noted; 0 where it did not."""
        return float(self.noted.get(name, 0))


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("-k", default="", help="of the tests, as pytest takes it", metavar="EXPRESSION")
    options = parser.parse_args()
    try:
        found = read()
        code = 0 if options.report else run(options.k, found)
        tests = list(found.values())
        put_between_markers(PAGE, table(tests), "faults")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(table(tests))
    print(json.dumps(verdict(tests)))
    return code


def run(expression: str, found: dict[str, Tried]) -> int:
    """pytest's exit code; every test that it runs is in `found`, and in the file, as soon as it has ended."""
    os.environ["HYPOTHESIS_PROFILE"] = "faults"
    arguments = ["-q", "-m", "", str(TESTS), *(["-k", expression] if expression else [])]
    return int(pytest.main(arguments, plugins=[Keeper(found)]))


class Keeper:
    """pytest's plugin that writes down each test once it is torn down."""

    def __init__(self, found: dict[str, Tried]) -> None:
        self._found = found
        self._phases: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test: its setup, the call or the teardown."""
        self._phases.append(report)
        if report.when != "teardown":
            return
        phases, self._phases = self._phases, []
        outcomes = {phase.outcome for phase in phases}
        file, _, name = report.nodeid.partition("::")
        tried = Tried(
            test=f"{Path(file).stem}::{name}",
            outcome="failed" if "failed" in outcomes else "skipped" if "skipped" in outcomes else "passed",
            elapsed_s=sum(phase.duration for phase in phases),
            noted={name: str(value) for name, value in report.user_properties},
            machine=provenance(),
        )
        self._found[tried.test] = tried
        keep(self._found)


def read() -> dict[str, Tried]:
    """The last outcome of every test, by its name."""
    if not RESULTS.is_file():
        return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {tried.test: tried for tried in map(Tried.model_validate_json, lines)}


def keep(found: dict[str, Tried]) -> None:
    """Write them down."""
    with writing(RESULTS) as partial:
        partial.write_text("".join(f"{tried.model_dump_json()}\n" for tried in found.values()), encoding="utf-8")


def of(tests: Sequence[Tried], *kinds: str) -> list[Tried]:
    """The tests of some kinds of fault that were not skipped."""
    return [tried for tried in tests if tried.noted.get("fault") in kinds and tried.outcome != "skipped"]


def tries(tests: Sequence[Tried]) -> int:
    """A test is one try where it does not say how many."""
    return sum(int(tried.number("tried")) or 1 for tried in tests)


def figures(tests: list[Tried]) -> dict[str, float | None]:
    """One number for each target; None where nothing of the kind was tried."""

    def total(count: Callable[[list[Tried]], float], *kinds: str) -> float | None:
        found = of(tests, *kinds)
        return count(found) if found else None

    return {
        "failed": sum(tried.outcome == "failed" for tried in tests) if tests else None,
        "kills": total(tries, "kill -9"),
        "finished_steps_redone": total(lambda found: sum(int(tried.number("redone")) for tried in found), *KINDS),
        "ctrl_c_longest_s": total(lambda found: max(tried.number("seconds") for tried in found), "Ctrl-C"),
        "damages": total(tries, "flip", "truncate", "swap"),
        "bad_inputs": total(tries, "generated bad input"),
        "garbled_files": total(tries, "garbled files"),
    }


def verdict(tests: list[Tried]) -> dict[str, Any]:
    """The line for scripts; what is not measured is not met."""
    values = figures(tests)

    def met(name: str) -> bool:
        value, (bound, sense, _) = values[name], TARGETS[name]
        return value is not None and (value >= bound if sense == "at least" else value <= bound)

    return {
        "bench": "faults",
        "figures": values,
        "targets": {name: bound for name, (bound, _, _) in TARGETS.items()},
        "met": {name: met(name) for name in TARGETS},
    }


def table(tests: list[Tried]) -> str:
    """Every kind of fault with its counts, and the targets."""
    rows = []
    for kind, title in KINDS.items():
        found = of(tests, kind)
        if found:
            held = [tried for tried in found if tried.outcome == "passed"]
            rows.append([title, f"{tries(found):,}", f"{tries(held):,}", remark(found)])
    outcome = verdict(tests)
    goals = []
    for name, (bound, sense, meaning) in TARGETS.items():
        value = outcome["figures"][name]
        state = "not measured" if value is None else "met" if outcome["met"][name] else "**not met**"
        goals.append([meaning, f"{sense} {bound:,g}", "–" if value is None else f"{value:,g}", state])
    parts = [markdown(["fault", "tried", "held", ""], rows)]
    parts.append(markdown(["figure", "target", "measured", ""], goals))
    if tests:
        machine = tests[-1].machine
        parts.append(f"On {machine.cpu}, {machine.cores} cores.")
    return "\n\n".join(parts)


def remark(tests: list[Tried]) -> str:
    """What the tests of one kind noted, in a few words."""
    said = []
    places = {tried.noted["place"] for tried in tests if "place" in tried.noted}
    if places:
        said.append(f"{len(places)} places")
    if any("finished" in tried.noted for tried in tests):
        finished, redone = (sum(int(tried.number(name)) for tried in tests) for name in ("finished", "redone"))
        said.append(f"{finished} finished steps, {redone} done again")
    if any("seconds" in tried.noted for tried in tests):
        said.append(f"longest {max(tried.number('seconds') for tried in tests):.2f} s")
    if any("enough" in tried.noted for tried in tests):
        said.append(f"{sum(tried.noted.get('enough') == 'True' for tried in tests)} were enough")
        signals = sum(tried.noted.get("killed_by_signal") == "True" for tried in tests)
        said += [f"{signals} ended by a signal out of native code"] if signals else []
    if any("refused" in tried.noted for tried in tests):
        said.append(f"{sum(int(tried.number('refused')) for tried in tests):,} refused in a line")
    return "; ".join(said)


if __name__ == "__main__":
    raise SystemExit(main())
