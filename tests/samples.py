"""Comparisons with made-up samples whose truth is known.

comparison = made_up(speedup=1.2, noise=0.02)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trsp_deploy.artifacts import provenance
from trsp_deploy.recipe import BenchSettings, Recipe
from trsp_deploy.results import (
    ROLES,
    Block,
    Comparison,
    Perplexity,
    PerplexityParity,
    Replicate,
    Served,
    ServedRequest,
    ServedWindow,
    Subject,
    TaskScore,
    Telemetry,
    ZeroShot,
)
from trsp_deploy.tools.judging.comparisons import compare
from trsp_deploy.tools.judging.limits import PhaseLimit, SpeedLimit
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.reports.measured import Measured
from trsp_deploy.tools.reports.quality import QualityReport
from trsp_deploy.tools.reports.record import (
    SCHEMA_VERSION,
    EngineFigures,
    EngineReport,
    ModelReport,
    RemovalReport,
    Report,
    verdict,
)
from trsp_deploy.tools.reports.sweeps import Point, Sweep, Targets, choose

NEW_TOKENS = 4
NEW_TOKENS_SERVED = 16


MADE_UP_QUALITY = QualityReport(
    origin="made up",
    dense_ppl=10.0,
    pruned_ppl=15.0,
    ratio=1.5,
    ratio_low=1.4,
    ratio_high=1.6,
    tokens=1000,
    context_length=64,
    pairs="documents",
)


def made_up(
    speedup: float = 1.0,
    noise: float = 0.01,
    replicates: int = 8,
    cycles: int = 4,
    seed: int = 0,
    control: bool = True,
    host_s: float | None = None,
    shapes: tuple[float, ...] = (1.0,),
) -> Comparison:
    """Log-normal noise of size `noise` on every process and on every block; dense takes 10 ms a token, 50 a prompt.

    host_s: of every call on a GPU, beside what CUDA events see; None is a CPU.
    shapes: speed-up at each prompt length over `speedup`.
    """
    generator = np.random.default_rng(seed)
    subjects: tuple[Subject, ...] = ("dense", "again", "pruned") if control else ("dense", "pruned")
    return Comparison(
        engine="made-up",
        settings=BenchSettings(new_tokens=NEW_TOKENS, prompt_tokens=tuple(128 * (n + 1) for n in range(len(shapes)))),
        threads=2,
        replicates=tuple(
            _replicate(subjects, [speedup * each for each in shapes], noise, cycles, generator, host_s)
            for _ in range(replicates)
        ),
        telemetry=tuple(
            Telemetry(at_s=at_s, load=1.0, busy_share=0.5, steal_share=0.0, mhz=2600.0) for at_s in range(5)
        ),
        rates=None,
        stopped="budget",
        elapsed_s=60.0,
    )


def made_up_served(speedup: float = 1.25, noise: float = 0.01, replicates: int = 6) -> Served:
    """One and eight requests at once: dense takes 100 ms to its first token and 10 ms for each of 15 more."""
    generator = np.random.default_rng(0)

    def window(subject: Subject, concurrency: int, replicate: int) -> ServedWindow:
        slow = concurrency**0.5 * np.exp(generator.normal(0, noise)) / (speedup if subject == "pruned" else 1)
        request = ServedRequest(
            sent_s=0.0,
            answered_s=tuple(slow * (0.1 + 0.01 * token) for token in range(NEW_TOKENS_SERVED)),
            tokens=tuple(range(1, NEW_TOKENS_SERVED + 1)),
        )
        return ServedWindow(
            subject=subject, concurrency=concurrency, replicate=replicate, began_s=0.0, requests=(request,) * 3
        )

    return Served(
        engine="ort-cpu-fp32",
        models={"pruned": "m", "dense": "m-dense"},
        engines={"pruned": "0", "dense": "1"},
        prompt_tokens=32,
        new_tokens=NEW_TOKENS_SERVED,
        window_s=1.0,
        concurrencies=(1, 8),
        windows=tuple(
            window(subject, concurrency, replicate)
            for replicate in range(replicates)
            for concurrency in (1, 8)
            for subject in ("dense", "again", "pruned")
        ),
        telemetry=(),
        load_generator="perf_analyzer",
        server="triton 2.51.0",
        fresh=True,
        provenance=provenance(),
        elapsed_s=60.0,
    )


def _replicate(
    subjects: tuple[Subject, ...],
    speedups: Sequence[float],
    noise: float,
    cycles: int,
    generator: np.random.Generator,
    host_s: float | None,
) -> Replicate:
    def case(subject: Subject, speedup: float) -> tuple[Block, ...]:
        process = np.exp(generator.normal(0, noise)) / (speedup if subject == "pruned" else 1)
        turns = cycles * (3 if len(subjects) == 3 else 2)
        return tuple(_block(process * np.exp(generator.normal(0, noise)), host_s) for _ in range(turns))

    def blocks(subject: Subject) -> tuple[tuple[Block, ...], ...]:
        return tuple(case(subject, speedup) for speedup in speedups)

    return Replicate(
        began_s=0.0,
        together=True,
        load_s=dict.fromkeys(subjects, 0.5),
        peak_rss_bytes=dict.fromkeys(subjects, 10**8),
        gpu_bytes={},
        warmup_blocks=3,
        blocks_per_turn=1,
        cycles_s=1.0,
        order=subjects,
        blocks={subject: blocks(subject) for subject in subjects},
    )


def _block(scale: float, host_s: float | None) -> Block:
    prefill_s, token_s, extra_s = 0.05 * scale, 0.01 * scale, host_s or 0.0
    return Block(
        prefill_s=prefill_s + extra_s,
        decode_s=(token_s + extra_s,) * NEW_TOKENS,
        total_s=prefill_s + NEW_TOKENS * token_s + (1 + NEW_TOKENS) * extra_s,
        device_prefill_s=None if host_s is None else prefill_s,
        device_decode_s=None if host_s is None else (token_s,) * NEW_TOKENS,
    )


def same_limit(ratio: float, assumed: bool = False) -> SpeedLimit:
    """One limit of every phase, whatever dense takes."""
    each = PhaseLimit(ratio)
    return SpeedLimit(prefill=each, decode=each, layers=1 / ratio, new_tokens=NEW_TOKENS, assumed=assumed)


def made_up_report(comparison: Comparison, model: str = "tiny") -> Report:
    """A whole report around one engine's comparison."""
    removal = RemovalReport(form="anneal", trained_tokens=100, dense_ppl=10.0, before_ppl=15.0, after_ppl=15.0)
    figures = EngineFigures(size_bytes=10**8, build_s=1.0)
    engines = (
        EngineReport(
            name="ort-cpu-fp32",
            backend="onnxruntime-cpu",
            precision="fp32",
            status="ran",
            dense=figures,
            pruned=figures,
            comparison=compare(comparison, lambda case: same_limit(1.4)),
            quality={"text": MADE_UP_QUALITY},
            to_pytorch=tuple(
                PerplexityParity(
                    subject="ort-cpu-fp32", role=role, precision="fp32", text="text", ratio=ratio, tolerance=0.005
                )
                for role, ratio in zip(ROLES, (1.0, 1.0012), strict=True)
            ),
        ),
        EngineReport(
            name="tensorrt-fp16", backend="tensorrt", precision="fp16", status="unavailable", reason="no CUDA device"
        ),
    )
    return Report(
        schema_version=SCHEMA_VERSION,
        verdict=verdict(list(engines), {"text": MADE_UP_QUALITY}),
        model=ModelReport(
            name=model,
            origin="made up",
            architecture="LlamaForCausalLM",
            num_layers_dense=8,
            num_layers_pruned=6,
            dropped_layers=(3, 4),
            parameters_dense=1000,
            parameters_pruned=800,
            layers_dropped_share=0.25,
            parameters_dropped_share=0.2,
        ),
        removal=removal,
        quality={"text": MADE_UP_QUALITY},
        engines=engines,
        parity=(),
        recipe=Recipe(model=model),
        plan=PruningPlan(
            model=model,
            num_layers=8,
            dropped=(3, 4),
            kept=(0, 1, 2, 5, 6, 7),
            method="trsp",
            seed=0,
            settings={},
            calibration="made up",
        ),
        provenance=provenance(),
        measured=(
            Measured(step="evaluate-text-dense", time="2026-01-01T10:00:00Z", differs={}),
            Measured(step="bench-ort-cpu-fp32", time="2025-12-01T10:00:00Z", differs={"torch": ("2.8.0", "2.9.0")}),
        ),
    )


