"""What serving costs and what batching gains, on a real tritonserver: `make bench-serving`.

    python -m benchmarks.serving            # a quarter of an hour on 2 cores of an EPYC, longer on slower ones;
                                            # stopped, it goes on with the lengths that had ended
    python -m benchmarks.serving --quick    # about three minutes; keeps nothing
    python -m benchmarks.serving --report   # the table and docs/triton.md from what is there

SmolLM2-135M, 8 of its 30 layers removed without training (speed does not depend on it), engine ort-cpu-fp32, dense and
pruned in one repository. Answers of two lengths, one after the other. In each replicate, in turn: the bare runner in a
fresh process, and a fresh server loaded by perf_analyzer with one and with eight requests at once. A time per token is
that of the tokens after the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import targets
from benchmarks.code import code_digest
from benchmarks.kept import every_machine, judged, keep, kept_in, results_path
from benchmarks.pages import markdown, put_between_markers
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import Provenance, RunFolder, provenance
from trsp_deploy.errors import TrspError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.runs import save_recipe
from trsp_deploy.recipe import Recipe, Strict
from trsp_deploy.results import ROLES, Role, Served, ServedWindow
from trsp_deploy.stages.serve_bench import LoadSettings, measure_served, started
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.judging.statistics import Ratio, interval
from trsp_deploy.tools.measuring.worker import Worker
from trsp_deploy.tools.model_repository.manifest import ServedModel, read_repository
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
ENDED = HOME / "ended"  # a file a length, until all of them are measured
PAGE = Path("docs/triton.md")
ENGINE = "ort-cpu-fp32"
NAME = "smollm2"
MAX_BATCH = 8
MAX_LENGTH = 1024
FULL = LoadSettings(concurrencies=(1, MAX_BATCH), prompt_tokens=128, window_s=4, replicates=5)
QUICK = FULL.model_copy(update={"window_s": 3, "replicates": 2})
# New tokens a request. Prompts are read one by one, at 8 at once as at 1: the shorter the answers, the less batching
# can gain. The long ones are as long as those of `make bench-engines`.
SHORT, LONG = 32, 128
BLOCKS = 3  # of the bare runner in a replicate, after one to warm up
TARGETS = {
    f"{name}_{new_tokens}": bound(limit, f"{meaning}, {new_tokens} new tokens after 128")
    for new_tokens in (SHORT, LONG)
    for name, bound, limit, meaning in (
        ("throughput_8_over_1", at_least, 3.0, "served tokens/s of the pruned model at 8 requests at once over 1"),
        ("time_per_token_overhead", at_most, 0.10, "served time per token over the bare runner's, less 1, one request"),
    )
}


class Loaded(Strict):
    """Raw samples of one load."""

    served: Served
    bare_s: dict[Role, tuple[tuple[float, ...], ...]]  # mean time per token of each block, a tuple a replicate


class Ended(Strict):
    """A length that was measured before others were, and what it was measured by and of."""

    code: str
    settings: LoadSettings
    models: tuple[ServedModel, ...]
    load: Loaded

    def stands_beside(self, code: str, settings: LoadSettings, models: tuple[ServedModel, ...], generator: str) -> bool:
        """Whether what would be measured now is of the same code, load, models and machine."""
        served = self.load.served
        same = (self.code, self.settings, self.models, served.load_generator) == (code, settings, models, generator)
        return same and not served.provenance.differences(provenance())


class Serving(Strict):
    """Raw samples of the bench, by the new tokens of a request."""

    loads: dict[int, Loaded]

    @property
    def provenance(self) -> Provenance:
        """Where it was measured."""
        return next(iter(self.loads.values())).served.provenance


def main() -> int:
    """Parse, make, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter; keeps nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped bench takes its server with it
    try:
        if options.report:
            found = judged(read(), lambda each: each.provenance.cpu, met)
        else:
            found = measure(QUICK, (SHORT,)) if options.quick else measure(FULL, (SHORT, LONG), ENDED)
        print(page(found))
        print(json.dumps(verdict(found)))
        if not options.report and not options.quick:  # after the table, which a full disk does not refuse
            keep(results_path("serving", found.provenance.cpu), found)
            shutil.rmtree(ENDED)
        if not options.quick:
            put_between_markers(PAGE, "\n\n".join(map(page, read())), "serving")
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the lengths that had ended", file=sys.stderr)
        return 130
    return 0


