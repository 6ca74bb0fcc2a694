"""Which point of a sweep is taken, and what is said about it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.breadth import BREADTH
from tests.samples import made_up, made_up_point, made_up_report, made_up_sweep, scores
from trsp_deploy.artifacts import RunFolder, provenance
from trsp_deploy.artifacts.layout import SWEEP
from trsp_deploy.checks import cut_of
from trsp_deploy.cli.tables import print_sweep
from trsp_deploy.errors import RecipeError
from trsp_deploy.pipeline.inputs import Inputs
from trsp_deploy.pipeline.reporting import sweep_of
from trsp_deploy.recipe import Recipe, parse_drops
from trsp_deploy.sweep import _found, _points
from trsp_deploy.tools.judging.comparisons import compare
from trsp_deploy.tools.reports import markdown, plots, sweep_page
from trsp_deploy.tools.reports.baselines import Cut
from trsp_deploy.tools.reports.measured import Measured
from trsp_deploy.tools.reports.quality import ChoicesReport, choices_report
from trsp_deploy.tools.reports.record import EngineReport, Report
from trsp_deploy.tools.reports.rows import sweep_columns, sweep_rows
from trsp_deploy.tools.reports.sweeps import TIMED_AGAIN, Point, Sweep, Targets, answer, choose

POINTS = [
    made_up_point(2, 1.1, 1.05),
    made_up_point(4, 1.2, 1.2),
    made_up_point(6, 1.35, 1.5),
    made_up_point(8, 1.5, 2.5),
]
SURE = choices_report(scores("1" * 100), scores("1" * 90 + "0" * 10))
FEW = choices_report(scores("1110", "1011"), scores("0110", "1010"))


@pytest.mark.parametrize(
    ("targets", "count", "words"),
    [
        ({"min_speedup": 1.25}, 6, ["fast enough: 1.35x (1.35 to 1.35) of 1.25x end to end", "4 gives 1.20x"]),
        ({"min_speedup": 1.05}, 2, ["the smallest cut that was judged"]),
        ({"max_ppl_ratio": 1.3}, 4, ["the most that quality allows", "of at most 1.3x; 6 would cost 1.50x"]),
        ({"max_ppl_ratio": 9}, 8, ["more was not tried"]),
        ({"min_speedup": 1.15, "max_ppl_ratio": 1.3}, 4, ["2 gives 1.10x"]),
        (
            {"min_speedup": 1.25, "max_ppl_ratio": 1.3},
            None,
            ["fast enough: 6, 8 dropped", "1.3x: 2, 4 dropped"],
        ),
        ({"min_speedup": 2}, None, ["the largest cut, 8, is not fast enough: 1.50x (1.50 to 1.50) of 2x"]),
        ({"max_ppl_ratio": 1.01}, None, ["the smallest cut, 2, costs 1.05x"]),
        ({"max_latency_s": 0.0084}, 4, ["8.3 ms of 8.4 ms a token", "2 gives 9.1 ms"]),
        ({}, None, ["no target was given"]),
    ],
)
def test_the_choice_and_the_limit_that_bound(targets: dict[str, float], count: int | None, words: list[str]) -> None:
    found = choose(POINTS, Targets(**targets))
    assert found.num_dropped == count and all(word in found.reason for word in words), found.reason


@BREADTH
@pytest.mark.parametrize(
    ("targets", "doubt"),
    [
        ({"min_speedup": 1.1, "max_ppl_ratio": 1.4}, ""),
        ({"min_speedup": 1.19, "max_ppl_ratio": 1.4}, "speed-up"),
        ({"min_speedup": 1.1, "max_ppl_ratio": 1.25}, "perplexity"),
        ({"min_speedup": 1.19, "max_ppl_ratio": 1.25}, "speed-up and perplexity"),
        ({"max_ppl_ratio": 1.25}, "perplexity"),
    ],
)
def test_what_an_estimate_keeps_and_its_interval_may_miss_is_said(targets: dict[str, float], doubt: str) -> None:
    point = made_up_point(4, 1.2, 1.2)
    assert point.comparison is not None
    phases = tuple(
        phase.model_copy(update={"speedup": phase.speedup.model_copy(update={"low": 1.15})})
        for phase in point.comparison.phases
    )
    wide = point.model_copy(update={"comparison": point.comparison.model_copy(update={"phases": phases})})
    found = choose([wide], Targets(**targets))
    assert found.num_dropped == 4
    words = f"; by estimates, for the interval of its {doubt} allows a miss: `check` decides"
    assert found.reason.endswith(words) if doubt else "by estimates" not in found.reason
    page = sweep_page.render(made_up_sweep().model_copy(update={"choice": found}))
    assert ('<div class="verdict good">' in page) == (not doubt), "green is for what a check would pass"


def test_a_speed_up_counts_for_no_more_than_its_limit() -> None:
    drifted = made_up_point(2, 1.3, 1.05, limit=1.1)
    found = choose([drifted, made_up_point(6, 1.35, 1.5)], Targets(min_speedup=1.2))
    assert found.num_dropped == 6 and "2 gives 1.30x (1.30 to 1.30, and the limit is 1.10x)" in found.reason


def test_an_assumed_limit_caps_nothing_as_in_a_check() -> None:
    point = made_up_point(4, 1.3, 1.05, limit=1.2)
    assert point.comparison is not None
    phases = tuple(phase.model_copy(update={"limit_assumed": True}) for phase in point.comparison.phases)
    assumed = point.model_copy(update={"comparison": point.comparison.model_copy(update={"phases": phases})})
    assert choose([point], Targets(min_speedup=1.25)).num_dropped is None
    assert choose([assumed], Targets(min_speedup=1.25)).num_dropped == 4
    for only, limit, shown in ((point, "limit", "1.20x"), (assumed, "limit, assumed", "1.20x (assumed)")):
        found = made_up_sweep().model_copy(update={"points": (only,)})
        assert sweep_rows(found)[0][sweep_columns(found).index("limit")] == shown
        assert f">{limit}</text>" in plots.by_count(found)
        allow = f"what bytes and operations {'are assumed to ' * (only is assumed)}allow."
        assert allow in sweep_page.render(found)


def test_what_a_check_would_not_decide_is_said_of_a_choice() -> None:
    point = made_up_point(4, 1.3, 1.2)
    assert point.comparison is not None
    few = point.model_copy(update={"comparison": point.comparison.model_copy(update={"replicates": 2})})
    found = choose([few], Targets(min_speedup=1.2))
    assert found.reason.endswith("for it has 2 replicates, 5 are the fewest that decide: `check` decides")
    text = point.quality["text"].model_copy(update={"pairs": "windows", "tokens": 31, "context_length": 32})
    short = point.model_copy(update={"quality": {"text": text}})
    found = choose([short], Targets(max_ppl_ratio=1.5))
    assert found.reason.endswith("for 'text' is 1 window of 32 tokens, 5 are the fewest that decide: `check` decides")
    above = tuple(phase.model_copy(update={"above_limit": True}) for phase in point.comparison.phases)
    drifted = point.model_copy(update={"comparison": point.comparison.model_copy(update={"phases": above})})
    found = choose([drifted], Targets(min_speedup=1.2))
    assert found.reason.endswith("for its speed-up is above its limit: `check` decides")


def beside_other_work(point: Point) -> Point:
    """The same, timed on a busy machine."""
    assert point.comparison is not None and point.comparison.machine is not None
    machine = point.comparison.machine.model_copy(update={"lost_cores": 0.5})
    return point.model_copy(update={"comparison": point.comparison.model_copy(update={"machine": machine})})


def test_a_time_of_a_busy_machine_is_doubted_and_a_ratio_is_not() -> None:
    """No check has a limit of a time: `check` was said to decide, and of other work nothing."""
    points = [beside_other_work(point) for point in POINTS]
    work = "other work took the time of 0.50 cores from the engines, which compute on 1"
    doubt, meanwhile = f"for {work}: {TIMED_AGAIN}", f" (meanwhile {work}: {TIMED_AGAIN})"
    assert choose(points, Targets(min_speedup=1.25)) == choose(POINTS, Targets(min_speedup=1.25))
    timed = choose(points, Targets(max_latency_s=0.0084))
    assert timed.num_dropped == 4 and timed.doubts == (work,)
    assert timed.reason.endswith(f"; 2 gives 9.1 ms{meanwhile}; by estimates, {doubt}")
    none = choose(points, Targets(max_latency_s=0.001))
    assert none.reason == f"the largest cut, 8, is not fast enough: 6.7 ms of 1 ms a token{meanwhile}"
    both = choose(points[1:], Targets(max_latency_s=0.0084, max_ppl_ratio=1.25))
    miss = "the interval of its perplexity allows a miss"
    assert both.doubts == (miss, work)
    assert both.reason.endswith(f"; by estimates, for {miss}: `check` decides; {doubt}")


def test_few_replicates_of_a_time_are_no_matter_for_a_check() -> None:
    point = POINTS[1]
    assert point.comparison is not None
    few = point.model_copy(update={"comparison": point.comparison.model_copy(update={"replicates": 2})})
    found = choose([few], Targets(max_latency_s=0.0084))
    assert found.reason.endswith(f"for it has 2 replicates, 5 are the fewest that decide: {TIMED_AGAIN}")


def timed(point: Point, time: str | None) -> Point:
    """The same, measured at a time."""
    steps = ("evaluate-text-dense", "bench-ort-cpu-fp32")
    return point.model_copy(update={"measured": tuple(Measured(step=s, time=time, differs={}) for s in steps)})


def test_times_of_different_days_are_doubted_and_ratios_are_not() -> None:
    """Points that an earlier call had measured were held against today's."""
    first, then, now = "2025-12-01T22:00:00Z", "2025-12-02T04:00:00Z", "2026-01-01T10:00:00Z"
    words = f"the points were timed more than a day apart, {first} to {now}"
    apart = [timed(POINTS[0], first), timed(POINTS[1], now)]
    found = choose(apart, Targets(max_latency_s=0.0084))
    assert found.doubts == (words,) and found.reason.endswith(f"; by estimates, for {words}: {TIMED_AGAIN}")
    assert not choose(apart, Targets(min_speedup=1.15)).doubts
    for near in ([timed(POINTS[0], first), timed(POINTS[1], then)], [timed(POINTS[0], None), timed(POINTS[1], now)]):
        assert not choose(near, Targets(max_latency_s=0.0084)).doubts
    elsewhere = [point.model_copy(update={"engine": "another"}) for point in apart]
    assert not choose(elsewhere, Targets(max_latency_s=0.0084)).doubts, "of measurements that are none of its times"


