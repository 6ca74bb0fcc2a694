"""The bench of the comparison itself: answers from samples, figures, targets, and the table of every machine."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import kept
from benchmarks.proof import __main__ as bench
from benchmarks.proof import subject, trials
from benchmarks.proof.found import COUNTS, TARGETS, figures, met, page, read_here, table, verdict
from benchmarks.proof.trials import RIGHT, Kind, Trial, comparison_digest, terms_of
from tests.made_run import SPEC, made_run
from tests.samples import made_up
from trsp_deploy.artifacts import provenance
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.results import PHASES

RIGHT_LOG: dict[Kind, float] = {"same": 0.0, "same, loaded": 0.0, "slower": -0.05, "faster": 0.18}
WRONG_LOG: dict[Kind, float] = {"same": 0.1, "same, loaded": -0.1, "slower": 0.05, "faster": 0.0}
ROOT = Path(__file__).parents[2]


def trial(kind: Kind, number: int, right: bool, elapsed_s: float = 20.0, cpu: str = provenance().cpu) -> Trial:
    log = (RIGHT_LOG if right else WRONG_LOG)[kind]
    return Trial(
        kind=kind,
        number=number,
        machine=provenance().model_copy(update={"cpu": cpu}),
        elapsed_s=elapsed_s,
        replicates=dict.fromkeys(PHASES, (log,) * 6),
        control=dict.fromkeys(PHASES, (0.0,) * 6),
        load=1.0,
        terms=terms_of(kind),
        code=comparison_digest(),
    )


def by_earlier_code(made: Trial) -> Trial:
    return made.model_copy(update={"code": "another"})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trials are kept; not there yet."""
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "proof.md")
    monkeypatch.setattr(bench, "HOME", tmp_path / "home")
    (tmp_path / "proof.md").write_text("<!-- proof:start -->\nold\n<!-- proof:end -->\n")
    return tmp_path / "results"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kind, int]]:
    """The trials that a run makes, without measuring."""
    asked: list[tuple[Kind, int]] = []

    def make(kind: Kind, number: int, engine: Path) -> Trial:
        asked.append((kind, number))
        return trial(kind, number, right=True)

    monkeypatch.setattr(bench, "make", make)
    monkeypatch.setattr(bench, "small_engine", lambda: Path("engine"))
    return asked


def test_targets_are_judged_and_what_is_missing_is_not_met() -> None:
    every = [trial(kind, n, right=True) for kind, count in COUNTS.items() for n in range(count)]
    good = verdict(every)
    assert all(good["met"].values()) and good["figures"]["same_wrong_share"] == 0
    assert set(good["figures"]) == set(good["targets"]) == set(good["met"]) == set(TARGETS)
    wrong = [trial("same", 0, right=False), *every[1:20], trial("slower", 0, True, elapsed_s=61)]
    found = verdict(wrong)
    assert found["figures"]["same_wrong_share"] == 0.05 and found["met"]["same_wrong_share"]
    assert not found["met"]["slower_longest_s"] and not found["met"]["faster_confirmed_share"]
    assert figures([])["slower_found_share"] is None and not any(verdict([])["met"].values())


def test_targets_are_judged_before_they_are_rounded() -> None:
    assert not met([trial("slower", 0, right=True, elapsed_s=60.04)])["slower_longest_s"]
    assert "60.04" in table([trial("slower", 0, right=True, elapsed_s=60.04)])


def test_the_table_counts_answers() -> None:
    text = table([trial("slower", 0, True), trial("slower", 1, False)])
    assert "| slower | 2 | fail 1, pass 1 | 1 |" in text and "**not met**" in text and "not measured" in text


