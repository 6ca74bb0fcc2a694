"""Faults tried for real, counted: `make faults`.

    python -m benchmarks.faults              # runs tests/faults, about 40 minutes on 2 cores; then the table
    python -m benchmarks.faults -k killed    # some of them; what else was tried before stays in the table
    python -m benchmarks.faults --report     # the table and docs/faults.md from what is there

Each test notes what it tried (`record_property`); pytest's JUnit file has that and the outcome. The last outcome of
each test is a line of benchmarks/results/faults.jsonl, kept after every file of tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.pages import markdown, put_between_markers
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import Strict

TESTS = Path("tests/faults")
NOTHING_CHOSEN = 5  # pytest's exit code
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
    code = 0
    try:
        found = read()
        for file in [] if options.report else sorted(TESTS.glob("test_*.py")):
            ended, fresh = run(file, options.k)
            code = code if ended in (0, NOTHING_CHOSEN) else 1
            found = {**found, **fresh}
            keep(found)
        tests = list(found.values())
        put_between_markers(PAGE, table(tests), "faults")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped; whole files of tests are kept", file=sys.stderr)
        return 130
    print(table(tests))
    print(json.dumps(verdict(tests)))
    return code


def run(tests: Path, expression: str) -> tuple[int, dict[str, Tried]]:
    """pytest's exit code and every test that it ran, of one file."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(tests), f"--junitxml={junit}"]
        command += ["-k", expression] if expression else []
        code = subprocess.run(command, env={**os.environ, "HYPOTHESIS_PROFILE": "faults"}, check=False).returncode
        if not junit.is_file():
            return code, {}
        return code, {tried.test: tried for tried in map(_tried, ElementTree.parse(junit).iter("testcase"))}


def _tried(case: ElementTree.Element) -> Tried:
    outcome: Literal["passed", "failed", "skipped"] = "passed"
    if case.find("skipped") is not None:
        outcome = "skipped"
    elif case.find("failure") is not None or case.find("error") is not None:
        outcome = "failed"
    return Tried(
        test=f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}",
        outcome=outcome,
        elapsed_s=float(case.get("time", "0")),
        noted={each.get("name", ""): each.get("value", "") for each in case.iter("property")},
        machine=provenance(),
    )


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