@BREADTH
def test_a_sweeps_page_says_when_its_points_were_measured() -> None:
    """Those of an earlier call were as of now, with now's packages."""
    report = made_up_report(made_up(speedup=1.3, noise=1e-6))
    points = _points({"drop-2": report, "drop-4": report.model_copy(update={"measured": report.measured[:1]})})
    found = made_up_sweep().model_copy(update={"points": points})
    page = sweep_page.render(found)
    assert "<td>2025-12-01T10:00:00Z to 2026-01-01T10:00:00Z</td>" in page
    assert "<td>torch 2.8.0 (now 2.9.0): drop-2/bench-ort-cpu-fp32</td>" in page
    assert Sweep.model_validate_json(found.model_dump_json()) == found
    older = Sweep.model_validate_json(found.model_dump_json(exclude={"points": {"__all__": {"measured"}}}))
    assert "<th>measured</th>" in page and "<th>measured</th>" not in sweep_page.render(older)


def test_a_perplexity_that_is_no_number_is_not_kept() -> None:
    point = made_up_point(4, 1.3, 1.2)
    broken = point.quality["text"].model_copy(update={"ratio": float("nan")})
    for quality in ({"a": point.quality["text"], "b": broken}, {"b": broken, "a": point.quality["text"]}):
        found = choose([point.model_copy(update={"quality": quality})], Targets(max_ppl_ratio=1.5))
        assert found.num_dropped is None


