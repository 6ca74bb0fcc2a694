"""The commands that judge: compare, baseline and check."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp_deploy.cli.options import Json, Run, Tasks, file_to_write, finite
from trsp_deploy.errors import RecipeError

if TYPE_CHECKING:
    from trsp_deploy.checks import Check, Tolerances
    from trsp_deploy.recipe import BenchSettings
    from trsp_deploy.results import Phase

Dense = Annotated[Path, typer.Argument(help="Run folder, engine folder or .onnx file.", metavar="DENSE")]
Pruned = Annotated[
    Path | None, typer.Argument(help="The same; a run folder alone has both.", metavar="PRUNED", show_default=False)
]
Engine = Annotated[
    str | None, typer.Option("--engine", help="One of the run's engines; else the first that runs here.", metavar="E")
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", help="Seconds to measure at most.", min=1.0, callback=finite, metavar="SECONDS"),
]
MinSpeedup = Annotated[
    list[str] | None,
    typer.Option(
        "--min-speedup",
        help="Least dense time / pruned time: 1.2 end to end, or prefill=1.2, decode=1.2; repeat.",
        metavar="[PHASE=]X",
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        "--max-latency-regression", help="Most by which pruned may be slower than the baseline.", metavar="3%"
    ),
]
MaxLoss = Annotated[
    str | None,
    typer.Option("--max-speedup-loss", help="Most of the baseline's speed-up that may be lost.", metavar="3%"),
]
MaxPerplexity = Annotated[
    float | None,
    typer.Option(
        "--max-ppl-ratio", help="Most pruned / dense perplexity, on every text.", min=0.01, callback=finite, metavar="X"
    ),
]
Budgeted = Annotated[
    str | None,
    typer.Option("--quality-budget", help="99% or 99.9%: perplexity may grow by so little.", metavar="SHARE"),
]
MinAccuracy = Annotated[
    str | None,
    typer.Option("--min-accuracy-retained", help="Least pruned / dense mean accuracy over the tasks.", metavar="99%"),
]
Against = Annotated[
    Path | None, typer.Option("--against", help="A file that `trsp-deploy baseline` made.", metavar="BASELINE.json")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write the result, with raw samples, there.", callback=file_to_write, metavar="FILE"),
]
BaselineOut = Annotated[Path, typer.Option("--out", help="The file to write.", callback=file_to_write, metavar="FILE")]
Junit = Annotated[
    Path | None, typer.Option("--junit", help="Write JUnit XML there.", callback=file_to_write, metavar="FILE")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key of the measurement: prompt_tokens=[128,1024].", metavar="KEY=VALUE"),
]

PHASE_NAMES: dict[str, Phase] = {"end-to-end": "total", "total": "total", "prefill": "prefill", "decode": "decode"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (compare, baseline, check):
        app.command(command.__name__)(command)


def compare(
    dense: Dense,
    pruned: Pruned = None,
    engine: Engine = None,
    min_speedup: MinSpeedup = None,
    budget: Budget = None,
    out: Out = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Measure two engines in turn: speed-up with interval, limit, control. With --min-speedup the exit code judges."""
    least = _speedups(min_speedup)
    settings = _settings({}, budget, sets)
    from trsp_deploy.cli.tables import print_comparison
    from trsp_deploy.stages import bench
    from trsp_deploy.tools.judging.comparisons import sentence
    from trsp_deploy.tools.judging.goals import least_speedup
    from trsp_deploy.tools.judging.verdicts import EXIT_CODES, worst

    pair = bench.find_pair(dense, pruned, engine)
    goals = [least_speedup(phase, bound, "--min-speedup", len(settings.cases)) for phase, bound in least.items()]
    label = bench.label_of(*pair)
    comparison = bench.compare_engines(*pair, label, settings, seed=0, goals=goals)
    found = bench.derive(*pair, comparison)
    outcomes = [goal.outcome(comparison.replicates) for goal in goals]
    if out is not None:
        from trsp_deploy.artifacts import write_json

        write_json(out, comparison)
    stream = sys.stderr if as_json else sys.stdout
    print_comparison(label, found, stream)
    for outcome in outcomes:
        print(outcome.sentence, file=stream)
    if as_json:
        plain = [outcome.model_dump(mode="json") for outcome in outcomes]
        print(
            json.dumps(
                {"verdict": sentence(label, found), "comparison": found.model_dump(mode="json"), "outcomes": plain}
            )
        )
    raise typer.Exit(EXIT_CODES[worst(outcome.word for outcome in outcomes)])


