"""Generated command lines: one of our exit codes and a line, soon, and no file outside the run folder.

A few by default; `make faults` draws thousands (`HYPOTHESIS_PROFILE=faults`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'trsp_deploy[dev]'")

from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from tests.faults.drawn import (
    ASSIGNMENTS,
    NUMBERS,
    TEXTS,
)
from tests.faults.tally import LONGEST_LINE, LONGEST_S
from tests.made_run import made_run, made_sweep, served_repository
from trsp_deploy.artifacts import MANIFEST
from trsp_deploy.cli import run
from trsp_deploy.cli.app import app

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Watch:
    """Every path that this process writes to while `on`; Python tells each before it is done."""

    def __init__(self) -> None:
        self.on = False
        self.written: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(arguments[0], int):
                self.written.add(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
        elif event in WRITES and not isinstance(arguments[0], int):
            self.written.add(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


OUTS = st.sampled_from(
    ["out", "a/b/out", "text.txt/out", "out\nline", "é" * 300, "", ".", "out/../out", "/proc/nowhere"]
)
PLACES = st.one_of(
    st.sampled_from(
        [
            "nowhere",
            "empty",
            "broken",
            "text.txt",
            "pipe",
            "pipe.yaml",
            "pipe.txt",
            "deep.json",
            "/dev/zero",
            "latin.txt",
            "made-run",
            "made-run/engines/ort-cpu-fp32/pruned",
            "made-sweep",
            "made-repository",
        ]
    ),
    st.sampled_from(["bad.onnx", "broken/recipe.yaml", "x.onnx", "~", "/proc/self/mem"]),
    TEXTS.filter(lambda text: not text.startswith("-")),
)
NAMED_TEXTS = st.one_of(PLACES, st.sampled_from(["wiki-demo", "owner/name:train", "a=b=c", "=", "x=nowhere.txt", "c4"]))
OPTIONS: dict[str, st.SearchStrategy[str]] = {
    "--model": st.one_of(PLACES, st.sampled_from(["opt-6.7b", "owner/name", "opt-6.7"])),
    "--drop": st.one_of(TEXTS, st.sampled_from(["1", "25%", "5%..50%", "2..12:2"])),
    "--recipe": st.one_of(PLACES, st.sampled_from(["default", "opt-6.7b", "broken.yaml"])),
    "--engine": st.one_of(PLACES, st.sampled_from(["auto", "ort-cpu-fp32", "broken.yaml"])),
    "--calibration": NAMED_TEXTS,
    "--eval": NAMED_TEXTS,
    "--seed": st.one_of(TEXTS, NUMBERS.map(str)),
    "--set": ASSIGNMENTS,
    "--plan": PLACES,
    "--method": st.one_of(TEXTS, st.sampled_from(["trsp", "fold"])),
    "--then": TEXTS,
    "--task": TEXTS,
    "--onnx": PLACES,
    "--against": PLACES,
    "--min-speedup": st.one_of(TEXTS, NUMBERS.map(str), st.sampled_from(["1.2", "decode=1.1", "nan"])),
    "--max-latency-regression": TEXTS,
    "--max-ppl-ratio": NUMBERS.map(str),
    "--quality-budget": st.one_of(TEXTS, st.sampled_from(["99%", "100%"])),
    "--min-accuracy-retained": TEXTS,
    "--budget": NUMBERS.map(str),
    "--prompt": TEXTS,
    "--max-tokens": NUMBERS.map(str),
    "--temperature": NUMBERS.map(str),
    "--tokenizer": PLACES,
    "--target-latency": TEXTS,
    "--target-speedup": NUMBERS.map(str),
    "--name": TEXTS,
    "--max-batch": NUMBERS.map(str),
    "--max-length": NUMBERS.map(str),
    "--concurrency": st.one_of(TEXTS, st.sampled_from(["1,8", "0"])),
    "--url": st.one_of(TEXTS, st.sampled_from(["localhost:1:2"])),
    "--key": PLACES,
    "--public-key": PLACES,
    "--keep": st.one_of(TEXTS, st.sampled_from(["dense,engines", "engines/ort-cpu-fp32", "engines/..", ","])),
}
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = ["--json", "--plan-memory", "--ignore-memory", "--dense", "--step", "--private", "--unknown", "-x"]
WITHOUT_A_FOLDER = ["prune-and-build", "prune", "sweep"]
TAKES = {
    **dict.fromkeys(WITHOUT_A_FOLDER, 0),
    **dict.fromkeys(["export", "build", "bench", "evaluate", "report", "baseline", "check", "inspect", "generate"], 1),
    **dict.fromkeys(["triton", "triton-lint", "triton-stop", "bench-server", "compare"], 1),
    **dict.fromkeys(["verify", "sign", "convert", "clean", "push"], 1),
}


def _taken(command: str, options: Iterable[str]) -> list[str]:
    """Those of the options that a command takes; none of what is no command."""
    taken = [name for parameter in COMMANDS[command].params for name in parameter.opts] if command in COMMANDS else []
    return [option for option in options if option in taken]


@st.composite
def command_lines(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[list[str], str | None]:
    """A command with arguments, and the folder that it may write to."""
    command = draw(st.sampled_from([*TAKES, *WITHOUT_A_FOLDER, "compare", "recipes show", "engines show", "nonsense"]))
    arguments = command.split()
    folder = None
    for _ in range(TAKES.get(command, 1)):
        folder = draw(PLACES)
        arguments.append(folder)
    if command == "compare" and draw(st.booleans()):
        arguments.append(draw(PLACES))
    if command == "push":
        arguments.append(draw(OPTIONS["--model"]))
    if command in ("push", "clean"):
        arguments.append("--dry-run")
    if command == "sign" and draw(st.integers(0, 3)):
        arguments += ["--key", draw(PLACES)]
    if command in ("prune-and-build", "prune") and draw(st.integers(0, 3)):
        arguments += ["--model", draw(OPTIONS["--model"])]
    of_its_own = draw(st.integers(0, 3))  # else most command lines end at an option of another command
    known = _taken(command, OPTIONS) if of_its_own else list(OPTIONS)
    for option in draw(st.lists(st.sampled_from(known), max_size=4)) if known else ():
        arguments += [option, draw(OPTIONS[option])]
    flags = _taken(command, FLAGS) if of_its_own else FLAGS
    arguments += draw(st.lists(st.sampled_from(flags), max_size=2, unique=True)) if flags else []
    out = draw(OUTS)
    writes = (*WITHOUT_A_FOLDER, "compare", "triton", "build", "baseline", "check", "convert")
    if command in writes and draw(st.integers(0, 4)):
        arguments += ["--out", out]
        return arguments, out
    if command == "baseline":
        return arguments, "baseline.json"  # where it writes unless it is told
    return arguments, folder


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with something of everything that is broken, and no network."""
    for name in ("empty", "broken", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("pipe", "pipe.yaml", "pipe.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x09garbage")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "broken" / "recipe.yaml").write_text("model: nowhere\n")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_text("[]")
    (tmp_path / "broken" / "config.pbtxt").write_text("a: [")
    made_run(tmp_path / "made-run")
    made_sweep(tmp_path / "made-sweep")
    (tmp_path / "made-repository").mkdir()
    (tmp_path / "made-repository" / MANIFEST).write_text(json.dumps(served_repository()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.delenv("TRSP_DEPLOY_TRITON", raising=False)
    return tmp_path


def test_command_lines(tally, sandbox, watch):
    import trsp_deploy.pipeline  # noqa: F401  what is imported late writes bytecode

    @given(command_lines())
    def check(drawn: tuple[list[str], str | None]) -> None:
        arguments, folder = drawn
        watch.written.clear()
        out, err = io.StringIO(), io.StringIO()
        began = time.perf_counter()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            watch.on = True
            try:
                code = run(arguments)
            finally:
                watch.on = False
        tally.tried += 1
        tally.refused += code == 1
        tally.longest_s = max(tally.longest_s, time.perf_counter() - began)
        said = err.getvalue()
        assert code in (0, 1, 2, 3), said[-3000:]
        assert code == 0 or code != 1 or said.splitlines()[-1].startswith("error: "), said
        assert len(said) < LONGEST_LINE, said[:3000]
        assert tally.longest_s < LONGEST_S
        allowed = [sandbox / "runs", *([] if folder is None else [Path(os.path.abspath(sandbox / folder))])]  # noqa: PTH100
        strange = [path for path in watch.written if not any(_below(path, each) for each in allowed)]
        assert not strange, (arguments, strange)

    check()


def _below(path: str, folder: Path) -> bool:
    """Whether it is in the folder, is the folder, leads to it, or is on its way to be it (`.NAME.partial` and what is
    in it, or a trial of the nearest folder that is there)."""
    written = Path(path)
    on_its_way = (each for each in (written, *written.parents) if each.name.startswith(f".{folder.name}."))
    aside = any(each.parent in folder.parents for each in on_its_way)
    return aside or folder in (written, *written.parents) or written in folder.parents or "__pycache__" in path