def test_the_shape_that_decides_is_the_one_that_is_named() -> None:
    found = compare(made_up(speedup=1.3, shapes=(1.0, 1.1), noise=1e-6))
    limits = iter((1.35, 1.10))
    phases = tuple(
        phase.model_copy(update={"limit": next(limits)}) if phase.phase == "total" else phase for phase in found.phases
    )
    point = made_up_point(4, 1.3, 1.05).model_copy(update={"comparison": found.model_copy(update={"phases": phases})})
    reason = choose([point], Targets(min_speedup=1.25)).reason
    assert "not fast enough: 1.43x (1.43 to 1.43, and the limit is 1.10x) at batch 1, prompt 256 of 1.25x" in reason


def test_without_a_wish_for_speed_nothing_is_said_of_it() -> None:
    assert choose(POINTS, Targets(max_ppl_ratio=1.01)).reason.startswith("the smallest cut, 2, costs 1.05x")


def test_a_smaller_cut_that_was_refused_for_its_quality_is_named_with_it() -> None:
    found = choose(
        [made_up_point(2, 1.3, 1.6), made_up_point(4, 1.4, 1.2)], Targets(min_speedup=1.2, max_ppl_ratio=1.3)
    )
    assert found.num_dropped == 4 and "2 costs 1.60x perplexity" in found.reason


