"""Faults tried for real, counted: `make faults`.

    python -m benchmarks.faults              # runs tests/faults, about an hour on 2 cores; then the table
    python -m benchmarks.faults -k killed    # some of them; what else was tried before stays in the table
    python -m benchmarks.faults --report     # the table and docs/faults.md from what is there

Each test notes what it tried (`record_property`). Its last outcome is a line of benchmarks/results/faults.jsonl as soon
as it has ended: a run that is stopped loses nothing. Lines of tests that are no longer there go, and tests that have
none, or were skipped, are counted and named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

import trsp_deploy
from benchmarks import targets
from benchmarks.code import code_digest
from benchmarks.kept import keep, kept_in
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.errors import RunError, TrspError
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
TARGETS = {
    "failed": at_most(0, "tests that failed"),
    "tests_without_an_outcome": at_most(0, "tests that never ran, or were skipped"),
    "kills": at_least(40, "moments at which a run was killed"),
    "finished_steps_redone": at_most(0, "finished steps that a rerun did again, after any fault"),
    "ctrl_c_longest_s": at_most(2.0, "Ctrl-C: seconds until no process was left, the longest"),
    "damages": at_least(60, "damaged files, each found and named"),
    "bad_inputs": at_least(10_000, "generated bad inputs"),
    "garbled_files": at_least(3_000, "garbled files read"),
}
NAMED = 10  # tests without an outcome; of more the rest is a number


class Tried(Strict):
    """One test and what it noted."""

    test: str
    outcome: Literal["passed", "failed", "skipped"]
    elapsed_s: float
    noted: dict[str, str]
    machine: Provenance
    code: str = ""  # digest of the whole package, of the test's file and of what the tests share

    @property
    def stale(self) -> bool:
        """Whether it was tried with other code than there is now."""
        return self.code != digest(self.test)


def digest(test: str) -> str:
    """Of all code that a test by this name may run."""
    package, own = Path(trsp_deploy.__file__).parent, f"{test.partition('::')[0]}.py"
    everything = sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))
    beside = tuple(sorted(path for path in TESTS.glob("*.py") if path.name == own or not path.name.startswith("test_")))
    return code_digest(*everything, beside=beside)


def numbers(tests: Sequence[Tried], name: str) -> list[float]:
    """A number of every test that noted it."""
    return [float(tried.noted[name]) for tried in tests if name in tried.noted]


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("-k", default="", help="of the tests, as pytest takes it", metavar="EXPRESSION")
    options = parser.parse_args()
    try:
        found = read()
        keeper = Keeper(found)
        code = collect(keeper) if options.report else run(options.k, keeper)
        tests, missing = list(found.values()), keeper.missing()
        put_between_markers(PAGE, table(tests, missing), "faults")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(table(tests, missing))
    print(json.dumps(verdict(tests, missing)))
    return code


def run(expression: str, keeper: Keeper) -> int:
    """pytest's exit code; the keeper has every test that it runs, and so has the file, as soon as it has ended."""
    os.environ["HYPOTHESIS_PROFILE"] = "faults"
    arguments = ["-q", "-m", "", str(TESTS), *(["-k", expression] if expression else [])]
    return int(pytest.main(arguments, plugins=[keeper]))


def collect(keeper: Keeper) -> int:
    """Tell the keeper which tests there are and run none; 0. Raises RunError when pytest cannot read them."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["-q", "--collect-only", "-m", "", str(TESTS)], plugins=[keeper])
    if code != pytest.ExitCode.OK:
        raise RunError(f"{TESTS}: pytest cannot read the tests; `pytest --collect-only -m '' {TESTS}` says why")
    return 0


class Keeper:
    """pytest's plugin that writes down each test once it is torn down, and forgets tests that are no longer there."""

    def __init__(self, found: dict[str, Tried]) -> None:
        self._found = found
        self._phases: list[pytest.TestReport] = []
        self._collected: list[str] = []
        self._unread: set[str] = set()  # files that failed or were skipped as a whole: their tests are not known

    def missing(self) -> list[str]:
        """The tests that never ran, or were skipped when they last did."""
        tried = {name for name, test in self._found.items() if test.outcome != "skipped"}
        unread = [f"{file}::*" for file in sorted(self._unread)]
        return [name for name in self._collected if name not in tried] + unread

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """One file, read or not."""
        if report.outcome != "passed":
            self._unread.add(Path(report.nodeid).stem)

    @pytest.hookimpl(tryfirst=True)  # before -k takes some of them away
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Every test that there is."""
        self._collected = [name_of(item.nodeid) for item in items]
        there = set(self._collected)
        gone = [name for name in self._found if name not in there and name.partition("::")[0] not in self._unread]
        for name in gone:
            del self._found[name]
        if gone:
            keep(RESULTS, *self._found.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test: its setup, the call or the teardown."""
        self._phases.append(report)
        if report.when != "teardown":
            return
        phases, self._phases = self._phases, []
        outcomes = {phase.outcome for phase in phases}
        tried = Tried(
            test=name_of(report.nodeid),
            outcome="failed" if "failed" in outcomes else "skipped" if "skipped" in outcomes else "passed",
            elapsed_s=sum(phase.duration for phase in phases),
            noted={name: str(value) for name, value in report.user_properties},
            machine=provenance(),
            code=digest(name_of(report.nodeid)),
        )
        self._found[tried.test] = tried
        keep(RESULTS, *self._found.values())


