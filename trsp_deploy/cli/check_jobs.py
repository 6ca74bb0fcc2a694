"""The commands that judge: compare, baseline and check."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp_deploy.cli.options import Json, Run, Tasks, file_to_write, finite
from trsp_deploy.cli.terminal import Output
from trsp_deploy.errors import RecipeError, TrspError, machine_reason, named, one_line, redacted

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
    typer.Option(
        "--budget",
        help="Seconds to measure at most; two replicates in any case.",
        min=1.0,
        callback=finite,
        metavar="SECONDS",
    ),
]
MinSpeedup = Annotated[
    list[str] | None,
    typer.Option(
        "--min-speedup",
        help="Least dense time / pruned time: 1.2 end to end, or prefill=1.2, decode=1.2; once per phase.",
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
    typer.Option(
        "--quality-budget", help="Quality to keep, 99% or 99.9%: limits how much perplexity may grow.", metavar="SHARE"
    ),
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

QUALITY_ALONE_S = 30.0  # at most, where no time is judged: the speed-up is still worth a look
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
    from trsp_deploy.tools.judging.verdicts import EXIT_CODES, worst

    pair = bench.find_pair(dense, pruned, engine)
    bench.check_pair(*pair, settings)
    goals = bench.speedup_goals(*pair, least, settings)
    label = bench.label_of(*pair)
    comparison = bench.compare_engines(*pair, label, settings, seed=0, goals=goals)
    found = bench.derive(*pair, comparison)
    outcomes = [goal.outcome(comparison.replicates) for goal in goals]
    if out is not None:
        from trsp_deploy.artifacts import write_json

        write_json(out, comparison)
    output = Output(as_json)
    print_comparison(label, found, output.stream)
    said = bench.pair_notes(*pair)
    output.say(*said, *(outcome.sentence for outcome in outcomes))
    output.result(
        {
            "verdict": sentence(label, found),
            "comparison": found.model_dump(mode="json"),
            "outcomes": [outcome.model_dump(mode="json") for outcome in outcomes],
            "notes": said,
        }
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
    from trsp_deploy.tools.reports.baselines import speedups_of, weaknesses

    with existing(run) as job:
        settings = _settings(job.recipe.bench.model_dump(), budget, sets)
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
    _check_files(against, out, junit)
    with _errors_told(out, junit, output):
        if quality_budget is not None and (max_ppl_ratio is not None or min_accuracy_retained is not None):
            raise RecipeError("check: --quality-budget sets the limits of perplexity and accuracy; give it or your own")
        if against is not None:
            _no_shapes(sets or [])
        from trsp_deploy.checks import Tolerances

        share = None if quality_budget is None else _kept("--quality-budget", quality_budget)
        tolerances: Tolerances = Tolerances(
            min_speedup=_speedups(min_speedup),
            max_latency_regression=_share("--max-latency-regression", max_latency_regression),
            max_speedup_loss=_share("--max-speedup-loss", max_speedup_loss),
            max_ppl_ratio=max_ppl_ratio if share is None else 1 / share,
            min_accuracy_retained=_kept("--min-accuracy-retained", min_accuracy_retained),
        )
        found = _check(run, tolerances, share, against, engine, task, budget, sets)
        _publish(found, out, junit, output)
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

    if task:
        from trsp_deploy.stages.zeroshot import check_tasks

        check_tasks(task)  # before anything is done, and before the run's recipe says so
    with existing(run, sets=task_sets(task)) as job:
        if share is not None and job.recipe.evaluate.tasks:  # of what the run has to be judged on
            texts = tolerances.max_ppl_ratio if job.recipe.evaluation else None
            tolerances = tolerances.model_copy(update={"min_accuracy_retained": share, "max_ppl_ratio": texts})
        values = job.recipe.bench.model_dump()
        if not tolerances.timed:
            values["budget_s"] = min(values["budget_s"], QUALITY_ALONE_S)
        return check_run(job, tolerances, against, engine, _settings(values, budget, sets))


def _check_files(against: Path | None, out: Path | None, junit: Path | None) -> None:
    """Raise RecipeError where one file is to be two things, before anything is written or removed."""
    named = {"--against": against, "--out": out, "--junit": junit}
    given = [(option, path, path.resolve()) for option, path in named.items() if path is not None]
    for (one, path, place), (other, _, place_of_other) in itertools.combinations(given, 2):
        if place == place_of_other:
            raise RecipeError(f"check: {one} and {other} are both {path}; give each a file of its own")


@contextlib.contextmanager
def _errors_told(out: Path | None, junit: Path | None, output: Output) -> Iterator[None]:
    """Tell a CI system of an error too, and leave it no verdict of an earlier check for this one's."""
    for earlier in (out, junit):
        if earlier is not None:
            earlier.unlink(missing_ok=True)  # also for a check that is killed
    try:
        yield
    except Exception as problem:
        said = problem if isinstance(problem, TrspError) else machine_reason(problem) or named(problem)
        _publish_error(redacted(one_line(said)), junit, output)
        raise


