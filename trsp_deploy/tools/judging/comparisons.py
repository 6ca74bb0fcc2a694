"""A comparison's raw samples as figures for people: speed-ups with intervals, their limits, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from trsp_deploy.recipe import Case, Strict
from trsp_deploy.results import PHASES, ROLES, Comparison, Phase, Role, Stop, Subject, Telemetry
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.judging.limits import SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    FEWEST_REPLICATES,
    Ratio,
    Speedup,
    device_s,
    median_s,
    samples_s,
    speedups,
)

Claim = Literal["CONFIRMED", "NOT THERE", "INCONCLUSIVE"]
TAIL_SAMPLES = 20
LimitOf = Callable[[Case], SpeedLimit]


class PhaseReport(Strict):
    """One phase at one shape."""

    case: Case
    phase: Phase
    dense_s: float  # median; of decoding, of a token
    pruned_s: float
    tail: dict[str, tuple[float, float]]  # "p90", "p95": dense and pruned, where there are samples enough for them
    speedup: Ratio
    control: Ratio | None  # dense against itself
    noise_floor: float | None  # log units: the smallest difference that could be told from none
    device_speedup: float | None  # of the medians by CUDA events; None on a CPU
    limit: float | None  # None where the models' sizes are not known
    efficiency: float | None  # (speed-up - 1) / (limit - 1)
    above_limit: bool  # the whole interval: a measurement to distrust

    @property
    def title(self) -> str:
        """Phase and shape."""
        return f"{PHASE_TITLES[self.phase]}, {self.case.title}"


class MachineReport(Strict):
    """What else went on, over the whole comparison."""

    load: float  # mean
    busy_share: float
    steal_share: float
    mhz: tuple[float, float] | None  # lowest and highest
    gpu_mhz: tuple[int, int] | None
    gpu_watts: tuple[float, float] | None
    gpu_celsius: tuple[int, int] | None
    throttle_reasons: tuple[str, ...]
    other_gpu_processes: int


class ComparisonReport(Strict):
    """What a comparison found."""

    claim: Claim
    phases: tuple[PhaseReport, ...]
    load_s: dict[Role, float]  # medians over the replicates
    peak_rss_bytes: dict[Role, int]
    gpu_bytes: dict[Role, int]
    replicates: int
    blocks: int
    elapsed_s: float
    stopped: Stop
    machine: MachineReport | None

    def of(self, phase: Phase) -> PhaseReport:
        """A phase at the first shape."""
        return next(report for report in self.phases if report.phase == phase)


def compare(comparison: Comparison, limit_of: LimitOf | None = None) -> ComparisonReport:
    """Derive every figure; `limit_of` gives the limits of a shape."""
    cases = comparison.settings.cases
    found = speedups(comparison.replicates, len(cases))
    phases = tuple(
        _phase(comparison, index, phase, found[index, phase], None if limit_of is None else limit_of(case))
        for index, case in enumerate(cases)
        for phase in PHASES
    )
    replicates = comparison.replicates
    return ComparisonReport(
        claim=claim([phase.speedup for phase in phases], len(comparison.replicates)),
        phases=phases,
        load_s={role: statistics.median(r.load_s[role] for r in replicates) for role in ROLES},
        peak_rss_bytes={role: max(r.peak_rss_bytes[role] for r in replicates) for role in ROLES},
        gpu_bytes={
            role: max(r.gpu_bytes[role] for r in replicates)
            for role in ROLES
            if all(role in r.gpu_bytes for r in replicates)
        },
        replicates=len(replicates),
        blocks=sum(len(case) for r in replicates for subject in r.blocks.values() for case in subject),
        elapsed_s=comparison.elapsed_s,
        stopped=comparison.stopped,
        machine=_machine(comparison.telemetry),
    )


def _phase(comparison: Comparison, case: int, phase: Phase, found: Speedup, limits: SpeedLimit | None) -> PhaseReport:
    limit = None if limits is None else getattr(limits, phase)
    ratio = found.found
    return PhaseReport(
        case=comparison.settings.cases[case],
        phase=phase,
        dense_s=median_s(comparison, "dense", case, phase),
        pruned_s=median_s(comparison, "pruned", case, phase),
        tail=_tail(comparison, case, phase),
        speedup=ratio,
        control=found.control,
        noise_floor=found.noise_floor,
        device_speedup=_device_speedup(comparison, case, phase),
        limit=limit,
        efficiency=None if limit is None or limit <= 1 else (ratio.ratio - 1) / (limit - 1),
        above_limit=limit is not None and ratio.low > limit,
    )


def _tail(comparison: Comparison, case: int, phase: Phase) -> dict[str, tuple[float, float]]:
    """Percentiles that at least TAIL_SAMPLES samples lie beyond; of decoding, every token is a sample."""
    samples = [samples_s(comparison, subject, case, phase) for subject in ("dense", "pruned")]
    found = {}
    for percent in (90, 95):
        if min(map(len, samples)) * (100 - percent) / 100 >= TAIL_SAMPLES:
            dense, pruned = (float(np.percentile(each, percent)) for each in samples)
            found[f"p{percent}"] = (dense, pruned)
    return found


def _device_speedup(comparison: Comparison, case: int, phase: Phase) -> float | None:
    def middle(subject: Subject) -> float | None:
        blocks = [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]
        times = [device_s(block, phase) for block in blocks]
        known = [time for time in times if time is not None]
        return statistics.median(known) if known else None

    dense, pruned = middle("dense"), middle("pruned")
    return None if dense is None or pruned is None else dense / pruned


def claim(found: Sequence[Ratio], replicates: int) -> Claim:
    """What the speed-ups of all phases say together; nothing where there are too few replicates."""
    if replicates < FEWEST_REPLICATES:
        return "INCONCLUSIVE"
    if all(ratio.low > 1 for ratio in found):
        return "CONFIRMED"
    return "NOT THERE" if any(ratio.high < 1 for ratio in found) else "INCONCLUSIVE"


def _machine(samples: Sequence[Telemetry]) -> MachineReport | None:
    if not samples:
        return None
    clocks = [sample.mhz for sample in samples if sample.mhz]
    gpus = [sample.gpu for sample in samples if sample.gpu is not None]

    return MachineReport(
        load=statistics.mean(sample.load for sample in samples),
        busy_share=statistics.mean(sample.busy_share for sample in samples),
        steal_share=statistics.mean(sample.steal_share for sample in samples),
        mhz=(min(clocks), max(clocks)) if clocks else None,
        gpu_mhz=(min(g.sm_mhz for g in gpus), max(g.sm_mhz for g in gpus)) if gpus else None,
        gpu_watts=(min(g.power_w for g in gpus), max(g.power_w for g in gpus)) if gpus else None,
        gpu_celsius=(min(g.temperature_c for g in gpus), max(g.temperature_c for g in gpus)) if gpus else None,
        throttle_reasons=tuple(sorted({reason for gpu in gpus for reason in gpu.throttle_reasons})),
        other_gpu_processes=max((gpu.other_processes for gpu in gpus), default=0),
    )


def sentence(name: str, found: ComparisonReport) -> str:
    """The verdict on one engine, for people."""
    shown = [found.of(phase) for phase in ("total", "decode", "prefill")]
    parts = []
    for phase in shown:
        limit = "" if phase.limit is None else f", limit {phase.limit:.2f}x"
        ratio = phase.speedup
        parts.append(f"{PHASE_TITLES[phase.phase]} {ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}{limit})")
    above = [phase.title for phase in found.phases if phase.above_limit]
    caution = f" Above its limit, so distrust it: {'; '.join(above)}." if above else ""
    return f"{found.claim} on {name}: {', '.join(parts)}.{caution}"


def notes(found: ComparisonReport) -> list[str]:
    """How it was measured and what may have disturbed it, a line each."""
    how = {
        "precise": "the interval was narrow enough",
        "decided": "every requirement was decided",
        "budget": "the budget was spent",
    }
    lines = [
        f"{found.replicates} replicates of fresh processes, {found.blocks:,} blocks in turn, {found.elapsed_s:.0f} s, "
        f"until {how[found.stopped]}"
    ]
    if found.replicates < FEWEST_REPLICATES:
        lines.append(
            f"fewer than {FEWEST_REPLICATES} replicates decide nothing: give a larger budget "
            "(--budget, or in a run's recipe bench.budget_s)"
        )
    whole = found.of("total")
    if whole.control is not None and whole.noise_floor is not None:
        control = whole.control
        lines.append(
            f"control: dense against itself {control.ratio:.3f}x ({control.low:.3f} to {control.high:.3f}) end to end, "
            f"in the same blocks; end to end, differences below {math.expm1(whole.noise_floor):.1%} cannot be told "
            "from none"
        )
    else:
        lines.append("no control: dense was not measured against itself")
    machine = found.machine
    if machine is not None:
        if machine.steal_share > 0.02:
            lines.append(f"the hypervisor took {machine.steal_share:.0%} of the processors' time")
        if machine.throttle_reasons:
            lines.append(f"the GPU was throttled: {', '.join(machine.throttle_reasons)}")
        if machine.other_gpu_processes:
            lines.append(f"{machine.other_gpu_processes} other processes used the GPU")
    return lines
