"""The dense model that a run starts from, as the folder `dense/`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from trsp_deploy.artifacts import RunFolder, Step, steps, writing
from trsp_deploy.decoder import known_positions, load_config, load_tokenizer, meta_model
from trsp_deploy.errors import RecipeError
from trsp_deploy.launch import launched_as_several
from trsp_deploy.pipeline.runs import plain_name, seen_from
from trsp_deploy.recipe import BenchSettings, Recipe
from trsp_deploy.stages.bench import check_positions
from trsp_deploy.tools.cached import cached_method
from trsp_deploy.tools.measuring.subjects import positions_of
from trsp_deploy.tools.sources.model_folders import copy_model, fingerprint_model
from trsp_deploy.tools.sources.models import ModelSource, model_config, resolve_model
from trsp_deploy.tools.sources.names import SHORT_NAMES, is_model_folder


class DenseModel:
    """The recipe's model; read once."""

    def __init__(self, run: RunFolder, recipe: Recipe, say: Callable[[str], None], place: Path) -> None:
        """place: that a relative path in the recipe is relative to."""
        self._run = run
        self._recipe = recipe
        self._say = say
        self._place = place
        self.path = run.layout.model("dense")  # its Hugging Face folder in the run, there or not

    @property
    def name(self) -> str:
        """The recipe's model as this process finds it."""
        return seen_from(self._place, self._recipe.model, SHORT_NAMES)

    @property
    def shown(self) -> str:
        """The recipe's model as reports call it."""
        shown = self._recipe.public.model
        return shown if PurePath(shown).name not in ("", "..") else plain_name(shown, self._place)

    @cached_method
    def copied(self) -> ModelSource:
        """The dense model, as the folder `dense/`."""
        # Downloaded or unpacked by the main process, which alone may have the model's folder.
        found: tuple[ModelSource, str] = self._run.from_main(self._source if self._run.main else None)
        source, sha256 = found
        self._run.do(self.step(lambda: {"model": sha256}), lambda: self._copy(source), ModelSource)
        return source

    def step(self, inputs: Callable[[], Mapping[str, str]]) -> Step:
        """inputs: the fingerprint of the model, which takes reading it, by the name `model`."""
        return Step(steps.DENSE, lambda: {"model": self._recipe.model}, inputs, self._run.layout.below(self.path))

    def at_hand(self) -> dict[str, str] | None:
        """The fingerprint of the model as it is now, by the name `model`, where it is a folder here; else None.

        Reads it, once in a process. Of several machines only the main process's need have it, so that it is found to
        be another when it is asked for. Raises ModelError for one that cannot be used.
        """
        return {"model": self._source[1]} if is_model_folder(self.name) and not launched_as_several() else None

    def is_another(self) -> bool:
        """Whether the run has a copy of another model than lies under the name by now; raises ModelError."""
        record = self._run.record(steps.DENSE)
        now = None if record is None else self.at_hand()
        return record is not None and now is not None and record.inputs != now

    def readable(self) -> Path:
        """A folder with the dense model's config and tokenizer. Of a model that `dense/` is still to be made of it is
        its own, for what is refused by them leaves what the run has."""
        if launched_as_several():  # of several machines the main process's alone may have the model
            self.copied()
            return self.path
        return Path(self._source[0].path)

    def config(self) -> Any:
        """transformers' config of the dense model, before the model is asked for; raises ModelError."""
        kept = self._kept_model()
        return model_config(self.name, self._say) if kept is None else load_config(self.path)

    @cached_method
    def num_layers(self) -> int:
        """Number of layers of the dense model, as its config has it: a model is not made `dense/` to be counted."""
        if launched_as_several():
            self.copied()  # of several machines the main process's alone may have the model
        count: int = self.config().num_hidden_layers
        return count

    @cached_method
    def tokenizer(self) -> Any:
        """Tokenizer of the dense model."""
        return load_tokenizer(self.readable())

    @cached_method
    def vocabulary(self) -> int:
        """Number of tokens that the dense model has embeddings for."""
        embeddings: Any = meta_model(load_config(self.readable())).get_input_embeddings()
        return int(embeddings.num_embeddings)

    def check_bench(self, settings: BenchSettings) -> None:
        """Raise RecipeError where a measurement's prompt and new tokens are more than the model was made for."""
        check_positions(settings, positions_of(self.readable()), self._recipe.public.model)

    def check_lengths(self, wanted: Mapping[str, int]) -> None:
        """Raise RecipeError where the model has fewer positions than a setting wants; wanted: tokens, by its key."""
        positions = known_positions(self.readable())
        longer = [name for name, length in wanted.items() if positions is not None and length > positions]
        if longer:
            raise RecipeError(
                f"{longer[0]} {wanted[longer[0]]}: {self._recipe.model} has {positions} positions; "
                + " ".join(f"--set {name}={positions}" for name in longer)
            )

    @functools.cached_property
    def _source(self) -> tuple[ModelSource, str]:
        """Where the dense model is, and its fingerprint.

        A folder on this machine may be another by now. All else is what the run has of it, which may have been taken
        to a machine without such a folder, and without a network.
        """
        kept = self._kept_model()
        if kept is None:
            source = resolve_model(self.name, self._say)
            return source, fingerprint_model(Path(source.path))
        source, sha256 = kept
        if source.kind == "folder":
            self._say(f"model '{self._recipe.model}': no such folder here; going on with the run's copy of it")
        here = resolve_model(str(self.path), self._say)
        return source.model_copy(update={"path": here.path}), sha256

    def _kept_model(self) -> tuple[ModelSource, str] | None:
        """What the run wrote down of the model that it has in `dense/`; None where that is to be compared, or made."""
        record = self._run.record(steps.DENSE)
        if record is None or record.settings != {"model": self._recipe.model} or is_model_folder(self.name):
            return None
        try:
            source = ModelSource.model_validate(record.result)
        except ValidationError:  # of an earlier version
            return None
        return (source, record.inputs["model"]) if self._run.holds(record) else None

    def _copy(self, source: ModelSource) -> ModelSource:
        with writing(self.path) as partial:
            copy_model(Path(source.path), partial)
        return source.model_copy(update={"path": "dense"})  # the folder that it came from is no part of a run
