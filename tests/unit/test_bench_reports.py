"""What benches share: a file a machine, whose figures a report judges, and coverage's target."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import coverage, kept, serving
from trsp_deploy.artifacts import provenance
from trsp_deploy.errors import RunError

ROOT = Path(__file__).parents[2]


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
        kept.every_machine("proof", "jsonl")
    for cpu in ("Intel(R) Xeon(R) Processor", "AMD EPYC"):
        kept.results_path("proof", cpu, "jsonl").write_text(cpu)
    kept.results_path("proof", "other").write_text("")
    assert kept.every_machine("proof", "jsonl") == [b"AMD EPYC", b"Intel(R) Xeon(R) Processor"]


def test_coverage_is_judged_before_it_is_rounded() -> None:
    assert coverage.verdict(89.96)["met"] == {"lines_percent": False}
    assert coverage.verdict(90.0)["met"] == {"lines_percent": True}


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
