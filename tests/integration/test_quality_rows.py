"""Rows of the quality bench on a tiny model: what each kind finds, and what an interrupted one leaves."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import __main__ as bench
from benchmarks.quality import work
from benchmarks.quality.rows import Accuracies, Losses, Outcome, Row, Selected, Subject, recipe_of
from benchmarks.quality.store import Store, digest
from benchmarks.quality.table import FULL, Table, labelled_rows, rows
from benchmarks.quality.work import compute, plan_of
from tests.breadth import BREADTH
from tests.tiny import english, save_tiny
from trsp_deploy.decoder import load_model, load_tokenizer
from trsp_deploy.errors import RunError
from trsp_deploy.results import TaskScore, ZeroShot
from trsp_deploy.stages.transfer import Training
from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows

pytestmark = BREADTH

# One of each way to train: the others differ in the layers or in settings that tests of the library try.
ARMS = ("default", "control", "refit-anneal", "own-text", "anneal")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The full table's arms on a tiny model with a few windows of text, 2 of its 6 layers dropped."""
    folder = tmp_path_factory.mktemp("subject")
    for name, start in (("calibration", 0), ("inside", 100_000), ("outside", 200_000)):
        (folder / f"{name}.txt").write_text(english()[start : start + 20_000], encoding="utf-8")
    subject = Subject(
        model=str(save_tiny("llama", folder / "model")),
        calibration=str(folder / "calibration.txt"),
        context_length=32,
        pool_windows=60,
        validation_windows=6,
        fit_windows=16,
        tests={"inside": str(folder / "inside.txt"), "outside": str(folder / "outside.txt")},
        test_context=32,
        test_windows=3,
    )
    changes = {
        "subject": subject,
        "arms": tuple(arm for arm in FULL.arms if arm.name in ARMS),
        "selectors": {name: s.model_copy(update={"windows": 8}) for name, s in FULL.selectors.items()},
        "drop": 2,
        "counts": (1, 3),
        "steps": (2,),
        "seeds": (0,),
        "selection_seeds": (0,),
        "zero_shot_steps": 2,
        "zero_shot_arms": ("default", "own-text", "control"),
        "zero_shot_every_seed": ("default",),
        "items": 2,
    }
    return FULL.model_copy(update=changes)


