"""Options that several commands have, and what options take: numbers that can be used, files that can be written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trsp_deploy.cli import completion
from trsp_deploy.errors import RecipeError, StorageError, shown

MOST = 1e9  # as in recipe/values.py, which takes too long to import for `--help`


def bounded(value: float | None) -> float | None:
    """A callback of options: float() reads nan and inf, and neither is below a least value."""
    if value is not None and not abs(value) <= MOST:
        raise typer.BadParameter(f"{value} is not a number that can be used; at most {MOST:g} is")
    return value


def file_to_write(path: Path | None) -> Path | None:
    """A callback of options: said before hours of work, not after them. Returns the file that a link leads to."""
    if path is None:
        return None
    from trsp_deploy.artifacts.layout import run_that_owns
    from trsp_deploy.artifacts.storage import place_to_write

    try:
        place = place_to_write(path)
    except StorageError as problem:
        raise typer.BadParameter(str(problem)) from problem
    if (run := run_that_owns(place)) is not None:
        raise typer.BadParameter(f"{path}: the run {run.root} made that; name another file")
    return place


def named_texts(pairs: list[str] | None) -> list[str] | None:
    """A callback of options: the names of texts become names of files."""
    if not pairs:
        return pairs
    from pydantic import TypeAdapter, ValidationError

    from trsp_deploy.recipe.values import Name

    for pair in pairs:
        name, equals, texts = pair.partition("=")
        if not (name and equals and texts):
            continue  # of these it is said that they are no pairs
        try:
            TypeAdapter(Name).validate_python(name)
        except ValidationError as problem:
            raise RecipeError(
                f"--eval {shown(pair)}: {shown(name)} cannot be a text's name; valid: letters, digits, spaces and "
                "_ . + -, at most 100 bytes of them, of which the first is a letter, a digit or _"
            ) from problem
    return pairs


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A folder, a hub id, or a short name such as opt-6.7b.",
        metavar="M",
        autocompletion=completion.models,
    ),
]
Drop = Annotated[
    str | None, typer.Option("--drop", help="Share of layers (25%) or count of layers (8) to remove.", metavar="D")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A name from `recipes ls` or a YAML file.", metavar="R", autocompletion=completion.recipes
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        help="A name from `engines ls` or a YAML file; repeat for more.",
        metavar="E",
        autocompletion=completion.engines_or_auto,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text to learn from: a .txt or .jsonl, dataset:split, or a name; repeat to mix several.",
        metavar="TEXTS",
    ),
]
Evaluation = Annotated[
    list[str] | None,
    typer.Option(
        "--eval", help="Text to judge on, as NAME=TEXTS; repeat for more.", callback=named_texts, metavar="NAME=TEXTS"
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="Zero-shot choice task: piqa, copa (`fetch piqa`), lm-eval's, or your own .jsonl; repeat.",
        metavar="T",
        autocompletion=completion.tasks,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; runs/<model>-drop<k> when not given.", metavar="DIR")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice.", metavar="N")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override one recipe key: transfer.steps=64.", metavar="KEY=VALUE")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Apply this plan.json instead of choosing layers.", metavar="FILE")
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="trsp, trsp-fold, trsp-anneal, trsp-refit, shortgpt, sleb, uidl or fold.",
        metavar="M",
        autocompletion=completion.methods,
    ),
]
Then = Annotated[
    str | None,
    typer.Option(
        "--then",
        help="Transfer after any selection: anneal, l2, l1, train or none.",
        metavar="FORM",
        autocompletion=completion.transfers,
    ),
]
PlanMemory = Annotated[
    bool,
    typer.Option(
        "--plan-memory", help="Show the memory that each stage would need and what there is; load and train nothing."
    ),
]
IgnoreMemory = Annotated[bool, typer.Option("--ignore-memory", help="Begin even if the estimate does not fit.")]
IgnoreDisk = Annotated[bool, typer.Option("--ignore-disk", help="Begin even if the disk looks too small.")]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Push the pruned checkpoint there at the end, as `push` does; name and token are checked at once.",
        metavar="OWNER/NAME",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the hub a private one.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON line on stdout; text, where there is any, goes to stderr.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]