def test_a_cut_that_is_fast_and_poor_is_named_whatever_follows_it() -> None:
    points = [made_up_point(2, 1.4, 1.8), made_up_point(4, 1.1, 1.2), made_up_point(6, 1.4, 1.3)]
    found = choose(points, Targets(min_speedup=1.3, max_ppl_ratio=1.5))
    assert found.num_dropped == 6 and "fast and good enough" in found.reason and "2 costs 1.80x" in found.reason
    points = [made_up_point(2, 1.1, 1.2), made_up_point(4, 1.4, 1.8), made_up_point(6, 1.2, 1.3)]
    found = choose(points, Targets(min_speedup=1.3, max_ppl_ratio=1.5))
    assert found.reason == "fast enough: 4 dropped; perplexity of at most 1.5x: 2, 6 dropped"


def test_a_point_without_an_engine_is_never_fast() -> None:
    unmeasured = POINTS[3].model_copy(update={"comparison": None, "size_bytes": None})
    refused = choose([unmeasured], Targets(min_speedup=1.01))
    assert refused.num_dropped is None and "no engine was timed here, so no speed is known" in refused.reason
    assert choose([unmeasured], Targets(max_ppl_ratio=3)).num_dropped == 8


def test_a_point_that_could_not_be_measured_is_not_called_slow() -> None:
    """Such as one whose engine's process ended: it had "no speed-up", and took "inf ms" a token."""
    first, last = (POINTS[place].model_copy(update={"comparison": None, "engine": None}) for place in (0, 3))
    for targets in (Targets(min_speedup=1.25), Targets(max_latency_s=0.008)):
        taken = choose([first, POINTS[2]], targets)
        assert taken.num_dropped == 6 and taken.reason.startswith("the smallest cut that is known to be fast enough: ")
        assert "; 2 was not measured" in taken.reason
    for targets, found in (
        (Targets(min_speedup=1.5), "1.35x (1.35 to 1.35)"),
        (Targets(max_latency_s=0.001), "7.4 ms"),
    ):
        none = choose([POINTS[2], last], targets)
        assert none.num_dropped is None
        assert none.reason.startswith(f"the largest cut that was measured, 6, is not fast enough: {found} of ")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"min_speedup": 1.2504}, "is not fast enough: 1.2502x (1.2502 to 1.2502) of 1.2504x end to end"),
        ({"max_latency_s": 0.007998}, "is not fast enough: 7.999 ms of 7.998 ms a token"),
        ({"max_ppl_ratio": 1.2}, "the smallest cut, 4, costs 1.2001x perplexity of at most 1.2x"),
    ],
)
def test_what_misses_a_target_by_little_is_not_shown_as_it(targets: dict[str, float], words: str) -> None:
    """As "1.25x is not fast enough" for 1.25x."""
    found = choose([made_up_point(4, 1.2502, 1.2001)], Targets(**targets))
    assert found.num_dropped is None and words in found.reason, found.reason


