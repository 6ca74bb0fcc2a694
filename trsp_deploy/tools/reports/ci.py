"""A check for machines that run other people's work: JUnit XML, a GitHub step summary, GitHub annotations."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from trsp_deploy.tools.judging.verdicts import Outcome, Word

SIGNS: dict[Word, str] = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}


def junit(name: str, outcomes: Sequence[Outcome], seconds: float) -> str:
    """One test case a requirement: a failure fails, what is not decided is skipped, neither passed nor failed."""
    words = [outcome.word for outcome in outcomes]
    counts = {
        "tests": str(len(words)),
        "failures": str(words.count("fail")),
        "skipped": str(words.count("inconclusive")),
        "errors": "0",
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": "trsp-deploy check", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts})
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"trsp_deploy.{name}", "name": outcome.requirement.name, "time": "0"}
        )
        if outcome.word == "fail":
            ElementTree.SubElement(case, "failure", {"message": outcome.sentence, "type": outcome.requirement.source})
        elif outcome.word == "inconclusive":
            ElementTree.SubElement(case, "skipped", {"message": outcome.sentence})
        ElementTree.SubElement(case, "system-out").text = outcome.sentence
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def step_summary(name: str, verdict: Word, outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """Markdown for $GITHUB_STEP_SUMMARY."""
    lines = [
        f"### {SIGNS[verdict]} {verdict}: {name}",
        "",
        "| | requirement | wanted | measured (95%) |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        wanted, found = outcome.requirement, outcome.found
        lines.append(
            f"| {SIGNS[outcome.word]} {outcome.word} | {wanted.name} | {wanted.sense} {wanted.bound:.4g} "
            f"| {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}) {outcome.note} |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def github_annotations(outcomes: Sequence[Outcome]) -> list[str]:
    """GitHub's workflow commands: an error for each failure, a warning for what is not decided."""
    kinds = {"fail": "error", "inconclusive": "warning"}
    return [
        f"::{kinds[outcome.word]} title=trsp-deploy check::{_escaped(outcome.sentence)}"
        for outcome in outcomes
        if outcome.word in kinds
    ]


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
