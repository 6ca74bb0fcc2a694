"""A trial: a comparison whose truth is known, its samples, and what they say."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Literal

from benchmarks.code import code_digest
from benchmarks.proof.subject import VOCABULARY, background_load
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.recipe import BenchSettings, Strict
from trsp_deploy.results import PHASES, ROLES, Comparison, Phase
from trsp_deploy.tools.judging.comparisons import compare, disturbance
from trsp_deploy.tools.judging.goals import Goal, least_speedup, settled_all
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, Ratio, Speedup, replicate_ratios, widened
from trsp_deploy.tools.judging.verdicts import Requirement, claim, judge, settled, too_few
from trsp_deploy.tools.measuring.bench_worker import PAUSED, PLANTED
from trsp_deploy.tools.measuring.samples import measure

Kind = Literal["same", "same, loaded", "slower", "faster"]
MINUTE_S = 60.0  # that a slow-down has to be found within
BUDGETS_S: dict[Kind, float] = {
    "same": 30.0,
    "same, loaded": 30.0,
    "slower": MINUTE_S - 1,
    "faster": BenchSettings().budget_s,
}
PLANTS: dict[Kind, tuple[float, float]] = {  # by how much dense and pruned are slowed down; the other waits as long
    "same": (0, 0),
    "same, loaded": (0, 0),
    "slower": (0, 0.05),
    "faster": (0.2, 0),
}
WANTED: dict[Kind, float] = {"slower": 1.0, "faster": 1.15}
RIGHT: dict[Kind, str] = {"same": "INCONCLUSIVE", "same, loaded": "INCONCLUSIVE", "slower": "fail", "faster": "pass"}
# Where a comparison's code begins, below trsp_deploy/; what it imports belongs to it, but for what decides no trial.
CODE = (
    "tools/measuring/samples.py",
    "tools/measuring/bench_worker.py",
    "tools/judging/comparisons.py",
    "tools/judging/goals.py",
)
NO_INFLUENCE = frozenset(
    {"__init__", "artifacts", "errors", "limits", "manifest", "prctl", "progress", "recipe", "requirements"}
)
# Of this bench, what is compared and what disturbs it.
BESIDE = tuple(Path(__file__).with_name(name) for name in ("neighbour.py", "subject.py"))
PACKAGES = ("onnxruntime", "numpy")  # that a trial runs


class Terms(Strict):
    """What a trial asks, and how."""

    planted: tuple[float, float]
    wanted: float | None
    settings: BenchSettings


class Trial(Strict):
    """One comparison's samples; what they say is derived."""

    kind: Kind
    number: int
    machine: Provenance
    elapsed_s: float
    replicates: dict[Phase, tuple[float, ...]]  # log ratio of each
    control: dict[Phase, tuple[float, ...]]
    load: float  # mean number of runnable processes
    disturbance: str | None = None  # what else the machine did, as it was noticed; None in trials older than this key
    ended_s: tuple[float, ...] = ()  # when each replicate did; empty in trials older than this key
    terms: Terms | None = None  # None, and no code, where a trial is older than these
    code: str = ""  # digest

    @functools.cached_property
    def speedups(self) -> dict[Phase, Speedup]:
        """By phase, with their controls."""
        return self._after(len(self.replicates["total"]))

    @property
    def total(self) -> Ratio:
        """The speed-up end to end, with its interval."""
        return self.speedups["total"].found

    @property
    def truth(self) -> float | None:
        """The speed-up that there is; None where a slow-down was larger than it said, as before trials had terms."""
        dense, pruned = PLANTS[self.kind]
        return None if self.terms is None and dense != pruned else (1 + dense) / (1 + pruned)

    @property
    def holds(self) -> list[bool]:
        """Whether each phase's interval holds the truth; empty where that is not known."""
        if (truth := self.truth) is None:
            return []
        return [each.found.low <= truth <= each.found.high for each in self.speedups.values()]

    @functools.cached_property
    def answer(self) -> str:
        """The claim, or the verdict on the requirement."""
        return self._answer(self.speedups, len(self.replicates["total"]))

    @property
    def right(self) -> bool:
        """Whether the answer is the truth."""
        return self.answer == RIGHT[self.kind]

    @property
    def right_in_a_minute(self) -> bool:
        """Whether what it had after a minute says the truth; older trials had no more than that."""
        count = sum(each <= MINUTE_S for each in self.ended_s) if self.ended_s else len(self.replicates["total"])
        return count > 0 and self._answer(self._after(count), count) == RIGHT[self.kind]

    def _after(self, count: int) -> dict[Phase, Speedup]:
        """What the first replicates found."""
        return {
            phase: widened(logs[:count], self.control[phase][:count] or None) for phase, logs in self.replicates.items()
        }

    def _answer(self, found: dict[Phase, Speedup], count: int) -> str:
        goal = goal_of(self.kind)
        if goal is None:
            return claim(list(found.values()), count)
        return judge(goal.requirement, found["total"].found, too_few(count)).word

    def checked(self, bound: float) -> str:
        """The verdict on a least speed-up, had it been asked after every replicate until it was decided."""
        wanted = Requirement(name="", source="", sense="at least", bound=bound)
        logs, control = self.replicates["total"], self.control["total"]
        counts = range(min(FEWEST_REPLICATES, len(logs)), len(logs) + 1)
        ratios = {count: widened(logs[:count], control[:count] or None).found for count in counts}
        last = next((count for count in counts if settled(wanted, ratios[count], count)), len(logs))
        return judge(wanted, ratios[last], too_few(last)).word

    @property
    def stale(self) -> bool:
        """Whether it was made by other code, or asked otherwise, than now."""
        return (self.code, self.terms) != (comparison_digest(), terms_of(self.kind))

    @property
    def foreign(self) -> bool:
        """Whether it was made on other cores or with other packages than this process has."""
        here = provenance()
        same = [self.machine.packages.get(name) == here.packages.get(name) for name in PACKAGES]
        return self.machine.cores != here.cores or not all(same)


