"""What serving costs and what batching gains, on a real tritonserver: `make bench-serving`.

    python -m benchmarks.serving            # about six minutes on 2 cores
    python -m benchmarks.serving --quick    # about three; keeps nothing
    python -m benchmarks.serving --report   # the table and docs/triton.md from what is there

SmolLM2-135M, 8 of its 30 layers removed without training (speed does not depend on it), engine ort-cpu-fp32, dense and
pruned in one repository. In each replicate, in turn: the bare runner in a fresh process, and a fresh server loaded by
perf_analyzer with one and with eight requests at once. A time per token is that of the tokens after the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import targets
from benchmarks.kept import every_machine, judged, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import RunFolder, writing
from trsp_deploy.errors import TrspError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.runs import save_recipe
from trsp_deploy.recipe import Recipe, Strict
from trsp_deploy.results import ROLES, Role, Served, ServedWindow
from trsp_deploy.stages.serve_bench import LoadSettings, measure_served, started
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.judging.statistics import Ratio, interval
from trsp_deploy.tools.measuring.worker import Worker
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.triton_server.load import find_load_generator, prompts_of
from trsp_deploy.tools.triton_server.process import environment_of
from trsp_deploy.tools.triton_server.served import (
    SERVED_COLUMNS,
    derive,
    inter_token_s,
    served_notes,
    served_rows,
    served_sentence,
    tokens_per_s,
)

HOME = Path("runs/bench-serving")
PAGE = Path("docs/triton.md")
ENGINE = "ort-cpu-fp32"
NAME = "smollm2"
MAX_BATCH = 8
MAX_LENGTH = 1024
FULL = LoadSettings(concurrencies=(1, MAX_BATCH), prompt_tokens=128, new_tokens=32, window_s=4, replicates=5)
QUICK = FULL.model_copy(update={"window_s": 3, "replicates": 2})
BLOCKS = 3  # of the bare runner in a replicate, after one to warm up
TARGETS = {
    "throughput_8_over_1": at_least(3.0, "served tokens/s of the pruned model at 8 requests at once over 1"),
    "time_per_token_overhead": at_most(0.10, "served time per token over the bare runner's, less 1, one request"),
}


class Serving(Strict):
    """Raw samples of the bench."""

    served: Served
    bare_s: dict[Role, tuple[tuple[float, ...], ...]]  # mean time per token of each block, a tuple a replicate


def main() -> int:
    """Parse, make, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter; keeps nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    try:
        if options.report:
            found = judged(read(), lambda each: each.served.provenance.cpu, met)
        else:
            found = measure(QUICK if options.quick else FULL)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    if not options.quick:
        put_between_markers(PAGE, "\n\n".join(map(page, read())), "serving")
    print(page(found))
    print(json.dumps(verdict(found)))
    return 0


def measure(settings: LoadSettings) -> Serving:
    """Make the repository where it is missing, and measure; the full bench keeps its samples."""
    environment = environment_of(None)
    generator = find_load_generator(environment)
    run = engines()
    folders = {role: run / "engines" / ENGINE / role for role in ROLES}
    repository = HOME / "repository"
    names: dict[Role, str] = {"pruned": NAME, "dense": f"{NAME}-dense"}
    write_repository(folders, run / "pruned", names, repository, MAX_BATCH, MAX_LENGTH)
    prompt = bare_prompt(run / "pruned" / "tokenizer.json", settings)
    bare: dict[Role, list[tuple[float, ...]]] = {role: [] for role in ROLES}

    def run_bare(replicate: int) -> None:
        for role in ROLES if replicate % 2 == 0 else ROLES[::-1]:
            with Worker(folders[role]) as worker:
                blocks = [worker.block([prompt], settings.new_tokens - 1) for _ in range(1 + BLOCKS)]
            bare[role].append(tuple(float(np.mean(block["decode_s"])) for block in blocks[1:]))

    found = measure_served(repository, lambda: started(repository, environment), generator, settings, before=run_bare)
    result = Serving(served=found, bare_s={role: tuple(each) for role, each in bare.items()})
    if settings == FULL:
        with writing(results_path("serving", found.provenance.cpu)) as partial:
            partial.write_text(result.model_dump_json() + "\n", encoding="utf-8")
    return result


