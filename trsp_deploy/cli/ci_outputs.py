"""What a CI system reads of a check: its JUnit file, annotations and step summary; the same for a check that fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trsp_deploy.cli.terminal import Output
from trsp_deploy.errors import TrspError, machine_reason, named, one_line, redacted

if TYPE_CHECKING:
    from trsp_deploy.checks import Check


@contextlib.contextmanager
def errors_told(out: Path | None, junit: Path | None, output: Output) -> Iterator[None]:
    """Tell a CI system of an error too, and leave it no verdict of an earlier check for this one's."""
    for earlier in (out, junit):
        if earlier is not None:
            earlier.unlink(missing_ok=True)  # also for a check that is killed
    try:
        yield
    except Exception as problem:
        said = problem if isinstance(problem, TrspError) else machine_reason(problem) or named(problem)
        _publish_error(redacted(one_line(said)), junit, output)
        raise


def _publish_error(line: str, junit: Path | None, output: Output) -> None:
    """Write an error wherever a CI system looks for a verdict; a full disk does not hide why the check ended."""
    from trsp_deploy.tools.reports import ci

    if junit is not None:
        with contextlib.suppress(OSError, TrspError):
            _write_text(junit, ci.junit_of_error(line))
    if _in_github():
        output.say(ci.github_error(line))


def publish(found: Check, out: Path | None, junit: Path | None, output: Output) -> None:
    """Write the verdict wherever a CI system looks for it, and to the terminal. Files first: a reader may have left."""
    from trsp_deploy.artifacts import write_json
    from trsp_deploy.tools.reports import ci

    try:
        if out is not None:
            write_json(out, found)
        if junit is not None:
            _write_text(junit, ci.junit(found.engine, found.outcomes, found.comparison.elapsed_s))
    finally:  # what minutes of measuring found is not lost to a full disk
        _show(found, output)


def _show(found: Check, output: Output) -> None:
    from trsp_deploy.cli.tables import print_comparison
    from trsp_deploy.tools.judging.comparisons import notes
    from trsp_deploy.tools.reports import ci

    _add_step_summary(ci.step_summary(found.engine, found.verdict, found.outcomes, found.notes))
    print_comparison(found.engine, found.comparison, found.quality, output.stream)
    more = [note for note in found.notes if note not in notes(found.comparison)]  # those of the comparison are shown
    said = [*more, *(outcome.sentence for outcome in found.outcomes)]  # with words of a baseline's file among them
    output.say(*map(ci.github_text, said), found.verdict.upper())
    if _in_github():
        output.say(*ci.github_annotations(found.outcomes))
    output.result(found.model_dump(mode="json", exclude={"provenance", "samples"}))


def _add_step_summary(text: str) -> None:
    """Add to GitHub's page of a step, where there is one; what cannot be written there changes no verdict."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not summary:
        return
    try:
        with Path(summary).open("a", encoding="utf-8") as file:  # a step's commands share it
            file.write(text)
    except OSError as problem:
        print(
            f"warning: GITHUB_STEP_SUMMARY {summary}: no summary is written ({problem.strerror})",
            file=sys.stderr,
        )


def _in_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _write_text(path: Path, text: str) -> None:
    from trsp_deploy.artifacts import writing

    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")