def _publish_error(line: str, junit: Path | None, output: Output) -> None:
    """Write an error wherever a CI system looks for a verdict; a full disk does not hide why the check ended."""
    from trsp_deploy.tools.reports import ci

    if junit is not None:
        with contextlib.suppress(OSError, TrspError):
            _write_text(junit, ci.junit_of_error(line))
    if _in_github():
        output.say(ci.github_error(line))


def _publish(found: Check, out: Path | None, junit: Path | None, output: Output) -> None:
    """Write the verdict wherever a CI system looks for it, and to the terminal. Files first: a reader may have left."""
    from trsp_deploy.artifacts import write_json
    from trsp_deploy.cli.tables import print_comparison
    from trsp_deploy.tools.judging.comparisons import notes
    from trsp_deploy.tools.reports import ci

    if out is not None:
        write_json(out, found)
    if junit is not None:
        _write_text(junit, ci.junit(found.engine, found.outcomes, found.comparison.elapsed_s))
    _add_step_summary(ci.step_summary(found.engine, found.verdict, found.outcomes, found.notes))
    print_comparison(found.engine, found.comparison, output.stream)
    more = [note for note in found.notes if note not in notes(found.comparison)]  # those of the comparison are shown
    output.say(*more, *(outcome.sentence for outcome in found.outcomes), found.verdict.upper())
    if _in_github():
        output.say(*ci.github_annotations(found.outcomes))
    output.result(found.model_dump(mode="json", exclude={"provenance", "samples"}))


def _add_step_summary(text: str) -> None:
    """Add to GitHub's page of a step, where there is one; what cannot be written there changes no verdict."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not summary:
        return
    try:
        with Path(summary).open("a", encoding="utf-8") as file:  # a step's commands share it
            file.write(text)
    except OSError as problem:
        print(
            f"warning: GITHUB_STEP_SUMMARY {summary}: no summary is written ({problem.strerror})",
            file=sys.stderr,
        )


def _in_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _write_text(path: Path, text: str) -> None:
    from trsp_deploy.artifacts import writing

    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _settings(values: dict[str, Any], budget: float | None, sets: list[str] | None) -> BenchSettings:
    from trsp_deploy.recipe import override, read_bench_settings

    chosen = override(values, sets or [])
    if budget is not None:
        chosen["budget_s"] = budget
    return read_bench_settings(chosen, "--set" if sets else "the run's recipe")


def _no_shapes(sets: list[str]) -> None:
    """Raise RecipeError where --set names a shape: a baseline says at which shapes to measure."""
    from trsp_deploy.checks import SHAPES

    named = {assignment.partition("=")[0].strip() for assignment in sets} & set(SHAPES)
    if named:
        raise RecipeError(
            f"check: --set {min(named)} does not go with --against: the baseline's own shapes are measured; "
            "make a baseline with that --set"
        )


def _speedups(texts: list[str] | None) -> dict[Phase, float]:
    found: dict[Phase, float] = {}
    given: dict[Phase, str] = {}
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
        if phase in given:  # the looser of two may not take the stricter one's place
            raise RecipeError(f"--min-speedup '{given[phase]}' and '{text}': are of the same phase; give it once")
        found[phase], given[phase] = bound, text
    return found


def _share(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    share = _percent(text)
    if share is None or share >= 1:
        raise RecipeError(f"{option} '{text}': expected a share of at least 0% and below 100%, such as 3%")
    return share


def _kept(option: str, text: str | None) -> float | None:
    """The share of quality that an option wants kept, as a fraction; None without it."""
    if text is None:
        return None
    share = _percent(text)
    if share is None or not 0.5 <= share <= 1:
        raise RecipeError(
            f"{option} '{text}': expected the share of quality to keep, 50% to 100%, such as 99% or 99.9%"
        )
    return share


def _percent(text: str) -> float | None:
    """A percentage as a share of 1; None for what is none."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    return None if number is None else float(number[1]) / 100