def made_up_point(count: int, speed: float, ppl: float, limit: float | None = None) -> Point:
    """One number of layers of a sweep. limit: of every phase's speed-up."""
    found = compare(made_up(speedup=speed, noise=1e-6))
    phases = tuple(phase.model_copy(update={"limit": limit}) for phase in found.phases)
    quality = made_up_report(made_up()).quality["text"]
    return Point(
        num_dropped=count,
        dropped=tuple(range(count)),
        folder=f"drop-{count}",
        engine="ort-cpu-fp32",
        parameters_dropped_share=count / 10,
        quality={"text": quality.model_copy(update={"ratio": ppl, "ratio_low": ppl - 0.1, "ratio_high": ppl + 0.1})},
        comparison=found.model_copy(update={"phases": phases}),
        size_bytes=10**8,
        dense_size_bytes=2 * 10**8,
    )


def made_up_sweep(model: str = "tiny") -> Sweep:
    """Three cuts of a model of 10 layers; the largest is quick enough."""
    targets = Targets(min_speedup=1.25)
    points = tuple(made_up_point(count, 1 + count / 20, 1 + count / 10, 1 + count / 18) for count in (2, 4, 6))
    return Sweep(
        model=model,
        num_layers=10,
        points=points,
        targets=targets,
        choice=choose(points, targets),
        provenance=provenance(),
    )


def slow_again(made: Comparison, share: float) -> Comparison:
    """The same with dense so much slower the second time."""
    replicates = []
    for replicate in made.replicates:
        blocks = tuple(
            tuple(
                block.model_copy(update={name: (1 + share) * getattr(block, name) for name in ("prefill_s", "total_s")})
                for block in case
            )
            for case in replicate.blocks["again"]
        )
        replicates.append(replicate.model_copy(update={"blocks": {**replicate.blocks, "again": blocks}}))
    return made.model_copy(update={"replicates": tuple(replicates)})


def busy(made: Comparison, others: float | None, cores: int | None = 2) -> Comparison:
    """The same beside other work of so many cores."""
    samples = tuple(
        Telemetry(at_s=at_s, load=2, busy_share=1, steal_share=0, others_cores=others, mhz=None) for at_s in range(3)
    )
    return made.model_copy(update={"telemetry": samples, "cores": cores})


def scores(*correct: str) -> ZeroShot:
    """Tasks as strings of 1 (right) and 0 (wrong)."""
    tasks = [TaskScore(task=f"t{n}", metric="acc", correct=tuple(c == "1" for c in s)) for n, s in enumerate(correct)]
    return ZeroShot(role="dense", tasks=tuple(tasks))


def by_documents(losses: list[float], tokens: int = 10) -> Perplexity:
    documents = tuple((loss * tokens, tokens) for loss in losses)
    return Perplexity(
        text="t", role="dense", origin="", context_length=11, nll=(float(np.mean(losses)),), documents=documents
    )