def baseline(
    run: Run,
    out: BaselineOut = Path("baseline.json"),
    engine: Engine = None,
    budget: Budget = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Measure a run's engines and write the file that later checks are held against."""
    from trsp_deploy.checks import make_baseline
    from trsp_deploy.cli.running import existing

    with existing(run) as job:
        settings = _settings(job.recipe.bench.model_dump(), budget, sets)
        made = make_baseline(job, engine, settings, out)
    print(f"{out}: {', '.join(made.engines)} on {made.machine}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps({"baseline": str(out), "machine": made.machine.model_dump(), "engines": list(made.engines)}))


def check(
    run: Run,
    against: Against = None,
    engine: Engine = None,
    min_speedup: MinSpeedup = None,
    max_latency_regression: MaxLatency = None,
    max_speedup_loss: MaxLoss = None,
    max_ppl_ratio: MaxPerplexity = None,
    min_accuracy_retained: MinAccuracy = None,
    quality_budget: Budgeted = None,
    task: Tasks = None,
    budget: Budget = None,
    out: Out = None,
    junit: Junit = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """The regression check for CI: exit code 0 pass, 2 fail, 3 inconclusive, 1 error."""
    if quality_budget is not None and (max_ppl_ratio is not None or min_accuracy_retained is not None):
        raise RecipeError("check: --quality-budget sets the limits of perplexity and accuracy; give it or your own")
    from trsp_deploy.checks import Tolerances, check_run
    from trsp_deploy.cli.recipe_options import task_sets
    from trsp_deploy.cli.running import existing
    from trsp_deploy.tools.judging.verdicts import EXIT_CODES

    if against is not None:
        _no_shapes(sets or [])
    kept = None if min_accuracy_retained is None else _kept("--min-accuracy-retained", min_accuracy_retained)
    wanted_texts, wanted_tasks = max_ppl_ratio, kept
    if quality_budget is not None:
        share = _kept("--quality-budget", quality_budget)
        wanted_texts = 1 / share
    tolerances: Tolerances = Tolerances(
        min_speedup=_speedups(min_speedup),
        max_latency_regression=_share("--max-latency-regression", max_latency_regression),
        max_speedup_loss=_share("--max-speedup-loss", max_speedup_loss),
        max_ppl_ratio=wanted_texts,
        min_accuracy_retained=wanted_tasks,
    )
    if task:
        from trsp_deploy.stages.zeroshot import check_tasks

        check_tasks(task)  # before anything is done, and before the run's recipe says so
    with existing(run, sets=task_sets(task)) as job:
        if quality_budget is not None and job.recipe.evaluate.tasks:  # of what the run has to be judged on
            texts = wanted_texts if job.recipe.evaluation else None
            tolerances = tolerances.model_copy(update={"min_accuracy_retained": share, "max_ppl_ratio": texts})
        settings = _settings(job.recipe.bench.model_dump(), budget, sets)
        found = check_run(job, tolerances, against, engine, settings)
    _publish(found, out, junit, as_json)
    raise typer.Exit(EXIT_CODES[found.verdict])


def _publish(found: Check, out: Path | None, junit: Path | None, as_json: bool) -> None:
    """The verdict on the terminal, and wherever else a CI system looks for it."""
    from trsp_deploy.artifacts import write_json, writing
    from trsp_deploy.cli.tables import print_comparison
    from trsp_deploy.tools.reports import ci

    stream = sys.stderr if as_json else sys.stdout
    print_comparison(found.engine, found.comparison, stream)
    for outcome in found.outcomes:
        print(outcome.sentence, file=stream)
    print(f"{found.verdict.upper()}", file=stream)
    if out is not None:
        write_json(out, found)
    if junit is not None:
        with writing(junit) as partial:
            text = ci.junit(found.engine, found.outcomes, found.comparison.elapsed_s)
            partial.write_text(text, encoding="utf-8")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:  # a step's commands share it
            file.write(ci.step_summary(found.engine, found.verdict, found.outcomes, found.notes))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in ci.github_annotations(found.outcomes):
            print(line, file=stream)
    if as_json:
        print(json.dumps(found.model_dump(mode="json", exclude={"provenance"})))


def _settings(values: dict[str, Any], budget: float | None, sets: list[str] | None) -> BenchSettings:
    from trsp_deploy.recipe import override, read_bench_settings

    chosen = override(values, sets or [])
    if budget is not None:
        chosen["budget_s"] = budget
    return read_bench_settings(chosen, "--set" if sets else "the run's recipe")


def _no_shapes(sets: list[str]) -> None:
    """A baseline says at which shapes to measure."""
    from trsp_deploy.checks import SHAPES

    named = {assignment.partition("=")[0].strip() for assignment in sets} & set(SHAPES)
    if named:
        raise RecipeError(
            f"check: --set {min(named)} does not go with --against: the baseline's own shapes are measured; "
            "make a baseline with that --set"
        )


def _speedups(texts: list[str] | None) -> dict[Phase, float]:
    found: dict[Phase, float] = {}
    for text in texts or []:
        name, equals, number = text.rpartition("=")
        phase = PHASE_NAMES.get(name if equals else "total")
        try:
            bound = float(number.removesuffix("x"))
        except ValueError:
            bound = 0.0
        if phase is None or not 0 < bound < 1000:
            raise RecipeError(
                f"--min-speedup '{text}': expected a factor such as 1.2, or prefill=1.2, decode=1.2, end-to-end=1.2"
            )
        found[phase] = bound
    return found


def _share(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if number is None or not 0 <= float(number[1]) < 100:
        raise RecipeError(f"{option} '{text}': expected a share such as 3%")
    return float(number[1]) / 100


def _kept(option: str, text: str) -> float:
    """The share of quality that has to be kept."""
    share = _share(option, text) if text.strip() != "100%" else 1.0
    if share is None or share < 0.5:
        raise RecipeError(f"{option} '{text}': expected the share of quality to keep, such as 99% or 99.9%")
    return share
