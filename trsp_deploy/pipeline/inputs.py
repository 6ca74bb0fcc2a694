"""What a run starts from: the dense model as the folder `dense/`, and the texts as windows of its tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from trsp_deploy.artifacts import Made, RunFolder, Step, steps, writing
from trsp_deploy.decoder import known_positions, load_config, load_tokenizer, meta_model
from trsp_deploy.errors import RecipeError, TextError
from trsp_deploy.launch import launched_as_several
from trsp_deploy.pipeline.runs import engine_seen_from, plain_name, seen_from
from trsp_deploy.reading import user_path
from trsp_deploy.recipe import BenchSettings, Recipe, has_own_items
from trsp_deploy.results import Role
from trsp_deploy.stages.bench import check_positions
from trsp_deploy.stages.zeroshot import Task
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.measuring.subjects import positions_of
from trsp_deploy.tools.reports.texts import TextReport, text_report
from trsp_deploy.tools.sources.choice_items import load_items
from trsp_deploy.tools.sources.kept_texts import is_small, keep_text, kept_text
from trsp_deploy.tools.sources.mixture import joined, mix_windows
from trsp_deploy.tools.sources.model_folders import copy_model, fingerprint_model
from trsp_deploy.tools.sources.models import ModelSource, model_config, resolve_model
from trsp_deploy.tools.sources.names import SHORT_NAMES, is_model_folder
from trsp_deploy.tools.sources.overlap import overlap, overlap_note
from trsp_deploy.tools.sources.texts import DATASET_ID, PACKAGED_TEXTS, Texts, documents_of, load_texts
from trsp_deploy.tools.sources.texts import SHORT_NAMES as TEXT_NAMES
from trsp_deploy.tools.sources.texts import Role as TextRole
from trsp_deploy.tools.sources.windows import Extent, extent_of, known_windows

# Windows are drawn from so many times as much text as is read: all of WikiText-2, and a part of a corpus of gigabytes.
POOL = 16


class _Calibration(NamedTuple):
    """The calibration texts as windows (windows, context_length)."""

    train: torch.Tensor
    held_out: torch.Tensor
    extents: tuple[Extent, ...]  # of each text what windows are drawn from


class Inputs:
    """Model and texts of a recipe; each is read once."""

    def __init__(self, run: RunFolder, recipe: Recipe, say: Callable[[str], None], place: Path | None = None) -> None:
        self.run = run
        self.recipe = recipe
        self.say = say
        self.place = place or Path.cwd()  # that relative paths in the recipe are relative to

    @property
    def model(self) -> str:
        """The recipe's model as this process finds it."""
        return seen_from(self.place, self.recipe.model, SHORT_NAMES)

    @property
    def shown_model(self) -> str:
        """The recipe's model as reports call it."""
        shown = self.recipe.public.model
        return shown if PurePath(shown).name not in ("", "..") else plain_name(shown, self.place)

    def engine(self, name: str) -> str:
        """One of the recipe's engine specs as this process finds it."""
        return engine_seen_from(self.place, name)

    def path(self, role: Role) -> Path:
        """The role's Hugging Face folder, there or not."""
        return self.run.layout.model(role)

    @cached_method
    def dense(self) -> ModelSource:
        """The dense model, as the folder `dense/`."""
        # Downloaded or unpacked by the main process, which alone may have the model's folder.
        found: tuple[ModelSource, str] = self.run.from_main(self._source if self.run.main else None)
        source, sha256 = found
        self.run.do(self.dense_step(lambda: {"model": sha256}), lambda: self._copy_dense(source), ModelSource)
        return source

    def dense_step(self, inputs: Callable[[], Mapping[str, str]]) -> Step:
        """inputs: the fingerprint of the model, which takes reading it, by the name `model`."""
        return Step(steps.DENSE, lambda: {"model": self.recipe.model}, inputs, self.made("dense").path)

    def model_at_hand(self) -> dict[str, str] | None:
        """The fingerprint of the model as it is now, by the name `model`, where it is a folder here; else None.

        Reads it, once in a process. Of several machines only the main process's need have it, so that it is found to
        be another when it is asked for. Raises ModelError for one that cannot be used.
        """
        return {"model": self._source[1]} if is_model_folder(self.model) and not launched_as_several() else None

    def is_of_another_model(self) -> bool:
        """Whether the run has a copy of another model than lies under the name by now; raises ModelError."""
        record = self.run.record(steps.DENSE)
        now = None if record is None else self.model_at_hand()
        return record is not None and now is not None and record.inputs != now

    def readable(self) -> Path:
        """A folder with the dense model's config and tokenizer. Of a model that `dense/` is still to be made of it is
        its own, for what is refused by them leaves what the run has."""
        if launched_as_several():  # of several machines the main process's alone may have the model
            self.dense()
            return self.path("dense")
        return Path(self._source[0].path)

    def made(self, role: Role) -> Made:
        """The role's Hugging Face folder, as an input of what is made of it."""
        return Made(steps.model(role), self.run.layout.below(self.path(role)))

    def config(self) -> Any:
        """transformers' config of the dense model, before the model is asked for; raises ModelError."""
        kept = self._kept_model()
        return model_config(self.model, self.say) if kept is None else load_config(self.path("dense"))

    @functools.cached_property
    def _source(self) -> tuple[ModelSource, str]:
        """Where the dense model is, and its fingerprint.

        A folder on this machine may be another by now. All else is what the run has of it, which may have been taken
        to a machine without such a folder, and without a network.
        """
        kept = self._kept_model()
        if kept is None:
            source = resolve_model(self.model, self.say)
            return source, fingerprint_model(Path(source.path))
        source, sha256 = kept
        if source.kind == "folder":
            self.say(f"model '{self.recipe.model}': no such folder here; going on with the run's copy of it")
        here = resolve_model(str(self.path("dense")), self.say)
        return source.model_copy(update={"path": here.path}), sha256

    def _kept_model(self) -> tuple[ModelSource, str] | None:
        """What the run wrote down of the model that it has in `dense/`; None where that is to be compared, or made."""
        record = self.run.record(steps.DENSE)
        if record is None or record.settings != {"model": self.recipe.model} or is_model_folder(self.model):
            return None
        try:
            source = ModelSource.model_validate(record.result)
        except ValidationError:  # of an earlier version
            return None
        return (source, record.inputs["model"]) if self.run.holds(record) else None

    def check_lengths(self) -> None:
        """Raise RecipeError where windows or prompts are longer than the model was made for."""
        self.check_context_lengths()
        self.check_bench(self.recipe.bench)

    def check_context_lengths(self) -> None:
        """The same of windows alone."""
        wanted = {"calibration.context_length": self.recipe.calibration.context_length}
        if self.recipe.evaluation:
            wanted["evaluate.context_length"] = self.recipe.evaluate.context_length
        self._check(wanted)

    def check_bench(self, settings: BenchSettings) -> None:
        """Raise RecipeError where a measurement's prompt and new tokens are more than the model was made for."""
        check_positions(settings, positions_of(self.readable()), self.recipe.public.model)

    def find_evaluation(self) -> None:
        """Read every text that the model is judged on, without the model; raises TextError."""
        for name in self.recipe.evaluation:
            self.evaluation_texts(name)

    def read_evaluation(self) -> None:
        """Read every text that the model is judged on as its tokens; raises TextError."""
        for name in self.recipe.evaluation:
            self.evaluation_windows(name)
            if note := overlap_note(name, self.overlap(name)):
                self.say(note)

    @cached_method
    def overlap(self, name: str) -> float:
        """Share of an evaluation text that stands in the texts that the run calibrates and trains on."""
        return overlap(self.evaluation_texts(name), self._calibration())

    def text_reports(self) -> tuple[TextReport, ...]:
        """Which texts the run's figures rest on."""
        calibration = zip(self.recipe.public.calibration.texts, self._calibration(), self._read.extents, strict=True)
        found = [text_report(name, "calibration", text, read) for name, text, read in calibration]
        for name in self.recipe.evaluation:
            read = extent_of(self.evaluation_windows(name)[0], self.tokenizer())
            found.append(text_report(name, "evaluation", self.evaluation_texts(name), read, self.overlap(name)))
        return tuple(found)

    def _check(self, wanted: dict[str, int]) -> None:
        positions = known_positions(self.readable())
        longer = [name for name, length in wanted.items() if positions is not None and length > positions]
        if longer:
            raise RecipeError(
                f"{longer[0]} {wanted[longer[0]]}: {self.recipe.model} has {positions} positions; "
                + " ".join(f"--set {name}={positions}" for name in longer)
            )

    def _copy_dense(self, source: ModelSource) -> ModelSource:
        with writing(self.path("dense")) as partial:
            copy_model(Path(source.path), partial)
        return source.model_copy(update={"path": "dense"})  # the folder that it came from is no part of a run

    @cached_method
    def num_layers(self) -> int:
        """Number of layers of the dense model, as its config has it: a model is not made `dense/` to be counted."""
        if launched_as_several():
            self.dense()  # of several machines the main process's alone may have the model
        count: int = self.config().num_hidden_layers
        return count

    @cached_method
    def tokenizer(self) -> Any:
        """Tokenizer of the dense model."""
        return load_tokenizer(self.readable())

    @cached_method
    def calibration_texts(self) -> Texts:
        """The texts that the run trains and calibrates on, as one."""
        return joined(self._calibration())

    @cached_method
    def _calibration(self) -> tuple[Texts, ...]:
        named = self.recipe.calibration.texts
        return tuple(self._text(name, "calibration", str(number)) for number, name in enumerate(named, start=1))

    def calibration_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to train on and windows held out, (windows, context_length) each."""
        return self._read.train, self._read.held_out

    @functools.cached_property
    def _read(self) -> _Calibration:
        settings = self.recipe.calibration
        self._check({"calibration.context_length": settings.context_length})
        drawn_from = POOL * (settings.max_windows + settings.validation_windows)
        self.calibration_texts()  # texts that cannot go together are said before any is tokenised
        texts = [self._windows(text, settings.context_length, drawn_from) for text in self._calibration()]
        for text, windows in zip(self._calibration(), texts, strict=True):
            if len(windows) == 1:
                self.say(
                    f"calibration text '{text.name}': holds one window of {settings.context_length} tokens alone, "
                    "which is trained on and held out too, so that the losses on it tell nothing"
                )
            if len(windows) == drawn_from:
                self.say(
                    f"calibration text '{text.name}': windows are drawn from its first {windows.numel():,} tokens alone"
                )
        train, held_out = mix_windows(texts, settings.max_windows, settings.validation_windows, self.recipe.seed)
        return _Calibration(train, held_out, tuple(extent_of(windows, self.tokenizer()) for windows in texts))

    @cached_method
    def evaluation_texts(self, name: str) -> Texts:
        """The texts that quality is measured on, by the recipe's names for them."""
        return self._text(self.recipe.evaluation[name], "evaluation", name)

    def _text(self, name: str, role: TextRole, called: str) -> Texts:
        return self._read_or_kept(name, f"{role}-{called}", f"{role} text", lambda found: load_texts(found, role))

    def _read_or_kept(self, name: str, called: str, what: str, read: Callable[[str], Texts]) -> Texts:
        """A text of the recipe: as with the model, what is on this machine is read anew."""
        found, copy = seen_from(self.place, name, TEXT_NAMES), self.run.layout.text(called)
        kept = None if self._is_at_hand(found) else kept_text(copy, name)
        if kept is None:
            return read(found)
        if Path(kept.origin).is_absolute():
            self.say(f"{what} '{name}': no such file here; going on with the run's copy of it")
        return kept

    @cached_method
    def tasks(self) -> tuple[Task, ...]:
        """The choice tasks that the model is judged on; of a file of one's own items these. Raises TextError."""
        return tuple(
            self._read_or_kept(task, f"task-{number}", "zero-shot task", load_items) if has_own_items(task) else task
            for number, task in enumerate(self.recipe.evaluate.tasks, start=1)
        )

    def _is_at_hand(self, text: str) -> bool:
        """Whether a text is a file here, or a dataset's folder, which is found from the working directory alone."""
        if text in TEXT_NAMES:
            return False
        dataset = DATASET_ID.fullmatch(text) if self.place == Path.cwd() else None
        return user_path(text).is_file() or (dataset is not None and Path(dataset["repo"]).is_dir())

    def keep_calibration(self) -> None:
        """Leave copies of the calibration texts in the run, for a machine that has not got them."""
        for number, (name, text) in enumerate(zip(self.recipe.calibration.texts, self._calibration(), strict=True), 1):
            self._keep(name, text, f"calibration-{number}")

    def keep_evaluation(self) -> None:
        """The same with the texts that the model is judged on."""
        for called in self.recipe.evaluation:
            self._keep_evaluation(called)
        self._keep_items()

    def keep_evaluation_at_hand(self) -> None:
        """The same with those of them that are on this machine; a hub's are read when the model is judged."""
        for called, name in self.recipe.evaluation.items():
            found = seen_from(self.place, name, TEXT_NAMES)
            if found in PACKAGED_TEXTS or self._is_at_hand(found):
                with contextlib.suppress(TextError):  # said where the model is judged
                    self._keep_evaluation(called)
        with contextlib.suppress(TextError):
            self._keep_items()

    def _keep_evaluation(self, called: str) -> None:
        self._keep(self.recipe.evaluation[called], self.evaluation_texts(called), f"evaluation-{called}")

    def _keep_items(self) -> None:
        for number, (name, task) in enumerate(zip(self.recipe.evaluate.tasks, self.tasks(), strict=True), start=1):
            if isinstance(task, Texts):
                self._keep(name, task, f"task-{number}")

    def _keep(self, name: str, text: Texts, called: str) -> None:
        copy = self.run.layout.text(called)
        kept = kept_text(copy, name)
        if not self.run.main or (kept is not None and kept.fingerprint == text.fingerprint):
            return
        if is_small(text):
            self.run.outdate_manifest()
            keep_text(copy, name, text)
            return
        self.say(f"{name}: too large for a copy in the run; where the run is taken, the text has to be as well")
        if copy.exists():  # of what it was before
            self.run.outdate_manifest()
            copy.unlink()

    @cached_method
    def evaluation_windows(self, name: str) -> tuple[torch.Tensor, np.ndarray | None]:
        """(windows, context_length) token ids of an evaluation text, and which document each of them belongs to."""
        settings = self.recipe.evaluate
        self._check({"evaluate.context_length": settings.context_length})
        texts = self.evaluation_texts(name)
        limit = None if settings.max_tokens is None else max(1, settings.max_tokens // settings.context_length)
        windows = self._windows(texts, settings.context_length, limit, f"--eval {name}")
        return windows, documents_of(texts, self.tokenizer(), windows.numel())

    def _windows(self, text: Texts, length: int, most: int | None, option: str = "--calibration") -> torch.Tensor:
        """Windows (windows, length) of a text, `most` at most; raises ModelError for a token that the model lacks."""
        return known_windows(text, self.tokenizer(), length, most, option, self._vocabulary())

    @cached_method
    def _vocabulary(self) -> int:
        """Number of tokens that the dense model has embeddings for."""
        embeddings: Any = meta_model(load_config(self.readable())).get_input_embeddings()
        return int(embeddings.num_embeddings)