def name_of(nodeid: str) -> str:
    """A test's name in the file, such as test_killed::test_killed_run_goes_on[prune-0.5]."""
    file, _, name = nodeid.partition("::")
    return f"{Path(file).stem}::{name}"


def read() -> dict[str, Tried]:
    """The last outcome of every test, by its name."""
    return {tried.test: tried for tried in kept_in(RESULTS, Tried, "delete the line to forget its test")}


def of(tests: Sequence[Tried], *kinds: str) -> list[Tried]:
    """The tests of some kinds of fault that were not skipped."""
    return [tried for tried in tests if tried.noted.get("fault") in kinds and tried.outcome != "skipped"]


def tries(tests: Sequence[Tried]) -> int:
    """A test is one try where it does not say how many."""
    return sum(int(tried.noted.get("tried", 1)) for tried in tests)


def figures(tests: list[Tried], missing: Sequence[str]) -> dict[str, float | None]:
    """One number for each target; None where nothing of the kind was tried, or no test noted what it asks for."""

    def total(count: Callable[[list[Tried]], float], *kinds: str) -> float | None:
        found = of(tests, *kinds)
        return count(found) if found else None

    redone = numbers(of(tests, *KINDS), "redone")
    seconds = numbers(of(tests, "Ctrl-C", "Ctrl-C on a terminal"), "seconds")
    return {
        "failed": sum(tried.outcome == "failed" for tried in tests) if tests else None,
        "tests_without_an_outcome": len(missing),
        "kills": total(tries, "kill -9"),
        "finished_steps_redone": sum(redone) if redone else None,
        "ctrl_c_longest_s": max(seconds, default=None),
        "damages": total(tries, "flip", "truncate", "swap"),
        "bad_inputs": total(tries, "generated bad input"),
        "garbled_files": total(tries, "garbled files"),
    }


def verdict(tests: list[Tried], missing: Sequence[str]) -> dict[str, Any]:
    """The line for scripts; what is not measured is not met."""
    return targets.verdict("faults", TARGETS, figures(tests, missing))


def table(tests: list[Tried], missing: Sequence[str]) -> str:
    """Every kind of fault with its counts, and the targets; `missing`: tests without an outcome."""
    rows = []
    for kind, title in KINDS.items():
        found = of(tests, kind)
        held = [tried for tried in found if tried.outcome == "passed"]
        rows.append([title, f"{tries(found):,}", f"{tries(held):,}", remark(found) if found else "not tried"])
    parts = [markdown(["fault", "tried", "held", ""], rows)]
    parts.append(targets.table(TARGETS, figures(tests, missing), "{:,g}".format))
    if missing:
        rest = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        parts.append(f"Without an outcome: {', '.join(f'`{name}`' for name in missing[:NAMED])}{rest}.")
    if tests:
        machines = {f"{tried.machine.cpu}, {tried.machine.cores} cores" for tried in tests}
        days = sorted({(tried.machine.time or "earlier")[:10] for tried in tests})
        stale = sum(tried.stale for tried in tests)
        earlier = f", {stale} of {len(tests)} tests with earlier code" if stale else ""
        parts.append(f"On {'; '.join(sorted(machines))}; tried on {' and '.join(days)}{earlier}.")
    return "\n\n".join(parts)


def remark(tests: list[Tried]) -> str:
    """What the tests of one kind noted, in a few words."""
    said = []
    places = {tried.noted["place"] for tried in tests if "place" in tried.noted}
    if places:
        said.append(f"{len(places)} place{'s' * (len(places) > 1)}")
    finished, redone, seconds, refused = (numbers(tests, name) for name in ("finished", "redone", "seconds", "refused"))
    if finished:
        said.append(f"{sum(finished):g} finished steps" + (f", {sum(redone):g} done again" if redone else ""))
    if seconds:
        said.append(f"longest {max(seconds):.2f} s")
    if any("enough" in tried.noted for tried in tests):
        said.append(f"{sum(tried.noted.get('enough') == 'True' for tried in tests)} were enough")
        signals = sum(tried.noted.get("killed_by_signal") == "True" for tried in tests)
        said += [f"{signals} ended by a signal out of native code"] if signals else []
    if refused:
        said.append(f"{sum(refused):,.0f} refused in a line")
    return "; ".join(said)


if __name__ == "__main__":
    raise SystemExit(main())