@pytest.fixture(scope="module")
def made(table: Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """The table's rows but the zero-shot ones, and the folder of the checkpoints that were kept."""
    folder = tmp_path_factory.mktemp("made")
    store = Store(folder / "quality.jsonl")
    for row in rows(table):
        if row.work != "zero-shot":
            store.add(row, compute(row, store, folder / "checkpoints"), 1.0)
    return store, folder / "checkpoints"


def find(table: Table, store: Store, kind: str, arm: str, drop: int) -> tuple[Row, Outcome]:
    row = next(row for row in labelled_rows(table) if (row.kind, row.arm, row.drop) == (kind, arm, drop))
    line = store.get(row)
    assert line is not None
    return row, line.outcome


def test_raw_losses_of_every_text(table: Table, made: tuple[Store, Path]) -> None:
    for kind, arm, drop in (("dense", "dense", 0), ("untrained", "uidl", 2), ("trained", "anneal", 2)):
        _, found = find(table, made[0], kind, arm, drop)
        assert isinstance(found, Losses)
        assert {name: len(nll) for name, nll in found.nll.items()} == {"inside": 3, "outside": 3}
        assert all(nll == round(nll, 5) for nll in found.nll["inside"])


def test_trained_rows_remove_and_train(table: Table, made: tuple[Store, Path]) -> None:
    for arm in table.arms:
        _, found = find(table, made[0], "trained", arm.name, 2)
        assert isinstance(found, Losses)
        assert found.checkpoint["tokens"] == 2 * 4 * 32 and found.checkpoint["num_layers_pruned"] == 4
    _, dense = find(table, made[0], "dense-trained", "dense-trained", 0)
    assert isinstance(dense, Losses)
    assert dense.checkpoint["dropped"] == [] and len(dense.checkpoint["lm_loss"]) == 2


def test_half_of_the_text_is_of_a_test_texts_source_and_never_of_its_windows(
    table: Table, made: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = tmp_path / "numbered.txt"
    numbered.write_text("\n\n".join(f"{number} " * 8 for number in range(100, 200)))
    own = next(row for row in labelled_rows(table) if (row.kind, row.arm) == ("trained", "own-text"))
    tests = {**table.subject.tests, "outside": str(numbered)}
    subject = table.subject.model_copy(update={"tests": tests})
    row = own.model_copy(update={"subject": subject, "self_generated": 0.0, "test_sources": {"outside": 0.5}})
    tokenizer = load_tokenizer(Path(table.subject.model))

    def numbers(windows: torch.Tensor) -> list[set[str]]:
        return [set(re.findall(r"\b1\d\d\b", tokenizer.decode(window))) for window in windows]

    trained: list[torch.Tensor] = []

    def transfer(*, train: torch.Tensor, **_: Any) -> None:
        trained.append(train)
        raise RunError("seen")

    monkeypatch.setattr(work, "transfer_and_remove", transfer)
    monkeypatch.setattr(work, "plan_of", lambda row, store: None)
    with pytest.raises(RunError, match="seen"):
        compute(row, made[0], tmp_path)
    tested = set().union(*numbers(tokenize_windows(load_texts(str(numbered), "evaluation"), tokenizer, 32, 3)))
    found = numbers(trained[0])
    assert len(found) == 8 and found[:4] == [set()] * 4 and all(found[4:]), "the calibration text, then the other's"
    assert tested and min(set().union(*found)) > max(tested)
    with pytest.raises(RunError, match=r"wants 8000 windows behind the test windows of outside, \d+ are there"):
        compute(row.model_copy(update={"test_sources": {"outside": 1000.0}}), made[0], tmp_path)


def test_control_and_default_lose_the_same_layers(table: Table, made: tuple[Store, Path]) -> None:
    default, control = (find(table, made[0], "trained", arm, 2)[1] for arm in ("default", "control"))
    assert isinstance(default, Losses) and isinstance(control, Losses)
    assert default.checkpoint["dropped"] == control.checkpoint["dropped"]


def test_selection_is_judged_and_its_cost_counted(table: Table, made: tuple[Store, Path]) -> None:
    row, found = find(table, made[0], "selection", "sleb", 2)
    assert isinstance(found, Selected)
    # The method's own count, and the dense loss that `select_layers` takes on one validation window.
    passes = found.plan["settings"]["forward_passes"]
    assert passes == 6 + 5
    # A few tokens more may go through the model to find out how it is built.
    expected = passes * row.windows + 1
    assert expected <= found.window_passes < 1.1 * expected
    assert found.removal_loss != found.dense_loss


def test_a_backward_pass_counts_as_two_forward_ones(table: Table) -> None:
    model = load_model(Path(table.subject.model))
    ids = torch.zeros(4, 8, dtype=torch.int64)
    with work.counting_passes(model, 8) as passes:
        with torch.no_grad():
            model(input_ids=ids)
        assert passes() == pytest.approx(4)
        model(input_ids=ids)
        assert passes() == pytest.approx(4 + 3 * 4)
    model(input_ids=ids)
    assert passes() == pytest.approx(16), "counts no longer"


def test_a_greedy_search_serves_fewer_layers(table: Table, made: tuple[Store, Path]) -> None:
    row, _ = find(table, made[0], "curve", "sleb", 1)
    own, _ = find(table, made[0], "untrained", "sleb", table.drop)
    most, _ = find(table, made[0], "curve", "sleb", 3)
    assert row.selection() == own.selection() != most.selection(), "the table's own search, not the longest"
    chosen = made[0].lines[own.selection().key].outcome  # type: ignore[union-attr]
    assert isinstance(chosen, Selected)
    plan = plan_of(row, made[0])
    assert plan.dropped == (chosen.plan["settings"]["scores"]["order"][0],) and len(plan.kept) == 5


def test_a_row_says_what_it_needs(table: Table, tmp_path: Path) -> None:
    row = next(row for row in rows(table) if row.kind == "untrained")
    with pytest.raises(RunError, match=r"needs row 'selection, .*' first"):
        compute(row, Store(tmp_path / "empty.jsonl"), tmp_path)


def test_zero_shot_asks_the_kept_checkpoint_or_makes_it_again(
    table: Table, made: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def answer(folder: Path, tasks: tuple[str, ...], limit: int, role: str, recipe: object) -> ZeroShot:
        asked.append(folder)
        assert load_model(folder).config.num_hidden_layers == (4 if role == "pruned" else 6)
        return ZeroShot(role=role, tasks=tuple(TaskScore(task=name, metric="acc", correct=(True,)) for name in tasks))

    monkeypatch.setattr(work, "evaluate_zero_shot", answer)
    store, checkpoints = made
    default = next(row for row in rows(table) if (row.kind, row.arm) == ("zero-shot", "default"))
    assert isinstance(compute(default, store, checkpoints), Accuracies)
    compute(default, store, tmp_path / "gone")
    compute(next(row for row in rows(table) if (row.kind, row.arm) == ("zero-shot", "dense")), store, checkpoints)
    made_for = default.checkpoint()
    name = "-".join([made_for.key, digest(made_for), *map(str, store.dropped(made_for) or ())])
    assert asked == [checkpoints / name, tmp_path / "gone" / name, Path(table.subject.model)]
    kept = {row.key for row in rows(table) if row.keep}
    found = [path.name.split("-")[0] for path in checkpoints.iterdir()]
    assert sorted(found) == sorted(kept), "other checkpoints are not kept, and each once"


def test_a_row_killed_while_it_trains_goes_on(
    table: Table, made: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, whole = find(table, made[0], "trained", "control", 2)
    step, steps = Training._step, []

    def killed_at_the_second(self: Training, *rest: Any) -> None:
        steps.append(rest[-1])
        if len(steps) == 2:
            raise KeyboardInterrupt
        step(self, *rest)

    monkeypatch.setattr(work, "TRAINING", tmp_path / "training")
    monkeypatch.setattr(work, "recipe_of", lambda row: recipe_of(row).model_copy(update={"checkpoint_s": 0.0}))
    monkeypatch.setattr(Training, "_step", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compute(row, made[0], tmp_path / "checkpoints")
    found = compute(row, made[0], tmp_path / "checkpoints")
    assert steps == [0, 1, 1], "the first step is not made again"
    assert isinstance(found, Losses) and isinstance(whole, Losses)
    assert found.nll == whole.nll and found.checkpoint == whole.checkpoint
    assert not (tmp_path / "training").exists()


def test_a_row_killed_while_it_is_tested_does_not_train_again(
    table: Table, made: tuple[Store, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, whole = find(table, made[0], "trained", "control", 2)
    step, steps = Training._step, []

    def counted(self: Training, *rest: Any) -> None:
        steps.append(rest[-1])
        step(self, *rest)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "TRAINING", tmp_path / "training")
    monkeypatch.setattr(work, "recipe_of", lambda row: recipe_of(row).model_copy(update={"checkpoint_s": 0.0}))
    monkeypatch.setattr(Training, "_step", counted)
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(work, "evaluate_perplexity", killed)
        compute(row, made[0], tmp_path / "checkpoints")
    found = compute(row, made[0], tmp_path / "checkpoints")
    assert steps == [0, 1] and isinstance(found, Losses) and isinstance(whole, Losses)
    assert found.nll == whole.nll and found.checkpoint == whole.checkpoint
    assert not (tmp_path / "training").exists()


def test_an_interrupted_row_leaves_nothing_and_the_rest_goes_on(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = rows(table)[:2]
    code = (
        "import os, signal, sys; from pathlib import Path; from benchmarks.quality.store import Store;"
        "from benchmarks.quality.rows import Losses, Row;"
        "row = Row.model_validate_json(sys.argv[2]);"
        "row.kind == 'dense' and os.kill(os.getpid(), signal.SIGKILL);"
        "Store(Path(sys.argv[1])).add(row, Losses(nll={}, checkpoint={}, transfer_s=0), 1.0)"
    )
    path = tmp_path / "quality.jsonl"
    options = argparse.Namespace(quick=False, redo_stale=False)

    def command(row: Row, quick: bool) -> list[str]:
        return [sys.executable, "-c", code, str(path), row.model_dump_json()]

    monkeypatch.setattr(bench, "_command", command)
    assert bench.make_rows([first, second], Store(path), options) == 1
    assert list(Store(path).lines) == [second.key]
    assert "FAILED" in (said := capsys.readouterr().out) and "[1/2] dense" in said and "left in all" in said
    assert bench.make_rows([second], Store(path), options) == 0
    assert "0 rows made, 1 were there" in capsys.readouterr().out
