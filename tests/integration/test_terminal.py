"""What a terminal shows and a shell completes: the program as it is installed, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from tests.tiny import english, save_tiny
from trsp_deploy import cli
from trsp_deploy.recipe import METHODS
from trsp_deploy.tools.library import engine_names, recipe_names

PROGRAM = Path(sys.executable).with_name("trsp-deploy")
ESCAPE = b"\x1b["
COLOUR, CURSOR_OFF = b"36m", b"?25l"  # cyan, of options and of stages; of a progress bar


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    environment = {**os.environ, **words, "_TRSP_DEPLOY_COMPLETE": "complete_bash"}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@BREADTH
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("trsp-deploy prune", ["prune-and-build", "prune"]),
        ("trsp-deploy prune --recipe opt", [name for name in recipe_names() if name.startswith("opt")]),
        ("trsp-deploy prune-and-build --engine ort-cpu", [name for name in engine_names() if "ort-cpu" in name]),
        ("trsp-deploy prune --method trsp-", [name for name in METHODS if name.startswith("trsp-")]),
        ("trsp-deploy prune --model gpt2-", ["gpt2-medium", "gpt2-large", "gpt2-xl"]),
        ("trsp-deploy prune-and-build --task pi", ["piqa"]),
        ("trsp-deploy prune --out a --out b --model gpt2-", ["gpt2-medium", "gpt2-large", "gpt2-xl"]),
        ("trsp-deploy fetch wiki", ["wiki-demo"]),
        ("trsp-deploy engines show tensorrt-rtx-4", ["tensorrt-rtx-40-int4"]),
    ],
)
def test_a_shell_completes(line: str, offered: list[str]) -> None:
    assert completed(line) == offered and offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "_TRSP_DEPLOY_COMPLETE": f"source_{shell}"}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert f"_TRSP_DEPLOY_COMPLETE=complete_{shell}" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed, so nothing reads its script")
    (tmp_path / "script").write_text(done.stdout)
    read = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.alone
def test_help_takes_little_more_than_what_it_is_written_with() -> None:
    """Whole processes, in turn. They wait for nothing, so that their CPU time is what they take on an idle machine:
    0.2 s on a quick one of 2026 and 0.4 s on a slow one, of which two thirds are Typer's and Rich's."""

    def cpu_s(*command: str | Path) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    frameworks = (sys.executable, "-c", "import typer.rich_utils")
    taken = [(cpu_s(PROGRAM, "--help"), cpu_s(*frameworks)) for _ in range(8)]
    ours, theirs = map(min, zip(*taken, strict=True))
    assert ours < 2 * theirs, taken


def on_a_terminal(work: Callable[[int], object]) -> bytes:
    """What comes to a terminal that `work` is given to write to."""
    ours, theirs = pty.openpty()
    said = []

    def read() -> None:
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while part := os.read(ours, 65536):
                said.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        work(theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return b"".join(said)


def wishes(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """An environment with these wishes about colours and no others."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)


WISHES: dict[str, dict[str, str]] = {"coloured": {}, "plain": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}


def test_help_has_colours_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for name, environment in WISHES.items():
        wishes(monkeypatch, **environment)
        said[name] = on_a_terminal(
            lambda terminal: subprocess.run([PROGRAM, "--help"], stdout=terminal, stderr=terminal, check=True)
        )
    assert COLOUR in said["coloured"] and COLOUR not in said["plain"] and ESCAPE not in said["dumb"]
    wishes(monkeypatch)
    piped = subprocess.run([PROGRAM, "--help"], capture_output=True, check=True)
    assert ESCAPE not in piped.stderr + piped.stdout
    assert all(b"prune-and-build" in text for text in (*said.values(), piped.stdout))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    save_tiny("llama", folder / "tiny")
    (folder / "train.txt").write_text(english()[:30_000])
    return folder


def prune(out: str) -> list[str]:
    """A short job with progress of its own, anew for each folder."""
    settings = ["calibration.context_length=32", "calibration.max_windows=8", "calibration.validation_windows=2"]
    options = ["--model", "tiny", "--drop", "2", "--method", "trsp", "--calibration", "train.txt", "--out", out]
    settings += ["plan.steps=2", "plan.candidates=2", "transfer.steps=2"]
    return ["prune", *options, *(part for pair in settings for part in ("--set", pair))]


@BREADTH
def test_a_job_is_quiet_when_piped(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes(monkeypatch)
    done = trsp_deploy(*prune("piped"), cwd=workspace)
    assert done.code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith("dropped "), "the result alone"
    stages = [line.removeprefix("> ").partition(":")[0] for line in done.stderr.splitlines()]
    assert {"plan", "prune"} <= set(stages) and all(line.startswith(("> ", "  ")) for line in done.stderr.splitlines())
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr, "no colour, no bar"


@BREADTH
@pytest.mark.parametrize("name", WISHES)
def test_a_job_has_bars_and_colours_for_terminals_that_want_them(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes(monkeypatch, **WISHES[name])

    def work(terminal: int) -> None:
        with (
            os.fdopen(terminal, "w", closefd=False) as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            contextlib.chdir(workspace),
        ):
            assert cli.run(prune(name)) == 0

    said = on_a_terminal(work)
    assert b"prune: started" in said and b"dropped " in said
    assert (COLOUR in said) == (name == "coloured")
    assert (CURSOR_OFF in said) == (name != "dumb"), "a dumb terminal cannot draw over a line"
    assert name != "dumb" or ESCAPE not in said


@BREADTH
def test_a_job_goes_on_without_its_terminal(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `trsp-deploy prune … & disown`, when the terminal is closed: neither a step's line nor a bar ends it."""
    wishes(monkeypatch)
    ours, theirs = pty.openpty()

    def close() -> None:
        said = b""
        while b"plan: started" not in said:
            said += os.read(ours, 65536)
        os.close(ours)

    reader = threading.Thread(target=close)
    reader.start()
    with (
        os.fdopen(theirs, "w") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        contextlib.chdir(workspace),
    ):
        assert cli.run(prune("left")) == 0
    reader.join()
    assert (workspace / "left" / "pruned" / "model.safetensors").is_file()
