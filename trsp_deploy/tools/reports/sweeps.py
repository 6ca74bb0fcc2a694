"""The records of a sweep, and which of its points to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import numpy as np

from trsp_deploy.artifacts import Provenance, steps
from trsp_deploy.recipe import Positive, Strict
from trsp_deploy.tools.judging.comparisons import ComparisonReport, PhaseReport, disturbance
from trsp_deploy.tools.judging.statistics import decimals
from trsp_deploy.tools.judging.verdicts import too_few
from trsp_deploy.tools.reports.measured import Measured, first_and_last
from trsp_deploy.tools.reports.quality import ChoicesReport, QualityReport

# A check has no limit of a time, and the same settings again are the same times, which a run has.
TIMED_AGAIN = "the same `sweep` on a quiet machine, with a larger --set bench.budget_s, times it again"
A_DAY = timedelta(days=1)


class Targets(Strict):
    """What the model is wanted to do; None asks for nothing."""

    min_speedup: Positive | None = None  # end to end
    max_latency_s: Positive | None = None  # of a new token
    max_ppl_ratio: Positive | None = None  # on every text


class Point(Strict):
    """One number of layers, through a real engine."""

    num_dropped: int
    dropped: tuple[int, ...]
    folder: str  # below the sweep's
    engine: str | None  # that the figures are of; None where none runs here
    parameters_dropped_share: float
    quality: dict[str, QualityReport]  # by text
    quality_in_pytorch: bool = False  # and not through the engine; files older than this key do not say
    choices: ChoicesReport | None = None  # through the engine; None where no task was asked for, and in older files
    comparison: ComparisonReport | None
    size_bytes: int | None
    dense_size_bytes: int | None
    measured: tuple[Measured, ...] = ()  # of the run's report; empty in files that are older than this key

    @property
    def worst_ppl_ratio(self) -> float:
        """Largest pruned / dense perplexity over the texts; NaN where there is none, or one of them is."""
        ratios = [text.ratio for text in self.quality.values()]
        return float(np.max(ratios)) if ratios else float("nan")


class Choice(Strict):
    """The answer to "how much should I drop?"."""

    num_dropped: int | None  # None: no point keeps every target
    folder: str | None
    reason: str  # which target bound, and by how much its neighbour misses it
    doubts: tuple[str, ...] = ()  # why a check may not pass it, or its time not hold, though by estimates it keeps all


class Sweep(Strict):
    """`sweep.json`."""

    model: str
    num_layers: int
    points: tuple[Point, ...]  # smallest cut first
    targets: Targets
    choice: Choice
    provenance: Provenance
    asked: tuple[int, ...] = ()  # numbers of layers; empty in files that are older than this key
    not_judged: tuple[str, ...] = ()  # engines of the recipe that the figures are not of; the same

    @property
    def engine(self) -> str | None:
        """That the figures are of; None where none ran."""
        return next((point.engine for point in self.points if point.engine is not None), None)

    @property
    def measured(self) -> list[Measured]:
        """Every point's measurements, their steps below the sweep's folder."""
        return [
            each.model_copy(update={"step": f"{point.folder}/{each.step}"})
            for point in self.points
            for each in point.measured
        ]

    @property
    def limits_assumed(self) -> bool:
        """Whether limits of its speed-ups are not by measured rates."""
        return any(total.limit_assumed for point in self.points for total in _totals(point))

    @property
    def lacking(self) -> list[int]:
        """Numbers of layers that were asked for and have no point, as far as the file says."""
        return _lacking(self.points, self.asked)


def answer(found: Sweep) -> str:
    """How much to drop and which target said so, by which engine, and whether there are cuts to come."""
    choice = found.choice
    taken = f"Drop {choice.num_dropped} of {found.num_layers} layers ({choice.folder})"
    said = [f"{'No choice' if choice.num_dropped is None else taken}: {choice.reason}."]
    if found.engine is not None:
        others = f"; not judged: {', '.join(found.not_judged)}" if found.not_judged else ""
        said.append(f"Figures are of {found.engine}{others}.")
    if found.lacking:
        said.append(f"Judged so far: {len(found.points)} of {len(found.asked)} cuts{_without(found.lacking)}.")
    return " ".join(said)


def _lacking(points: Sequence[Point], asked: Sequence[int]) -> list[int]:
    return [count for count in asked if count not in {point.num_dropped for point in points}]


def _without(counts: Sequence[int]) -> str:
    """What to say behind a choice of cuts that may change it: they are still to come, or failed."""
    has = "has" if len(counts) == 1 else "have"
    return f"; {', '.join(map(str, counts))} {has} no figures" if counts else ""


def choose(points: Sequence[Point], targets: Targets, asked: Sequence[int] = ()) -> Choice:
    """The smallest cut that is fast enough; without a wish for speed, the largest cut that quality allows.

    A target counts as kept by the estimate, not by the whole interval, and the reason says where that allows a miss:
    the run's own check decides what may ship. But no speed-up counts for more than its limit, as what is measured above
    that is the machine's drift.

    asked: every number of layers that is wanted; the reason names those without a point that may be the better choice.
    """
    wishes = _speed_wishes(targets)
    if not wishes and targets.max_ppl_ratio is None:
        return Choice(num_dropped=None, folder=None, reason="no target was given, so nothing is chosen")
    fast = [point for point in points if all(keeps(point) for _, keeps, _ in wishes)]
    good = [point for point in points if _good(point, targets)]
    both = [point for point in fast if point in good]
    lacking = _lacking(points, asked)
    if wishes and both:
        taken = both[0]
        before = [point for point in points if point.num_dropped < taken.num_dropped]
        smaller = [count for count in lacking if count < taken.num_dropped]
        return _chosen(points, taken, targets, _why_no_less(before, targets, wishes, taken) + _without(smaller))
    if not wishes and good:
        taken = good[-1]
        after = [point for point in points if point.num_dropped > taken.num_dropped]
        bound = f"perplexity {_said_perplexity(taken, targets)} of at most {targets.max_ppl_ratio:g}x"
        larger = [count for count in lacking if count > taken.num_dropped]
        more = "" if larger else "; more was not tried"
        if after:
            more = f"; {after[0].num_dropped} would cost {_said_perplexity(after[0], targets)}"
        return _chosen(points, taken, targets, f"the most that quality allows: {bound}{more}{_without(larger)}")
    reason = _why_none(points, fast, good, targets, wishes) + _without(lacking)
    return Choice(num_dropped=None, folder=None, reason=reason)


Wish = tuple[str, Callable[[Point], bool], Callable[[Point], str]]  # what is wanted, whether it is so, how it is


def _speed_wishes(targets: Targets) -> list[Wish]:
    wishes: list[Wish] = []
    least, most = targets.min_speedup, targets.max_latency_s
    if least is not None:
        wishes.append((f"{least:g}x end to end", lambda p: _speedup(p) >= least, lambda p: _said_speedup(p, least)))
    if most is not None:
        wishes.append((f"{1e3 * most:g} ms a token", lambda p: _token_s(p) <= most, lambda p: _said_token(p, most)))
    return wishes


def _totals(point: Point) -> list[PhaseReport]:
    """End to end, by shape; none where no engine ran."""
    return [] if point.comparison is None else [each for each in point.comparison.phases if each.phase == "total"]


def _capped(total: PhaseReport) -> float:
    """A speed-up, which counts for no more than its limit where that is not assumed: a check judges it so, too."""
    return total.speedup.ratio if total.limit is None or total.limit_assumed else min(total.speedup.ratio, total.limit)


def _speedup(point: Point) -> float:
    """At the shape where it is least."""
    return min(map(_capped, _totals(point)), default=0.0)


def _said_speedup(point: Point, wanted: float) -> str:
    assert point.comparison is not None  # of what was not measured the reasons say that
    least = min(_totals(point), key=_capped)
    form = f".{decimals(_capped(least), wanted, 2)}f"
    above = f", and the limit is {least.limit:{form}}x" if _capped(least) < least.speedup.ratio else ""
    where = point.comparison.where if least.case == point.comparison.headline else f" at {least.case.title}"
    return f"{least.speedup.text(form, more=above)}{where}"


def _said_token(point: Point, wanted_s: float) -> str:
    token_ms, wanted_ms = 1e3 * _token_s(point), 1e3 * wanted_s
    return f"{token_ms:.{decimals(token_ms, wanted_ms, 1)}f} ms"


def _said_perplexity(point: Point, targets: Targets) -> str:
    ratio, wanted = point.worst_ppl_ratio, targets.max_ppl_ratio or 0.0
    return f"{ratio:.{decimals(ratio, wanted, 2)}f}x"


def _token_s(point: Point) -> float:
    return float("inf") if point.comparison is None else token_s(point.comparison)


def token_s(found: ComparisonReport) -> float:
    """Seconds of a new token of the pruned model, at the slowest of the shapes."""
    return max(phase.pruned_s for phase in found.phases if phase.phase == "decode")


def _good(point: Point, targets: Targets) -> bool:
    return targets.max_ppl_ratio is None or point.worst_ppl_ratio <= targets.max_ppl_ratio


def _chosen(points: Sequence[Point], point: Point, targets: Targets, reason: str) -> Choice:
    checked = [*_intervals_that_miss(point, targets), *_undecided(point, targets)]
    timed = _doubts_of_time(points, point, targets)
    said = [
        f"for {' and '.join(doubts)}: {then}"
        for doubts, then in ((checked, "`check` decides"), (timed, TIMED_AGAIN))
        if doubts
    ]
    doubt = f"; by estimates, {'; '.join(said)}" if said else ""
    return Choice(num_dropped=point.num_dropped, folder=point.folder, reason=reason + doubt, doubts=(*checked, *timed))


def _intervals_that_miss(point: Point, targets: Targets) -> list[str]:
    """The targets that a point keeps by its estimate and may miss by its 95% interval; a time has none."""
    least, most = targets.min_speedup, targets.max_ppl_ratio
    slow = least is not None and any(total.speedup.low < least for total in _totals(point))
    poor = most is not None and any(text.ratio_high > most for text in point.quality.values())
    missed = " and ".join(["speed-up"] * slow + ["perplexity"] * poor)
    return [f"the interval of its {missed} allows a miss"] if missed else []


def _undecided(point: Point, targets: Targets) -> list[str]:
    """Why a check would decide nothing, whatever the intervals say."""
    found = [] if targets.min_speedup is None else _too_few(point)
    if targets.min_speedup is not None and any(total.above_limit for total in _totals(point)):
        found.append("its speed-up is above its limit")
    if targets.max_ppl_ratio is not None:
        found += ["its perplexity is PyTorch's"] if point.quality_in_pytorch else []
        found += [f"'{name}' is {text.few}" for name, text in point.quality.items() if text.few]
    return found


def _doubts_of_time(points: Sequence[Point], point: Point, targets: Targets) -> list[str]:
    """Why the time of a new token may not be that of a quiet machine, or of the machine as it was at other points. A
    ratio's two sides share what goes on."""
    if targets.max_latency_s is None:
        return []
    few = _too_few(point) if targets.min_speedup is None else []  # of both a check says it
    return few + _disturbance(point) + _days_between(points)