def test_points_are_of_the_engine_that_ran_in_most_runs() -> None:
    """Where the first run's could not be timed, no point was measured, and "no engine ran here" was said."""
    report = made_up_report(made_up(speedup=1.3, noise=1e-6))
    ran, absent = report.engines
    untimed = ran.model_copy(update={"comparison": None, "status": "built", "reason": "the measuring process died"})

    def run(count: int, *engines: EngineReport) -> Report:
        plan = report.plan.model_copy(update={"dropped": tuple(range(count))})
        return report.model_copy(update={"engines": engines, "plan": plan})

    points = _points({"drop-2": run(2, untimed, absent), "drop-4": run(4, ran, absent), "drop-6": run(6, ran, absent)})
    assert [(point.folder, point.num_dropped, point.engine) for point in points] == [
        ("drop-2", 2, None),
        ("drop-4", 4, "ort-cpu-fp32"),
        ("drop-6", 6, "ort-cpu-fp32"),
    ]
    assert [point.quality_in_pytorch for point in points] == [True, False, False]
    rows = sweep_rows(made_up_sweep().model_copy(update={"points": points}))
    assert [row[2].endswith("(PyTorch)") for row in rows] == [True, False, False]
    small = choose(points[:1], Targets(max_ppl_ratio=9))
    assert small.num_dropped == 2 and "for its perplexity is PyTorch's: `check` decides" in small.reason
    found = choose(points, Targets(min_speedup=1.2))
    assert found.num_dropped == 4 and "the smallest cut that is known to be fast enough" in found.reason
    other = ran.model_copy(update={"name": "another"})
    both = _points({"drop-2": run(2, other), "drop-4": run(4, ran, other), "drop-6": run(6, ran, other)})
    assert [point.engine for point in both] == ["another"] * 3
    alike = _points({"drop-2": run(2, ran, other), "drop-4": run(4, ran, other)})
    assert [point.engine for point in alike] == ["ort-cpu-fp32"] * 2
    assert [point.engine for point in _points({"drop-2": run(2, untimed)})] == [None]


def test_an_engine_that_read_some_of_the_texts_gives_a_point_no_quality() -> None:
    """The other texts would be without a figure, and the worst one perhaps among them."""
    report = made_up_report(made_up())
    (engine, *others), quality = report.engines, report.quality["text"]
    better = quality.model_copy(update={"ratio": 1.1})
    asked = {"text": quality, "other": quality.model_copy(update={"ratio": 1.6})}
    for read, in_pytorch in (({"text": better}, True), (dict.fromkeys(asked, better), False)):
        engines = (engine.model_copy(update={"quality": read}), *others)
        (point,) = _points({"drop-2": report.model_copy(update={"quality": asked, "engines": engines})})
        assert point.quality == (asked if in_pytorch else read) and point.quality_in_pytorch == in_pytorch


def test_the_page_has_the_answer_every_point_and_two_plots() -> None:
    targets = Targets(min_speedup=1.25)
    found = Sweep(
        model="tiny",
        num_layers=10,
        points=tuple(POINTS),
        targets=targets,
        choice=choose(POINTS, targets),
        provenance=provenance(),
    )
    page = sweep_page.render(found)
    assert "Drop 6 of 10 layers (drop-6)" in page and page.count("<svg") == 2
    assert all(f'href="drop-{count}/report.html"' in page for count in (2, 4, 6, 8))
    unmeasured = found.model_copy(update={"points": (POINTS[0].model_copy(update={"comparison": None}),)})
    assert "not measured" in sweep_page.render(unmeasured)


