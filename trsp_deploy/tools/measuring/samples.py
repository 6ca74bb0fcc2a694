"""Raw samples of dense and pruned on one engine, taken so that nobody has to believe the ratio.

A replicate is a fresh process for each subject. Within it they take turns in an order that a drift of the machine hits
all alike (`results.TURNS`). A process that has no turn is stopped by a signal, for thread pools spin on after their
work and would slow down the next one's (docs/decisions/0011). Dense takes part twice, or where memory has no room for
that every turn is a fresh process: what dense shows against itself is the noise floor. Replicates go on until the
interval is narrow enough, or every requirement is decided, or the budget is spent. Raw samples are kept;
`tools/judging/statistics.py` derives the rest.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trsp_deploy.artifacts.control_groups import usable_cores
from trsp_deploy.recipe import BenchSettings, Case
from trsp_deploy.results import TURNS, Block, Comparison, Rates, Replicate, Stop, Subject
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.host_memory import available_host_bytes
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, speedup, speedups
from trsp_deploy.tools.measuring.telemetry import Recorder, gpu_memory_free
from trsp_deploy.tools.measuring.worker import Worker
from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.graph_files import graph_bytes
from trsp_deploy.tools.runners.manifest import read_manifest

STEADY = 0.97  # a block that is not quicker than this share of the one before needs no more warm-up
LONGEST_WARMUP = 6  # blocks
MOST_CYCLES = 50  # in one replicate
TURN_S = 0.05  # short blocks are repeated until a turn is about this long
MOST_BLOCKS = 4  # of one shape in a turn
WARM_SHARE = 4  # a turn begins with a block of a quarter of the tokens, untimed: caches are the other subject's
CAUTION = 0.85  # of the time that is left is given out: the machine may slow down
CYCLES_SHARE = 2.0  # seconds of cycles for each second of starting a replicate's processes
OVERTIME = 2.0  # budgets that the fewest replicates that decide may take: fewer say nothing
ROOM = 1.5  # memory of a running engine over the size of its files

Start = Callable[[], Worker]
Work = tuple[Case, list[list[int]]]  # a shape and its prompt (batch, tokens)
Decided = Callable[[Sequence[Replicate]], bool]  # whether nothing is left to find out


def measure(
    subjects: Mapping[Subject, Path],
    label: str,
    vocabulary: int,
    settings: BenchSettings,
    seed: int,
    *,
    rates: Rates | None = None,
    decided: Decided | None = None,
    environment: Mapping[Subject, Mapping[str, str]] | None = None,
    device: str = "cpu",
) -> Comparison:
    """Compare built engines; raises EngineUnavailable when one cannot run.

    subjects: engine folders or ONNX files of `dense` and `pruned`; `again` comes in where the settings want a control.
    vocabulary: prompts are random token ids below it; speed does not depend on them.
    decided: asked after every replicate; without it the precision alone decides.
    environment: variables for a subject's processes.
    device: "cpu" or "cuda", where the engines run: its memory says whether all of them can be there at once.
    """
    for path in {*subjects.values()}:
        if not path.is_file():
            open_engine(path)  # which checks it, off the clock: the processes take over what was read of its files
    everyone, together = _arranged(subjects, settings, device)
    starts: dict[Subject, Start] = {
        subject: _start(path, (environment or {}).get(subject, {})) for subject, path in everyone.items()
    }
    generator = np.random.default_rng(seed)
    work = [(case, _prompt(case, vocabulary, generator)) for case in settings.cases]
    replicates: list[Replicate] = []
    schedule = _Schedule(settings, decided)
    with Recorder() as recorder, Meter(f"bench {label}", round(settings.budget_s)) as meter:
        while (stop := schedule.stop(replicates, recorder.now_s)) is None:
            began = recorder.now_s
            order = _rotated(list(starts), len(replicates))
            replicates.append(_replicate(starts, order, work, schedule, together, began))
            schedule.learn(replicates[-1], len(replicates), recorder.now_s - began, recorder.now_s)
            meter.reach(round(recorder.now_s), _progress(replicates), of=round(schedule.end_s))
        elapsed_s = recorder.now_s
    affinity = sorted(os.sched_getaffinity(0))
    return Comparison(
        engine=label,
        settings=settings,
        threads=usable_cores(),
        cores=len(affinity),
        affinity=tuple(affinity),
        replicates=tuple(replicates),
        telemetry=tuple(recorder.samples),
        rates=rates,
        stopped=stop,
        elapsed_s=elapsed_s,
    )


class _Schedule:
    """How many cycles the next replicate has, and when there have been enough replicates."""

    def __init__(self, settings: BenchSettings, decided: Decided | None) -> None:
        self._settings = settings
        self._decided = decided
        self._wanted = max(settings.replicates, FEWEST_REPLICATES)  # ending with fewer, nothing could be said of them
        self._overhead_s = 0.0  # the longest start of a replicate
        self._cycle_s = 0.0
        self.end_s = settings.budget_s  # when it will end at the latest, as far as is known
        self.cycles = 1
        self.blocks = 1  # of each shape in a turn

    def learn(self, replicate: Replicate, done: int, elapsed_s: float, now_s: float) -> None:
        """Fit cycles into what is left for each of the wanted replicates, and no more than starting is worth.

        replicate: the last of those `done`, which took `elapsed_s`.
        """
        overhead_s = elapsed_s - replicate.cycles_s
        self._overhead_s = max(self._overhead_s, overhead_s)
        blocks = [block.total_s for cases in replicate.blocks.values() for case in cases for block in case]
        turn_s = sum(blocks) / len(blocks) * len(self._settings.cases)
        self.blocks = min(MOST_BLOCKS, max(1, round(TURN_S / turn_s)))
        expected_s = len(TURNS[len(replicate.blocks)]) * turn_s * (self.blocks + 1 / WARM_SHARE)
        self._cycle_s = max(expected_s, replicate.cycles_s / self.cycles)
        share_s = CAUTION * (self._settings.budget_s - now_s) / max(1, self._wanted - done) - overhead_s
        self.cycles = min(MOST_CYCLES, max(1, int(min(share_s, CYCLES_SHARE * overhead_s) / self._cycle_s)))

    def stop(self, replicates: Sequence[Replicate], now_s: float) -> Stop | None:
        """Why to stop now; None to go on."""
        if len(replicates) < 2:  # one has no interval
            return None
        if len(replicates) >= self._wanted:
            if self._decided is not None:
                if self._decided(replicates):
                    return "decided"
            elif self._narrow(replicates):
                return "precise"
        next_s = self._overhead_s + self.cycles * self._cycle_s
        missing = min(self._settings.replicates, FEWEST_REPLICATES) - len(replicates)
        budget_s = self._settings.budget_s
        if missing > 0 and now_s + missing * next_s <= OVERTIME * budget_s:
            self.end_s = max(budget_s, now_s + missing * next_s)
            return None
        return "budget" if now_s + next_s > budget_s else None  # what would not end in time is not begun

    def _narrow(self, replicates: Sequence[Replicate]) -> bool:
        found = speedups(replicates, len(self._settings.cases))
        widths = [width for each in found.values() for width in (each.found.half_width, each.noise_floor or 0.0)]
        return max(widths) <= self._settings.precision


def _arranged(
    subjects: Mapping[Subject, Path], settings: BenchSettings, device: str
) -> tuple[dict[Subject, Path], bool]:
    """Who takes part, and whether all of them stay in memory.

    Without room for dense twice every turn has a process of its own: two turns of dense are then the control
    (`judging.statistics.replicate_ratios`), which two that stay would not have.
    """
    if not settings.control:
        return dict(subjects), _fit_together(list(subjects.values()), settings, device)
    three: dict[Subject, Path] = {"dense": subjects["dense"], "again": subjects["dense"], "pruned": subjects["pruned"]}
    if _fit_together(list(three.values()), settings, device):
        return three, True
    return dict(subjects), False


def _fit_together(engines: Sequence[Path], settings: BenchSettings, device: str) -> bool:
    """Whether all of them can be in the device's memory at once, each with its largest cache."""
    free = gpu_memory_free() if device == "cuda" else None
    available = available_host_bytes() if free is None else free
    if available is None:
        return True
    return sum(ROOM * _weights_bytes(engine) + _cache_bytes(engine, settings) for engine in engines) <= available


