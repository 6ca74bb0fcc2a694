"""Latency of dense and pruned on one engine, measured in turn: a block of each, ABBA, every raw sample kept.

Each engine lives in a process of its own (`tools/bench_worker.py`) and only one works at a time, so that drift of the
machine hits both alike and peak memory is the engine's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.results import Latency, Measurement
from trsp_deploy.tools.progress import Meter


class Worker:
    """A measuring process around one engine folder, for the length of a `with` block.

    command: another program that speaks the same lines (`tools/bench_worker.py`), to measure what is not an engine.
    """

    def __init__(self, engine: Path, command: Sequence[str] = ()) -> None:
        self._engine = engine
        self._command = command or (sys.executable, "-m", "trsp_deploy.tools.bench_worker", str(engine))
        self.load_s = 0.0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        try:
            self.load_s = self._read()["load_s"]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def block(self, prompt: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Run one block; returns prefill_s, decode_s, peak_rss_bytes and gpu_bytes."""
        return self.ask({"prompt": prompt, "new_tokens": new_tokens})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
            code = self._process.wait()
            raise EngineUnavailable(f"{self._engine}: the measuring process died with code {code} ({last[0]})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineUnavailable(reply["error"])
        return reply


def measure(dense: Path, pruned: Path, engine: str, vocabulary: int, settings: BenchSettings, seed: int) -> Measurement:
    """Alternate blocks of two built engines; raises EngineUnavailable when one cannot run.

    vocabulary: prompts are random token ids below it; speed does not depend on them.
    """
    generator = np.random.default_rng(seed)
    shape = (settings.batch_size, settings.prompt_tokens)
    prompt: list[list[int]] = generator.integers(vocabulary, size=shape).tolist()
    blocks: dict[str, list[dict[str, Any]]] = {"dense": [], "pruned": []}
    with (
        Worker(dense) as dense_worker,
        Worker(pruned) as pruned_worker,
        Meter(f"bench {engine}", settings.warmup_blocks + settings.blocks) as meter,
    ):
        workers = {"dense": dense_worker, "pruned": pruned_worker}
        for number in range(settings.warmup_blocks + settings.blocks):
            order = ("dense", "pruned") if number % 2 == 0 else ("pruned", "dense")
            for role in order:
                blocks[role].append(workers[role].block(prompt, settings.new_tokens))
            medians = {role: 1e3 * float(np.median(taken[-1]["decode_s"])) for role, taken in blocks.items()}
            meter.advance(f"{medians['dense']:.1f} / {medians['pruned']:.1f} ms a token")
        latencies = {
            role: _latency(workers[role].load_s, taken, settings.warmup_blocks) for role, taken in blocks.items()
        }
    return Measurement(engine=engine, settings=settings, dense=latencies["dense"], pruned=latencies["pruned"])


def _latency(load_s: float, blocks: list[dict[str, Any]], warmup: int) -> Latency:
    return Latency(
        load_s=load_s,
        prefill_s=tuple(block["prefill_s"] for block in blocks[warmup:]),
        decode_s=tuple(tuple(block["decode_s"]) for block in blocks[warmup:]),
        peak_rss_bytes=max(block["peak_rss_bytes"] for block in blocks),
        gpu_bytes=max((block["gpu_bytes"] for block in blocks if block["gpu_bytes"] is not None), default=None),
    )
