"""Show what the rows say: docs/quality.md, the README's table, plots, and one JSON line against the targets.

python -m benchmarks.quality.report [--quick]      # --quick prints the quick table's report and writes nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import targets
from benchmarks.pages import markdown, put_between_markers
from benchmarks.quality.__main__ import results_file
from benchmarks.quality.figures import BUDGETS, TARGETS, Found, Interval, figures, mean_over_seeds
from benchmarks.quality.rows import Kind
from benchmarks.quality.store import Store
from benchmarks.quality.table import FULL, QUICK, Arm, rows, trained_arms
from benchmarks.targets import ABSENT
from trsp_deploy.errors import TrspError

DOC, README, IMAGES = Path("docs/quality.md"), Path("README.md"), Path("docs/img")
# Arms of the README's table.
SHORT = ("default", "own-text", "own-text-control", "fold", "refit-anneal", "control", "given-text-control", "sleb")
ELSEWHERE = "† Made on another processor than the default, or on several: some multiply in bf16, some in fp32."


def main() -> int:
    """Write the report, or print it for the quick table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report", description="Show what the rows say.")
    parser.add_argument("--quick", action="store_true", help="print the quick table's report; write nothing")
    quick = parser.parse_args().quick
    try:
        found = Found(QUICK if quick else FULL, Store(results_file(quick)))
        if quick:
            print(full_text(found))
        else:
            write(found)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(json.dumps(summary(found)))
    return 0


def summary(found: Found) -> dict[str, object]:
    """The bench's result for scripts: figures, targets and whether each is met, under the same keys."""
    return targets.verdict("quality", TARGETS, figures(found), decimals=4)


def write(found: Found) -> None:
    """Put text and plots where people read them. Raises RunError when a page has no markers."""
    from benchmarks.quality import plots

    put_between_markers(DOC, full_text(found), "quality")
    put_between_markers(README, short_table(found), "quality")
    if any(found.ratio("untrained", arm.name, found.texts[0]) for arm in found.table.untrained):
        plots.draw_curve(found, IMAGES / "quality-layers.png")
    plots.draw_budgets(found, IMAGES / "quality-tokens.png")


def full_text(found: Found) -> str:
    """Every table, with what has been measured so far."""
    parts = [
        state(found),
        "### Against the targets",
        targets_table(found),
        f"### {found.table.drop} layers removed, no training: perplexity over the dense model's",
        losses_table(found, "untrained", found.table.untrained, 0),
    ]
    for steps in found.table.steps:
        parts.append(f"### Trained on {_tokens(found, steps)} tokens: perplexity over the dense model's")
        parts.append(losses_table(found, "trained", trained_arms(found.table, steps), steps))
    parts += ["### Choosing the layers", selections_table(found)]
    parts += [
        f"### Zero-shot accuracy after {_tokens(found, found.table.zero_shot_steps)} tokens",
        zero_shot_table(found),
    ]
    return "\n\n".join(parts)


def state(found: Found) -> str:
    """How much is measured, where, and by how many versions of the code."""
    wanted = rows(found.table)
    lines = [line for row in wanted if (line := found.store.get(row)) is not None]
    machines = sorted({f"{line.provenance.cpu} ({line.provenance.cores} cores)" for line in lines})
    torches = sorted({line.provenance.packages.get("torch", "?") for line in lines})
    stale = sum(found.store.stale(row) for row in wanted)
    shared = sum(bool(line.same_as) for line in lines)
    return (
        f"{len(lines)} of {len(wanted)} rows measured on {', '.join(machines) or 'no machine yet'}, torch "
        f"{', '.join(torches) or ABSENT}; {stale} of them by earlier code; {shared} share "
        "the outcome of a row that removes the same layers and trains alike. Means over seeds with 95% t-intervals; "
        "a single seed has none and says so."
    )


def targets_table(found: Found) -> str:
    """What is claimed, and whether it holds."""
    return targets.table(TARGETS, figures(found))


def losses_table(found: Found, kind: Kind, arms: Sequence[Arm], steps: int) -> str:
    """Arms by texts; the best mean of a text is bold."""
    first = found.processors(kind, arms[0].name, steps)
    elsewhere = [arm for arm in arms if found.processors(kind, arm.name, steps) - first]
    entries = [
        (
            f"{arm.label} †" if arm in elsewhere else arm.label,
            [found.ratio(kind, arm.name, t, steps) for t in found.texts],
        )
        for arm in arms
    ]
    best = [min((i.mean for _, cells in entries if (i := cells[n])), default=None) for n in range(len(found.texts))]
    if steps:
        trained = [found.ratio("dense-trained", "dense-trained", text, steps) for text in found.texts]
        entries.append(("*dense, trained on the same tokens*", trained))
    body = [[label, *(_cell(cell, best[n]) for n, cell in enumerate(cells))] for label, cells in entries]
    table = markdown(["", *found.texts], body)
    return f"{table}\n\n{ELSEWHERE}" if elsewhere and first else table