def test_accuracy_is_shown_where_a_point_has_it_and_its_doubt_with_it() -> None:
    """The tasks of a sweep's recipe were answered in every run, and no point said how."""
    report = made_up_report(made_up(speedup=1.3, noise=1e-6))
    ran = report.engines[0]

    def run(choices: ChoicesReport | None) -> Report:
        return report.model_copy(update={"engines": (ran.model_copy(update={"choices": choices}),)})

    untimed = report.model_copy(update={"engines": (ran.model_copy(update={"comparison": None}),)})
    points = _points({"drop-2": run(SURE), "drop-4": run(FEW), "drop-6": run(None), "drop-8": untimed})
    assert [point.choices for point in points] == [SURE, FEW, None, None]
    found = made_up_sweep().model_copy(update={"points": points})
    where = sweep_columns(found).index("accuracy retained")
    assert [row[where] for row in sweep_rows(found)] == [
        f"90.0% ({SURE.retained.low:.1%} to {SURE.retained.high:.1%})",
        f"66.7% ({FEW.retained.low:.1%} to {FEW.retained.high:.1%}; 8 items, 50 are the fewest that decide)",
        "",
        "not measured",
    ]
    assert {len(row) for row in sweep_rows(found)} == {len(sweep_columns(found))}
    print_sweep(found, Path("sweep"), terminal := io.StringIO())
    pages = [sweep_page.render(found), markdown.render(report.model_copy(update={"sweep": found}))]
    for page in (*pages, terminal.getvalue()):
        assert "retained" in page and "90.0%" in page
    assert all("8 items, 50 are the fewest that decide" in page for page in pages)
    assert Sweep.model_validate_json(found.model_dump_json()) == found
    older = Sweep.model_validate_json(found.model_dump_json(exclude={"points": {"__all__": {"choices"}}}))
    assert "accuracy retained" not in sweep_columns(older)
    assert {len(row) for row in sweep_rows(older)} == {len(sweep_columns(older))}


def test_the_answer_names_the_engine_that_was_judged() -> None:
    """Of several in the recipe neither terminal nor page said which one."""
    found = made_up_sweep()
    assert answer(found).endswith(". Figures are of ort-cpu-fp32.") and "ort-cpu-fp32" in sweep_page.render(found)
    several = found.model_copy(update={"not_judged": ("ort-cpu-int8", "tensorrt-fp16")})
    report = made_up_report(made_up()).model_copy(update={"sweep": several})
    for said in (answer(several), sweep_page.render(several), markdown.render(report)):
        assert "Figures are of ort-cpu-fp32; not judged: ort-cpu-int8, tensorrt-fp16." in said
    none = tuple(point.model_copy(update={"engine": None, "comparison": None}) for point in found.points)
    assert "Figures" not in answer(several.model_copy(update={"points": none}))


def test_a_sweep_with_cuts_to_come_does_not_look_final() -> None:
    found = made_up_sweep()
    part = found.model_copy(update={"asked": (2, 4, 6, 8, 9)})
    whole = found.model_copy(update={"asked": (2, 4, 6)})
    assert answer(part).endswith(" Judged so far: 3 of 5 cuts; 8, 9 have no figures.")
    assert '<div class="verdict good">' not in sweep_page.render(part)
    older = Sweep.model_validate_json(found.model_dump_json(exclude={"asked", "not_judged"}))
    for each in (whole, older):
        assert "so far" not in answer(each) and '<div class="verdict good">' in sweep_page.render(each)


