"""Requirements that samples of a comparison decide: a least speed-up, and little lost against a baseline.

A goal knows its requirement and how its ratio comes out of the replicates, so that a measurement can ask after each of
them whether there is anything left to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trsp_deploy.results import Phase, Replicate
from trsp_deploy.tools.statistics import Ratio, change, replicate_logs, replicate_ratios, speedup
from trsp_deploy.tools.verdicts import Outcome, Requirement, judge, settled

PHASE_TITLES: dict[Phase, str] = {"prefill": "prefill", "decode": "decode", "total": "end to end"}
Logs = dict[Phase, tuple[float, ...]]  # one a replicate


@dataclass(frozen=True)
class Goal:
    """A requirement on one ratio of a comparison."""

    requirement: Requirement
    ratio: Callable[[Sequence[Replicate]], Ratio]

    def outcome(self, replicates: Sequence[Replicate]) -> Outcome:
        """What the samples say so far."""
        return judge(self.requirement, self.ratio(replicates), len(replicates))

    def settled(self, replicates: Sequence[Replicate]) -> bool:
        """Whether more of them would change nothing."""
        return settled(self.requirement, self.ratio(replicates), len(replicates))


def settled_all(goals: Sequence[Goal], replicates: Sequence[Replicate]) -> bool:
    """Whether every goal is settled."""
    return all(goal.settled(replicates) for goal in goals)


def least_speedup(phase: Phase, bound: float, source: str, cases: int) -> Goal:
    """Speed-up of a phase, at the shape where it is smallest."""

    def smallest(replicates: Sequence[Replicate]) -> Ratio:
        found = [speedup(replicates, case, phase).found for case in range(cases)]
        return min(found, key=lambda ratio: ratio.low)

    name = f"speed-up, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at least", bound=bound), smallest)


def most_latency(phase: Phase, share: float, source: str, before: Sequence[Logs]) -> Goal:
    """Pruned latency over the baseline's, at the shape where it has grown most; `before` has a baseline's log seconds
    for each shape. Only on the machine that the baseline was made on."""

    def largest(replicates: Sequence[Replicate]) -> Ratio:
        found = [
            change(logs[phase], replicate_logs(replicates, "pruned", case, phase)) for case, logs in enumerate(before)
        ]
        return max(found, key=lambda ratio: ratio.high)

    name = f"latency over the baseline's, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at most", bound=1 + share), largest)


def most_speedup_lost(phase: Phase, share: float, source: str, before: Sequence[Logs]) -> Goal:
    """Speed-up over the baseline's, at the shape where most of it is gone.

    before: a baseline's log ratios for each shape. They carry over to other machines, for dense is measured on each.
    """

    def smallest(replicates: Sequence[Replicate]) -> Ratio:
        found = [change(logs[phase], replicate_ratios(replicates, case, phase)[0]) for case, logs in enumerate(before)]
        return min(found, key=lambda ratio: ratio.low)

    name = f"speed-up over the baseline's, {PHASE_TITLES[phase]}"
    return Goal(Requirement(name=name, source=source, sense="at least", bound=1 - share), smallest)
