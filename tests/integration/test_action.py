"""The GitHub action and the documented workflow, their steps run as a runner runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.breadth import BREADTH
from tests.command import PYTHON_SCRIPT, trsp_deploy
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES
from trsp_deploy.tools.measuring.bench_worker import PLANTED

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


@pytest.fixture
def action() -> Any:
    return yaml.safe_load((ROOT / "action.yml").read_text())


def program(tmp_path: Path) -> Path:
    """A folder with `trsp-deploy` in it, as a runner has it in its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    file = folder / "trsp-deploy"
    file.write_text(f"{PYTHON_SCRIPT}from trsp_deploy.cli import main; main()\n")
    file.chmod(0o755)
    return folder


def run_action(action: Any, workspace: Path, tmp_path: Path, planted: str = "0", **inputs: str) -> tuple[int, str, str]:
    """The action's step as a runner runs it: bash, inputs in variables, exit code, outputs.

    planted: a slow-down of measuring processes, as `bench_worker` takes it.
    """
    (step,) = action["runs"]["steps"]
    values = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()} | inputs
    variables = {}
    for name, expression in step["env"].items():
        key = expression.removeprefix("${{ inputs.").removesuffix(" }}")
        variables[name] = values[key]
    assert "${{" not in step["run"], "an input must not become part of the script"
    script = tmp_path / "step.sh"
    script.write_text(step["run"])
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"
    environment = {
        **os.environ,
        **variables,
        PLANTED: planted,
        "PATH": f"{program(tmp_path)}:{os.environ['PATH']}",
        "GITHUB_ACTIONS": "true",
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    # What GitHub runs for `shell: bash`.
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, outputs.read_text() if outputs.exists() else "", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("planted", "inputs", "code", "verdict"),
    [
        # Four times the time for each call: no machine is so busy that it stays open whether pruned is the quicker one.
        ("pruned=3", {"min-speedup": "decode=0.01\n1.05\n", "junit": ""}, 2, "fail"),
        pytest.param("0", {"min-speedup": "1.05", "budget": "1", "out": ""}, 3, "inconclusive", marks=pytest.mark.slow),
        pytest.param(
            "0",
            {"min-speedup": "1.05", "budget": "1", "inconclusive-passes": "true"},
            0,
            "inconclusive",
            marks=pytest.mark.slow,
        ),
        ("0", {"min-speedup": "$(touch hacked)"}, 1, ""),
    ],
)
def test_the_actions_step_ends_as_the_check_does(
    action: Any,
    workspace: Path,
    baseline: Path,
    tmp_path: Path,
    planted: str,
    inputs: dict[str, str],
    code: int,
    verdict: str,
) -> None:
    given = {"budget": "60", "out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml"), **inputs}
    found, outputs, said = run_action(action, workspace, tmp_path, planted, run="run", **given)
    assert found == code, said
    assert ("::error title=trsp-deploy check::speed-up, end to end: " in said) == (verdict == "fail")
    assert outputs == (f"verdict={verdict}\n" if verdict else "")
    assert not (workspace / "hacked").exists()


def test_an_input_that_is_empty_is_no_option(action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a workflow's own input that was not given; an empty budget had ended the check in an error."""
    said_back = program(tmp_path) / "trsp-deploy"
    said_back.write_text('#!/bin/sh\necho "$@"\n')
    monkeypatch.setitem(globals(), "program", lambda folder: said_back.parent)
    empty = dict.fromkeys(set(action["inputs"]) - {"run"}, "")
    assert run_action(action, tmp_path, tmp_path, run="run", **empty) == (0, "verdict=pass\n", "check run\n")


@pytest.fixture(scope="module")
def sound_baseline(workspace: Path) -> Path:
    """With replicates enough to decide."""
    options = ["--budget", "30", "--set", "replicates=6", "--set", "precision=0.1", "--set", "prompt_tokens=[64]"]
    done = trsp_deploy("baseline", "run", "--out", "sound.json", *options, "--json", cwd=workspace)
    assert done.code == 0, done.said
    if json.loads(done.stdout)["replicates"]["ort-cpu-fp32"] < FEWEST_REPLICATES:
        pytest.skip("the machine is too busy to measure on")
    return workspace / "sound.json"


@BREADTH
@pytest.mark.parametrize(("planted", "code", "verdict"), [("0", 0, "pass"), ("pruned=0.3", 2, "fail")])
def test_the_action_is_green_until_pruned_gets_slower(
    action: Any, workspace: Path, sound_baseline: Path, tmp_path: Path, planted: str, code: int, verdict: str
) -> None:
    """A pull request that makes the pruned engine 30% slower loses 23% of the speed-up; a tenth may be lost."""
    files = {"out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml")}
    limits = {"against": str(sound_baseline), "max-speedup-loss": "10%", "budget": "30", **files}
    for _ in range(2):  # what a busy machine leaves open says nothing; a wrong verdict is never tried again
        found, outputs, said = run_action(action, workspace, tmp_path, planted=planted, run="run", **limits)
        if found != 3:
            break
        (tmp_path / "outputs").unlink()
    else:
        pytest.skip("the machine is too busy to decide")
    assert found == code, said
    assert outputs == f"verdict={verdict}\n"
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert suite.get("failures") == ("1" if verdict == "fail" else "0")


def documented_steps() -> tuple[dict[str, Any], dict[str, Any]]:
    """The workflow's step that builds, and its step that checks."""
    page = (ROOT / "docs" / "ci.md").read_text()
    block = page.partition("<!-- workflow:start -->\n```yaml\n")[2].partition("```")[0]
    steps = yaml.safe_load(block)["jobs"]["check"]["steps"]
    (build,) = [step for step in steps if "run" in step]
    (check,) = [step for step in steps if "trsp_deploy" in step.get("uses", "")]
    return build, check


@pytest.mark.slow  # run by `make test-docs`
def test_the_documented_workflow_runs(action: Any, workspace: Path, baseline: Path, tmp_path: Path) -> None:
    build, check = documented_steps()
    workspace = shutil.copytree(workspace, tmp_path / "workspace")  # other tests use the run as it is
    recipe = (workspace / "run" / "recipe.yaml").read_text()
    (workspace / "recipe.yaml").write_text(recipe.replace("budget_s: 60.0", "budget_s: 1.0"))
    environment = {**os.environ, "RUN": "run", "PATH": f"{program(tmp_path)}:{os.environ['PATH']}"}
    command = ["bash", "-eo", "pipefail", "-c", build["run"]]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (workspace / "run" / "report.html").is_file(), done.stderr
    files = {"out": str(tmp_path / "check.json"), "junit": str(tmp_path / "check.xml")}
    inputs = {**check["with"], "run": "run", "budget": "1", **files}  # a second decides nothing, but of quality
    code, outputs, said = run_action(action, workspace, tmp_path, **inputs)
    assert (code, outputs) in ((2, "verdict=fail\n"), (3, "verdict=inconclusive\n")), said


def test_the_documented_workflow_fits_the_action(action: Any) -> None:
    _, check = documented_steps()
    assert set(check["with"]) <= set(action["inputs"])
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= set(check["with"])
