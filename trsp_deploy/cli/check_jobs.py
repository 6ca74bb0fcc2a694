"""The commands that judge: compare, baseline and check."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trsp_deploy.cli.ci_outputs import errors_told, publish
from trsp_deploy.cli.judging_options import (
    Against,
    BaselineBudget,
    BaselineEngine,
    BaselineOut,
    Budget,
    Budgeted,
    Dense,
    Engine,
    Junit,
    MaxLatency,
    MaxLoss,
    MaxPerplexity,
    MeasurementSets,
    MinAccuracy,
    MinSpeedup,
    Out,
    Pruned,
    Sets,
    TokenizerFolder,
    asked_of,
    bench_settings,
    kept_share,
    lost_share,
    speedups,
)
from trsp_deploy.cli.options import Evaluation, Json, Run, Tasks
from trsp_deploy.cli.terminal import Output, say
from trsp_deploy.errors import RecipeError

if TYPE_CHECKING:
    from trsp_deploy.checks import Check, Tolerances

QUALITY_ALONE_S = 30.0  # at most, where no time is judged: the speed-up is still worth a look


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (compare, baseline, check):
        app.command(command.__name__)(command)


def compare(
    dense: Dense,
    pruned: Pruned = None,
    engine: Engine = None,
    min_speedup: MinSpeedup = None,
    evaluation: Evaluation = None,
    max_ppl_ratio: MaxPerplexity = None,
    tokenizer: TokenizerFolder = None,
    budget: Budget = None,
    out: Out = None,
    sets: MeasurementSets = None,
    as_json: Json = False,
) -> None:
    """Measure two engines in turn: speed-up with interval, limit, control; with --eval their perplexity too.

    With --min-speedup or --max-ppl-ratio the exit code judges.
    """
    asked = asked_of(min_speedup, evaluation, max_ppl_ratio, tokenizer, budget, sets)
    for subject, path in (("DENSE", dense), ("PRUNED", pruned)):
        _check_files("compare", {subject: path, "--out": out})
    if out is not None:
        out.unlink(missing_ok=True)  # an earlier comparison's is not taken for this one's, whatever ends it
    from trsp_deploy.artifacts import write_json
    from trsp_deploy.cli.tables import print_comparison
    from trsp_deploy.comparison import compare_paths
    from trsp_deploy.tools.judging.comparisons import notes, sentence
    from trsp_deploy.tools.judging.verdicts import EXIT_CODES

    found = compare_paths(dense, pruned, engine, asked, say)
    output = Output(as_json)
    print_comparison(found.label, found.report, found.quality, output.stream)
    output.say(*found.said, *(outcome.sentence for outcome in found.outcomes))
    output.result(
        {
            "verdict": sentence(found.label, found.report),
            "comparison": found.report.model_dump(mode="json"),
            "quality": {name: text.model_dump(mode="json") for name, text in found.quality.items()},
            "texts": [text.model_dump(mode="json") for text in found.samples.texts],
            "outcomes": [outcome.model_dump(mode="json") for outcome in found.outcomes],
            "notes": [*notes(found.report), *found.said],
        }
    )
    if out is not None:  # last: what cannot be written has been shown
        write_json(out, found.samples)
    raise typer.Exit(EXIT_CODES[found.verdict])


def baseline(
    run: Run,
    out: BaselineOut = Path("baseline.json"),
    engine: BaselineEngine = None,
    budget: BaselineBudget = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Measure a run's engines and write the file that later checks are held against."""
    from trsp_deploy.checks import make_baseline
    from trsp_deploy.cli.running import existing
    from trsp_deploy.tools.reports.baselines import speedups_of, weaknesses

    with existing(run) as job:
        settings = bench_settings(job.recipe.bench.model_dump(), budget, sets)
        made = make_baseline(job, engine, settings, out)
    output = Output(as_json)
    output.say(f"{out}: {', '.join(made.engines)} on {made.machine}")
    for name, part in made.engines.items():
        for case, found in speedups_of(part):
            output.say(f"{name}: end to end, {case.title}: {found.text()}, {part.replicates} replicates")
        output.say(*(f"warning: {name}: {line}" for line in weaknesses(part)))
    output.result(
        {
            "baseline": str(out),
            "machine": made.machine.model_dump(),
            "engines": list(made.engines),
            "replicates": {name: part.replicates for name, part in made.engines.items()},
            "speedup": {
                name: [{**case.model_dump(), **found.model_dump()} for case, found in speedups_of(part)]
                for name, part in made.engines.items()
            },
        }
    )


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
    """The regression check for CI: exit code 0 pass, 2 fail, 3 inconclusive, 4 parity, 1 error."""
    output = Output(as_json)
    _check_files("check", {"--against": against, "--out": out, "--junit": junit})
    with errors_told(out, junit, output):
        if quality_budget is not None and (max_ppl_ratio is not None or min_accuracy_retained is not None):
            raise RecipeError("check: --quality-budget sets the limits of perplexity and accuracy; give it or your own")
        if against is not None:
            _no_shapes(sets or [])
        from trsp_deploy.checks import Tolerances

        share = None if quality_budget is None else kept_share("--quality-budget", quality_budget)
        tolerances: Tolerances = Tolerances(
            min_speedup=speedups(min_speedup),
            max_latency_regression=lost_share("--max-latency-regression", max_latency_regression),
            max_speedup_loss=lost_share("--max-speedup-loss", max_speedup_loss),
            max_ppl_ratio=max_ppl_ratio if share is None else 1 / share,
            min_accuracy_retained=kept_share("--min-accuracy-retained", min_accuracy_retained),
            quality_source=None if share is None else "--quality-budget",
        )
        found = _check(run, tolerances, share, against, engine, task, budget, sets)
        publish(found, out, junit, output)
    from trsp_deploy.tools.judging.verdicts import EXIT_CODES

    raise typer.Exit(EXIT_CODES[found.verdict])


