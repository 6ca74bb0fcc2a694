"""Methods that are worked out once for each object."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from trsp_deploy.artifacts import RunFolder
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.recipe import Recipe
from trsp_deploy.tools.cached import cached_method


class Counting:
    """Knows how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    @cached_method
    def one(self, number: int) -> int | None:
        """Asked for the first time it writes that down."""
        self.asked.append((number,))
        return number or None

    @cached_method
    def none(self) -> None:
        """The same of a method without arguments."""
        self.asked.append(())


def test_each_object_is_asked_once_for_the_same() -> None:
    first, second = Counting(), Counting()
    for each in (first, second):
        for _ in range(2):
            assert (each.one(1), each.one(0), each.none()) == (1, None, None)
        assert each.asked == [(1,), (0,), ()]


def test_a_pipeline_goes_once_nobody_has_it(tmp_path: Path) -> None:
    """Whoever made runs in a loop held the models and texts of them all."""
    (tmp_path / "text.txt").write_text("Words to read.")
    recipe = Recipe(model="model", calibration={"texts": str(tmp_path / "text.txt")})  # type: ignore[arg-type]
    job = Pipeline(RunFolder(tmp_path / "run"), recipe)
    text = job.inputs.texts.calibration()
    assert job.inputs.texts.calibration() is text
    gone = weakref.ref(job.inputs)
    del job
    gc.collect()
    assert gone() is None