def _weights_bytes(engine: Path) -> int:
    """Bytes that an engine is loaded from; beside one of TensorRT lies its graph, with the weights once more, and
    beside a graph alone may lie any other."""
    if engine.is_file():
        return graph_bytes(engine)
    return read_manifest(engine).size_bytes


def _cache_bytes(engine: Path, settings: BenchSettings) -> int:
    """Bytes of keys and values at the largest shape; a cache that grows is there twice, as it is read and as it is
    written. Of a graph alone nothing is known."""
    if engine.is_file():
        return 0
    inputs = read_manifest(engine).inputs
    fixed = decoder_io.cache_length(inputs)
    places = [case.batch_size * (fixed or 2 * (case.prompt_tokens + case.new_tokens)) for case in settings.cases]
    return max(places) * decoder_io.cache_bytes(inputs)


def _start(engine: Path, environment: Mapping[str, str]) -> Start:
    return lambda: Worker(engine, environment=environment)


def _prompt(case: Case, vocabulary: int, generator: np.random.Generator) -> list[list[int]]:
    ids: list[list[int]] = generator.integers(vocabulary, size=(case.batch_size, case.prompt_tokens)).tolist()
    return ids


def _rotated(subjects: list[Subject], by: int) -> list[Subject]:
    """The subjects in an order in which each goes first equally often over the replicates."""
    by %= len(subjects)
    return subjects[by:] + subjects[:by]