def selections_table(found: Found) -> str:
    """One line a seed: which layers, what their removal costs, and what finding them cost."""
    full_pass = found.table.selectors["sleb"].windows
    body = []
    for name in found.table.selections:
        for outcome in found.selections(name):
            dropped = ", ".join(map(str, outcome.plan["dropped"]))
            cost = f"{outcome.window_passes / full_pass:.1f}"
            loss = f"{outcome.removal_loss:.3f}"
            body.append([name, str(outcome.plan["seed"]), dropped, loss, cost, f"{outcome.select_s:.0f} s"])
    head = ["selection", "seed", "layers", "removal loss, nats", f"passes over {full_pass} windows", "wall time"]
    return markdown(head, body)


def zero_shot_table(found: Found) -> str:
    """Accuracy by task, means over seeds; `retained` is the mean over the dense model's."""
    labels = {"dense": "dense", **{arm.name: arm.label for arm in found.table.arms}}
    first = found.processors("zero-shot", found.table.zero_shot_arms[0], found.table.zero_shot_steps)
    body, elsewhere = [], False
    for name in ("dense", *found.table.zero_shot_arms):
        scores = list(found.accuracies(name).values())
        if not scores:
            continue
        if name != "dense" and found.processors("zero-shot", name, found.table.zero_shot_steps) - first:
            labels[name], elsewhere = f"{labels[name]} †", True
        tasks = zip(*(score.tasks for score in scores), strict=True)  # each with its answers by seed
        by_task = [float(np.mean([answered.accuracy for answered in seeds])) for seeds in tasks]
        mean = float(np.mean([score.mean_accuracy for score in scores]))
        share = mean_over_seeds(list(found.retained(name).values()))
        body.append([labels[name], *(f"{value:.3f}" for value in (*by_task, mean)), _share(share, name == "dense")])
    table = markdown(["", *found.table.tasks, "mean", "retained"], body)
    return f"{table}\n\n{ELSEWHERE}" if elsewhere and first else table


def short_table(found: Found) -> str:
    """The README's: by budget the default, the control and the rivals that were measured most; the same model once."""
    arms = {arm.name: arm for arm in found.table.arms}
    untrained = {arm.name: arm for arm in found.table.untrained}
    shown: list[tuple[Arm, Kind, int]] = [
        (untrained[name], "untrained", 0) for name in ("layers", "fold", "sleb") if name in untrained
    ]
    for steps in found.table.steps:
        named = (arms[name] for name in SHORT if name in arms)
        shown += [(arm, "trained", steps) for arm in named]
    labels: dict[tuple[str, ...], list[str]] = {}  # by what a line shows
    for arm, kind, steps in shown:
        cells = [found.ratio(kind, arm.name, text, steps) for text in found.texts]
        if any(cells):
            line = (_tokens(found, steps) if steps else "0", *map(_cell, cells))
            labels.setdefault(line, []).append(arm.label)
    body = [[tokens, "; ".join(names), *cells] for (tokens, *cells), names in labels.items()]
    return markdown(["tokens", "perplexity over dense", *found.texts], body)


def _cell(interval: Interval | None, best: float | None = None) -> str:
    if interval is None:
        return ABSENT
    mean = _number(interval.mean)
    if interval.mean == best:
        mean = f"**{mean}**"
    if interval.low is None or interval.high is None:
        return f"{mean} (one seed)"
    return f"{mean} ({_number(interval.low)} to {_number(interval.high)})"


def _number(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 100 else f"{ratio:.1g}"  # of a model that is lost nobody wants digits


def _share(interval: Interval | None, exact: bool) -> str:
    if interval is None:
        return ABSENT
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.1%}" if exact else f"{interval.mean:.1%} (one seed)"
    return f"{interval.mean:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _tokens(found: Found, steps: int) -> str:
    names = {count: name for name, count in BUDGETS.items()}
    return names.get(steps, f"{steps * 4 * found.table.subject.context_length / 1e3:.0f}k")


if __name__ == "__main__":
    raise SystemExit(main())