def comparison_digest() -> str:
    """Hash of the code that compares, and of what it is tried on."""
    return code_digest(*CODE, without=NO_INFLUENCE, beside=BESIDE)


def terms_of(kind: Kind) -> Terms:
    """What a trial of this kind asks now."""
    settings = BenchSettings(prompt_tokens=(64,), new_tokens=16, budget_s=BUDGETS_S[kind])
    return Terms(planted=PLANTS[kind], wanted=WANTED.get(kind), settings=settings)


def goal_of(kind: Kind) -> Goal | None:
    """The requirement that a comparison has to decide; None where it is to claim nothing."""
    return least_speedup("total", WANTED[kind], "the bench", cases=1) if kind in WANTED else None


def make(kind: Kind, number: int, engine: Path) -> Trial:
    """One comparison of the engine with itself, slowed down as the kind says."""
    terms, goal = terms_of(kind), goal_of(kind)
    slow_dense, slow_pruned = (str(share) for share in terms.planted)
    dense, pruned = {PLANTED: slow_dense, PAUSED: slow_pruned}, {PLANTED: slow_pruned, PAUSED: slow_dense}
    with background_load() if kind == "same, loaded" else contextlib.nullcontext():
        comparison = measure(
            {"dense": engine, "pruned": engine},
            f"{kind} {number}",
            VOCABULARY,
            terms.settings,
            number,
            decided=(lambda replicates: settled_all([goal], replicates)) if goal else None,
            environment={"dense": dense, "again": dense, "pruned": pruned},
        )
    found = compare(comparison, threads=dict.fromkeys(ROLES, comparison.threads))
    return Trial(
        kind=kind,
        number=number,
        machine=provenance(),
        elapsed_s=comparison.elapsed_s,
        replicates={phase: _ratios(comparison, phase)[0] for phase in PHASES},
        control={phase: _ratios(comparison, phase)[1] for phase in PHASES},
        load=0.0 if found.machine is None else found.machine.load,
        disturbance=disturbance(found),
        ended_s=(*(round(each.began_s, 2) for each in comparison.replicates[1:]), round(comparison.elapsed_s, 2)),
        terms=terms,
        code=comparison_digest(),
    )


def _ratios(comparison: Comparison, phase: Phase) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ratios, control = replicate_ratios(comparison.replicates, 0, phase)
    return tuple(round(value, 5) for value in ratios), tuple(round(value, 5) for value in control or [])
