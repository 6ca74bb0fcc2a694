"""What a terminal shows and a shell completes: the program as it is installed, in a process of its own."""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trsp_deploy.recipe import METHODS
from trsp_deploy.tools.library import engine_names, recipe_names

PROGRAM = Path(sys.executable).with_name("trsp-deploy")
ESCAPE = b"\x1b["


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    environment = {**os.environ, **words, "_TRSP_DEPLOY_COMPLETE": "complete_bash"}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("trsp-deploy prune", ["prune-and-build", "prune"]),
        ("trsp-deploy prune --recipe opt", [name for name in recipe_names() if name.startswith("opt")]),
        ("trsp-deploy prune-and-build --engine ort-cpu", [name for name in engine_names() if "ort-cpu" in name]),
        ("trsp-deploy prune --method trsp-", [name for name in METHODS if name.startswith("trsp-")]),
        ("trsp-deploy prune --model gpt2-", ["gpt2-medium", "gpt2-large", "gpt2-xl"]),
        ("trsp-deploy prune-and-build --task pi", ["piqa"]),
        ("trsp-deploy fetch wiki", ["wiki-demo"]),
        ("trsp-deploy engines show tensorrt-rtx-4", ["tensorrt-rtx-40-int4"]),
    ],
)
def test_a_shell_completes(line: str, offered: list[str]) -> None:
    assert completed(line) == offered and offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str) -> None:
    environment = {**os.environ, "_TRSP_DEPLOY_COMPLETE": f"source_{shell}"}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert f"_TRSP_DEPLOY_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.alone
def test_help_takes_less_than_a_third_of_a_second() -> None:
    """The whole process. It waits for nothing, so that its CPU time is what it takes on an idle machine."""

    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    taken = []
    for _ in range(8):
        before = cpu_s()
        subprocess.run([PROGRAM, "--help"], stdout=subprocess.DEVNULL, check=True)
        taken.append(cpu_s() - before)
    assert min(taken) < 0.3, taken  # 0.2 on an idle machine of 2026


def on_a_terminal(**environment: str) -> bytes:
    """What help looks like on a terminal."""
    ours, theirs = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    terminal = {"TERM": "xterm-256color", **environment}
    subprocess.run([PROGRAM, "--help"], stdout=theirs, stderr=theirs, env={**clean, **terminal}, check=True)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # nobody has the other end any more
            break
        said += part
    os.close(ours)
    return said


def test_colours_are_for_terminals_that_want_them() -> None:
    coloured, plain, dumb = (on_a_terminal(**more) for more in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}))
    assert b"36m" in coloured and b"36m" not in plain and ESCAPE not in dumb
    piped = subprocess.run([PROGRAM, "--help"], capture_output=True, check=True)
    assert ESCAPE not in piped.stderr + piped.stdout
    assert all(b"prune-and-build" in said for said in (coloured, plain, dumb, piped.stdout))
