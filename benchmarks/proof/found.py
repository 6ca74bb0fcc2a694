"""The trials that are there, a file a machine: figures, targets, and the page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks import targets
from benchmarks.kept import every_machine, keep, kept_in, results_path
from benchmarks.pages import markdown
from benchmarks.proof.trials import Kind, Trial
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import provenance

COUNTS: dict[Kind, int] = {"same": 20, "same, loaded": 20, "slower": 30, "faster": 30}
LEAST = 0.02  # a speed-up that nobody planted
TARGETS = {
    "same_wrong_share": at_most(0.05, "an engine against itself: share of comparisons that claim a difference"),
    "slower_found_share": at_least(0.95, "5% slower: share of comparisons that find it"),
    "slower_longest_s": at_most(60, "5% slower: seconds of the longest comparison"),
    "faster_confirmed_share": at_least(0.95, "20% faster: share that confirm it against a requirement of 15%"),
    "faster_in_a_minute_share": at_least(0.95, "20% faster: share that would have confirmed it within 60 s"),
}


def read() -> list[list[Trial]]:
    """The trials that are there, by machine; raises RunError when there are none."""
    return every_machine("proof", Trial, "jsonl")


def read_here() -> list[Trial]:
    """This machine's."""
    path = results_path("proof", provenance().cpu, "jsonl")
    return kept_in(path, Trial, "delete the line to make its trial again")


def write(trials: list[Trial]) -> None:
    """Keep this machine's trials; the file is replaced as a whole."""
    keep(results_path("proof", provenance().cpu, "jsonl"), *trials)


def cpu_of(trials: list[Trial]) -> str:
    """A machine's processor."""
    return trials[-1].machine.cpu


def figures(trials: list[Trial]) -> dict[str, float | None]:
    """One number for each target; None where there is no trial of its kind."""

    def share(wanted: bool, *kinds: Kind) -> float | None:
        right = [trial.right for trial in trials if trial.kind in kinds]
        return float(np.mean(np.array(right) == wanted)) if right else None

    slower = [trial.elapsed_s for trial in trials if trial.kind == "slower"]
    in_a_minute = [trial.right_in_a_minute for trial in trials if trial.kind == "faster"]
    return {
        "same_wrong_share": share(False, "same", "same, loaded"),
        "slower_found_share": share(True, "slower"),
        "slower_longest_s": max(slower) if slower else None,
        "faster_confirmed_share": share(True, "faster"),
        "faster_in_a_minute_share": float(np.mean(in_a_minute)) if in_a_minute else None,
    }


def met(trials: list[Trial]) -> dict[str, bool]:
    """Which targets are met; what is not measured is not."""
    return targets.met(TARGETS, figures(trials))


def verdict(trials: list[Trial]) -> dict[str, Any]:
    """The line for scripts."""
    return targets.verdict("proof", TARGETS, figures(trials), machine=cpu_of(trials) if trials else None)


def page(trials: list[Trial]) -> str:
    """Markdown: one machine and its trials."""
    return "\n\n".join([where(trials), table(trials), early(trials)])


def early(trials: list[Trial]) -> str:
    """What looking after every replicate, as a check does, would have made of the trials in which nothing differs."""
    same = [trial for trial in trials if trial.kind in ("same", "same, loaded")]
    slower = sum(trial.checked(1.0) == "fail" for trial in same)
    faster = sum(trial.checked(1 + LEAST) == "pass" for trial in same)
    return (
        f"Had each of the {len(same)} *same* trials been a check that ends as soon as it is decided, {slower} would "
        f'have found "not slower" missed, and {faster} "at least {LEAST:.0%} faster" met.'
    )


def table(trials: list[Trial]) -> str:
    """What each kind of trial said, and the targets."""
    rows = []
    for kind in COUNTS:
        found = [trial for trial in trials if trial.kind == kind]
        if not found:
            continue
        noticed = [trial.disturbance for trial in found]
        answers = [trial.answer for trial in found]
        widths = [trial.total.half_width for trial in found]
        holds = [each for trial in found for each in trial.holds]
        middle = math.exp(float(np.mean([math.log(trial.total.ratio) for trial in found])))
        rows.append(
            [
                kind,
                str(len(found)),
                ", ".join(f"{answer} {answers.count(answer)}" for answer in sorted(set(answers))),
                f"{sum(trial.right for trial in found)}",
                f"{middle:.3f}",
                f"{np.median(widths):.1%}",
                f"{sum(holds)} of {len(holds)}" if holds else "not known",
                f"{np.median([trial.elapsed_s for trial in found]):.0f} s",
                "not recorded" if None in noticed else f"{sum(map(bool, noticed))} of {len(found)}",
            ]
        )
    head = [
        "trials",
        "number",
        "answers",
        "right",
        "mean speed-up",
        "median half-width",
        "intervals with the truth",
        "median time",
        "other work noticed",
    ]
    return "\n\n".join([markdown(head, rows), targets.table(TARGETS, figures(trials), "{:.4g}".format)])


def where(trials: list[Trial]) -> str:
    """The machine, with every number of cores and version that took part, and how much of it is of now."""
    if not trials:
        return "No trial has been made."
    machines = [trial.machine for trial in trials]
    cores = sorted({machine.cores for machine in machines})
    runtimes = sorted({machine.packages.get("onnxruntime", "?") for machine in machines})
    stale = sum(trial.stale for trial in trials)
    return (
        f"{cpu_of(trials)}, {' or '.join(map(str, cores))} cores, onnxruntime {' or '.join(runtimes)}; "
        f"{len(trials)} trials, {stale} of them made by earlier code."
    )
