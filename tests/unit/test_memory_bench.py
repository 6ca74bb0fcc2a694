"""The export's memory bench: what was stopped is not met, and nothing that it starts is left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import OPTConfig

from benchmarks import kept, memory
from benchmarks.code import code_digest
from benchmarks.memory import MOST, TARGETS, Memory, Row, figures, page, verdict, watch
from trsp_deploy.artifacts import provenance
from trsp_deploy.recipe import FLOAT_BYTES, Float

PARAMETERS = 10**6
ENOUGH = 10**12


def found(ratio: float = 1.0, cpu: str = "A", **changes: object) -> Memory:
    """Every row at one ratio; `changes` to the first, an export in fp32."""
    rows = [
        Row(
            job=job,
            precision=precision,
            peak_bytes=round(ratio * PARAMETERS * FLOAT_BYTES[precision]),
            anonymous_bytes=1,
            libraries_bytes=1,
        )
        for job in memory.JOBS
        for precision in FLOAT_BYTES
    ]
    rows[0] = rows[0].model_copy(update=changes)
    machine = provenance().model_copy(update={"cpu": cpu})
    return Memory(machine=machine, parameters=PARAMETERS, rows=tuple(rows))


def test_a_row_that_was_stopped_has_no_figure_and_is_not_met() -> None:
    whole, stopped = found(), found(stopped=True)
    assert all(verdict(whole)["met"].values()) and figures(whole) == dict.fromkeys(TARGETS, 1.0)
    assert figures(stopped)["fp32_export"] is None
    assert [name for name, met in verdict(stopped)["met"].items() if not met] == ["fp32_export"]
    assert page(whole).count("| met |") == 6 and "**not met**" not in page(whole)
    assert page(stopped).count("| met |") == 5 and "more than 1.00 | at most 1.6 | stopped, **not met** |" in page(
        stopped
    )


def test_what_earlier_code_made_is_called_so() -> None:
    today = found().model_copy(update={"code": code_digest(*memory.CODE)})
    assert "earlier code" in page(found()) and "earlier code" not in page(today)


def test_targets_are_judged_before_they_are_rounded() -> None:
    above = found(MOST + 0.0003)
    assert not any(verdict(above)["met"].values()) and page(above).count("**not met**") == 6


def test_a_report_judges_this_machine_or_the_worst(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    monkeypatch.setattr(memory, "PAGE", tmp_path / "memory.md")
    monkeypatch.setattr(sys, "argv", ["memory", "--report"])
    memory.PAGE.write_text("<!-- memory:start -->\n<!-- memory:end -->\n")

    def judged() -> str:
        assert memory.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["machine"]

    for each in (found(2.0, cpu="A"), found(1.0, cpu="Z")):
        kept.results_path("memory", each.machine.cpu).write_text(each.model_dump_json())
    assert judged() == "A"
    here = found(1.0, cpu=provenance().cpu)
    kept.results_path("memory", here.machine.cpu).write_text(here.model_dump_json())
    assert judged() == provenance().cpu
    assert memory.PAGE.read_text().count("| peak RSS, GB |") == 3


def test_engines_are_built_from_the_graph_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not from the one that a bench left which was killed in a build."""
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "made").write_text("of the killed one")
    built_from: dict[str, str] = {}

    def run(job: str, precision: Float, quick: bool, limit_bytes: int) -> Row:
        if job.startswith(memory.BUILD):
            built_from[job] = (tmp_path / "graph" / "made").read_text()
        else:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "made").write_text(f"{job} {precision}")
        return Row(job=job, precision=precision, peak_bytes=1, anonymous_bytes=1, libraries_bytes=1)

    monkeypatch.setattr(memory, "run", run)
    monkeypatch.setattr(memory, "make", lambda *_: OPTConfig(num_hidden_layers=1))
    memory.measure(tmp_path, quick=True, limit_gb=None)
    wanted = {
        memory.BUILD + name: f"export {precision}" for precision, names in memory.ENGINES.items() for name in names
    }
    assert built_from == wanted and not list(tmp_path.iterdir())


def test_a_worker_that_says_much_is_read_to_its_end() -> None:
    seen = watch([sys.executable, "-c", "print('x' * 200_000); print('last')"], ENOUGH)
    assert seen.code == 0 and not seen.stopped and len(seen.said) > 200_000 and seen.said.endswith("last\n")
    assert seen.peak_bytes > 0


def test_a_worker_above_the_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "held = b'x' * 200_000_000\n"
        "time.sleep(100)"
    )
    began = time.monotonic()
    seen = watch([sys.executable, "-c", program], 150_000_000)
    assert seen.stopped and seen.code == -9 and time.monotonic() - began < 60
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(memory, "end_with_parent", lambda: called.append("end_with_parent"))
    monkeypatch.setattr(memory, "work", lambda *_: called.append("work"))
    monkeypatch.setattr(sys, "argv", ["memory", "--worker", "export", "--precision", "fp32"])
    assert memory.main() == 0 and called == ["end_with_parent", "work"]
