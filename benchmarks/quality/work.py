"""How a row is made: load, call the library, keep the raw numbers."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.quality.rows import Accuracies, Losses, Outcome, Row, Selected, recipe_of
from benchmarks.quality.store import Store, digest, work_digest
from trsp_deploy.artifacts import writing
from trsp_deploy.decoder import decoder_layers, layer_input, load_model, load_tokenizer
from trsp_deploy.errors import RunError
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.stages.evaluate import evaluate_perplexity
from trsp_deploy.stages.selection import select_layers
from trsp_deploy.stages.transfer import transfer_and_remove
from trsp_deploy.stages.zeroshot import evaluate_zero_shot
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.plan import PruningPlan, complement
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.sources.models import ModelSource, resolve_model
from trsp_deploy.tools.sources.texts import documents_of, jsonl, load_texts, tokenize_windows
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.self_calibration import self_generated_windows, write_texts
from trsp_deploy.tools.training.shared import TRAINING_DTYPES, mean_loss, pick_device

DECIMALS = 5  # of a loss in nats
SELF_GENERATED = Path("runs/quality/self-generated")  # texts that the dense model wrote
TRAINING = Path("runs/quality/training")  # what a killed row's training goes on from


@dataclass(frozen=True)
class Calibration:
    """Windows (windows, context_length) int64, and where they came from."""

    train: torch.Tensor  # in the seed's order
    validation: torch.Tensor  # the last of the text, so of other documents; the same for every row
    origin: str


def compute(row: Row, store: Store, checkpoints: Path) -> Outcome:
    """Make one row. `store` holds the rows that it needs; raises RunError when it does not.

    checkpoints: folder of the models that zero-shot rows ask.
    """
    with quiet_libraries():
        return MAKERS[row.work](row, store, checkpoints)


def _select(row: Row, store: Store, checkpoints: Path) -> Selected:
    recipe, calibration = recipe_of(row), _calibration(row)
    dense = Path(_source(row.subject.model).path)
    model = load_model(dense, pick_device(recipe), TRAINING_DTYPES[recipe.weights])
    began = time.perf_counter()
    with counting_passes(model, row.subject.context_length) as passes:
        plan = select_layers(
            model, calibration.train[: row.windows], calibration.validation[:1], row.drop, recipe, calibration.origin
        )
    elapsed = time.perf_counter() - began
    with LayerGates(model) as gates:
        dense_loss = mean_loss(model, calibration.validation, recipe.plan.batch_size)
        gates.closed.update(plan.dropped)
        removal_loss = mean_loss(model, calibration.validation, recipe.plan.batch_size)
    return Selected(
        plan=plan.model_dump(mode="json"),
        dense_loss=round(dense_loss, DECIMALS),
        removal_loss=round(removal_loss, DECIMALS),
        window_passes=round(passes(), 2),
        select_s=round(elapsed, 1),
    )


def _losses(row: Row, store: Store, checkpoints: Path) -> Losses:
    kept = _checkpoint(row, store, checkpoints)
    with tempfile.TemporaryDirectory(prefix="trsp-quality-") as scratch:
        folder = kept if row.keep else Path(scratch) / "model"
        began = time.perf_counter()
        checkpoint = _make_model(row, store, folder)
        elapsed = time.perf_counter() - began
        found = Losses(
            nll=_test_losses(row, _folder(row, folder)),
            checkpoint=checkpoint.model_dump(mode="json") if checkpoint else {},
            transfer_s=round(elapsed, 1),
        )
    _training(row, store).remove()  # not before: a row that is killed while it is tested goes on from there too
    return found


def _answers(row: Row, store: Store, checkpoints: Path) -> Accuracies:
    made = row.checkpoint()
    folder = _checkpoint(made, store, checkpoints)
    if not folder.is_dir():  # never made here, or deleted: it is made again
        _make_model(made, store, folder)
        _training(made, store).remove()
    score = evaluate_zero_shot(_folder(made, folder), row.tasks, row.items, row.role, recipe_of(row))
    return Accuracies(score=score)


def _checkpoint(row: Row, store: Store, checkpoints: Path) -> Path:
    """Where a row's model, or its training, is kept: under another name for other code, settings or layers."""
    layers = "-".join(map(str, store.dropped(row) or ()))
    return checkpoints / "-".join(part for part in (row.key, digest(row), layers) if part)


def _training(row: Row, store: Store) -> Checkpoints:
    """What a row's training goes on from where it was killed."""
    folder = _checkpoint(row, store, TRAINING)
    return Checkpoints(folder, folder.name, recipe_of(row).checkpoint_s)


MAKERS: dict[str, Callable[[Row, Store, Path], Outcome]] = {
    "selection": _select,
    "losses": _losses,
    "zero-shot": _answers,
}


def plan_of(row: Row, store: Store) -> PruningPlan:
    """The layers that go, cut from the selection row's plan; an empty plan for the dense model."""
    chosen = row.selection()
    if chosen is None:
        return _empty_plan(row)
    line, dropped = store.get(chosen), store.dropped(row)
    if line is None or not isinstance(line.outcome, Selected) or dropped is None:
        raise RunError(f"row '{row.title}': needs row '{chosen.title}' first")
    plan = PruningPlan.model_validate(line.outcome.plan)
    return plan.model_copy(update={"dropped": dropped, "kept": complement(dropped, plan.num_layers)})