def _days_between(points: Sequence[Point]) -> list[str]:
    """That the machine may have drifted between the points' times, some of which an earlier call of the sweep took."""
    timed = [
        each
        for point in points
        for each in point.measured
        if point.engine is not None and each.step == steps.bench(point.engine)
    ]
    times = first_and_last(timed)
    if len(times) < 2 or datetime.fromisoformat(times[1]) - datetime.fromisoformat(times[0]) < A_DAY:
        return []
    return [f"the points were timed more than a day apart, {' to '.join(times)}"]


def _too_few(point: Point) -> list[str]:
    few = "" if point.comparison is None else too_few(point.comparison.replicates)
    return [f"it has {few.partition(':')[0]}"] if few else []


def _disturbance(point: Point) -> list[str]:
    disturbed = "" if point.comparison is None else disturbance(point.comparison)
    return [disturbed] if disturbed else []


def _meanwhile(point: Point, targets: Targets) -> str:
    """What to say behind a time that is too long: that the machine was busy; empty where it is not known to be."""
    if targets.max_latency_s is None or _token_s(point) <= targets.max_latency_s:
        return ""
    return "".join(f" (meanwhile {disturbed}: {TIMED_AGAIN})" for disturbed in _disturbance(point))


def _why_no_less(before: Sequence[Point], targets: Targets, wishes: Sequence[Wish], taken: Point) -> str:
    found = " and ".join(f"{says(taken)} of {wanted}" for wanted, _, says in wishes)
    if not before:
        return f"the smallest cut that was judged is fast enough: {found}"
    poor = [point for point in before if all(keeps(point) for _, keeps, _ in wishes)]
    if poor:  # fast enough, and refused for its quality: a larger cut may come out better
        nearest = poor[-1]
        costs = f"{nearest.num_dropped} costs {_said_perplexity(nearest, targets)} perplexity"
        return f"the smallest cut that is fast and good enough: {found}; {costs}"
    nearest = before[-1]
    if nearest.comparison is None:
        return f"the smallest cut that is known to be fast enough: {found}; {nearest.num_dropped} was not measured"
    missed = [f"{nearest.num_dropped} gives {says(nearest)}" for _, keeps, says in wishes if not keeps(nearest)]
    return f"the smallest cut that is fast enough: {found}; {' and '.join(missed)}{_meanwhile(nearest, targets)}"


