"""Requirements that samples of a comparison decide: a least speed-up, and little lost against a baseline.

A goal knows its requirement and how its ratio comes out of the replicates, so that a measurement can ask after each of
them whether there is anything left to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trsp_deploy.recipe import Case
from trsp_deploy.results import Phase, Replicate
from trsp_deploy.tools.judging.limits import SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    Ratio,
    change,
    medians_s,
    replicate_logs,
    replicate_ratios,
    speedup,
)
from trsp_deploy.tools.judging.verdicts import (
    Outcome,
    Requirement,
    above_limit,
    disturbed_before,
    disturbed_now,
    judge,
    settled,
    too_few,
    too_few_before,
)

PHASE_TITLES: dict[Phase, str] = {"prefill": "prefill", "decode": "decode", "total": "end to end"}
Logs = dict[Phase, tuple[float, ...]]  # one per replicate


@dataclass(frozen=True)
class Goal:
    """A requirement on one ratio of a comparison, at every shape that is measured."""

    requirement: Requirement
    ratios: Callable[[Sequence[Replicate]], list[Ratio]]  # one per shape
    # One per shape, that no ratio can be above; None where none is known.
    limits: Callable[[Sequence[Replicate]], list[float | None]] | None = None
    earlier: Earlier | None = None  # that it is held against

    def outcome(self, replicates: Sequence[Replicate], disturbance: str = "", cases: Sequence[Case] = ()) -> Outcome:
        """What the samples say so far: of a shape that misses it, else of one that is open, else of the tightest.

        disturbance: what the machine did beside, which decides nothing between two times; within one all turns bear it.
        cases: the shapes; of several the outcome says of which it is.
        """
        doubt = disturbed_now(disturbance) if self.earlier is not None and disturbance else ""
        outcomes = self._outcomes(replicates, doubt)
        if len(cases) > 1:
            named = zip(outcomes, cases, strict=True)
            outcomes = [outcome.model_copy(update={"where": case.title}) for outcome, case in named]
        return min(outcomes, key=_leniency)

    def settled(self, replicates: Sequence[Replicate]) -> bool:
        """Whether more of them would change nothing: one shape misses it for certain, or all are certain.

        Nor would they where the baseline has too few to decide.
        """
        if self.earlier is not None and self.earlier.doubt:
            return True
        words = [
            outcome.word if not outcome.note and settled(self.requirement, outcome.found, len(replicates)) else None
            for outcome in self._outcomes(replicates)
        ]
        return "fail" in words or None not in words

    def _outcomes(self, replicates: Sequence[Replicate], doubt: str = "") -> list[Outcome]:
        """One a shape."""
        ratios = self.ratios(replicates)
        limits = [None] * len(ratios) if self.limits is None else self.limits(replicates)
        before = "" if self.earlier is None else self.earlier.doubt
        doubt = before or too_few(len(replicates)) or doubt
        return [self._judge(ratio, limit, doubt) for ratio, limit in zip(ratios, limits, strict=True)]

    def _judge(self, ratio: Ratio, limit: float | None, doubt: str) -> Outcome:
        outcome = judge(self.requirement, ratio, doubt)
        # What is above its limit was measured wrong: it passes nothing. What it misses the truth misses too.
        return judge(self.requirement, ratio, above_limit(ratio, limit)) if outcome.word == "pass" else outcome


def _leniency(outcome: Outcome) -> tuple[int, float]:
    """Sort key of an outcome, smallest for the shape that is worst off."""
    found = outcome.found
    margin = found.low if outcome.requirement.sense == "at least" else -found.high
    return ("fail", "inconclusive", "pass").index(outcome.word), margin


def settled_all(goals: Sequence[Goal], replicates: Sequence[Replicate]) -> bool:
    """Whether every goal is settled."""
    return all(goal.settled(replicates) for goal in goals)


def least_speedup(
    phase: Phase, bound: float, source: str, cases: int, limits: Sequence[SpeedLimit | None] = ()
) -> Goal:
    """The goal of a least speed-up in a phase at each of the shapes; limits: of each of them, where they are known."""

    def ratios(replicates: Sequence[Replicate]) -> list[Ratio]:
        return [speedup(replicates, case, phase).found for case in range(cases)]

    def bounds(replicates: Sequence[Replicate]) -> list[float | None]:
        return [
            None if limit is None else limit.of(phase, medians_s(replicates, "dense", case))
            for case, limit in enumerate(limits)
        ]

    name = f"speed-up, {PHASE_TITLES[phase]}"
    wanted = Requirement(name=name, source=source, sense="at least", bound=bound)
    return Goal(wanted, ratios, bounds if limits else None)


@dataclass(frozen=True)
class Earlier:
    """A baseline's log values at each shape, and its log ratios of dense against itself; none without a control."""

    values: Sequence[Logs]
    control: Sequence[Logs] = ()
    disturbance: str = ""  # what the machine did beside, when it was made

    @property
    def doubt(self) -> str:
        """Why nothing can be decided against it; empty where something can."""
        fewest = min(len(values) for logs in self.values for values in logs.values())
        return too_few_before(fewest) or (disturbed_before(self.disturbance) if self.disturbance else "")


def most_latency(phase: Phase, share: float, source: str, before: Earlier) -> Goal:
    """Pruned latency over the baseline's, of whose log seconds `before` is. Only on the machine that it was made on."""

    def now(replicates: Sequence[Replicate], case: int) -> list[float]:
        return replicate_logs(replicates, "pruned", case, phase)

    name = f"latency over the baseline's, {PHASE_TITLES[phase]}"
    wanted = Requirement(name=name, source=source, sense="at most", bound=1 + share)
    return Goal(wanted, _changes(phase, before, now), earlier=before)


def most_speedup_lost(phase: Phase, share: float, source: str, before: Earlier) -> Goal:
    """Speed-up over the baseline's, of whose log ratios `before` is.

    They carry over to other machines, for dense is measured on each.
    """

    def now(replicates: Sequence[Replicate], case: int) -> list[float]:
        return replicate_ratios(replicates, case, phase)[0]

    name = f"speed-up over the baseline's, {PHASE_TITLES[phase]}"
    wanted = Requirement(name=name, source=source, sense="at least", bound=1 - share)
    return Goal(wanted, _changes(phase, before, now), earlier=before)


def _changes(
    phase: Phase, before: Earlier, now: Callable[[Sequence[Replicate], int], Sequence[float]]
) -> Callable[[Sequence[Replicate]], list[Ratio]]:
    """Now over before at each shape, no narrower than what both controls show."""

    def ratios(replicates: Sequence[Replicate]) -> list[Ratio]:
        found = []
        for case, logs in enumerate(before.values):
            then = before.control[case][phase] if before.control else ()
            controls = [then, replicate_ratios(replicates, case, phase)[1] or ()]
            found.append(change(logs[phase], now(replicates, case), [each for each in controls if each]))
        return found

    return ratios
