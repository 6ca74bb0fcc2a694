"""What the commands that judge take: their options, and what the values of these mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp_deploy.cli.options import bounded, file_to_write
from trsp_deploy.cli.recipe_options import say_twins, with_lists
from trsp_deploy.errors import RecipeError, shown

if TYPE_CHECKING:
    from trsp_deploy.comparison import Asked
    from trsp_deploy.recipe import BenchSettings
    from trsp_deploy.results import Phase

Dense = Annotated[Path, typer.Argument(help="Run folder, engine folder or .onnx file.", metavar="DENSE")]
Pruned = Annotated[
    Path | None, typer.Argument(help="The same; a run folder alone has both.", metavar="PRUNED", show_default=False)
]
Engine = Annotated[
    str | None, typer.Option("--engine", help="One of the run's engines; else the first that runs here.", metavar="E")
]
BaselineEngine = Annotated[
    str | None,
    typer.Option("--engine", help="One of the run's engines; else every one that runs here.", metavar="E"),
]
BaselineBudget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="Seconds to measure each engine; up to twice as many where five replicates take longer.",
        min=1.0,
        callback=bounded,
        metavar="SECONDS",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="Seconds to measure; up to twice as many where five replicates take longer.",
        min=1.0,
        callback=bounded,
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
        "--max-ppl-ratio",
        help="Most pruned / dense perplexity, on every text.",
        min=0.01,
        callback=bounded,
        metavar="X",
    ),
]
Budgeted = Annotated[
    str | None,
    typer.Option(
        "--quality-budget",
        help="Quality to keep, 99% or 99.9%: of accuracy, and 1 / that of perplexity.",
        metavar="SHARE",
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
MeasurementSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one key of the measurement: prompt_tokens=[128,1024], evaluate.max_tokens=20000.",
        metavar="KEY=VALUE",
    ),
]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder of the texts' tokenizer; else the engines' own.", metavar="DIR"),
]

PHASE_NAMES: dict[str, Phase] = {"end-to-end": "total", "total": "total", "prefill": "prefill", "decode": "decode"}


def bench_settings(values: dict[str, Any], budget: float | None, sets: list[str] | None) -> BenchSettings:
    """How to measure: a recipe's values with the options' in their place. Raises RecipeError for what is invalid."""
    from trsp_deploy.recipe import override, read_bench_settings

    chosen = override(values, sets or [])
    say_twins(sets)
    if budget is not None:
        same = next((text for text in sets or [] if text.partition("=")[0].strip() == "budget_s"), None)
        if same is not None:
            raise RecipeError(f"--set {shown(same)}: --budget {budget:g} is the same setting; give one of the two")
        chosen["budget_s"] = budget
    return read_bench_settings(chosen, "--set" if sets else "the run's recipe")


def asked_of(
    min_speedup: list[str] | None,
    evaluation: list[str] | None,
    max_ppl_ratio: float | None,
    tokenizer: Path | None,
    budget: float | None,
    sets: list[str] | None,
) -> Asked:
    """What `compare` is asked for; keys of `--set` that begin with `evaluate.` are of its texts."""
    from trsp_deploy.recipe import override, read_evaluate_settings

    least = speedups(min_speedup)
    texts = with_lists({}, None, evaluation).get("evaluation", {})
    of_texts = [text for text in sets or [] if text.lstrip().startswith("evaluate.")]
    times = bench_settings({}, budget, [text for text in sets or [] if text not in of_texts])
    say_twins(of_texts)
    reading = read_evaluate_settings(override({}, of_texts).get("evaluate", {}), "--set evaluate")
    from trsp_deploy.comparison import Asked  # after what can be said without PyTorch

    return Asked(
        min_speedup=least,
        max_ppl_ratio=max_ppl_ratio,
        texts=texts,
        bench=times,
        evaluate=reading,
        tokenizer=tokenizer,
    )


def speedups(texts: list[str] | None) -> dict[Phase, float]:
    """What --min-speedup asks of each phase, dense time / pruned time."""
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


def lost_share(option: str, text: str | None) -> float | None:
    """The share that may be lost, as a fraction; None without the option."""
    if text is None:
        return None
    found = _percent(text)
    if found is None or found >= 1:
        raise RecipeError(f"{option} '{text}': expected a share of at least 0% and below 100%, such as 3%")
    return found


def kept_share(option: str, text: str | None) -> float | None:
    """The share of quality that an option wants kept, as a fraction; None without it."""
    if text is None:
        return None
    found = _percent(text)
    if found is None or not 0.5 <= found <= 1:
        raise RecipeError(
            f"{option} '{text}': expected the share of quality to keep, 50% to 100%, such as 99% or 99.9%"
        )
    return found


def _percent(text: str) -> float | None:
    """A percentage as a share of 1; None for what is none."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    return None if number is None else float(number[1]) / 100
