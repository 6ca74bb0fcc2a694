"""A check for machines that run other people's work: JUnit XML, a GitHub step summary, GitHub annotations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from trsp_deploy.errors import no_command, one_line
from trsp_deploy.tools.judging.verdicts import Outcome, Word

TITLE = "trsp-deploy check"
NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKS = re.compile(r"[\\`*_~\[\]<>&|#!$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)  # what Markdown, or GitHub's, acts on
SIGNS: dict[Word, str] = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}


def junit(name: str, outcomes: Sequence[Outcome], seconds: float) -> str:
    """One test case per requirement: a failure fails, what is not decided is skipped, neither passed nor failed."""
    words = [outcome.word for outcome in outcomes]
    root, suite = _suite(name, len(words), words.count("fail"), words.count("inconclusive"), 0, seconds)
    for outcome in outcomes:
        case = _case(suite, name, outcome.requirement.name)
        sentence = _in_xml(outcome.sentence)
        if outcome.word == "fail":
            ElementTree.SubElement(case, "failure", {"message": sentence, "type": outcome.requirement.source})
        elif outcome.word == "inconclusive":
            ElementTree.SubElement(case, "skipped", {"message": sentence})
        ElementTree.SubElement(case, "system-out").text = sentence
    return _text(root)


def junit_of_error(line: str) -> str:
    """One test case that did not get to its verdict, and why."""
    root, suite = _suite("check", 1, 0, 0, 1, 0.0)
    ElementTree.SubElement(_case(suite, "check", "check"), "error", {"message": _in_xml(line), "type": "error"})
    return _text(root)


def _in_xml(text: str) -> str:
    return NOT_IN_XML.sub("?", text)


def _suite(
    name: str, tests: int, failures: int, skipped: int, errors: int, seconds: float
) -> tuple[ElementTree.Element, ElementTree.Element]:
    """The root and its only suite."""
    counts = {"tests": str(tests), "failures": str(failures), "errors": str(errors), "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", {"name": TITLE, **counts})  # which in Jenkins' schema has no `skipped`
    return root, ElementTree.SubElement(root, "testsuite", {"name": name, **counts, "skipped": str(skipped)})


def _case(suite: ElementTree.Element, engine: str, name: str) -> ElementTree.Element:
    values = {"classname": f"trsp_deploy.{engine}", "name": name, "time": "0"}
    return ElementTree.SubElement(suite, "testcase", values)


def _text(root: ElementTree.Element) -> str:
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
        wanted = outcome.requirement
        lines.append(
            f"| {SIGNS[outcome.word]} {outcome.word} | {_in_markdown(outcome.name)} "
            f"| {wanted.sense} {wanted.bound:.6g} | {outcome.measured} {_in_markdown(outcome.note)} |"
        )
    return "\n".join([*lines, "", *(f"- {_in_markdown(note)}" for note in notes), ""])


def _in_markdown(text: str) -> str:
    """What a baseline's file may have put into it stays text: no HTML, link or image, no end of a cell or an item."""
    return MARKS.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def github_text(text: str) -> str:
    """A note, or an outcome's sentence, as the one line that it is to GitHub's runner too: a workflow command begins a
    line with `::`, or is `##[` anywhere in one."""
    return no_command(one_line(text))


def github_annotations(outcomes: Sequence[Outcome]) -> list[str]:
    """GitHub's workflow commands: an error for each failure, a warning for what is not decided."""
    kinds = {"fail": "error", "inconclusive": "warning"}
    return [_annotation(kinds[outcome.word], outcome.sentence) for outcome in outcomes if outcome.word in kinds]


def github_error(line: str) -> str:
    """GitHub's workflow command for a check that ended before its verdict."""
    return _annotation("error", line)


def _annotation(kind: str, text: str) -> str:
    return f"::{kind} title={TITLE}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