@pytest.mark.parametrize(
    ("asked", "targets", "ending"),
    [
        ((4, 8), {"max_ppl_ratio": 1.4}, "of at most 1.4x; 8 has no figures"),
        ((4, 8, 9), {"max_ppl_ratio": 1.4}, "of at most 1.4x; 8, 9 have no figures"),
        ((2, 4), {"max_ppl_ratio": 1.4}, "of at most 1.4x; more was not tried"),
        ((2, 4), {"min_speedup": 1.1}, "of 1.1x end to end; 2 has no figures"),
        ((4, 8), {"min_speedup": 1.1}, "of 1.1x end to end"),
        ((4, 8), {"min_speedup": 1.3}, "of 1.3x end to end; 8 has no figures"),
    ],
)
def test_a_cut_that_failed_or_is_to_come_is_not_called_untried(
    asked: tuple[int, ...], targets: dict[str, float], ending: str
) -> None:
    assert choose([made_up_point(4, 1.2, 1.2)], Targets(**targets), asked).reason.endswith(ending)


def test_every_text_is_drawn_however_many_there_are() -> None:
    quality = POINTS[0].quality["text"]
    found = made_up_sweep()
    texts = {f"text-{number}": quality for number in range(30)}
    points = tuple(point.model_copy(update={"quality": texts}) for point in found.points)
    drawn = plots.pareto(found.model_copy(update={"points": points}))
    assert all(f">{text}</text>" in drawn for text in texts)


def test_a_sweep_without_texts_has_no_plot_of_their_perplexity() -> None:
    """As one of tasks alone: its page had empty axes, and matplotlib warned of them in the terminal."""
    found = made_up_sweep()
    points = tuple(point.model_copy(update={"quality": {}, "choices": SURE}) for point in found.points)
    without = found.model_copy(update={"points": points})
    assert plots.pareto(without) == "" and sweep_page.render(without).count("<svg") == 1


def test_every_shape_has_to_keep_a_target() -> None:
    point = made_up_point(4, 1.4, 1.2)
    several = compare(made_up(speedup=1.4, noise=1e-6, shapes=(1.0, 0.8)))
    slow = [
        p.model_copy(update={"pruned_s": 0.5}) if p.phase == "decode" and not i else p
        for i, p in enumerate(sorted(several.phases, key=lambda p: p.phase))
    ]
    found = point.model_copy(update={"comparison": several.model_copy(update={"phases": tuple(slow)})})
    refused = choose([found], Targets(min_speedup=1.25))
    assert refused.num_dropped is None
    assert "1.12x (1.12 to 1.12) at batch 1, prompt 256, the least of 2 shapes of 1.25x end to end" in refused.reason
    assert choose([found], Targets(min_speedup=1.1)).num_dropped == 4
    assert choose([found], Targets(max_latency_s=0.1)).num_dropped is None, "a token takes 0.5 s at one shape"
    assert (
        "at batch 1, prompt 256, the least of 2 shapes"
        in sweep_rows(made_up_sweep().model_copy(update={"points": (found,)}))[0][3]
    )


