"""Reference pages from what they are about: commands, a recipe's keys, and the recipes and specs that ship.

    python -m trsp_deploy.cli.reference docs

`make docs` writes cli.md, recipe-keys.md and recipes.md there, and a test holds the committed ones against the code.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from trsp_deploy.cli.app import app
from trsp_deploy.recipe import Recipe, Strict, read_recipe
from trsp_deploy.recipe.values import MOST
from trsp_deploy.tools.library import engine_names, load_engine_spec, load_recipe_values, read_text, recipe_names
from trsp_deploy.tools.sources.names import SHORT_NAMES

PROGRAM = "trsp-deploy"
SHELL = ("install_completion", "show_completion", "help")  # said in the header
KEY_TABLE = ("| key | takes | default | |", "|---|---|---|---|")
TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "object": "mapping",
    "null": "nothing",
}
HEADER = """# Command line

Written by `python -m trsp_deploy.cli.reference docs` from the code; a test compares. `--help` on any command
says the same. Exit codes: [exit-codes.md](exit-codes.md). Methods and transfers: [methods.md](methods.md). What a text
or a model may be: [own-model.md](own-model.md).

Completion for bash, zsh and fish: `trsp-deploy --install-completion`, once, in that shell; `--show-completion` prints
it instead.
"""

CATALOGUE = """# Recipes and engine specs

Written by `python -m trsp_deploy.cli.reference docs` from `recipes/` and `engines/`; a test compares. A recipe called
like a model is taken for that model (`--model opt-1.3b`), any other with `--recipe`. `trsp-deploy recipes show NAME`
and `trsp-deploy engines show NAME` print a file and its comments: on what it was measured, or that it was not.
Memory is what `--plan-memory` estimates for selection and transfer; no GPU has confirmed it. fp16 has not the range of
bf16, in which most of these models were trained: what leaves it stays in fp32 ([engines.md](engines.md)), and the
parity check (exit code 4) says whether an fp16 engine holds.
"""

KEYS = """# A recipe's keys

Written by `python -m trsp_deploy.cli.reference docs` from `trsp_deploy/recipe/settings.py`; a test compares. A recipe
is a YAML file of these keys, `transfer.steps` being `steps` below `transfer`; `--set transfer.steps=500` overrides one.
An unknown key is an error that names the nearest valid one. Where a model has a recipe of its own, `trsp-deploy recipes
show NAME` prints it: what it does not say is the default here.
"""


def command_page() -> str:
    """cli.md: every command with its arguments and options."""
    root: Any = get_command(app)
    options = [option for option in root.params if option.name not in SHELL]
    before = ["## Before any command", "", f"    {PROGRAM} [OPTIONS] COMMAND", "", *_parameters([], options)]
    return "\n".join([HEADER, *before, *(_section(name, command) for name, command in commands())])


def catalogue_page() -> str:
    """recipes.md: what ships, and what was measured of it."""
    lines = [
        CATALOGUE,
        "## Recipes",
        "",
        "| recipe | model | drop | on | memory, GB | state |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_recipe_row(name) for name in recipe_names()]
    lines += ["", "## Engine specs", "", "| engine | for | state |", "|---|---|---|"]
    for name in engine_names():
        lines.append(f"| `{name}` | {load_engine_spec(name).description} | {_state(read_text('engines', name))} |")
    return "\n".join([*lines, ""])


def keys_page() -> str:
    """recipe-keys.md: every key of a recipe, what it takes, its default and what it is for."""
    lines = [KEYS]
    groups = {name: field for name, field in Recipe.model_fields.items() if _is_group(field.annotation)}
    top = [_key_row(Recipe, name, "") for name in Recipe.model_fields if name not in groups]
    lines += ["## The whole run", "", *KEY_TABLE, *top, ""]
    for name, field in groups.items():
        group: Any = field.annotation
        said = " ".join((group.__doc__ or "").split())
        rows = [_key_row(group, key, f"{name}.") for key in group.model_fields]
        lines += [f"## {name}", "", said, "", *KEY_TABLE, *rows, ""]
    return "\n".join(lines)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Strict)


def _key_row(group: Any, name: str, before: str) -> str:
    schema = group.model_json_schema()["properties"][name]
    field = group.model_fields[name]
    default = "required" if field.is_required() else f"`{json.dumps(group.model_construct().model_dump()[name])}`"
    return f"| `{before}{name}` | {_cell(_values(schema))} | {_cell(default)} | {_cell(_comment(group, name))} |"


def _values(schema: dict[str, Any]) -> str:
    """What a key takes: its values, or its type with its bounds."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in schema["enum"])
    if schema["type"] == "array":
        items = schema["items"] if "items" in schema else schema["prefixItems"][0]
        return f"list of: {_values(items)}"
    bounds = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
    }
    said = [words.format(f"{schema[key]:g}") for key, words in bounds.items() if schema.get(key, MOST) < MOST]
    return " ".join([TYPES[schema["type"]], *said])