def _listed(points: Sequence[Point]) -> str:
    return f"{', '.join(str(point.num_dropped) for point in points)} dropped"


def _why_none(
    points: Sequence[Point], fast: Sequence[Point], good: Sequence[Point], targets: Targets, wishes: Sequence[Wish]
) -> str:
    parts = []
    measured = [point for point in points if point.comparison is not None]
    if wishes and not measured:
        parts.append("no engine was timed here, so no speed is known")
    elif wishes and not fast:
        last = measured[-1]
        largest = "the largest cut" if last is points[-1] else "the largest cut that was measured"
        best = ", ".join(f"{says(last)} of {wanted}" for wanted, _, says in wishes)
        parts.append(f"{largest}, {last.num_dropped}, is not fast enough: {best}{_meanwhile(last, targets)}")
    elif wishes and fast:
        parts.append(f"fast enough: {_listed(fast)}")
    if targets.max_ppl_ratio is not None:
        if good:
            parts.append(f"perplexity of at most {targets.max_ppl_ratio:g}x: {_listed(good)}")
        else:
            first = points[0]
            parts.append(
                f"the smallest cut, {first.num_dropped}, costs {_said_perplexity(first, targets)} perplexity "
                f"of at most {targets.max_ppl_ratio:g}x"
            )
    return "; ".join(parts)
