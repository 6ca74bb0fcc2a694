"""Time our engines against their peers in one run, and against what the machine's memory allows.

    make bench-engines             # everything, about 12 minutes on 2 cores
    make bench-engines QUICK=1     # two rounds, few tokens: shows that it works

SmolLM2-135M dense unless stated, batch 1, a prompt of 128 tokens. Every contender is a process of its own; blocks of
all take turns, forwards and backwards, so that drift of the machine hits all alike; who is compared with whom stands
side by side, and a ratio is the median over rounds, with its bootstrap interval. Prints a table and ends with one JSON
line; raw samples go to benchmarks/results/engines-CPU.json (not with --quick).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from benchmarks.engines import subjects
from benchmarks.engines.peers import negative_log_likelihood
from benchmarks.kept import RESULTS, every_machine, judged, results_path
from benchmarks.pages import markdown, put_between_markers
from trsp_deploy.artifacts import Provenance, provenance, writing
from trsp_deploy.decoder import decoder_size
from trsp_deploy.errors import EngineUnavailable, TrspError
from trsp_deploy.recipe import Case, Precision, Strict
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.limits import Stored, decode_bytes, speed_limit, stored, stored_by
from trsp_deploy.tools.packaged import find_asset
from trsp_deploy.tools.rates import measure_rates
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.requirements import adds_int8_exactly
from trsp_deploy.tools.statistics import Ratio, paired_ratio
from trsp_deploy.tools.worker import Worker

DOC, README = Path("docs/engines.md"), Path("README.md")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
ENGINES = (*PRECISIONS, "int4-accurate")  # of the specs ort-cpu-*: those whose perplexity is in the table
PROMPT, NEW_TOKENS, ROUNDS = 128, 128, 11
WARM_TOKENS = 4
LONG_PROMPT, LONG_NEW, CONTEXT = 1900, 32, 2048
BATCH = 8
# figure -> (bound, whether the figure has to be at least it or at most, meaning)
TARGETS: dict[str, tuple[float, str, str]] = {
    "fp32_decode_to_genai": (1.0, "at least", "fp32 decoding over onnxruntime-genai's"),
    "fp32_decode_to_optimum": (1.5, "at least", "fp32 decoding over Optimum's runner of its graph"),
    "int4_decode_to_genai": (1.0, "at least", "int4 decoding over onnxruntime-genai's"),
    "int4_perplexity_to_genai": (1.03, "at most", "int4 perplexity over onnxruntime-genai's"),
    "int8_prefill_to_fp32": (2.0, "at least", "int8 prompt over fp32's"),
    "fp32_floor_share": (0.85, "at least", "fp32: bytes over measured bandwidth, over the time of a token"),
    "late_to_early": (1.35, "at most", f"fp32: a token at past {LONG_PROMPT} over one at past {PROMPT}"),
    "batch_fp32": (3.0, "at least", f"fp32: tokens/s at batch {BATCH} over batch 1"),
    "batch_int8": (3.0, "at least", f"int8: tokens/s at batch {BATCH} over batch 1"),
    "batch_int4": (3.0, "at least", f"int4: tokens/s at batch {BATCH} over batch 1"),
    "opt_decode_to_optimum": (2.0, "at least", "random OPT-125M, fp32 decoding over Optimum's runner"),
    "gpt2_decode_to_optimum": (2.0, "at least", "random GPT-2, fp32 decoding over Optimum's runner"),
    "pruned_fp32": (0.95, "at least", "7 of 30 layers less, fp32: measured speed-up over its limit"),
    "pruned_int8": (0.95, "at least", "7 of 30 layers less, int8: measured speed-up over its limit"),
    "pruned_int4": (0.95, "at least", "7 of 30 layers less, int4: measured speed-up over its limit"),
}
Samples = dict[str, list[dict[str, Any]]]  # contender -> one block a round


class Found(Strict):
    """What a run of the bench found: raw samples and what they were taken on."""

    machine: Provenance
    samples: dict[str, list[dict[str, Any]]]  # contender -> one block a round
    absent: dict[str, str]  # contender -> why it took no part
    perplexity: dict[str, float]
    bandwidths: tuple[float, ...]  # bytes/s that the machine read in each round of the first race
    peers: dict[str, str] = Field(default_factory=dict)  # versions in the peers' environment
    stored: dict[Precision, Stored] = Field(default_factory=dict)  # our engines; else as `limits.stored` says
    vnni: bool = True  # whether integer products are quick and exact: processors of one name differ in it

    @property
    def processor(self) -> str:
        """Its name, and what that does not say."""
        return self.machine.cpu if self.vnni else f"{self.machine.cpu} without VNNI"

    @property
    def bandwidth(self) -> float:
        """Bytes/s, over the rounds."""
        return float(np.median(self.bandwidths))


def main() -> int:
    """Measure and report."""
    options = _parse()
    try:
        if options.report:
            machines = [Found.model_validate_json(each) for each in every_machine("engines")]
            put_between_markers(DOC, "\n\n".join(map(markdown_text, machines)), "engines")
            put_between_markers(README, "\n\n".join(map(short_text, machines)), "engines")
            found = judged(machines, lambda each: each.machine.cpu, lambda each: verdict(figures(each))["met"])
        else:
            found = run(options)
        print(text(found))
        print(json.dumps(verdict(figures(found))))
    except (OSError, ValidationError) as problem:
        print(f"error: {RESULTS}: {problem}; `make bench-engines` writes it", file=sys.stderr)
        return 1
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def run(options: argparse.Namespace) -> Found:
    """Time everything in turn, and keep the raw samples unless the run was only to show that it works."""
    rounds, new_tokens = (2, 16) if options.quick else (ROUNDS, NEW_TOKENS)
    bandwidths: list[float] = []
    samples, absent = _race(_contenders(options.peers), _prompt(1, PROMPT), new_tokens, rounds, bandwidths)
    samples |= _lengths_and_batches(rounds, 8 if options.quick else LONG_NEW)
    for name in ("opt-125m", "gpt2"):
        raced, missing = _race(_pair(name), _prompt(1, PROMPT), new_tokens, rounds)
        samples, absent = samples | raced, absent | missing
    found = Found(
        machine=provenance(),
        samples=samples,
        absent=absent,
        perplexity=_perplexities(options.peers),
        bandwidths=tuple(bandwidths),
        peers=subjects.peer_versions(options.peers),
        stored={precision: stored_by(load_engine_spec(f"ort-cpu-{precision}")) for precision in PRECISIONS},
        vnni=adds_int8_exactly(),
    )
    if not options.quick:
        with writing(results_path("engines", found.processor)) as partial:
            partial.write_text(found.model_dump_json() + "\n", encoding="utf-8")
    return found


def figures(found: Found) -> dict[str, float | None]:
    """One number for each target; None where something that it needs was not there."""
    values = ratios(found.samples, found.bandwidths, found.perplexity, found.stored)
    return {name: None if value is None else value.ratio for name, value in values.items()}


def ratios(
    samples: Samples, bandwidths: Sequence[float], perplexities: dict[str, float], ours: Mapping[Precision, Stored]
) -> dict[str, Ratio | None]:
    """What each target is held against; None where something that it needs was not there."""

    def times(label: str, part: str = "decode_s") -> list[float]:
        return [float(np.median(block[part])) for block in samples[label]]

    def ratio(slow: str, quick: str, part: str = "decode_s") -> Ratio | None:
        there = slow in samples and quick in samples
        return paired_ratio(times(slow, part), times(quick, part)) if there else None

    def batch(precision: str) -> Ratio | None:
        found = ratio(f"ours {precision}, batch 1", f"ours {precision}, batch {BATCH}")
        return None if found is None else _scaled(found, BATCH)

    def kept(precision: Precision) -> Ratio | None:
        dense, pruned = (decoder_size(subjects.model(name)) for name in ("dense", "pruned"))
        case = Case(batch_size=1, prompt_tokens=PROMPT, new_tokens=NEW_TOKENS)
        limit = speed_limit(dense, pruned, ours.get(precision, stored(precision)), case)
        found = ratio(f"ours {precision}", f"pruned {precision}")
        return None if found is None else _scaled(found, 1 / limit.decode)

    genai4, ours4 = perplexities.get("genai int4"), perplexities.get("ours int4")
    read = decode_bytes(decoder_size(subjects.model("dense")), stored("fp32"), 1, PROMPT + NEW_TOKENS // 2)
    lost = None if genai4 is None or ours4 is None else ours4 / genai4
    values = {
        "fp32_decode_to_genai": ratio("genai fp32", "ours fp32"),
        "fp32_decode_to_optimum": ratio("optimum fp32", "ours fp32"),
        "int4_decode_to_genai": ratio("genai int4", "ours int4"),
        "int4_perplexity_to_genai": None if lost is None else Ratio(ratio=lost, low=lost, high=lost),
        "int8_prefill_to_fp32": ratio("ours fp32", "ours int8", "prefill_s"),
        "fp32_floor_share": paired_ratio([read / each for each in bandwidths], times("ours fp32")),
        "late_to_early": ratio(f"ours fp32, past {LONG_PROMPT}", "ours fp32, batch 1"),
        **{f"batch_{precision}": batch(precision) for precision in PRECISIONS},
        "opt_decode_to_optimum": ratio("optimum opt-125m", "ours opt-125m"),
        "gpt2_decode_to_optimum": ratio("optimum gpt2", "ours gpt2"),
        **{f"pruned_{precision}": kept(precision) for precision in PRECISIONS},
    }
    return {name: values[name] for name in TARGETS}


def _scaled(found: Ratio, factor: float) -> Ratio:
    return Ratio(ratio=factor * found.ratio, low=factor * found.low, high=factor * found.high)


def verdict(values: dict[str, float | None]) -> dict[str, Any]:
    """The line for scripts; what is not measured is not met."""

    def met(name: str, value: float | None) -> bool:
        bound, sense, _ = TARGETS[name]
        return value is not None and (value >= bound if sense == "at least" else value <= bound)

    return {
        "bench": "engines",
        "figures": {name: None if value is None else round(value, 3) for name, value in values.items()},
        "targets": {name: bound for name, (bound, _, _) in TARGETS.items()},
        "met": {name: met(name, value) for name, value in values.items()},
    }


# -- contenders --------------------------------------------------------------------------------------------------------


def _contenders(peers: Path) -> dict[str, Callable[[], Worker]]:
    """By label: ours dense and pruned, and the others on the same dense weights."""

    def llama() -> Worker:
        gguf = find_asset("smollm2-135m")
        if gguf is None:
            raise EngineUnavailable("the packaged GGUF file is not here: trsp-deploy fetch smollm2-135m")
        return _peer(peers, "llama", gguf)

    return {
        "optimum fp32": lambda: _peer(Path(sys.executable), "optimum", subjects.onnx("dense")),
        "genai fp32": lambda: _peer(peers, "genai", subjects.genai("dense", "fp32", peers)),
        "ours fp32": _ours("dense", "fp32"),
        "ours fp32, small pages": _small_pages,
        "pruned fp32": _ours("pruned", "fp32"),
        "genai int4": lambda: _peer(peers, "genai", subjects.genai("dense", "int4", peers)),
        "ours int4": _ours("dense", "int4"),
        "ours int4-accurate": _ours("dense", "int4-accurate"),
        "pruned int4": _ours("pruned", "int4"),
        "llama.cpp Q4_1": llama,
        "ours int8": _ours("dense", "int8"),
        "pruned int8": _ours("pruned", "int8"),
    }


def _pair(name: str) -> dict[str, Callable[[], Worker]]:
    return {
        f"ours {name}": _ours(name, "fp32"),
        f"optimum {name}": lambda: _peer(Path(sys.executable), "optimum", subjects.onnx(name)),
    }


def _ours(name: str, kind: str) -> Callable[[], Worker]:
    return lambda: Worker(subjects.engine(name, kind))


def _small_pages() -> Worker:
    engine = subjects.engine("dense", "fp32")
    return Worker(engine, [sys.executable, "-m", "benchmarks.engines.small_pages", str(engine)])


def _peer(python: Path, kind: str, path: Path) -> Worker:
    if not python.exists():
        raise EngineUnavailable(
            f"no environment of peers at {python.parent.parent}: make {python.parent.parent}/.ready"
        )
    # llama.cpp meets at an OpenMP barrier after every product. PASSIVE, which this toolkit asks for where processes
    # share cores and a shell may hand down, makes its token five times as long; here nobody else runs meanwhile.
    return Worker(path, [str(python), str(subjects.PEERS), kind, str(path)], {"OMP_WAIT_POLICY": "ACTIVE"})


def _race(
    contenders: dict[str, Callable[[], Worker]],
    prompt: list[list[int]],
    new_tokens: int,
    rounds: int,
    bandwidths: list[float] | None = None,
) -> tuple[Samples, dict[str, str]]:
    """Blocks of all contenders in turn, each after a short one; and why those that could not take part did not.

    bandwidths: gets the machine's bytes/s in the middle of every round.

    Who waits for its turn is stopped by a signal: thread pools spin on after their work (docs/decisions/0011).
    """
    with contextlib.ExitStack() as stack:
        workers, absent = {}, {}
        for label, make in contenders.items():
            try:
                workers[label] = stack.enter_context(make())
                workers[label].pause()
            except EngineUnavailable as problem:
                absent[label] = str(problem)
        samples: Samples = {label: [] for label in workers}
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}: {', '.join(workers)}", file=sys.stderr, flush=True)
            for place, label in enumerate(workers if number % 2 else reversed(workers)):
                if bandwidths is not None and number and place == len(workers) // 2:
                    measure_rates.cache_clear()
                    bandwidths.append(measure_rates("cpu").bytes_per_s)
                worker = workers[label]
                worker.resume()
                worker.block(prompt, WARM_TOKENS)  # while the others ran, its memory went cold
                samples[label] += [worker.block(prompt, new_tokens)] if number else []
                worker.pause()
    return samples, absent


def _lengths_and_batches(rounds: int, new_tokens: int) -> Samples:
    """Ours at a long past and in a batch, beside batch 1 at a short past, in the same rounds.

    One process has all shapes, so that its peak is no one shape's. A first round, which nothing is kept of, warms it.
    """
    samples: Samples = {}
    for precision in PRECISIONS:
        shapes = {f"batch {BATCH}": _prompt(BATCH, PROMPT), "batch 1": _prompt(1, PROMPT)}
        shapes |= {f"past {LONG_PROMPT}": _prompt(1, LONG_PROMPT)} if precision == "fp32" else {}
        with Worker(subjects.engine("dense", precision)) as worker:
            for number in range(rounds + 1):
                for label in shapes if number % 2 else reversed(shapes):
                    block = worker.block(shapes[label], new_tokens)
                    kept = samples.setdefault(f"ours {precision}, {label}", [])
                    kept += [{**block, "peak_rss_bytes": None}] if number else []
    return samples


def _prompt(batch: int, length: int) -> list[list[int]]:
    """Random token ids that every vocabulary has; speed does not depend on them."""
    ids: list[list[int]] = np.random.default_rng(0).integers(5, 40_000, size=(batch, length)).tolist()
    return ids


def _perplexities(peers: Path) -> dict[str, float]:
    """Of wiki-demo, 8 windows of 512 tokens, by contender."""
    windows = subjects.windows(512, 8)
    found = {}
    for name in ENGINES:
        with open_engine(subjects.engine("dense", name)) as runner:
            logits = (runner.prefill(window[None], np.ones((1, 512), dtype=np.int64))[0] for window in windows)
            losses = [negative_log_likelihood(*pair) for pair in zip(logits, windows, strict=True)]
        found[f"ours {name}"] = float(np.exp(np.mean(losses)))
    for precision in ("fp32", "int4"):
        with contextlib.suppress(EngineUnavailable), _genai_worker(peers, precision) as worker:
            found[f"genai {precision}"] = worker.ask({"windows": windows.tolist()})["perplexity"]
    return found


@contextlib.contextmanager
def _genai_worker(peers: Path, precision: str) -> Iterator[Worker]:
    with _peer(peers, "genai", subjects.genai("dense", precision, peers)) as worker:
        yield worker


# -- the table ---------------------------------------------------------------------------------------------------------

HEAD = ("", "prompt ms", "token ms", "tokens/s", "peak MB", "perplexity")


def rows(found: Found) -> list[list[str]]:
    """One line a contender: medians over rounds."""
    return [[label, *_cells(label, blocks, found.perplexity)] for label, blocks in found.samples.items()]


def _cells(label: str, blocks: list[dict[str, Any]], perplexity: dict[str, float]) -> list[str]:
    token_s = _median(np.median(block["decode_s"]) for block in blocks)
    texts = BATCH if label.endswith(f"batch {BATCH}") else 1
    peaks = [block["peak_rss_bytes"] for block in blocks if block["peak_rss_bytes"]]
    prompt_ms = 1e3 * _median(block["prefill_s"] for block in blocks)
    lost = f"{perplexity[label]:.2f}" if label in perplexity else ""
    return [
        f"{prompt_ms:.1f}",
        f"{1e3 * token_s:.2f}",
        f"{texts / token_s:.1f}",
        f"{max(peaks) / 1e6:.0f}" if peaks else "",
        lost,
    ]


def text(found: Found) -> str:
    """The table for a terminal."""
    lines = [f"{name:24}{''.join(f'{cell:>11}' for cell in cells)}" for name, *cells in (list(HEAD), *rows(found))]
    lines += [f"{label:24} not measured: {reason}" for label, reason in found.absent.items()]
    return "\n".join([*lines, f"memory bandwidth {found.bandwidth / 1e9:.1f} GB/s"])


def markdown_text(found: Found) -> str:
    """The table for a page, and every target with what was measured."""
    values = ratios(found.samples, found.bandwidths, found.perplexity, found.stored)
    met = verdict(figures(found))["met"]
    targets = [
        [meaning, f"{sense} {bound:g}", _with_interval(values[name]), _said(met[name])]
        for name, (bound, sense, meaning) in TARGETS.items()
    ]
    machine = found.machine
    # onnxruntime-gpu goes by another name; of the others there is none where their environment is not.
    versions = {**machine.packages, **{f"peers' {name}": version for name, version in found.peers.items()}}
    told = ("onnxruntime", "onnxruntime-gpu", "torch", "peers' onnxruntime-genai", "peers' llama-cpp-python")
    packages = ", ".join(f"{name} {versions[name]}" for name in told if name in versions)
    return "\n\n".join(
        [
            f"**{found.processor}**, {machine.cores} cores. SmolLM2-135M unless named otherwise, prompt {PROMPT}, "
            f"{NEW_TOKENS} new tokens ({LONG_NEW} where a batch or a past is named), "
            f"medians of {len(found.samples['ours fp32'])} rounds in turn; "
            f"{found.bandwidth / 1e9:.0f} GB/s, {packages}. "
            "Perplexity: 8 windows of 512 tokens of wiki-demo.",
            markdown(HEAD, rows(found)),
            *(f"{label}: not measured ({reason})." for label, reason in found.absent.items()),
            markdown(("ratio", "target", "measured", ""), targets),
        ]
    )


def short_text(found: Found) -> str:
    """The README's: SmolLM2-135M at batch 1, all of one race."""
    shown = [row for row in rows(found) if not row[0].endswith(("opt-125m", "gpt2")) and "," not in row[0]]
    return f"{found.processor}, {found.machine.cores} cores:\n\n{markdown(HEAD, shown)}"


def _with_interval(found: Ratio | None) -> str:
    if found is None:
        return "–"
    return f"{found.ratio:.2f}" + (f" ({found.low:.2f} to {found.high:.2f})" if found.low < found.high else "")


def _said(met: bool) -> str:
    return "met" if met else "**not met**"


def _median(values: Iterator[float]) -> float:
    return float(np.median(list(values)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Our engines against others.")
    parser.add_argument("--quick", action="store_true", help="two rounds, few tokens: shows that it works")
    parser.add_argument("--report", action="store_true", help="write the last run's table into the docs; time nothing")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="Python of the environment with onnxruntime-genai and llama-cpp-python",
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