@pytest.mark.parametrize(("early", "words"), [(-0.1, "1 would have"), (0.1, "0 would have")])
def test_a_check_that_ends_early_is_told_apart_from_a_whole_trial(early: float, words: str) -> None:
    """Five replicates that agree decide; the five after them take it back."""
    logs = (*(early + n / 1e4 for n in range(5)), *(-early + n / 1e4 for n in range(5)))
    made = trial("same", 0, right=True).model_copy(update={"replicates": dict.fromkeys(PHASES, logs)})
    made = made.model_copy(update={"control": dict.fromkeys(PHASES, (0.0,) * 10)})
    assert made.answer == "INCONCLUSIVE" and words in page([made])
    assert ('and 1 "at least 2% faster" met' in page([made])) == (early > 0)


@pytest.mark.parametrize(
    ("ended_s", "confirmed"),
    [((), True), ((20, 30, 40, 50, 55, 58), True), ((20, 30, 40, 50, 60, 70), True), ((30, 40, 50, 59, 61, 70), False)],
)
def test_what_a_minute_said_is_told_apart(ended_s: tuple[float, ...], confirmed: bool) -> None:
    """Five replicates decide, four do not; a trial that is older than the times had no more than a minute."""
    made = trial("faster", 0, right=True).model_copy(update={"ended_s": ended_s})
    assert made.right and made.right_in_a_minute is confirmed
    assert figures([made])["faster_confirmed_share"] == 1
    assert figures([made])["faster_in_a_minute_share"] == confirmed


def test_a_speedup_has_the_budget_that_a_comparison_has_by_default() -> None:
    assert terms_of("faster").settings.budget_s == BenchSettings().budget_s
    assert terms_of("slower").settings.budget_s < TARGETS["slower_longest_s"].bound


@pytest.mark.parametrize("kind", COUNTS)
def test_answers_come_from_the_samples(kind: Kind) -> None:
    right = trial(kind, 0, right=True)
    assert right.right and right.answer == RIGHT[kind]
    assert not trial(kind, 0, right=False).right
    few = right.model_dump() | {"replicates": {phase: logs[:4] for phase, logs in right.replicates.items()}}
    assert Trial.model_validate(few).answer.upper() == "INCONCLUSIVE"  # four replicates decide nothing


def test_intervals_are_held_against_what_was_planted() -> None:
    """All three phases count; older trials were slowed down by more than they said."""
    right = trial("slower", 0, right=True)
    assert right.truth == pytest.approx(1 / 1.05) and trial("faster", 0, right=True).truth == pytest.approx(1.2)
    logs = dict.fromkeys(PHASES, tuple(math.log(1 / 1.05) + n / 1e3 for n in range(-4, 5)))
    exact = right.model_copy(update={"replicates": logs, "control": dict.fromkeys(PHASES, (0.0,) * 9)})
    assert exact.holds == [True] * 3
    later = tuple(value + 0.02 for value in logs["decode"])
    shifted = Trial.model_validate(exact.model_dump() | {"replicates": {**logs, "decode": later}})
    assert shifted.holds == [phase != "decode" for phase in shifted.replicates]
    assert "| 5 of 6 |" in table([exact, shifted])
    older = exact.model_copy(update={"terms": None})
    assert older.truth is None and "| not known |" in table([older])
    assert trial("same", 0, right=True).model_copy(update={"terms": None}).truth == 1


def test_a_trial_is_kept_with_what_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = made_up(speedup=1.2)
    monkeypatch.setattr(trials, "measure", lambda *_, **__: comparison)
    new = trials.make("faster", 3, Path("engine"))
    assert new.right and new.load == 1.0 and new.total.ratio == pytest.approx(1.2, rel=0.02)
    read = Trial.model_validate_json(new.model_dump_json())
    assert read == new and not read.stale and not read.foreign


