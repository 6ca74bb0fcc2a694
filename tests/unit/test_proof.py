"""The bench of the comparison itself: figures, targets and the table from trials."""

from __future__ import annotations

from benchmarks.proof import COUNTS, TARGETS, Kind, Trial, figures, table, verdict
from trsp_deploy.artifacts import provenance
from trsp_deploy.tools.statistics import Ratio


def trial(kind: Kind, number: int, right: bool, elapsed_s: float = 20.0) -> Trial:
    ratio = Ratio(ratio=1.0, low=0.98, high=1.02)
    return Trial(
        kind=kind,
        number=number,
        machine=provenance(),
        answer="x" if right else "y",
        right=right,
        elapsed_s=elapsed_s,
        replicates={},
        control={},
        found={"prefill": ratio, "decode": ratio, "total": ratio},
        load=1.0,
    )


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


def test_the_table_counts_answers() -> None:
    text = table([trial("slower", 0, True), trial("slower", 1, False)])
    assert "| slower | 2 | x 1, y 1 | 1 |" in text and "**not met**" in text and "not measured" in text
