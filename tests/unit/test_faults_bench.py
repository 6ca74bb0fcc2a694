"""The count of faults: what no test noted, and tests without an outcome, are not taken for success."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import NAMED, TARGETS, Keeper, Tried, figures, table, verdict
from benchmarks.kept import keep
from tests.breadth import BREADTH
from trsp_deploy.artifacts import provenance

HERE = provenance()  # once: days are compared, and this knows the time


def tried(name: str, outcome: str = "passed", cpu: str = "A", **noted: str) -> Tried:
    machine = HERE.model_copy(update={"cpu": cpu})
    return Tried(test=name, outcome=outcome, elapsed_s=1.0, noted=noted, machine=machine)


@BREADTH
def test_what_was_never_noted_is_not_0() -> None:
    tests = [tried("t::a", fault="kill -9", place="prune"), tried("t::b", fault="Ctrl-C")]
    values = figures(tests, [])
    assert values["finished_steps_redone"] is None and values["ctrl_c_longest_s"] is None
    assert not verdict(tests, [])["met"]["finished_steps_redone"] and not verdict(tests, [])["met"]["ctrl_c_longest_s"]
    assert "| longest" not in table(tests, []) and "done again |" not in table(tests, [])
    more = [
        *tests,
        tried("t::c", fault="Ctrl-C", seconds="1.5"),
        tried("t::d", fault="kill -9", redone="0", finished="3"),
    ]
    assert figures(more, [])["finished_steps_redone"] == 0 and figures(more, [])["ctrl_c_longest_s"] == 1.5
    assert "3 finished steps, 0 done again" in table(more, [])


def test_a_test_that_tried_nothing_is_no_try() -> None:
    assert figures([tried("t::a", fault="generated bad input", tried="0")], [])["bad_inputs"] == 0


def test_tests_without_an_outcome_are_counted_and_named() -> None:
    tests = [tried("t::a", fault="kill -9"), tried("t::b", cpu="B", fault="Ctrl-C")]
    found = verdict(tests, ["t::c"])
    assert found["figures"]["tests_without_an_outcome"] == 1 and not found["met"]["tests_without_an_outcome"]
    assert set(found["figures"]) == set(found["met"]) == set(TARGETS)
    text = table(tests, ["t::c"])
    assert "Without an outcome: `t::c`." in text and "| `ulimit -f` | 0 | 0 | not tried |" in text
    day = (HERE.time or "")[:10]
    where = f"On A, {HERE.cores} cores; B, {HERE.cores} cores; tried on {day}"
    assert f"{where}, 2 of 2 tests with earlier code." in text
    today = [each.model_copy(update={"code": faults.digest(each.test)}) for each in tests]
    assert f"tried on {day}." in table(today, [])
    assert "1 of 2 tests with earlier code" in table([today[0], tests[1]], [])
    assert "Without" not in table(tests, []) and verdict(tests, [])["met"]["tests_without_an_outcome"]
    assert " and 2 more." in table(tests, [f"t::{number}" for number in range(NAMED + 2)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests to collect, away from this process's own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    tests = tmp_path / f"of_{tmp_path.name}"  # a name of its own, for this process keeps what it has imported
    tests.mkdir()
    (tests / "test_some.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tests / "test_skipped.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "few")  # a run sets it
    monkeypatch.setattr(faults, "TESTS", tests)
    monkeypatch.setattr(faults, "RESULTS", tmp_path / "faults.jsonl")
    monkeypatch.setattr(faults, "PAGE", tmp_path / "faults.md")
    faults.PAGE.write_text("<!-- faults:start -->\n<!-- faults:end -->\n")
    return tests


def test_outcomes_of_tests_that_are_gone_are_dropped(folder: Path) -> None:
    names = ("test_some::test_one", "test_some::test_gone", "test_deleted::test_a", "test_skipped::test_b")
    found = {name: tried(name) for name in names}
    keeper = Keeper(found)
    assert faults.collect(keeper) == 0
    # What a file holds that was skipped as a whole is not known.
    assert list(found) == list(faults.read()) == ["test_some::test_one", "test_skipped::test_b"]
    assert keeper.missing() == ["test_some::test_two", "test_skipped::*"]
    found["test_some::test_two"] = tried("test_some::test_two", outcome="skipped")
    assert "test_some::test_two" in keeper.missing()


@BREADTH
def test_a_part_of_the_tests_takes_nothing_from_the_others(folder: Path) -> None:
    found = {name: tried(name) for name in ("test_some::test_two", "test_some::test_gone")}
    keeper = Keeper(found)
    assert faults.run("one", keeper) == 0
    assert set(found) == {"test_some::test_one", "test_some::test_two"}
    assert keeper.missing() == ["test_skipped::*"]


def test_a_file_that_cannot_be_read_is_an_error_and_drops_nothing(folder: Path, monkeypatch, capsys) -> None:
    (folder / "test_broken.py").write_text("import no_such_package\n")
    keep(faults.RESULTS, tried("test_broken::test_a"))
    monkeypatch.setattr(sys, "argv", ["faults", "--report"])
    assert faults.main() == 1
    assert "cannot read the tests" in capsys.readouterr().err and list(faults.read()) == ["test_broken::test_a"]


def test_a_report_names_what_has_no_outcome(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "--report"])
    assert faults.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["tests_without_an_outcome"] == 3
    assert "`test_some::test_one`, `test_some::test_two`" in faults.PAGE.read_text()