def test_trials_of_other_code_settings_and_packages_are_known() -> None:
    new = trial("slower", 0, right=True)
    assert not new.stale and not new.foreign
    longer = terms_of("slower").settings.model_copy(update={"budget_s": 120.0})
    for update in ({"code": "another"}, {"terms": terms_of("slower").model_copy(update={"settings": longer})}):
        assert new.model_copy(update=update).stale
    for update in ({"cores": 999}, {"packages": {**new.machine.packages, "onnxruntime": "1.0"}}):
        machine = new.machine.model_copy(update=update)
        assert new.model_copy(update={"machine": machine}).foreign
    assert "2 trials, 1 of them made by earlier code" in page([new, by_earlier_code(new)])


def test_trials_of_earlier_code_are_made_again_only_when_asked(results: Path, made, capsys) -> None:
    old = [by_earlier_code(trial("same", 0, right=True)), trial("slower", 0, right=True)]
    counts: dict[Kind, int] = {"same": 1, "slower": 2}
    found = bench.run(counts, old, keep=True)
    assert made == [("slower", 1)] and len(found) == 3
    assert "1 trials are of other code" in capsys.readouterr().out
    assert read_here() == found  # in a folder that was not there
    again = bench.run(counts, found, keep=True, redo=True)
    assert made == [("slower", 1), ("same", 0)] and read_here() == again
    assert not any(each.stale for each in again) and len(again) == 3


def test_a_report_has_every_machine_and_judges_this_one(results: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["proof", "--report"])
    assert bench.main() == 1  # nothing is there: the page stays as it was
    assert "old" in bench.PAGE.read_text()
    results.mkdir()

    def write(cpu: str, right: bool) -> None:
        path = kept.results_path("proof", cpu, "jsonl")
        path.write_text(f"{trial('slower', 0, right, cpu=cpu).model_dump_json()}\n")

    write("A", right=False)
    write("Z", right=True)
    capsys.readouterr()
    assert bench.main() == 0
    assert all(f"\n{cpu}, " in bench.PAGE.read_text() for cpu in "AZ")
    assert '"machine": "A"' in capsys.readouterr().out  # the worst: none is of this machine
    write(provenance().cpu, right=True)
    assert bench.main() == 0
    assert f'"machine": "{provenance().cpu}"' in capsys.readouterr().out


def test_the_committed_trials_are_read() -> None:
    for path in (ROOT / kept.RESULTS).glob("proof-*.jsonl"):
        there = [Trial.model_validate_json(line) for line in path.read_text().splitlines()]
        assert len({(each.kind, each.number) for each in there}) == len(there) == sum(COUNTS.values())
        assert all(each.right for each in there if each.number == 0)


def test_an_engine_of_another_onnx_runtime_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made_run(tmp_path / "run") / "engines/ort-cpu-fp32/dense"
    monkeypatch.setattr(subject, "package_version", lambda backend: "1")
    assert subject.fits(engine, SPEC)
    assert not subject.fits(engine, SPEC.model_copy(update={"threads": 7}))
    assert not subject.fits(tmp_path / "nowhere", SPEC)
    (engine / "model.onnx").write_text("damaged")
    assert not subject.fits(engine, SPEC)
    monkeypatch.setattr(subject, "package_version", lambda backend: "2")
    assert not subject.fits(made_run(tmp_path / "again") / "engines/ort-cpu-fp32/dense", SPEC)


def test_the_neighbour_ends_with_a_bench_that_is_killed() -> None:
    program = (
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-m', 'benchmarks.proof.neighbour'], check=True)\n"
        "time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as bench:
        assert bench.stdout is not None
        neighbour = psutil.Process(int(bench.stdout.readline()))
        try:
            while neighbour.cpu_times().user < 1:  # its imports take less: it is at work
                time.sleep(0.05)
            assert neighbour.pid not in [child.pid for child in psutil.Process(bench.pid).children(recursive=True)]
        finally:
            os.kill(bench.pid, signal.SIGKILL)
            bench.wait()
        try:
            # Whose child it has become may be long in asking how it ended.
            gone = time.monotonic() + 10
            while neighbour.is_running() and neighbour.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < gone
                time.sleep(0.05)
        finally:
            if neighbour.is_running():
                neighbour.kill()
