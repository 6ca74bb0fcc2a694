"""The command that answers "how much should I drop?"."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trsp_deploy.cli.options import (
    MOST,
    Calibration,
    Engines,
    Evaluation,
    IgnoreDisk,
    IgnoreMemory,
    Json,
    MethodName,
    Model,
    RecipeName,
    Seed,
    Sets,
    Tasks,
    Then,
    bounded,
)
from trsp_deploy.cli.terminal import Output, say
from trsp_deploy.errors import RecipeError
from trsp_deploy.launch import launched

if TYPE_CHECKING:
    from trsp_deploy.pipeline import Pipeline

Drops = Annotated[
    str,
    typer.Option("--drop", help="A range, 5%..50% or 2..12, with :step or without; or 4,7,10.", metavar="RANGE"),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder; runs/<model>-sweep when not given.", metavar="DIR")]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup", help="Least speed-up end to end, such as 1.25.", min=1.0, callback=bounded, metavar="X"
    ),
]
TargetLatency = Annotated[
    str | None, typer.Option("--target-latency", help="Most time for a new token, such as 20ms.", metavar="TIME")
]
MaxPerplexity = Annotated[
    float | None,
    typer.Option(
        "--max-ppl-ratio", help="Most pruned / dense perplexity, on every text.", min=1.0, callback=bounded, metavar="X"
    ),
]

CHOICE_MISSING = 2  # exit code where targets were given and no point keeps them


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("sweep")(sweep)


def sweep(
    model: Model = None,
    drop: Drops = "10%..40%",
    recipe: RecipeName = None,
    engine: Engines = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    target_speedup: TargetSpeedup = None,
    target_latency: TargetLatency = None,
    max_ppl_ratio: MaxPerplexity = None,
    out: Out = None,
    seed: Seed = None,
    sets: Sets = None,
    method: MethodName = None,
    then: Then = None,
    task: Tasks = None,
    ignore_memory: IgnoreMemory = False,
    ignore_disk: IgnoreDisk = False,
    as_json: Json = False,
) -> None:
    """Quality, latency, memory and size for each number of layers, through real engines; targets choose one."""
    max_latency_s = _seconds(target_latency)
    if (cut := next((each for each in sets or () if each.partition("=")[0].strip() == "drop"), None)) is not None:
        raise RecipeError(f"--set {cut}: a sweep's cuts are those of --drop, such as --drop 5%..50% or --drop 4,7,10")
    from trsp_deploy.cli.needs import check_address_space, check_disk, check_memory

    check_address_space()
    from trsp_deploy.cli.recipe_options import recipe_from_options, task_sets
    from trsp_deploy.cli.running import run_of
    from trsp_deploy.cli.tables import print_sweep
    from trsp_deploy.recipe import parse_drops
    from trsp_deploy.tools.reports.sweeps import Targets

    if launched():
        raise RecipeError("sweep: is one process's work; `accelerate launch` a `prune` of the cut that it chose")
    parse_drops(drop)  # what cannot be a range is said before anything slow
    first = drop.split("..")[0].split(",")[0]
    chosen = recipe_from_options(
        model=model,
        drop=first,
        recipe=recipe,
        engine=engine,
        calibration=calibration,
        evaluation=evaluation,
        seed=seed,
        sets=[*(sets or []), *task_sets(task)],
        method=method,
        then=then,
    )
    from trsp_deploy.sweep import check_targets
    from trsp_deploy.sweep import sweep as sweep_all

    targets = Targets(min_speedup=target_speedup, max_latency_s=max_latency_s, max_ppl_ratio=max_ppl_ratio)
    check_targets(chosen, targets)  # before the recipe of a finished sweep is another

    def check(job: Pipeline) -> None:
        num_layers = job.inputs.model.config().num_hidden_layers  # without the model, which it may refuse
        counts = parse_drops(drop, num_layers)
        check_memory(job, None, ignore_memory, whole=True, counts=counts)
        check_disk(job, None, ignore_disk, counts)

    with run_of(chosen, out, drops=drop, check=check) as job:
        counts = parse_drops(drop, job.inputs.model.num_layers())
        found, failed = sweep_all(job, counts, targets, say)
        folder = job.run.path
    output = Output(as_json)
    print_sweep(found, folder, output.stream)
    output.result(found.model_dump(mode="json", exclude={"provenance"}))
    if failed is not None:  # last: what there is has been shown
        raise failed
    wanted = targets != Targets()
    raise typer.Exit(CHOICE_MISSING if wanted and found.choice.num_dropped is None else 0)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text.strip())
    if found is None or not 0 < float(found[1]) <= MOST:
        raise RecipeError(f"--target-latency '{text}': expected a time such as 20ms or 0.02s")
    return float(found[1]) / (1e3 if found[2] == "ms" else 1)
