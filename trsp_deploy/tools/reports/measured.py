"""When the figures of a report or a sweep were taken, and what is another one since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trsp_deploy.artifacts import Provenance, steps
from trsp_deploy.recipe import Strict


class Measured(Strict):
    """When a figure of a report was taken, and what is another one now that the report is written."""

    step: str  # such as "bench-ort-cpu-fp32"
    time: str | None  # UTC; None of records that are older than this key
    differs: dict[str, tuple[str, str]]  # by name: as it was and as it is, such as the version of a package


def measured_by(made: Mapping[str, Provenance], now: Provenance) -> tuple[Measured, ...]:
    """What is said of the measurements among steps, by name; now: of who writes the report."""
    return tuple(
        Measured(step=step, time=then.time, differs=then.differences(now))
        for step, then in made.items()
        if step.startswith(steps.MEASURING)
    )


def first_and_last(measured: Iterable[Measured]) -> tuple[str, ...]:
    """Times of the first and the last measurement; one where both are alike, none where none is known."""
    times = sorted({each.time for each in measured if each.time is not None})
    return tuple(dict.fromkeys((times[0], times[-1]))) if times else ()


def measured_rows(measured: Iterable[Measured]) -> list[tuple[str, str]]:
    """When figures were taken and what was another one then, as label and value."""
    measured = list(measured)
    times = first_and_last(measured)
    rows = [("measured", " to ".join(times))] if times else []
    found: dict[str, list[str]] = {}  # steps by what differs
    for each in measured:
        if each.differs:
            then = ", ".join(f"{name} {was} (now {now})" for name, (was, now) in each.differs.items())
            found.setdefault(then, []).append(each.step)
    return rows + [("measured otherwise", f"{then}: {', '.join(names)}") for then, names in found.items()]
