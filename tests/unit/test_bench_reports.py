"""What benches share: a file a machine, whose figures a report judges, and coverage's target."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import benchmarks.engines.__main__ as engines_bench
import benchmarks.proof.__main__ as proof_bench
from benchmarks import coverage, kept, memory, serving, sweep, train
from benchmarks.engines.figures import TARGETS, Found
from trsp_deploy.artifacts import provenance
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Strict

ROOT = Path(__file__).parents[2]


KINDS = {"engines": Found, "memory": memory.Memory, "serving": serving.Serving, "train": train.Training}


def trained() -> train.Training:
    """Of a bench whose figures nobody has kept so far."""
    block = train.Block(device="cpu", wall_s=(1.0,), cpu_s=(1.0,), peak_bytes=1, mean_loss=3.0)
    options = train.decisive(train.parse([]))
    blocks = dict.fromkeys(train.ENGINES, (block,))
    return train.Training(machine=provenance(), code="", omp_num_threads=None, options=options, blocks=blocks)


class Cpu(Strict):
    """A record."""

    name: str


def judged(*machines: tuple[str, int]) -> str:
    """The judged one of machines with so many targets met of three."""
    met = {cpu: {str(number): number < count for number in range(3)} for cpu, count in machines}
    return kept.judged([cpu for cpu, _ in machines], lambda cpu: cpu, lambda cpu: met[cpu])


def test_a_report_judges_this_machine_else_the_worst() -> None:
    here = provenance().cpu
    assert judged(("A", 2), ("B", 1), ("C", 3)) == "B"
    assert judged(("A", 0), (here, 3), ("Z", 1)) == here


def test_files_of_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    with pytest.raises(RunError, match=r"no proof-\*\.jsonl; `make bench-proof` measures"):
        kept.every_machine("proof", Cpu, "jsonl")
    for name in ("Intel(R) Xeon(R) Processor", "AMD EPYC"):
        kept.keep(kept.results_path("proof", name, "jsonl"), Cpu(name=name), Cpu(name="again"))
    kept.results_path("proof", "other").write_text("")
    kept.results_path("proof", "empty", "jsonl").write_text("")
    found = kept.every_machine("proof", Cpu, "jsonl")
    assert [[cpu.name for cpu in cpus] for cpus in found] == [
        ["AMD EPYC", "again"],
        ["Intel(R) Xeon(R) Processor", "again"],
    ]
    kept.keep(kept.results_path("memory", "AMD EPYC"), Cpu(name="ours"), Cpu(name="theirs"))
    with pytest.raises(RunError, match=r"memory-amd-epyc\.json: holds 2 records, expected one; `make bench-memory`"):
        kept.every_machine("memory", Cpu)


@pytest.mark.parametrize("bench", [engines_bench, memory, proof_bench, serving, sweep, train])
@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"x": 1}', "unknown key 'x'"), ("", "is not valid JSON"), ("<<<<<<< ours", "is not valid JSON")],
)
def test_a_file_that_is_none_of_a_bench_is_one_line(
    bench: ModuleType, line: str, reason: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """As a merge leaves one, or a later version's record; the bench named after its results measures."""
    name = bench.__name__.split(".")[1]
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--report"])
    kept.results_path(name, "a", "jsonl" if name == "proof" else "json").write_text(f"{line}\n")
    assert bench.main() == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"line 1: {reason}" in said and said.endswith(f"; `make bench-{name}` measures it anew")


@pytest.mark.parametrize(
    ("bench", "measures"),
    [(engines_bench, "race"), (memory, "measure"), (serving, "measure"), (train, "measure")],
)
def test_what_cannot_be_kept_has_been_shown(
    bench: ModuleType, measures: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """An hour's figures, and a disk that is full by then."""
    name = bench.__name__.split(".")[1]
    there = next((ROOT / kept.RESULTS).glob(f"{name}-*.json"), None)
    found = trained() if there is None else KINDS[name].model_validate_json(there.read_bytes())
    monkeypatch.setattr(bench, measures, lambda *_: found)
    if bench is engines_bench:  # whose figures ask for the model that was measured
        monkeypatch.setattr(bench, "figures", lambda _: dict.fromkeys(TARGETS, 1.0))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "file" / "results")
    monkeypatch.setattr(sys, "argv", [name])
    assert bench.main() == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith("error: ") and "its folder cannot be made" in told.err
    assert "figures" in json.loads(told.out.splitlines()[-1])


def test_coverage_is_judged_before_it_is_rounded() -> None:
    assert coverage.verdict(89.96)["met"] == {"lines_percent": False}
    assert coverage.verdict(90.0)["met"] == {"lines_percent": True}


def test_a_report_of_no_coverage_is_a_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert coverage.main(["--report"]) == 1
    assert capsys.readouterr().err == "error: .coverage: nothing was measured here; `make coverage` does\n"


def covered(*, run: int) -> dict[str, dict[str, dict[str, int]]]:
    """Files as coverage.py tells of them."""
    files = {"trsp_deploy/a.py": (40, 40), "trsp_deploy/tools/b.py": (50, run), "trsp_deploy/tools/c.py": (10, 10)}
    return {name: {"summary": {"num_statements": all, "covered_lines": run}} for name, (all, run) in files.items()}


@pytest.mark.parametrize(("codes", "run", "code"), [([0, 0], 45, 0), ([0, 0], 20, 2), ([1, 0], 45, 1)])
def test_what_the_default_tests_cover_is_kept(
    codes: list[int], run: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "KEPT", tmp_path / "coverage.json")
    monkeypatch.setattr(coverage, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(coverage, "measure", lambda runs: codes)
    monkeypatch.setattr(coverage, "table", lambda: covered(run=run))
    coverage.PAGE.write_text("before\n<!-- coverage:start -->\n<!-- coverage:end -->\nafter")
    before = coverage.PAGE.read_text()
    for some in (["tests/unit"], ["--report"]):
        coverage.main(some)
        assert coverage.PAGE.read_text() == before and not coverage.KEPT.exists(), "some tests say nothing of all"
    assert coverage.main([]) == code
    found = coverage.Covered.model_validate_json(coverage.KEPT.read_bytes())
    assert found.percent == 50 + run and found.passed == (codes == [0, 0])
    assert found.packages["trsp_deploy/tools"] == coverage.Lines(all=60, run=10 + run)
    said = coverage.PAGE.read_text()
    assert f"{50 + run}.0% of 100 lines" in said and f"lowest: `trsp_deploy/tools/` {(10 + run) / 0.6:.1f}%" in said
    assert ("not every test passed" in said) == (codes != [0, 0]) and said.endswith("after")


def test_served_figures_are_judged_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = serving.Serving.model_validate_json((ROOT / kept.RESULTS / "serving-amd-epyc.json").read_bytes())
    values = {
        "throughput_8_over_1_32": 2.9996,
        "time_per_token_overhead_32": 0.1004,
        "throughput_8_over_1_128": 3.0,
        "time_per_token_overhead_128": None,
    }
    monkeypatch.setattr(serving, "figures", lambda found: values)
    assert [name for name, met in serving.met(found).items() if met] == ["throughput_8_over_1_128"]
    assert serving.verdict(found)["machine"] == "AMD EPYC"
    page = serving.page(found)
    assert "| 0.100 | **not met** |" in page and "| – | not measured |" in page
