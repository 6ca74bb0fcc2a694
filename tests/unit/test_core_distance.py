"""The control for prompts on near and far cores: rounds are told apart, and the distance is asked for in earnest."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from benchmarks.engines import core_distance
from benchmarks.engines.core_distance import FAR_NS, PLACES, Round, distance, text, verdict
from trsp_deploy.errors import EngineUnavailable

NEAR, FAR = (FAR_NS - 50.0,) * 3, (FAR_NS + 80.0,) * 3


def made_up(fp32: float, int8: float, distances_ns: tuple[float, ...]) -> Round:
    token_s = {"fp32": fp32 / 10, "int8": int8 / 20}
    return Round(prompt_s={"fp32": fp32, "int8": int8}, token_s=token_s, distances_ns=distances_ns)


def test_a_round_is_near_or_far_where_all_its_distances_agree() -> None:
    ends = (FAR_NS - 0.1, FAR_NS, FAR_NS)
    rounds = [made_up(1, 1, each) for each in (NEAR, FAR, ends, ends[::-1], ends[:1] * 3, ends[1:])]
    assert [each.place for each in rounds] == ["near", "far", "moved", "moved", "near", "far"]


def test_each_place_has_a_ratio_of_its_own() -> None:
    rounds = (
        [made_up(0.2, 0.08, NEAR)] * 3 + [made_up(0.24, 0.15, FAR)] * 2 + [made_up(9, 1, (NEAR[0], FAR[0], FAR[0]))]
    )
    found = verdict(rounds)
    assert list(found["figures"].values()) == [2.5, 1.6] and list(found["met"].values()) == [True, False]
    assert found["figures"].keys() == found["targets"].keys() == found["met"].keys()
    lines = text(rounds).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == ["3", "2", "1"] * 2
    assert "| prompt | near | 3 | 30 | 200.00 | 80.00 | 2.50 (2.50 to 2.50) |" in lines
    assert "| token | far | 2 | 160 | 24.00 | 7.50 | 3.20 (3.20 to 3.20) |" in lines


def test_a_place_that_was_not_seen_is_not_met() -> None:
    found = verdict([made_up(0.3, 0.1, NEAR)])
    assert list(found["figures"].values()) == [3.0, None] and list(found["met"].values()) == [True, False]
    assert [line.split(" | ")[2] for line in text([made_up(0.3, 0.1, NEAR)]).splitlines()[2:]] == ["1", "0", "0"] * 2
    assert len(text([]).splitlines()) == 2 + 2 * len(PLACES)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no distance")
def test_the_distance_is_measured_and_threads_go_where_they_might_before() -> None:
    before = os.sched_getaffinity(0)
    ask = distance()
    assert all(1 < ask() < 1e6 for _ in range(3))
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("rounds", ["0", "-3"])
def test_no_rounds_replace_no_results(rounds: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["core_distance", "--rounds", rounds])
    with pytest.raises(SystemExit):
        core_distance.main()
    assert f"--rounds {rounds}: expected 1 or more" in capsys.readouterr().err


def test_a_distance_that_was_not_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ask:
        def __call__(self, *cores: int) -> float:
            return -1.0

    monkeypatch.setattr(core_distance.os, "sched_getaffinity", lambda pid: {3, 4})
    monkeypatch.setattr(core_distance.subprocess, "run", lambda *given, **how: None)
    monkeypatch.setattr(core_distance.ctypes, "CDLL", lambda path: SimpleNamespace(distance_ns=Ask()))
    with pytest.raises(EngineUnavailable, match="no thread could be started"):
        distance()()


def test_without_a_second_core_or_a_compiler_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_distance.os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(EngineUnavailable, match="may run on 1"):
        distance()
    monkeypatch.setattr(core_distance.os, "sched_getaffinity", lambda pid: {3, 4})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineUnavailable, match=r"ping_pong\.c was not compiled"):
        distance()
