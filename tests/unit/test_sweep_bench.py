"""`make bench-sweep`: what it says of a sweep that was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sweep as bench
from tests.breadth import BREADTH
from tests.samples import made_up, made_up_point
from trsp_deploy.artifacts import provenance
from trsp_deploy.tools.judging.statistics import speedup
from trsp_deploy.tools.reports.sweeps import Sweep, Targets, choose


@pytest.fixture
def found() -> bench.Found:
    unmeasured = made_up_point(9, 1.4, 2.0).model_copy(update={"comparison": None, "size_bytes": None})
    points = (made_up_point(3, 1.1, 1.2, limit=1.11), made_up_point(6, 1.2, 1.5, limit=1.3), unmeasured)
    sweep = Sweep(
        model="tiny",
        num_layers=30,
        points=points,
        targets=Targets(),
        choice=choose(points, Targets()),
        provenance=provenance().model_copy(update={"cpu": "Some CPU"}),
    )
    return bench.Found(sweep=sweep, comparisons={3: made_up(speedup=1.1)})


def test_speed_is_judged_by_its_limit(found: bench.Found) -> None:
    judged = bench.verdict(found)
    assert judged["bench"] == "sweep" and judged["figures"].keys() == judged["targets"].keys() == judged["met"].keys()
    assert judged["figures"]["drop_3_speedup_over_limit"] == pytest.approx(1.1 / 1.11, abs=2e-3)
    assert list(judged["met"].values()) == [True, False, False], "what has no limit or did not run is not met"


def test_the_page_and_the_plot_are_written_from_what_is_kept(
    found: bench.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/choosing-a-drop.md").write_text("before\n<!-- sweep:start -->\n<!-- sweep:end -->\nafter\n")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/sweep-some-cpu.json").write_text(found.model_dump_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep", "--report"])
    assert bench.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == bench.verdict(bench.derived(found))
    page = (tmp_path / "docs/choosing-a-drop.md").read_text()
    assert "| 3 of 30 |" in page and "not run" in page and page.startswith("before") and page.endswith("after\n")
    assert (tmp_path / "docs/img/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_are_derived_again_from_what_was_timed(found: bench.Found) -> None:
    """The file keeps the intervals of the code that measured; the page says what today's code makes of the blocks."""
    noisy = made_up(speedup=1.1, noise=0.05, seed=3)
    derived = bench.derived(found.model_copy(update={"comparisons": {3: noisy}}))
    for point, kept in zip(derived.sweep.points, found.sweep.points, strict=True):
        if point.num_dropped != 3 or point.comparison is None:
            assert point == kept
            continue
        for phase in point.comparison.phases:
            assert phase.speedup == speedup(noisy.replicates, 0, phase.phase).found and phase.limit == 1.11


@BREADTH
def test_a_sweep_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep", "--out", "sweep"])
    monkeypatch.setattr(bench, "COUNTS", (0,))
    assert bench.main() == 1
    assert (
        "sweep --recipe smollm2-135m --drop 0" in (last := capfd.readouterr().err.splitlines()[-1]) and "ended" in last
    )
