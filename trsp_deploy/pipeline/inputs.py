"""What a run starts from: the dense model as the folder `dense/`, and the texts as windows of its tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from trsp_deploy.artifacts import RunFolder, writing
from trsp_deploy.decoder import known_positions, load_config, load_tokenizer
from trsp_deploy.errors import RecipeError
from trsp_deploy.pipeline.runs import plain_name, seen_from
from trsp_deploy.recipe import BenchSettings, Recipe, Strict
from trsp_deploy.results import Role
from trsp_deploy.stages.bench import check_positions
from trsp_deploy.tools.measuring.subjects import positions_of
from trsp_deploy.tools.sources.mixture import joined, mix_windows
from trsp_deploy.tools.sources.model_folders import copy_model, fingerprint_model
from trsp_deploy.tools.sources.models import ModelSource, resolve_model
from trsp_deploy.tools.sources.names import SHORT_NAMES
from trsp_deploy.tools.sources.texts import SHORT_NAMES as TEXT_NAMES
from trsp_deploy.tools.sources.texts import Texts, documents_of, load_texts, tokenize_windows

# Windows are drawn from so many times as much text as is read: all of WikiText-2, and a part of a corpus of gigabytes.
POOL = 16


class Done(Strict):
    """Result of a step whose only result is its files."""


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
        return seen_from(self.place, name) if name.endswith((".yaml", ".yml")) else name

    def path(self, role: Role) -> Path:
        """The role's Hugging Face folder, there or not."""
        return self.run.layout.model(role)

    @functools.cache
    def dense(self) -> ModelSource:
        """The dense model, as the folder `dense/`."""
        source = self._found_by_main(lambda: resolve_model(self.model, self.say))
        self.run.step(
            "dense",
            lambda: self._copy_dense(source),
            Done,
            settings={"model": self.recipe.model},
            # Of several machines the main process's alone has that folder.
            inputs={"model": fingerprint_model(Path(source.path)) if self.run.main else ""},
            outputs=["dense"],
        )
        return source

    def check_lengths(self) -> None:
        """Raise RecipeError where windows or prompts are longer than the model was made for."""
        wanted = {"calibration.context_length": self.recipe.calibration.context_length}
        if self.recipe.evaluation:
            wanted["evaluate.context_length"] = self.recipe.evaluate.context_length
        self._check(wanted)
        self.check_bench(self.recipe.bench)

    def check_bench(self, settings: BenchSettings) -> None:
        """Raise RecipeError where a measurement's prompt and new tokens are more than the model was made for."""
        self.dense()
        check_positions(settings, positions_of(self.path("dense")), self.recipe.public.model)

    def find_evaluation(self) -> None:
        """Read every text that the model is judged on, without the model; raises TextError."""
        for name in self.recipe.evaluation:
            self.evaluation_texts(name)

    def read_evaluation(self) -> None:
        """Read every text that the model is judged on as its tokens; raises TextError."""
        for name in self.recipe.evaluation:
            self.evaluation_windows(name)
            if self.is_calibration(name):
                self.say(f"evaluation '{name}' is the calibration text: its perplexity flatters what learned from it")

    def is_calibration(self, name: str) -> bool:
        """Whether an evaluation text is one that the run calibrates and trains on."""
        return self.evaluation_texts(name).fingerprint in {text.fingerprint for text in self._calibration()}

    def _check(self, wanted: dict[str, int]) -> None:
        self.dense()
        positions = known_positions(self.path("dense"))
        longer = [name for name, length in wanted.items() if positions is not None and length > positions]
        if longer:
            raise RecipeError(
                f"{longer[0]} {wanted[longer[0]]}: {self.recipe.model} has {positions} positions; "
                + " ".join(f"--set {name}={positions}" for name in longer)
            )

    def _found_by_main(self, find: Callable[[], ModelSource]) -> ModelSource:
        """What may have to be downloaded or unpacked is so once, by the main process."""
        source: ModelSource = self.run.from_main(find() if self.run.main else None)
        return source

    def _copy_dense(self, source: ModelSource) -> Done:
        with writing(self.path("dense")) as partial:
            copy_model(Path(source.path), partial)
        return Done()

    @functools.cache
    def num_layers(self) -> int:
        """Number of layers of the dense model."""
        self.dense()
        count: int = load_config(self.path("dense")).num_hidden_layers
        return count

    @functools.cache
    def tokenizer(self) -> Any:
        """Tokenizer of the dense model."""
        self.dense()
        return load_tokenizer(self.path("dense"))

    @functools.cache
    def calibration_texts(self) -> Texts:
        """The texts that the run trains and calibrates on, as one."""
        return joined(self._calibration())

    @functools.cache
    def _calibration(self) -> tuple[Texts, ...]:
        named = self.recipe.calibration.texts
        return tuple(load_texts(seen_from(self.place, name, TEXT_NAMES), "calibration") for name in named)

    @functools.cache
    def calibration_windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to train on and windows held out, (windows, context_length) each."""
        settings = self.recipe.calibration
        self._check({"calibration.context_length": settings.context_length})
        drawn_from = POOL * (settings.max_windows + settings.validation_windows)
        self.calibration_texts()  # texts that cannot go together are said before any is tokenised
        texts = [
            tokenize_windows(text, self.tokenizer(), settings.context_length, drawn_from)
            for text in self._calibration()
        ]
        return mix_windows(texts, settings.max_windows, settings.validation_windows, self.recipe.seed)

    @functools.cache
    def evaluation_texts(self, name: str) -> Texts:
        """The texts that quality is measured on, by the recipe's names for them."""
        return load_texts(seen_from(self.place, self.recipe.evaluation[name], TEXT_NAMES), "evaluation")

    @functools.cache
    def evaluation_windows(self, name: str) -> tuple[torch.Tensor, np.ndarray | None]:
        """(windows, context_length) token ids of an evaluation text, and which document each of them belongs to."""
        settings = self.recipe.evaluate
        self._check({"evaluate.context_length": settings.context_length})
        texts = self.evaluation_texts(name)
        limit = None if settings.max_tokens is None else max(1, settings.max_tokens // settings.context_length)
        windows = tokenize_windows(texts, self.tokenizer(), settings.context_length, limit, f"--eval {name}")
        return windows, documents_of(texts, self.tokenizer(), windows.numel())
