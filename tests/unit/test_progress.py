"""What long work shows: units, time and memory; and that a stage without units goes on."""

from __future__ import annotations

import io
import re
import time

import numpy as np
import pytest
from rich.console import Console

from trsp_deploy.cli import terminal
from trsp_deploy.tools import progress
from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes, resident_bytes
from trsp_deploy.tools.progress import Heartbeat, Meter


def written(terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=200), file


def test_a_log_says_units_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0)
    console, file = written()
    with Meter("transfer", 4, console=console) as meter:
        meter.advance("loss 3.1")
    assert re.fullmatch(r"  transfer: 1/4 loss 3.1, about \d+ s left, \d+\.\d\d GB\n", file.getvalue())


def test_a_terminal_shows_memory_beside_the_bar() -> None:
    console, file = written(terminal=True)
    with Meter("transfer", 4, console=console) as meter:
        meter.advance("loss 3.1")
        meter._bar.refresh()
    assert re.search(r"1/4.*loss 3\.1.*left.*\d\.\d\d GB", file.getvalue())


def test_an_end_may_move_while_it_is_neared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0)
    console, file = written()
    with Meter("bench", 120, console=console) as meter:
        meter.reach(100)
        meter.reach(130, of=150)
        meter.reach(170, of=150)
    assert re.findall(r"\d+/\d+", file.getvalue()) == ["100/120", "130/150", "150/150"]
    console, file = written(terminal=True)
    with Meter("bench", 120, console=console) as meter:
        meter.reach(130, of=150)
        meter._bar.refresh()
    assert "130/150" in file.getvalue()


def test_a_stage_that_counts_nothing_is_heard_of_until_it_ends() -> None:
    console, file = written()
    with Heartbeat("export", interval_s=0.05, console=console):
        time.sleep(0.3)
    said = file.getvalue()
    assert re.match(r"  export: 0 s so far, \d+\.\d\d GB\n", said)
    time.sleep(0.15)
    assert file.getvalue() == said


def test_a_meter_speaks_for_its_stage() -> None:
    console, file = written()
    with Meter("transfer", 4, console=console), Heartbeat("prune", interval_s=0.02, console=console):
        time.sleep(0.1)
    assert file.getvalue() == "" and Meter.showing == 0


def test_a_finished_stage_says_its_highest_memory(capsys: pytest.CaptureFixture[str]) -> None:
    announce = terminal.Announcer()
    announce("export", "started")
    held = np.ones(400_000_000, dtype=np.uint8)
    before = resident_bytes()
    del held
    announce("export", "done in 1.0 s")
    announce("build", "started")
    announce("build", "stopped")  # its error says the rest
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "> export: started" and rest[1:] == ["> build: started"]
    found = re.fullmatch(r"> export: done in 1\.0 s, at most (\d+\.\d\d) GB", rest[0])
    assert before is not None and found is not None and float(found[1]) >= before / 1e9 - 0.01


def test_the_peak_is_that_of_a_stage() -> None:
    held = np.ones(400_000_000, dtype=np.uint8)
    del held
    forget_peak()
    peak, now = peak_resident_bytes(), resident_bytes()
    assert peak is not None and now is not None and peak < now + 100_000_000