def _check(
    run: Path,
    tolerances: Tolerances,
    share: float | None,
    against: Path | None,
    engine: str | None,
    task: list[str] | None,
    budget: float | None,
    sets: list[str] | None,
) -> Check:
    """What the check found. share: of quality that is to be kept; None where it is not asked for as one."""
    from trsp_deploy.checks import check_run
    from trsp_deploy.cli.recipe_options import task_sets
    from trsp_deploy.cli.running import existing

    with existing(run, sets=task_sets(task)) as job:
        if share is not None and job.recipe.evaluate.tasks:  # of what the run has to be judged on
            texts = tolerances.max_ppl_ratio if job.recipe.evaluation else None
            tolerances = tolerances.model_copy(update={"min_accuracy_retained": share, "max_ppl_ratio": texts})
        values = job.recipe.bench.model_dump()
        if not tolerances.timed:
            values |= {"budget_s": min(values["budget_s"], QUALITY_ALONE_S), "replicates": 2}  # none has to be decided
        return check_run(job, tolerances, against, engine, bench_settings(values, budget, sets))


def _check_files(command: str, named: Mapping[str, Path | None]) -> None:
    """Raise RecipeError where one file is to be two things, before anything is written or removed."""
    given = [(option, path, path.resolve()) for option, path in named.items() if path is not None]
    for (one, path, place), (other, _, place_of_other) in itertools.combinations(given, 2):
        if place == place_of_other:
            raise RecipeError(f"{command}: {one} and {other} are both {path}; give each a file of its own")


def _no_shapes(sets: list[str]) -> None:
    """Raise RecipeError where --set names a shape: a baseline says at which shapes to measure."""
    from trsp_deploy.checks import SHAPES

    named = {assignment.partition("=")[0].strip() for assignment in sets} & set(SHAPES)
    if named:
        raise RecipeError(
            f"check: --set {min(named)} does not go with --against: the baseline's own shapes are measured; "
            "make a baseline with that --set"
        )
