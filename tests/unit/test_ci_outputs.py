"""What a check tells a CI system of a baseline whose words are meant for more than to be read."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from tests.samples import made_up
from trsp_deploy.artifacts import provenance
from trsp_deploy.checks import CHECK_VERSION, Check, Tolerances
from trsp_deploy.cli.ci_outputs import publish
from trsp_deploy.cli.terminal import Output
from trsp_deploy.tools.judging.comparisons import compare
from trsp_deploy.tools.judging.statistics import Ratio
from trsp_deploy.tools.judging.verdicts import Requirement, disturbed_before, judge

COMMANDS = "load\n::add-mask::0\r\n::stop-commands::x ##[add-path]/tmp/evil\n\n| ok | <img src=x onerror=y> |\n# done"
ADDRESSES = "![x](https://evil.example) [y](/z) WWW.evil.example `code` **bold** _it_ ~~no~~ &lt; $1$ @me #1"


@pytest.fixture
def found() -> Check:
    """A check against a baseline whose name and disturbance are commands to GitHub's runner, and Markdown."""
    samples = made_up(speedup=1.2)
    wanted = Requirement(name=f"perplexity over dense, {COMMANDS}", source="--x", sense="at least", bound=1.0)
    return Check(
        schema_version=CHECK_VERSION,
        verdict="inconclusive",
        engine="ort-cpu-fp32",
        outcomes=(judge(wanted, Ratio(ratio=1.2, low=1.1, high=1.3), disturbed_before(COMMANDS)),),
        comparison=compare(samples),
        samples=samples,
        quality={},
        choices=None,
        notes=(f"the baseline is of {COMMANDS} {ADDRESSES}, this run of tiny",),
        tolerances=Tolerances(),
        provenance=provenance(),
    )


def test_a_baselines_words_are_no_workflow_commands(
    found: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can put a baseline into a pull request would have given the runner commands."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    publish(found, None, None, Output(as_json=False))
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.lstrip().startswith("::")]
    assert len(commands) == 1 and commands[0].startswith("::warning title=trsp-deploy check::perplexity over dense")
    assert not any("##[" in line for line in lines if line not in commands)
    assert any(line.startswith("the baseline is of load ::add-mask::0") for line in lines), "said all the same"


def test_a_baselines_words_are_text_in_a_summary(
    found: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    publish(found, None, None, Output(as_json=False))
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert [line.count("|") for line in lines if line.startswith("|")] == [5, 5, 5]
    assert len(lines) == 7 and lines[-1].startswith("- the baseline is of load ::add-mask")
    assert not any("<" in line for line in lines)
    assert "done &#33;&#91;x&#93;(https&#58;//evil.example) &#91;y&#93;(/z) WWW&#46;evil.example &#96;" in lines[-1]
    assert not re.search(r"[!\[\]`*_~$@]|://|&(?!#)", lines[-1]) and html.unescape(lines[-1]).count(ADDRESSES) == 1