@contextlib.contextmanager
def counting_passes(model: PreTrainedModel, context_length: int) -> Iterator[Callable[[], float]]:
    """Count what a selection costs, whatever its code: passes of `context_length` tokens through all layers.

    A pass that a gradient is wanted of counts 3: a backward pass costs about two forward ones. Layers that are skipped
    count as passed, for every method alike.
    """
    layers = decoder_layers(model)
    total = 0.0

    def count(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        tokens = layer_input(args, kwargs).shape[:2].numel()  # (batch, sequence)
        total += tokens / context_length * (3 if torch.is_grad_enabled() else 1) / len(layers)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(count, with_kwargs=True))
        yield lambda: total


def _make_model(row: Row, store: Store, out: Path) -> PrunedCheckpoint | None:
    """Write the row's model to `out`; None for the dense model, which is where it is.

    What its training goes on from is left.
    """
    if not row.transfer:
        return None
    recipe, calibration = recipe_of(row), _calibration(row)
    source = _source(row.subject.model)
    windows = row.steps * recipe.transfer.batch_size or row.subject.fit_windows
    own = _self_generated(row, self_generated_windows(row.self_generated, windows, len(calibration.train)))
    others = [_same_source(row, name, round(share * windows)) for name, share in row.test_sources.items()]
    beside = torch.cat([own, *others])
    with writing(out) as partial:
        return transfer_and_remove(
            dense=Path(source.path),
            source=source,
            plan=plan_of(row, store),
            train=torch.cat([calibration.train[: windows - len(beside)], beside]),
            validation=calibration.validation,
            recipe=recipe,
            out=partial,
            checkpoints=_training(row, store),
        )


def _self_generated(row: Row, count: int) -> torch.Tensor:
    """Windows (count, context_length) of text by the dense model with the row's seed; written once for all arms."""
    subject = row.subject
    if not count:
        return torch.empty(0, subject.context_length, dtype=torch.int64)
    recipe, folder = recipe_of(row), Path(_source(subject.model).path)
    made_by = f"{recipe.weights}-{work_digest('losses')}"
    name = f"{Path(subject.model).name}-{count}x{subject.context_length}-seed{row.seed}-{made_by}"
    kept, tokenizer = SELF_GENERATED / f"{name}.jsonl", load_tokenizer(folder)
    if not kept.is_file():
        model = load_model(folder, pick_device(recipe), TRAINING_DTYPES[recipe.weights])
        documents = write_texts(model, tokenizer, count * subject.context_length, subject.context_length, row.seed)
        with writing(kept) as partial:
            partial.write_text(jsonl(documents), encoding="utf-8")
    return tokenize_windows(load_texts(str(kept), "calibration"), tokenizer, subject.context_length, count)


def _same_source(row: Row, name: str, count: int) -> torch.Tensor:
    """Windows (count, context_length) of the documents behind those that a test text's windows are cut from.

    Which of them, and their order, are the seed's. Raises RunError where there are fewer.
    """
    subject, tokenizer = row.subject, load_tokenizer(Path(_source(row.subject.model).path))
    texts = load_texts(subject.tests[name], "calibration")
    tested = documents_of(texts, tokenizer, subject.test_windows * subject.test_context)
    if tested is None or len(texts.documents) == tested[-1] + 1:
        raise RunError(f"row '{row.title}': test text {name} has no documents behind its test windows")
    left = texts.model_copy(update={"documents": texts.documents[tested[-1] + 1 :]})
    windows = tokenize_windows(left, tokenizer, subject.context_length)
    if len(windows) < count:
        raise RunError(
            f"row '{row.title}': wants {count} windows behind the test windows of {name}, {len(windows)} are there"
        )
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(row.seed))[:count]]


def _folder(row: Row, made: Path) -> Path:
    return made if row.transfer else Path(_source(row.subject.model).path)


def _empty_plan(row: Row) -> PruningPlan:
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(_source(row.subject.model).path, local_files_only=True).num_hidden_layers
    return PruningPlan(
        model=row.subject.model,
        num_layers=layers,
        dropped=(),
        kept=tuple(range(layers)),
        method="none",
        seed=row.seed,
        settings={},
        calibration=row.subject.calibration,
    )


def _test_losses(row: Row, folder: Path) -> dict[str, tuple[float, ...]]:
    subject, recipe = row.subject, recipe_of(row)
    tokenizer = load_tokenizer(folder)
    losses = {}
    for name, source in subject.tests.items():
        texts = load_texts(source, "evaluation")
        windows = tokenize_windows(texts, tokenizer, subject.test_context, subject.test_windows, f"test text {name}")
        found = evaluate_perplexity(folder, windows, name, row.role, texts.origin, recipe)
        losses[name] = tuple(round(value, DECIMALS) for value in found.nll)
    return losses


@functools.cache
def _source(model: str) -> ModelSource:
    return resolve_model(model, lambda line: None)


def _calibration(row: Row) -> Calibration:
    subject = row.subject
    texts = load_texts(subject.calibration, "calibration")
    tokenizer = load_tokenizer(Path(_source(subject.model).path))
    windows = tokenize_windows(texts, tokenizer, subject.context_length, subject.pool_windows)
    pool, validation = windows[: -subject.validation_windows], windows[-subject.validation_windows :]
    generator = torch.Generator().manual_seed(row.seed)
    train = pool[torch.randperm(len(pool), generator=generator)]
    return Calibration(train, validation, texts.origin)
