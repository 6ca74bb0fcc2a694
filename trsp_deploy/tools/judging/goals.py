"""Requirements that samples of a comparison decide: a least speed-up, and little lost against a baseline.

A goal knows its requirement and how its ratio comes out of the replicates, so that a measurement can ask after each of
them whether there is anything left to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trsp_deploy.results import Phase, Replicate
from trsp_deploy.tools.judging.statistics import Ratio, change, replicate_logs, replicate_ratios, speedup
from trsp_deploy.tools.judging.verdicts import Outcome, Requirement, judge, settled, too_few

PHASE_TITLES: dict[Phase, str] = {"prefill": "prefill", "decode": "decode", "total": "end to end"}
Logs = dict[Phase, tuple[float, ...]]  # one a replicate


@dataclass(frozen=True)
class Goal:
    """A requirement on one ratio of a comparison, at every shape that is measured."""

    requirement: Requirement
    ratios: Callable[[Sequence[Replicate]], list[Ratio]]  # one a shape

    def outcome(self, replicates: Sequence[Replicate]) -> Outcome:
        """What the samples say so far: of a shape that misses it, else of one that is open, else of the tightest."""
        return min((self._judge(ratio, replicates) for ratio in self.ratios(replicates)), key=_leniency)

    def settled(self, replicates: Sequence[Replicate]) -> bool:
        """Whether more of them would change nothing: one shape misses it for certain, or all are certain."""
        words = [
            self._judge(ratio, replicates).word if settled(self.requirement, ratio, len(replicates)) else None
            for ratio in self.ratios(replicates)
        ]
        return "fail" in words or None not in words

    def _judge(self, ratio: Ratio, replicates: Sequence[Replicate]) -> Outcome:
        return judge(self.requirement, ratio, too_few(len(replicates)))


def _leniency(outcome: Outcome) -> tuple[int, float]:
    """Smallest for the shape that is worst off."""
    found = outcome.found
    margin = found.low if outcome.requirement.sense == "at least" else -found.high
    return ("fail", "inconclusive", "pass").index(outcome.word), margin


def settled_all(goals: Sequence[Goal], replicates: Sequence[Replicate]) -> bool:
    """Whether every goal is settled."""
    return all(goal.settled(replicates) for goal in goals)


def least_speedup(phase: Phase, bound: float, source: str, cases: int) -> Goal:
    """Speed-up of a phase."""

    def ratios(replicates: Sequence[Replicate]) -> list[Ratio]:
        return [speedup(replicates, case, phase).found for case in range(cases)]

    name = f"speed-up, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at least", bound=bound), ratios)


def most_latency(phase: Phase, share: float, source: str, before: Sequence[Logs]) -> Goal:
    """Pruned latency over the baseline's; `before` has a baseline's log seconds for each shape. Only on the machine
    that the baseline was made on."""

    def ratios(replicates: Sequence[Replicate]) -> list[Ratio]:
        return [
            change(logs[phase], replicate_logs(replicates, "pruned", case, phase)) for case, logs in enumerate(before)
        ]

    name = f"latency over the baseline's, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at most", bound=1 + share), ratios)


def most_speedup_lost(phase: Phase, share: float, source: str, before: Sequence[Logs]) -> Goal:
    """Speed-up over the baseline's.

    before: a baseline's log ratios for each shape. They carry over to other machines, for dense is measured on each.
    """

    def ratios(replicates: Sequence[Replicate]) -> list[Ratio]:
        return [change(logs[phase], replicate_ratios(replicates, case, phase)[0]) for case, logs in enumerate(before)]

    name = f"speed-up over the baseline's, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at least", bound=1 - share), ratios)
