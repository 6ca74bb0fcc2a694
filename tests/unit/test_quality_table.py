"""The quality bench's data: rows and keys, the file of finished rows, and what follows from them."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks import code
from benchmarks.pages import put_between_markers
from benchmarks.quality import __main__ as bench_command
from benchmarks.quality import report, store
from benchmarks.quality.estimates import estimate_s, pace
from benchmarks.quality.figures import TARGETS, Found, figures, over_seeds
from benchmarks.quality.rows import Accuracies, Losses, Outcome, Row, Selected, recipe_of
from benchmarks.quality.store import CODE, Store, work_digest
from benchmarks.quality.table import FULL, QUICK, Table, labelled_rows, rows, trained_arms
from tests.breadth import BREADTH
from trsp_deploy.errors import RunError
from trsp_deploy.results import TaskScore, ZeroShot

DENSE = {"wiki": 3.0, "c4": 4.0, "alpaca": 2.5}  # nats
ROOT = Path(__file__).parents[2]
START, END = "<!-- quality:start -->", "<!-- quality:end -->"
COST = {"default": 0.2, "layers": 0.2, "control": 0.22, "sleb": 0.6}  # nats that an arm loses, others 0.5


def outcome(row: Row) -> Outcome:
    """A made-up outcome: a seed adds a hundredth of its number."""
    if row.work == "selection":
        layers = list(range(row.drop))
        plan = {"dropped": layers, "seed": row.seed, "settings": {"scores": {"order": layers}}}
        passes = 280.0 if row.plan == FULL.selectors["default"].plan else 3024.0
        return Selected(plan=plan, dense_loss=3.0, removal_loss=4 + row.seed / 100, window_passes=passes, select_s=1.0)
    if row.work == "zero-shot":
        right = {"dense": 8, "default": 7}.get(row.arm, 6)
        score = [TaskScore(task=name, metric="acc", correct=(True,) * right + (False,) * 2) for name in row.tasks]
        return Accuracies(score=ZeroShot(role=row.role, tasks=tuple(score)))
    cost = COST.get(row.arm, 0.5) + row.seed / 100 if row.drop else 0.0
    checkpoint = {"dropped": list(range(row.drop))} if row.drop else {}
    return Losses(nll={text: (nll + cost,) * 2 for text, nll in DENSE.items()}, checkpoint=checkpoint, transfer_s=1.0)


def filled(path: Path, table: Table) -> Store:
    lines = Store(path)
    for row in rows(table):
        lines.add(row, outcome(row), 10.0)
    return lines


@pytest.mark.parametrize("table", [FULL, QUICK])
def test_rows_come_once_and_after_what_they_need(table: Table) -> None:
    seen: set[str] = set()
    for row in rows(table):
        needed = row.selection()
        assert needed is None or needed.key in seen, row.title
        assert row.key not in seen, row.title
        seen.add(row.key)
    assert seen >= {row.key for row in labelled_rows(table)}


def test_some_rows_bring_what_they_need() -> None:
    found = rows(FULL, "fold, 7 layers, 33k tokens, seed 0")
    assert [(row.kind, row.arm, row.seed) for row in found] == [("selection", "fold", 0), ("trained", "fold", 0)]


def test_a_title_of_no_row_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", "--only", "fold, 8 leyers"])
    assert bench_command.main() == 1
    assert "--only 'fold, 8 leyers': no row's title holds it" in capsys.readouterr().err


def test_the_full_table_has_what_it_promises() -> None:
    found = rows(FULL)
    tokens = [row.tokens for row in found if row.kind == "trained"]
    assert sorted(set(tokens)) == [32_768, 131_072, 524_288] and tokens == sorted(tokens)
    assert {row.drop for row in labelled_rows(FULL) if row.kind == "curve"} == {2, 4, 7, 10}
    assert len([row for row in labelled_rows(FULL) if row.kind == "selection"]) == 10
    kept = {row.key for row in found if row.keep}
    assert {row.checkpoint().key for row in found if row.kind == "zero-shot" and row.drop} == kept


@pytest.mark.parametrize("table", [FULL, QUICK])
def test_every_row_is_a_valid_recipe(table: Table) -> None:
    for row in rows(table):
        assert recipe_of(row).seed == row.seed
    assert 300 < sum(map(estimate_s, rows(QUICK))) < 1200


def test_labels_are_no_part_of_the_key() -> None:
    row = rows(QUICK)[2]
    assert row.model_copy(update={"arm": "other", "keep": True}).key == row.key
    assert row.model_copy(update={"seed": 9}).key != row.key
    assert row.model_copy(update={"kind": "selection"}).key != row.key


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    lines = filled(tmp_path / "quality.jsonl", QUICK)
    again = Store(lines.path)
    assert again.lines == lines.lines and all(row in again for row in rows(QUICK))
    assert pace(again.lines.values()) > 0
    again.add(rows(QUICK)[0], outcome(rows(QUICK)[0]), 20.0)
    assert len(Store(lines.path).lines) == len(lines.lines), "a row made again replaces the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["quality.jsonl"]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path / "quality.jsonl", QUICK).path
    path.write_text(path.read_text() + '{"key": 1}\n')
    with pytest.raises(
        RunError, match=f"line {len(rows(QUICK)) + 1}: key 'key': should be a valid string, got 1; delete"
    ):
        Store(path)
    path.write_text("{")
    with pytest.raises(RunError, match=r"line 1: is not valid JSON \(.*\); delete the line"):
        Store(path)


def test_digest_sees_code_and_neither_its_comments_nor_its_place() -> None:
    def meaning(source: str) -> set[str]:
        return code.meaning(ast.parse(source))

    assert meaning("def f():\n    '''Doc.'''\n    return 1  # why\n") == meaning("def f():\n\n    return 1")
    assert meaning("x = 1") != meaning("x = 2")
    moved = meaning("from trsp_deploy.errors import RunError")
    assert moved == meaning("from trsp_deploy.records.errors import RunError")
    assert moved != meaning("from trsp_deploy.errors import TextError as RunError")
    assert len({work_digest(work) for work in CODE}) == 3


def test_digest_follows_modules_that_are_imported_by_name() -> None:
    tree = ast.parse("from trsp_deploy.tools.runners import Runner, ort_build\nfrom trsp_deploy.errors import RunError")
    found = {str(path) for path in code._imported(tree, Path("trsp_deploy"))}
    runners = "trsp_deploy/tools/runners"
    assert found == {f"{runners}/__init__.py", f"{runners}/ort_build.py", "trsp_deploy/errors.py"}


def test_rows_of_other_code_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = filled(tmp_path / "quality.jsonl", QUICK)
    assert not any(lines.stale(row) for row in rows(QUICK))
    monkeypatch.setattr(store, "work_digest", lambda work: "other")
    assert all(lines.stale(row) for row in rows(QUICK))


def test_a_row_without_other_layers_than_are_chosen_now_is_stale(tmp_path: Path) -> None:
    lines = filled(tmp_path / "quality.jsonl", QUICK)
    row = next(row for row in rows(QUICK) if row.kind == "untrained" and row.arm == "layers")
    chosen = row.selection()
    assert chosen is not None and not lines.stale(row)
    other = outcome(chosen)
    assert isinstance(other, Selected)
    lines.add(chosen, other.model_copy(update={"plan": {"dropped": list(range(1, 1 + row.drop)), "seed": 0}}), 10.0)
    assert lines.stale(row)


def test_two_writers_keep_each_others_rows(tmp_path: Path) -> None:
    one, other = Store(tmp_path / "quality.jsonl"), Store(tmp_path / "quality.jsonl")
    first, second = rows(QUICK)[:2]
    one.add(first, outcome(first), 10.0)
    other.add(second, outcome(second), 10.0)
    assert set(Store(one.path).lines) == {first.key, second.key}


def test_what_is_no_number_is_no_outcome() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Losses(nll={"wiki": (math.nan,)}, checkpoint={}, transfer_s=1.0)


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"products": "another"}])
def test_rows_of_another_processor_are_marked(tmp_path: Path, change: dict[str, str]) -> None:
    lines = filled(tmp_path / "quality.jsonl", QUICK)
    arms = trained_arms(QUICK, QUICK.steps[0])
    assert "†" not in report.losses_table(Found(QUICK, lines), "trained", arms, QUICK.steps[0])
    row = next(row for row in rows(QUICK) if (row.kind, row.arm) == ("trained", "control"))
    line = lines.lines[row.key]
    elsewhere = {"provenance": line.provenance.model_copy(update=change)} if "cpu" in change else change
    lines.lines[row.key] = line.model_copy(update=elsewhere)
    table = report.losses_table(Found(QUICK, lines), "trained", arms, QUICK.steps[0])
    assert next(text for text in table.splitlines() if "†" in text).startswith("| control: remove, then train † |")
    assert report.ELSEWHERE in table


def test_rows_that_remove_the_same_layers_and_train_alike_are_computed_once(tmp_path: Path) -> None:
    lines = Store(tmp_path / "quality.jsonl")
    chosen = [row for row in rows(FULL) if row.kind == "selection" and row.seed == 0 and row.drop == FULL.drop]
    selected = {row.arm: row for row in chosen}
    for row in selected.values():
        lines.add(row, outcome(row), 10.0)  # every selector chooses the first layers
    trained = {row.arm: row for row in rows(FULL) if row.kind == "trained" and row.steps == 128 and row.seed == 0}
    assert lines.twin(trained["uidl"]) is None, "nothing is trained yet"
    control = trained["given-text-control"]
    lines.add(control, outcome(control), 10.0)
    twin = lines.twin(trained["uidl"])
    assert twin is not None and twin.row == control
    assert lines.twin(trained["fold"]) is None, "another training"
    lines.reuse(trained["uidl"], twin)
    kept = Store(lines.path).get(trained["uidl"])
    assert kept is not None and kept.outcome == twin.outcome and kept.same_as == twin.key
    assert not lines.stale(trained["uidl"])
    other = outcome(selected["uidl"])
    assert isinstance(other, Selected)
    lines.add(selected["uidl"], other.model_copy(update={"plan": {"dropped": list(range(1, 8)), "seed": 0}}), 10.0)
    assert lines.twin(trained["uidl"]) is None, "other layers"


def test_interval_over_seeds() -> None:
    assert over_seeds([]) is None
    single = over_seeds([math.log(1.5)])
    assert single is not None and (single.mean, single.low, single.seeds) == (pytest.approx(1.5), None, 1)
    three = over_seeds([0.0, 0.1, 0.2])
    assert three is not None and three.low is not None and three.high is not None
    margin = 4.303 * 0.1 / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert math.log(three.mean) == pytest.approx(0.1)
    assert (math.log(three.low), math.log(three.high)) == (pytest.approx(0.1 - margin), pytest.approx(0.1 + margin))


def test_nothing_measured_is_null_and_not_met(tmp_path: Path) -> None:
    summary = report.summary(Found(FULL, Store(tmp_path / "none.jsonl")))
    assert list(summary["figures"]) == list(summary["targets"]) == list(summary["met"]) == list(TARGETS)
    assert set(summary["figures"].values()) == {None} and set(summary["met"].values()) == {False}
    json.dumps(summary)


@BREADTH
def test_figures_of_a_full_table(tmp_path: Path) -> None:
    found = Found(FULL, filled(tmp_path / "quality.jsonl", FULL))
    values = figures(found)
    assert values["ratio_in_131k"] == pytest.approx(math.exp(0.21), abs=1e-4)  # mean of the seeds' 0.20, 0.21, 0.22
    assert values["to_control_524k"] == pytest.approx(math.exp(-0.02), abs=1e-4)
    assert values["untrained_to_sleb"] == pytest.approx(math.exp(-0.4), abs=1e-4)
    assert values["selection_spread"] == pytest.approx(4.04 / 4.0)
    assert values["selection_passes_to_sleb"] == pytest.approx(280 / 3024, abs=1e-4)
    assert values["zero_shot_margin"] == pytest.approx((7 / 9 - 6 / 8) / (8 / 10), abs=1e-4)
    assert TARGETS["zero_shot_margin"].met(values["zero_shot_margin"])


@BREADTH
def test_zero_shot_accuracy_is_compared_in_pairs_of_seeds(tmp_path: Path) -> None:
    lines = filled(tmp_path / "quality.jsonl", FULL)
    found = Found(FULL, lines)
    assert [list(found.retained(arm)) for arm in ("default", "fold", "sleb")] == [[0, 1, 2], [0, 1, 2], [0]]
    seed_2 = next(row for row in rows(FULL) if (row.kind, row.arm, row.seed) == ("zero-shot", "default", 2))
    worse = Accuracies(
        score=ZeroShot(
            role="pruned", tasks=tuple(TaskScore(task=t, metric="acc", correct=(True, False)) for t in FULL.tasks)
        )
    )
    lines.add(seed_2, worse, 10.0)
    # Fold has answered with three seeds; SLEB and the others with the first, and are compared on that one.
    gained = [(7 / 9 - 6 / 8) / 0.8, (7 / 9 - 6 / 8) / 0.8, (1 / 2 - 6 / 8) / 0.8]
    assert figures(found)["zero_shot_margin"] == pytest.approx(sum(gained) / 3)
    table = report.zero_shot_table(found)
    assert "| SLEB, then train | 0.750 " in table and "93.8% (one seed) |" in table
    assert "| TRSP, default | 0.685 " in table and "85.6% (35.8% to 135.5%) |" in table


def test_a_missing_seed_leaves_the_figure_open(tmp_path: Path) -> None:
    lines = filled(tmp_path / "quality.jsonl", FULL)
    gone = next(row for row in rows(FULL) if (row.kind, row.arm, row.seed, row.steps) == ("trained", "default", 2, 128))
    del lines.lines[gone.key]
    values = figures(Found(FULL, lines))
    assert values["ratio_in_131k"] is None and values["to_control_131k"] is None
    assert values["ratio_in_524k"] is not None


def test_report_keeps_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'trsp_deploy[dev]'")
    for name, file in (("DOC", "quality.md"), ("README", "README.md"), ("IMAGES", "img")):
        monkeypatch.setattr(report, name, tmp_path / file)
    for page in (report.DOC, report.README):
        page.write_text(f"before\n{START}\nearlier text\n{END}\nafter\n")
    found = Found(FULL, filled(tmp_path / "quality.jsonl", FULL))
    report.write(found)
    report.write(found)
    text = report.DOC.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "earlier text" not in text
    assert text.count(START) == text.count(END) == 1
    assert "| 1.234 (1.203 to 1.265) |" in text.replace("**", "") and "(one seed)" in text
    assert "| 131k | TRSP, default; TRSP, a quarter own text | " in report.README.read_text()
    for name in ("quality-layers.png", "quality-tokens.png"):
        assert (report.IMAGES / name).read_bytes().startswith(b"\x89PNG")


@BREADTH
def test_the_short_table_has_the_same_figures_once(tmp_path: Path) -> None:
    lines = report.short_table(Found(FULL, filled(tmp_path / "quality.jsonl", FULL))).splitlines()[2:]
    budgets = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert budgets == ["0"] * 3 + ["33k"] * 4 + ["131k"] * 4 + ["524k"] * 3
    assert lines[3].startswith("| 33k | TRSP, default | 1.234 ")
    own = "TRSP, a quarter own text; control, a quarter own text"
    assert lines[4].startswith(f"| 33k | {own}; fold, then train; TRSP, layers refitted, annealed | 1.665 ")


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(RunError, match="quality:start"):
        put_between_markers(page, "text", "quality")
    assert page.read_text() == "no markers"


def test_the_repository_s_pages_have_their_markers() -> None:
    for page in (report.DOC, report.README):
        text = page.read_text(encoding="utf-8")
        assert text.count(START) == text.count(END) == 1


def test_figures_in_prose_are_the_rows() -> None:
    """A mean is rounded once, and what is said of each seed holds for each."""
    found = Found(FULL, Store(ROOT / bench_command.RESULTS))

    def mean(arm: str, text: str, steps: int) -> float:
        interval = found.ratio("trained", arm, text, steps)
        assert interval is not None
        return interval.mean

    def behind(steps: int) -> str:
        ours, control = (found.rows("trained", arm, steps) for arm in ("default", "control"))
        gaps = [
            theirs - found.log_ratios(ours, text)[seed]
            for text in found.texts
            for seed, theirs in found.log_ratios(control, text).items()
        ]
        return " to ".join(f"{100 * math.expm1(end):.0f}" for end in (min(gaps), max(gaps)))

    own = [mean("own-text", text, 128) for text in found.texts]
    change = [100 * (mean("own-text", text, 512) / mean("given-text", text, 512) - 1) for text in found.texts]
    said = {
        "README.md": f"{behind(128)}% behind, and {behind(512)}% at 524k tokens",
        "docs/faq.md": f"{own[0]:.2f}, {own[1]:.2f} and {own[2]:.2f} with a quarter",
        "docs/quality.md": f"with 524k tokens {-change[2]:.0f}% less for {change[0]:.1f}% and {change[1]:.1f}%",
        "recipes/smollm2-135m-131k.yaml": f"Wikipedia {mean('given-text', 'wiki', 128):.2f} and {own[0]:.2f})",
    }
    for page, figures_said in said.items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert figures_said in text, f"{page}: {figures_said}"
