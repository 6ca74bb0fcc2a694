"""The texts that a run calibrates, trains and is judged on, as windows of the dense model's tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trsp_deploy.artifacts import RunFolder
from trsp_deploy.errors import TextError
from trsp_deploy.pipeline.dense_model import DenseModel
from trsp_deploy.pipeline.runs import seen_from
from trsp_deploy.reading import user_path
from trsp_deploy.recipe import Recipe, has_own_items
from trsp_deploy.stages.zeroshot import Task
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.reports.texts import TextReport, text_report
from trsp_deploy.tools.sources.choice_items import load_items
from trsp_deploy.tools.sources.kept_texts import is_small, keep_text, kept_text
from trsp_deploy.tools.sources.mixture import joined, mix_windows
from trsp_deploy.tools.sources.overlap import overlap, overlap_note
from trsp_deploy.tools.sources.texts import (
    DATASET_ID,
    PACKAGED_TEXTS,
    SHORT_NAMES,
    Role,
    Texts,
    documents_of,
    load_texts,
)
from trsp_deploy.tools.sources.windows import Extent, extent_of, known_windows

# Windows are drawn from so many times as much text as is read: all of WikiText-2, and a part of a corpus of gigabytes.
POOL = 16


class _Calibration(NamedTuple):
    """The calibration texts as windows (windows, context_length)."""

    train: torch.Tensor
    held_out: torch.Tensor
    extents: tuple[Extent, ...]  # of each text what windows are drawn from


class RunTexts:
    """Texts and choice tasks of a recipe; each is read once."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, say: Callable[[str], None], place: Path, model: DenseModel
    ) -> None:
        """place: that relative paths in the recipe are relative to; model: whose tokens windows are made of."""
        self._run = run
        self._recipe = recipe
        self._say = say
        self._place = place
        self._model = model

    def check_lengths(self) -> None:
        """Raise RecipeError where windows are longer than the model was made for."""
        wanted = {"calibration.context_length": self._recipe.calibration.context_length}
        if self._recipe.evaluation:
            wanted["evaluate.context_length"] = self._recipe.evaluate.context_length
        self._model.check_lengths(wanted)

    def find_evaluation(self) -> None:
        """Read every text that the model is judged on, without the model; raises TextError."""
        for name in self._recipe.evaluation:
            self.evaluation(name)

    def read_evaluation(self) -> None:
        """Read every text that the model is judged on as its tokens; raises TextError."""
        for name in self._recipe.evaluation:
            self.evaluation_windows(name)
            if note := overlap_note(name, self.overlap(name)):
                self._say(note)

    @cached_method
    def calibration(self) -> Texts:
        """The texts that the run trains and calibrates on, as one."""
        return joined(self._calibration_parts())

    def calibration_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to train on and windows held out, (windows, context_length) each."""
        return self._read.train, self._read.held_out

    @cached_method
    def evaluation(self, name: str) -> Texts:
        """The text that quality is measured on by the recipe's name for it."""
        return self._text(self._recipe.evaluation[name], "evaluation", name)

    @cached_method
    def evaluation_windows(self, name: str) -> tuple[torch.Tensor, np.ndarray | None]:
        """(windows, context_length) token ids of an evaluation text, and which document each of them belongs to."""
        settings = self._recipe.evaluate
        self._model.check_lengths({"evaluate.context_length": settings.context_length})
        texts = self.evaluation(name)
        limit = None if settings.max_tokens is None else max(1, settings.max_tokens // settings.context_length)
        windows = self._windows(texts, settings.context_length, limit, f"--eval {name}")
        return windows, documents_of(texts, self._model.tokenizer(), windows.numel())

    @cached_method
    def overlap(self, name: str) -> float:
        """Share of an evaluation text that stands in the texts that the run calibrates and trains on."""
        return overlap(self.evaluation(name), self._calibration_parts())

    @cached_method
    def tasks(self) -> tuple[Task, ...]:
        """The choice tasks that the model is judged on; of a file of one's own items these. Raises TextError."""
        return tuple(
            self._read_or_kept(task, f"task-{number}", "zero-shot task", load_items) if has_own_items(task) else task
            for number, task in enumerate(self._recipe.evaluate.tasks, start=1)
        )

    def reports(self) -> tuple[TextReport, ...]:
        """Which texts the run's figures rest on."""
        named = self._recipe.public.calibration.texts
        calibration = zip(named, self._calibration_parts(), self._read.extents, strict=True)
        found = [text_report(name, "calibration", text, read) for name, text, read in calibration]
        for name in self._recipe.evaluation:
            read = extent_of(self.evaluation_windows(name)[0], self._model.tokenizer())
            found.append(text_report(name, "evaluation", self.evaluation(name), read, self.overlap(name)))
        return tuple(found)

    def keep_calibration(self) -> None:
        """Leave copies of the calibration texts in the run, for a machine that has not got them."""
        named = self._recipe.calibration.texts
        for number, (name, text) in enumerate(zip(named, self._calibration_parts(), strict=True), start=1):
            self._keep(name, text, f"calibration-{number}")

    def keep_evaluation(self) -> None:
        """The same with the texts that the model is judged on."""
        for called in self._recipe.evaluation:
            self._keep_evaluation(called)
        self._keep_items()

    def keep_evaluation_at_hand(self) -> None:
        """The same with those of them that are on this machine; a hub's are read when the model is judged."""
        for called, name in self._recipe.evaluation.items():
            found = seen_from(self._place, name, SHORT_NAMES)
            if found in PACKAGED_TEXTS or self._is_at_hand(found):
                with contextlib.suppress(TextError):  # said where the model is judged
                    self._keep_evaluation(called)
        with contextlib.suppress(TextError):
            self._keep_items()

    @cached_method
    def _calibration_parts(self) -> tuple[Texts, ...]:
        named = self._recipe.calibration.texts
        return tuple(self._text(name, "calibration", str(number)) for number, name in enumerate(named, start=1))

    @functools.cached_property
    def _read(self) -> _Calibration:
        settings = self._recipe.calibration
        self._model.check_lengths({"calibration.context_length": settings.context_length})
        drawn_from = POOL * (settings.max_windows + settings.validation_windows)
        self.calibration()  # texts that cannot go together are said before any is tokenised
        texts = [self._windows(text, settings.context_length, drawn_from) for text in self._calibration_parts()]
        for text, windows in zip(self._calibration_parts(), texts, strict=True):
            if len(windows) == 1:
                self._say(
                    f"calibration text '{text.name}': holds one window of {settings.context_length} tokens alone, "
                    "which is trained on and held out too, so that the losses on it tell nothing"
                )
            if len(windows) == drawn_from:
                self._say(
                    f"calibration text '{text.name}': windows are drawn from its first {windows.numel():,} tokens alone"
                )
        train, held_out = mix_windows(texts, settings.max_windows, settings.validation_windows, self._recipe.seed)
        return _Calibration(train, held_out, tuple(extent_of(windows, self._model.tokenizer()) for windows in texts))

    def _windows(self, text: Texts, length: int, most: int | None, option: str = "--calibration") -> torch.Tensor:
        """Windows (windows, length) of a text, `most` at most; raises ModelError for a token that the model lacks."""
        return known_windows(text, self._model.tokenizer(), length, most, option, self._model.vocabulary())

    def _text(self, name: str, role: Role, called: str) -> Texts:
        return self._read_or_kept(name, f"{role}-{called}", f"{role} text", lambda found: load_texts(found, role))

    def _read_or_kept(self, name: str, called: str, what: str, read: Callable[[str], Texts]) -> Texts:
        """A text of the recipe: as with the model, what is on this machine is read anew."""
        found, copy = seen_from(self._place, name, SHORT_NAMES), self._run.layout.text(called)
        kept = None if self._is_at_hand(found) else kept_text(copy, name)
        if kept is None:
            return read(found)
        if Path(kept.origin).is_absolute():
            self._say(f"{what} '{name}': no such file here; going on with the run's copy of it")
        return kept

    def _is_at_hand(self, text: str) -> bool:
        """Whether a text is a file here, or a dataset's folder, which is found from the working directory alone."""
        if text in SHORT_NAMES:
            return False
        dataset = DATASET_ID.fullmatch(text) if self._place == Path.cwd() else None
        return user_path(text).is_file() or (dataset is not None and Path(dataset["repo"]).is_dir())

    def _keep_evaluation(self, called: str) -> None:
        self._keep(self._recipe.evaluation[called], self.evaluation(called), f"evaluation-{called}")

    def _keep_items(self) -> None:
        for number, (name, task) in enumerate(zip(self._recipe.evaluate.tasks, self.tasks(), strict=True), start=1):
            if isinstance(task, Texts):
                self._keep(name, task, f"task-{number}")

    def _keep(self, name: str, text: Texts, called: str) -> None:
        copy = self._run.layout.text(called)
        kept = kept_text(copy, name)
        if not self._run.main or (kept is not None and kept.fingerprint == text.fingerprint):
            return
        if is_small(text):
            self._run.outdate_manifest()
            keep_text(copy, name, text)
            return
        self._say(f"{name}: too large for a copy in the run; where the run is taken, the text has to be as well")
        if copy.exists():  # of what it was before
            self._run.outdate_manifest()
            copy.unlink()