class _Taken:
    """What one replicate's processes said."""

    def __init__(self, subjects: Sequence[Subject], cases: int) -> None:
        self.load_s: dict[Subject, float] = {}
        self.peak_rss_bytes: dict[Subject, int] = {}
        self.gpu_bytes: dict[Subject, int] = {}
        self.warmup_blocks = 0
        self.blocks: dict[Subject, list[list[Block]]] = {subject: [[] for _ in range(cases)] for subject in subjects}

    def add(self, subject: Subject, case: int, said: dict[str, Any]) -> None:
        """Keep one block."""
        block = Block.model_validate({name: value for name, value in said.items() if name in Block.model_fields})
        self.blocks[subject][case].append(block)
        self.peak_rss_bytes[subject] = max(self.peak_rss_bytes.get(subject, 0), said["peak_rss_bytes"])

    def add_warmup(self, subject: Subject, said: dict[str, Any]) -> None:
        """Keep what one block of the warm-up says of the GPU's memory: later on it may be another process's."""
        if said["gpu_bytes"] is not None:
            self.gpu_bytes[subject] = max(self.gpu_bytes.get(subject, 0), said["gpu_bytes"])


def _replicate(
    starts: Mapping[Subject, Start],
    order: list[Subject],
    work: list[Work],
    schedule: _Schedule,
    together: bool,
    began_s: float,
) -> Replicate:
    """Fresh processes, warm, and then cycles of turns.

    together: all are in memory at once; else each round starts a process for every turn.
    """
    taken = _Taken(order, len(work))
    with contextlib.ExitStack() as stack:
        workers: dict[Subject, Worker] = {}
        if together:
            workers = {subject: starts[subject]() for subject in order}  # side by side: starting is mostly imports
            for worker in workers.values():
                stack.callback(worker.close)
            for subject in order:
                _warm(subject, workers[subject], work, taken)
        began = time.perf_counter()
        for _ in range(schedule.cycles):
            for subject in (order[index] for index in TURNS[len(order)]):
                if together:
                    _take(subject, workers[subject], work, schedule.blocks, taken)
                    continue
                with contextlib.closing(starts[subject]()) as worker:
                    _warm(subject, worker, work, taken)
                    _take(subject, worker, work, schedule.blocks, taken)
        cycles_s = time.perf_counter() - began
    return Replicate(
        began_s=began_s,
        together=together,
        load_s=taken.load_s,
        peak_rss_bytes=taken.peak_rss_bytes,
        gpu_bytes=taken.gpu_bytes,
        warmup_blocks=taken.warmup_blocks,
        blocks_per_turn=schedule.blocks,
        cycles_s=cycles_s,
        order=tuple(order),
        blocks={subject: tuple(map(tuple, cases)) for subject, cases in taken.blocks.items()},
    )


def _warm(subject: Subject, worker: Worker, work: list[Work], taken: _Taken) -> None:
    """Load the engine, and run blocks until they stop getting quicker."""
    taken.load_s[subject] = worker.load()
    before, blocks = math.inf, 0
    while blocks < LONGEST_WARMUP:
        began = time.perf_counter()
        for case, prompt in work:
            taken.add_warmup(subject, worker.block(prompt, case.new_tokens))
        took, blocks = time.perf_counter() - began, blocks + 1
        if took > STEADY * before:
            break
        before = took
    taken.warmup_blocks = max(taken.warmup_blocks, blocks)
    worker.pause()


def _take(subject: Subject, worker: Worker, work: list[Work], blocks: int, taken: _Taken) -> None:
    """One turn: every shape, warm."""
    worker.resume()
    for index, (case, prompt) in enumerate(work):
        worker.block(prompt, max(1, case.new_tokens // WARM_SHARE))
        for _ in range(blocks):
            taken.add(subject, index, worker.block(prompt, case.new_tokens))
    worker.pause()


def _progress(replicates: Sequence[Replicate]) -> str:
    if len(replicates) < 2:
        return "1 replicate"
    return f"{len(replicates)} replicates, {speedup(replicates, 0, 'total').found.text('.3f')}"
