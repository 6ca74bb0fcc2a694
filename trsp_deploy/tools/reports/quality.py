"""What a cut costs: perplexity and accuracy of dense and pruned in pairs, and whether a quality budget is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trsp_deploy.recipe import Strict, shown_name
from trsp_deploy.results import Perplexity, ZeroShot
from trsp_deploy.tools.judging.statistics import (
    FEWEST_ITEMS,
    FEWEST_ITEMS_EACH,
    FEWEST_WINDOWS,
    PairedAccuracy,
    Ratio,
    decimals,
    paired_accuracy,
    paired_by_documents,
    perplexity_ratio,
    retained_accuracy,
)
from trsp_deploy.tools.judging.verdicts import Outcome, Requirement, judge

QUALITY_BUDGETS = (0.99, 0.999)  # of quality kept: MLPerf Inference's accuracy targets


class QualityReport(Strict):
    """Perplexity of both on one text, on the same tokens."""

    origin: str
    dense_ppl: float
    pruned_ppl: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens: int
    context_length: int
    pairs: Literal["documents", "windows"]  # what the interval's bootstrap draws

    @property
    def interval(self) -> Ratio:
        """pruned / dense perplexity as one value."""
        return Ratio(ratio=self.ratio, low=self.ratio_low, high=self.ratio_high)

    @property
    def few(self) -> str:
        """Of what there are too few for the interval to decide anything, for people; empty where they are enough."""
        windows = self.tokens // max(1, self.context_length - 1)
        if self.pairs == "documents" or windows >= FEWEST_WINDOWS:
            return ""
        said = f"{windows} window{'s' * (windows > 1)} of {self.context_length} tokens"
        return f"{said}, {FEWEST_WINDOWS} are the fewest that decide"

    @property
    def doubt(self) -> str:
        """The same with what helps."""
        return f"{self.few}: give more text, or a smaller evaluate.context_length" if self.few else ""

    def shown(self, more: str = "") -> str:
        """The ratio for people, with its interval and why that decides nothing, where it does not.

        more: what else stands within the brackets.
        """
        return self.interval.text(more=more + _behind(self.few))


class ChoicesReport(Strict):
    """Both on multiple-choice tasks, on the same items."""

    tasks: dict[str, PairedAccuracy]
    retained: Ratio  # mean accuracy, pruned / dense

    @property
    def few(self) -> str:
        """Of what there are too few for the interval to decide anything, for people; empty where they are enough."""
        counts = {name: task.items for name, task in self.tasks.items()}
        name, fewest = min(counts.items(), key=lambda each: each[1])
        if sum(counts.values()) < FEWEST_ITEMS:
            return f"{sum(counts.values())} items, {FEWEST_ITEMS} are the fewest that decide"
        if fewest < FEWEST_ITEMS_EACH:
            return f"{fewest} items of {name}, {FEWEST_ITEMS_EACH} of each task are the fewest that decide"
        return ""

    @property
    def doubt(self) -> str:
        """The same with what helps."""
        return f"{self.few}: ask more with evaluate.task_items" if self.few else ""

    @property
    def shown(self) -> str:
        """The share retained for people, with its interval and why that decides nothing, where it does not."""
        return self.retained.text(".1%", "", more=_behind(self.few))

    @property
    def cut(self) -> list[str]:
        """Tasks whose items were not all read whole, for people, one line each."""
        return [
            f"{task.cut} of {task.items} items of {name} are longer than it reads at once: they lost their beginning"
            for name, task in self.tasks.items()
            if task.cut
        ]


def _behind(few: str) -> str:
    """What stands behind an interval within its brackets."""
    return f"; {few}" if few else ""


@dataclass(frozen=True)
class Price:
    """What the cut costs, by what measured it."""

    engine: str | None  # None: PyTorch, for texts that no engine of the run has read here
    quality: Mapping[str, QualityReport]  # by text
    choices: ChoicesReport | None = None

    @property
    def source(self) -> str:
        """For people: what measured it."""
        return self.engine or "PyTorch"

    @property
    def where(self) -> str:
        """The same within a sentence."""
        return "in PyTorch and through no engine" if self.engine is None else f"through {self.engine}"


def quality_report(dense: Perplexity, pruned: Perplexity) -> QualityReport:
    """Pair two models on one text."""
    ratio = perplexity_ratio(dense, pruned)
    return QualityReport(
        origin=shown_name(dense.origin),
        dense_ppl=dense.ppl,
        pruned_ppl=pruned.ppl,
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        tokens=dense.tokens,
        context_length=dense.context_length,
        pairs="documents" if paired_by_documents(dense, pruned) else "windows",
    )


def choices_report(dense: ZeroShot, pruned: ZeroShot) -> ChoicesReport:
    """Pair two models item by item."""
    return ChoicesReport(
        tasks={
            before.task: paired_accuracy(before, after) for before, after in zip(dense.tasks, pruned.tasks, strict=True)
        },
        retained=retained_accuracy(dense, pruned),
    )


def perplexity_outcomes(quality: Mapping[str, QualityReport], bound: float | None, source: str) -> list[Outcome]:
    """Whether pruned / dense perplexity is at most `bound` on every text; none where nothing is required.

    source: the option that the bound came from.
    """
    if bound is None:
        return []
    return [
        judge(
            Requirement(name=f"perplexity over dense, {name}", source=source, sense="at most", bound=bound),
            text.interval,
            text.doubt,
        )
        for name, text in quality.items()
    ]


def in_brackets(few: str) -> str:
    """What stands behind a figure that is shown without its interval."""
    return f" ({few})" if few else ""


def price_sentences(prices: list[Price]) -> list[str]:
    """What the cut costs, one sentence per measure, such as "Perplexity through ort-cpu-fp32: 1.50x on wiki."."""
    lines = []
    for price in prices:
        if price.quality:
            costs = (f"{text.ratio:.2f}x on {name}{in_brackets(text.few)}" for name, text in price.quality.items())
            lines.append(f"Perplexity {price.where}: {', '.join(costs)}.")
        if price.choices is not None:
            kept = f"{price.choices.retained.ratio:.1%} of dense's{in_brackets(price.choices.few)}"
            lines.append(f"Accuracy {price.where}: {kept}.")
    return lines


def budget_text(price: Price, unmeasured: Sequence[str] = ()) -> str:
    """Whether quality stays within each budget. A share kept of q allows a perplexity ratio of 1 / q on every text, and
    asks for q of the mean accuracy.

    unmeasured: texts and tasks that were asked for beside. They leave a budget open unless something else misses it,
    as does what is too short or too little to decide.
    """
    if not price.quality and price.choices is None:
        return "neither a text nor a task was evaluated"
    left = [None] * len(unmeasured)
    words = [f"{share:.1%} {_word([*_judged(price, share), *left])}" for share in QUALITY_BUDGETS]
    rests_on = []
    if price.quality:
        worst = max(text.ratio for text in price.quality.values())
        shown = max(decimals(worst, 1 / share, 2) for share in QUALITY_BUDGETS)
        allowed = " and ".join(f"{round(1 / share, max(3, shown)):.7g}x" for share in QUALITY_BUDGETS)
        rests_on.append(f"worst text {worst:.{shown}f}x; they allow {allowed}")
    if price.choices is not None:
        rests_on.append(f"accuracy {price.choices.retained.ratio:.1%} retained")
    if unmeasured:
        rests_on.append(f"not measured: {', '.join(unmeasured)}")
    return f"{', '.join(words)} ({'; '.join(rests_on)})"


def _judged(price: Price, share: float) -> Iterator[bool | None]:
    """For each figure whether it keeps a budget; None where that is open."""
    for text in price.quality.values():
        if text.doubt:
            yield None
        else:
            yield True if text.ratio_high <= 1 / share else False if text.ratio_low > 1 / share else None
    if price.choices is not None:
        kept = price.choices.retained
        if price.choices.doubt:
            yield None
        else:
            yield True if kept.low >= share else False if kept.high < share else None


def _word(judged: list[bool | None]) -> str:
    return "not kept" if False in judged else "not decided" if None in judged else "kept"
