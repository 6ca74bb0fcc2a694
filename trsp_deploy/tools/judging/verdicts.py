"""Requirements on ratios, and what an interval says about them: pass, fail, or inconclusive.

A requirement is met when the whole interval meets it, missed when none of it does, and otherwise nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from trsp_deploy.recipe import Strict
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, Ratio, Speedup, decimals

Word = Literal["pass", "fail", "inconclusive"]
Claim = Literal["CONFIRMED", "NOT THERE", "INCONCLUSIVE"]
EXIT_CODES: dict[Word, int] = {"pass": 0, "fail": 2, "inconclusive": 3}
MARGIN = 2.0  # a measurement ends early when its verdict would also hold for an interval this many times as wide


class Requirement(Strict):
    """A bound that a ratio has to keep."""

    name: str  # such as "speed-up, end to end"
    source: str  # the option or file that asks for it
    sense: Literal["at least", "at most"]
    bound: float


class Outcome(Strict):
    """What a measurement says about one requirement."""

    requirement: Requirement
    found: Ratio
    word: Word
    note: str = ""  # why it is inconclusive, whatever the interval is
    where: str = ""  # the shape that decided, where there are several; empty in files that are older than this key

    @property
    def name(self) -> str:
        """What is required, and the shape that decided."""
        return f"{self.requirement.name}, {self.where}" if self.where else self.requirement.name

    @property
    def measured(self) -> str:
        """The ratio and its interval, with as many decimals as tell them from the bound."""
        found = self.found
        shown = max(decimals(each, self.requirement.bound, 3) for each in (found.ratio, found.low, found.high))
        return found.text(f".{shown}f", "")

    @property
    def sentence(self) -> str:
        """The outcome for people, on one line."""
        wanted = self.requirement
        note = f"; {self.note}" if self.note else ""
        return f"{self.name}: {self.measured}, {wanted.sense} {wanted.bound:.6g} wanted: {self.word}{note}"


def judge(requirement: Requirement, found: Ratio, doubt: str = "") -> Outcome:
    """Compare an interval with a bound; doubt: why this interval decides nothing, whatever it is."""
    if doubt:
        return Outcome(requirement=requirement, found=found, word="inconclusive", note=doubt)
    return Outcome(requirement=requirement, found=found, word=_word(requirement, found))


def too_few(replicates: int) -> str:
    """Why this many replicates decide nothing; empty where they are enough."""
    if replicates >= FEWEST_REPLICATES:
        return ""
    return f"{replicates} replicates, {FEWEST_REPLICATES} are the fewest that decide: give a larger budget"


def too_few_before(replicates: int) -> str:
    """The doubt about whatever is held against a baseline of so many replicates; empty where they are enough."""
    if replicates >= FEWEST_REPLICATES:
        return ""
    return (
        f"the baseline has {replicates} replicates, {FEWEST_REPLICATES} are the fewest that decide: make it again with "
        "a larger --budget"
    )


def disturbed_before(disturbance: str) -> str:
    """The doubt about whatever is held against a baseline that was made beside other work."""
    return f"when the baseline was made, {disturbance}: make it again on a quiet machine"


def disturbed_now(disturbance: str) -> str:
    """The doubt about what was measured beside other work, where it is held against another time."""
    return f"{disturbance}: only what a quiet machine shows can be held against a baseline"


def above_limit(found: Ratio, limit: float | None) -> str:
    """The doubt about a speed-up whose whole interval is above what is possible; empty where it is not."""
    if limit is None or found.low <= limit:
        return ""
    return f"above its limit of {limit:.3f}, so the measurement is to be distrusted"


def worst(words: Iterable[Word]) -> Word:
    """One word for several: a single failure fails, and what is not decided is not passed."""
    found = set(words)
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"


def claim(found: Sequence[Speedup], replicates: int) -> Claim:
    """What several speed-ups say together; nothing where there are too few replicates.

    A difference has to be beyond the noise floor, too: of several 95% intervals around no difference at all one misses
    it more often than in 5%.
    """
    if replicates < FEWEST_REPLICATES:
        return "INCONCLUSIVE"
    differences = {each.difference for each in found}
    return "NOT THERE" if -1 in differences else "CONFIRMED" if differences == {1} else "INCONCLUSIVE"


def settled(requirement: Requirement, found: Ratio, replicates: int) -> bool:
    """Whether measuring longer is pointless: an interval MARGIN times as wide would give the same verdict.

    Looking after every replicate and stopping at the first decision would be wrong more often than one look is.
    """
    if replicates < FEWEST_REPLICATES:
        return False
    middle = math.log(found.ratio)
    low, high = (middle + MARGIN * (math.log(end) - middle) for end in (found.low, found.high))
    wide = Ratio(ratio=found.ratio, low=math.exp(low), high=math.exp(high))
    return _word(requirement, wide) != "inconclusive"


def _word(requirement: Requirement, found: Ratio) -> Word:
    meets = [
        end >= requirement.bound if requirement.sense == "at least" else end <= requirement.bound
        for end in (found.low, found.high)
    ]
    return "pass" if all(meets) else "inconclusive" if any(meets) else "fail"
