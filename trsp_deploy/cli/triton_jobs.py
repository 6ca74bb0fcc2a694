"""The commands that write and check a Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trsp_deploy.cli.options import Json, Run
from trsp_deploy.cli.serving_jobs import Repository
from trsp_deploy.cli.terminal import Output, say

if TYPE_CHECKING:
    from trsp_deploy.results import Role

Out = Annotated[Path, typer.Option("--out", help="Folder of the repository.", metavar="DIR")]
Engine = Annotated[
    str | None, typer.Option("--engine", help="One of the run's engines; else the first that runs here.", metavar="E")
]
Name = Annotated[
    str | None, typer.Option("--name", help="Name of the model; <run>-pruned when not given.", metavar="NAME")
]
Dense = Annotated[bool, typer.Option("--dense", help="The dense model too, as NAME-dense, for comparisons.")]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="Texts at once.", min=1, max=1024)]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Tokens of a text; else the model's positions.", min=2)
]
Step = Annotated[bool, typer.Option("--step", help="The bare engine too, as NAME_step, for a decode loop of your own.")]
WRONG = 2  # exit code where the linter finds an error


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("triton")(triton)
    app.command("triton-lint")(triton_lint)


def triton_lint(repository: Repository, as_json: Json = False) -> None:
    """Find what a Triton server would say only at load, or never; exit code 2 when something is wrong."""
    from trsp_deploy.tools.model_repository.lint import lint

    found = lint(repository)
    errors = sum(finding.severity == "error" for finding in found)
    output = Output(as_json)
    output.say(*found, f"{repository}: {errors} errors, {len(found) - errors} warnings")
    output.result({"findings": [finding.model_dump() for finding in found]})
    raise typer.Exit(WRONG if errors else 0)


def triton(
    run: Run,
    out: Out = Path("model_repository"),
    engine: Engine = None,
    name: Name = None,
    dense: Dense = False,
    max_batch: MaxBatch = 8,
    max_length: MaxLength = None,
    step: Step = False,
    as_json: Json = False,
) -> None:
    """Write a Triton model repository that generates text with a run's engine."""
    from trsp_deploy.artifacts import RunLayout, check_made, reading_alone, steps
    from trsp_deploy.stages.triton_repository import write_repository
    from trsp_deploy.tools.measuring.subjects import common_engine, find_engine

    roles: list[Role] = ["pruned", *(["dense"] if dense else [])]  # type: ignore[list-item]
    base = name or f"{run.resolve().name}-pruned"
    names: dict[Role, str] = {"pruned": base, "dense": f"{base}-dense"}
    with reading_alone(run):
        if dense and engine is None and RunLayout(run).is_run:
            engine = common_engine(run, run)  # two engines beside each other would say nothing of the models
        engines = {role: find_engine(run, role, engine) for role in roles}
        check_made(run, steps.PRUNE, "pruned")  # its tokenizer goes along
        made = write_repository(engines, run / "pruned", names, out, max_batch, max_length, step=step, say=say)
    output = Output(as_json)
    output.say(
        *(f"{out / model.name}: {model.limits}" for model in made.models),
        f"the server's Python needs: {' '.join(made.packages)}",
    )
    output.result({"repository": str(out), "models": [model.name for model in made.models]})