def _comment(group: Any, name: str) -> str:
    """What stands beside a key in its class: the comment on its line, after those of the lines before it."""
    lines = inspect.getsource(group).splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith(f"    {name}: ")]
    before = itertools.takewhile(lambda line: line.startswith("    # "), reversed(lines[:at]))
    said = [line.strip().removeprefix("# ") for line in reversed(list(before))]
    return " ".join([*said, lines[at].partition("  # ")[2]]).strip()


def _recipe_row(name: str) -> str:
    values, source = load_recipe_values(name)
    recipe = read_recipe({"model": "any", **values}, source)
    text = read_text("recipes", name)
    memory = re.search(r"selection ([\d.]+) GB, transfer ([\d.]+) GB", text)
    device = "GPU" if recipe.device == "cuda" else "CPU or GPU"
    needed = " and ".join(memory.groups()) if memory else ""
    return (
        f"| `{name}` | {SHORT_NAMES.get(recipe.model, 'any')} | {recipe.drop} | {device} | {needed} | {_state(text)} |"
    )


def _state(text: str) -> str:
    """What the comments say; that each file says it is tested."""
    return "not measured" if re.search("not measured", text, re.IGNORECASE) else "measured"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name: `recipes ls`, not the group `recipes`."""
    root: Any = get_command(app)
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {below}", nested) for below, nested in inner.items())


def _section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    needed = [_spelled(option) for option in options if option.required]
    more = ["[OPTIONS]"] if len(options) > len(needed) else []
    usage = " ".join([PROGRAM, name, *(_usage(argument) for argument in arguments), *needed, *more])
    lines = [f"## {name}", "", command.help, "", f"    {usage}", ""]
    return "\n".join([*lines, *_parameters(arguments, options)])


def _parameters(arguments: Sequence[Any], options: Sequence[Any]) -> list[str]:
    """Lines of their table; none for a command that has none."""
    rows = [(_placeholder(argument), argument) for argument in arguments]
    rows += [(_spelled(option), option) for option in options]
    table = [f"| `{shown}` | {_cell(parameter.help)} | {_default(parameter)} |" for shown, parameter in rows]
    return ["| | | default |", "|---|---|---|", *table, ""] if table else []


def _usage(argument: Any) -> str:
    shown = _placeholder(argument)
    return shown if argument.required or shown.startswith("[") else f"[{shown}]"


def _placeholder(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _spelled(option: Any) -> str:
    """`--seed N`: what comes after the name is the declared placeholder, or the type where there is none."""
    name = ", ".join(option.opts)
    if option.is_flag:
        return name
    kind = option.type_descriptor.annotation
    return f"{name} {option.metavar or ('N' if kind in (int, float) else 'TEXT')}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value is None or value is False or value == () else f"`{value}`"


def _cell(text: str) -> str:
    """Table cells end at a bar, and HTML would swallow `<model>`."""
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "cli.md").write_text(command_page(), encoding="utf-8")
    (folder / "recipe-keys.md").write_text(keys_page(), encoding="utf-8")
    (folder / "recipes.md").write_text(catalogue_page(), encoding="utf-8")
