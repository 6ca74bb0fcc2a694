"""What a run starts from: the dense model and the texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trsp_deploy.artifacts import Made, RunFolder, steps
from trsp_deploy.pipeline.dense_model import DenseModel
from trsp_deploy.pipeline.run_texts import RunTexts
from trsp_deploy.pipeline.runs import engine_seen_from
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import Role


class Inputs:
    """Model and texts of a recipe."""

    def __init__(self, run: RunFolder, recipe: Recipe, say: Callable[[str], None], place: Path | None = None) -> None:
        self.run = run
        self.recipe = recipe
        self.say = say
        self.place = place or Path.cwd()  # that relative paths in the recipe are relative to
        self.model = DenseModel(run, recipe, say, self.place)
        self.texts = RunTexts(run, recipe, say, self.place, self.model)

    def engine(self, name: str) -> str:
        """One of the recipe's engine specs as this process finds it."""
        return engine_seen_from(self.place, name)

    def path(self, role: Role) -> Path:
        """The role's Hugging Face folder, there or not."""
        return self.run.layout.model(role)

    def made(self, role: Role) -> Made:
        """The role's Hugging Face folder, as an input of what is made of it."""
        return Made(steps.model(role), self.run.layout.below(self.path(role)))

    def check_lengths(self) -> None:
        """Raise RecipeError where windows or prompts are longer than the model was made for."""
        self.texts.check_lengths()
        self.model.check_bench(self.recipe.bench)