def engines() -> Path:
    """A run with dense and pruned engines."""
    recipe = Recipe.model_validate(
        {
            "model": "smollm2-135m",
            "drop": "8",
            "calibration": {"texts": "exl-wiki", "context_length": 256, "max_windows": 8, "validation_windows": 2},
            "plan": {"method": "shortgpt"},
            "transfer": {"form": "none"},
            "engines": [ENGINE],
        }
    )
    with RunFolder(HOME / "run") as run, quiet_libraries():
        job = Pipeline(run, recipe, None, lambda line: print(line, file=sys.stderr))
        save_recipe(run, recipe)
        job.pruning.prune()
        job.engines.build()
    return HOME / "run"


def bare_prompt(tokenizer: Path, settings: LoadSettings) -> list[int]:
    """Token ids of the first prompt that the server gets too."""
    reader = Tokenizer.from_file(str(tokenizer))
    ids: list[int] = reader.encode(prompts_of(reader, settings.prompt_tokens, 1)[0]).ids
    return ids


def overhead(found: Serving, role: Role) -> Ratio:
    """Served over bare time per token with one request at once, with an interval over replicates."""
    windows = {w.replicate: w for w in found.served.windows if w.concurrency == 1 and w.subject == role}
    return interval(
        [
            float(np.log(time_per_token(windows[replicate]) / np.median(blocks)))
            for replicate, blocks in enumerate(found.bare_s[role])
        ]
    )


def time_per_token(window: ServedWindow) -> float:
    """Median over requests."""
    return float(np.median([each for each in map(inter_token_s, window.requests) if each is not None]))


def batching(found: Serving, role: Role) -> Ratio:
    """Throughput at the highest concurrency over that at the lowest, with an interval over replicates."""
    low, high = min(found.served.concurrencies), max(found.served.concurrencies)
    rates = {(w.concurrency, w.replicate): tokens_per_s(w) for w in found.served.windows if w.subject == role}
    return interval(
        [float(np.log(rates[high, replicate] / rates[low, replicate])) for replicate in range(len(found.bare_s[role]))]
    )


def figures(found: Serving) -> dict[str, float]:
    """What the targets are about."""
    return {
        "throughput_8_over_1": batching(found, "pruned").ratio,
        "time_per_token_overhead": max(overhead(found, role).ratio for role in ROLES) - 1,
    }


def met(found: Serving) -> dict[str, bool]:
    """Which targets are met."""
    return targets.met(TARGETS, figures(found))


def verdict(found: Serving) -> dict[str, object]:
    """The JSON line."""
    return targets.verdict("serving", TARGETS, figures(found), machine=found.served.provenance.cpu)


def page(found: Serving) -> str:
    """Markdown: the targets, every figure, and where they come from."""
    report = derive(found.served)
    compared = [
        (role, f"{1e3 * np.median(found.bare_s[role]):.1f} ms", f"{1e3 * token_s:.1f} ms", shown(overhead(found, role)))
        for role in ROLES
        for token_s in [next(x.figures[role].inter_token_s["p50"] for x in report.levels if x.concurrency == 1)]
    ]
    gains = [(role, shown(batching(found, role))) for role in ROLES]
    made = found.served.provenance
    return "\n\n".join(
        [
            f"{made.cpu}, {made.cores} cores, onnxruntime {made.packages.get('onnxruntime', '?')}; engine {ENGINE}.",
            targets.table(TARGETS, figures(found)),
            served_sentence(report),
            markdown(SERVED_COLUMNS, served_rows(report)),
            markdown(("model", "bare runner, time per token", "served", "served over bare"), compared),
            markdown(("model", "tokens/s at 8 requests over 1"), gains),
            "\n".join(f"- {note}" for note in served_notes(report)),
        ]
    )


def shown(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def read() -> list[Serving]:
    """What is there, by machine; raises RunError when there is nothing."""
    return [Serving.model_validate_json(each) for each in every_machine("serving")]


if __name__ == "__main__":
    sys.exit(main())