def measure(settings: LoadSettings, lengths: tuple[int, ...], ended: Path | None = None) -> Serving:
    """Make the repository where it is missing, and measure.

    ended: a folder for each length as it ends, and that those which are there already are taken from.
    """
    environment = environment_of(None)
    generator = find_load_generator(environment)
    run = engines()
    folders = {role: run / "engines" / ENGINE / role for role in ROLES}
    repository = HOME / "repository"
    names: dict[Role, str] = {"pruned": NAME, "dense": f"{NAME}-dense"}
    write_repository(folders, run / "pruned", names, repository, MAX_BATCH, MAX_LENGTH)
    prompt = bare_prompt(run / "pruned" / "tokenizer.json", settings)

    def loaded(asked: LoadSettings) -> Loaded:
        bare: dict[Role, list[tuple[float, ...]]] = {role: [] for role in ROLES}

        def run_bare(replicate: int) -> None:
            for role in ROLES if replicate % 2 == 0 else ROLES[::-1]:
                with Worker(folders[role]) as worker:
                    blocks = [worker.block([prompt], asked.new_tokens - 1) for _ in range(1 + BLOCKS)]
                bare[role].append(tuple(float(np.mean(block["decode_s"])) for block in blocks[1:]))

        found = measure_served(repository, lambda: started(repository, environment), generator, asked, before=run_bare)
        return Loaded(served=found, bare_s={role: tuple(each) for role, each in bare.items()})

    def of_length(new_tokens: int) -> Loaded:
        asked = settings.model_copy(update={"new_tokens": new_tokens})
        if ended is None:
            return loaded(asked)
        path = ended / f"{new_tokens}.json"
        code, models = measuring_code(), read_repository(repository).models
        for each in kept_in(path, Ended, "delete it"):
            if each.stands_beside(code, asked, models, generator.version()):
                print(f"{new_tokens} new tokens: as measured at {each.load.served.provenance.time}", file=sys.stderr)
                return each.load
        load = loaded(asked)
        keep(path, Ended(code=code, settings=asked, models=models, load=load))
        return load

    return Serving(loads={new_tokens: of_length(new_tokens) for new_tokens in lengths})


def measuring_code() -> str:
    """What a load's samples are made by, beside what the repository holds."""
    return code_digest("stages/serve_bench.py", "tools/measuring/bench_worker.py", beside=(Path(__file__),))


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


def overhead(found: Loaded, role: Role) -> Ratio:
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


def batching(found: Loaded, role: Role) -> Ratio:
    """Throughput at the highest concurrency over that at the lowest, with an interval over replicates."""
    low, high = min(found.served.concurrencies), max(found.served.concurrencies)
    rates = {(w.concurrency, w.replicate): tokens_per_s(w) for w in found.served.windows if w.subject == role}
    return interval(
        [float(np.log(rates[high, replicate] / rates[low, replicate])) for replicate in range(len(found.bare_s[role]))]
    )


def figures(found: Serving) -> dict[str, float | None]:
    """What the targets are about; None for a load that was not put on."""
    values: dict[str, float | None] = dict.fromkeys(TARGETS)
    for new_tokens, load in found.loads.items():
        values[f"throughput_8_over_1_{new_tokens}"] = batching(load, "pruned").ratio
        values[f"time_per_token_overhead_{new_tokens}"] = max(overhead(load, role).ratio for role in ROLES) - 1
    return values


def met(found: Serving) -> dict[str, bool]:
    """Which targets are met."""
    return targets.met(TARGETS, figures(found))


def verdict(found: Serving) -> dict[str, object]:
    """The JSON line."""
    return targets.verdict("serving", TARGETS, figures(found), machine=found.provenance.cpu)


def page(found: Serving) -> str:
    """Markdown: the targets, then every figure of each load, and where they come from."""
    made = found.provenance
    return "\n\n".join(
        [
            f"{made.cpu}, {made.cores} cores, onnxruntime {made.packages.get('onnxruntime', '?')}; engine {ENGINE}.",
            targets.table(TARGETS, figures(found)),
            *map(section, found.loads.values()),
        ]
    )


def section(load: Loaded) -> str:
    """Markdown: one load."""
    report = derive(load.served)
    compared = [
        (
            role,
            f"{1e3 * np.median(load.bare_s[role]):.1f} ms",
            f"{1e3 * token_s:.1f} ms",
            overhead(load, role).text(".3f", ""),
        )
        for role in ROLES
        for token_s in [next(x.figures[role].inter_token_s["p50"] for x in report.levels if x.concurrency == 1)]
    ]
    gains = [(role, batching(load, role).text(".3f", "")) for role in ROLES]
    return "\n\n".join(
        [
            f"**{load.served.new_tokens} new tokens after {load.served.prompt_tokens}.** {served_sentence(report)}",
            markdown(SERVED_COLUMNS, served_rows(report)),
            markdown(("model", "bare runner, time per token", "served", "served over bare"), compared),
            markdown(("model", "tokens/s at 8 requests over 1"), gains),
            "\n".join(f"- {note}" for note in served_notes(report)),
        ]
    )


def read() -> list[Serving]:
    """What is there, by machine; raises RunError when there is nothing."""
    return [each for (each,) in every_machine("serving", Serving)]


if __name__ == "__main__":
    sys.exit(main())