def test_a_runs_report_keeps_the_sweep_that_it_is_a_point_of(tmp_path: Path) -> None:
    said: list[str] = []
    found = made_up_sweep()
    (tmp_path / "drop-4").mkdir()
    inputs: Any = SimpleNamespace(run=SimpleNamespace(path=tmp_path / "drop-4"), say=said.append)
    report = made_up_report(made_up())
    point = found.points[1]
    measured = report.engines[0].model_copy(update={"comparison": point.comparison, "quality": point.quality})
    plan = report.plan.model_copy(update={"dropped": (0, 1, 2, 3)})
    timed_anew = report.model_copy(update={"plan": plan})
    report = timed_anew.model_copy(update={"engines": (measured,)})
    assert sweep_of(inputs, report) is None and not said, "a run by itself"
    (tmp_path / SWEEP).write_text(found.model_dump_json())
    assert sweep_of(inputs, report) == found
    here = report.model_copy(update={"recipe": report.recipe.model_copy(update={"model": "."})})
    assert sweep_of(inputs, here) == found, "of --model . both have the folder's name"
    older = found.model_copy(update={"model": "."})
    (tmp_path / SWEEP).write_text(older.model_dump_json())
    assert sweep_of(inputs, here) == older and sweep_of(inputs, report) is None
    assert "its layers of drop-4 are no longer that run's" in said.pop()
    (tmp_path / SWEEP).write_text(found.model_dump_json())
    other: Any = SimpleNamespace(run=SimpleNamespace(path=tmp_path / "drop-5"), say=said.append)
    assert sweep_of(other, report) is None and not said, "beside a sweep, and none of it"
    changed = report.model_copy(update={"plan": report.plan.model_copy(update={"dropped": (0, 1, 2, 7)})})
    assert sweep_of(inputs, changed) is None and "its layers of drop-4 are no longer that run's" in said.pop()
    assert sweep_of(inputs, timed_anew) is None, "the page would show two speed-ups of one cut"
    assert "its times of drop-4 are no longer that run's; the report leaves the sweep out" in said.pop()
    other_texts = report.model_copy(update={"engines": (measured.model_copy(update={"quality": report.quality}),)})
    assert sweep_of(inputs, other_texts) is None, "the page would show two perplexities of one cut"
    assert "its perplexities of drop-4 are no longer that run's; the report leaves the sweep out" in said.pop()
    answered = found.model_copy(update={"points": tuple(p.model_copy(update={"choices": FEW}) for p in found.points)})
    (tmp_path / SWEEP).write_text(answered.model_dump_json())
    assert sweep_of(inputs, report) is None, "the page would show an accuracy that the run no longer has"
    assert "its accuracies of drop-4 are no longer that run's; the report leaves the sweep out" in said.pop()
    alike = report.model_copy(update={"engines": (measured.model_copy(update={"choices": FEW}),)})
    assert sweep_of(inputs, alike) == answered
    (tmp_path / SWEEP).write_text(found.model_dump_json())
    assert sweep_of(inputs, alike) == found, "an older file has none"
    in_pytorch = other_texts.model_copy(update={"quality": point.quality})
    assert sweep_of(inputs, in_pytorch) == found, "such as an older file's"
    (tmp_path / SWEEP).write_text("{}")
    assert sweep_of(inputs, report) is None and "is no sweep of this version" in said.pop()


def test_every_report_of_a_point_has_the_other_points() -> None:
    report = made_up_report(made_up()).model_copy(update={"sweep": made_up_sweep()})
    text = markdown.render(report)
    assert "## Other cuts of this model" in text and "Drop 6 of 10 layers (drop-6)" in text
    assert all(f"| -{count} | " in text for count in (2, 4, 6))
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert "Other cuts" not in markdown.render(made_up_report(made_up()))


def test_a_sweep_and_a_baseline_of_the_working_directory_have_its_name(tmp_path: Path) -> None:
    """They were of a model called "."; the report beside them was of its folder."""
    run, recipe = RunFolder(tmp_path / "drop-4"), Recipe(model=".")
    inputs = Inputs(run, recipe, print, tmp_path / "mine")
    inputs.model.num_layers = lambda: 8  # type: ignore[method-assign]
    report = made_up_report(made_up())
    pruning = SimpleNamespace(plan=lambda: report.plan)
    engines = SimpleNamespace(specs=())
    job: Any = SimpleNamespace(run=run, recipe=recipe, inputs=inputs, pruning=pruning, engines=engines)
    assert cut_of(job) == Cut(name="mine", num_layers_dense=8, num_layers_pruned=6)
    assert _found(job, (4,), Targets(), [(job, report)]).model == "mine"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("5%..50%", (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)),
        ("10%..30%:10%", (3, 6, 9)),
        ("2..6:2", (2, 4, 6)),
        ("2..4", (2, 3, 4)),
        ("7", (7,)),
        ("10%,4,25%", (3, 4, 8)),
    ],
)
def test_ranges_of_layers(text: str, counts: tuple[int, ...]) -> None:
    assert parse_drops(text, 30) == counts


@pytest.mark.parametrize("text", ["5..50%", "9..3", "..", "a..b", "2..4:0", "2..4:5%", "0..3", "50%..100%", "x"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(RecipeError, match="--drop"):
        parse_drops(text, 30)
