"""A comparison's raw samples as figures for people: speed-ups with intervals, their limits, and the verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import Field

from trsp_deploy.recipe import Case, Strict
from trsp_deploy.results import PHASES, ROLES, Comparison, Phase, Role, Stop, Subject, Telemetry
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.judging.limits import SpeedLimit
from trsp_deploy.tools.judging.statistics import (
    FEWEST_REPLICATES,
    Ratio,
    Speedup,
    device_s,
    device_speedup,
    medians_s,
    samples_s,
    speedups,
)
from trsp_deploy.tools.judging.verdicts import Claim, claim

TAIL_SAMPLES = 20
HOST_THREADS = 1  # that an engine on a GPU keeps busy on the host
MOST_LOST = 0.1  # cores: a quiet machine's own services take a few hundredths of one
LimitOf = Callable[[Case], SpeedLimit]


class DeviceTimes(Strict):
    """One phase by CUDA events: the GPU's time, without the host's."""

    dense_s: float  # median; of decoding, of a token
    pruned_s: float
    speedup: Ratio
    control: Ratio | None


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
    device_speedup: float | None  # by CUDA events; None on a CPU, and end to end
    limit: float | None  # None where the models' sizes are not known
    limit_assumed: bool = False  # not by measured rates: decoding bound by bytes, prefill by operations
    efficiency: float | None  # (speed-up - 1) / (limit - 1)
    above_limit: bool  # the whole interval, of a limit that is not assumed: a measurement to distrust
    device: DeviceTimes | None = None  # what `device_speedup` rests on; None too in files older than this key

    @property
    def title(self) -> str:
        """Name of the phase and its shape, for people."""
        return f"{PHASE_TITLES[self.phase]}, {self.case.title}"

    @property
    def difference(self) -> int:
        """1 where pruned is faster beyond doubt and the noise floor, -1 where it is slower, else 0."""
        return Speedup(found=self.speedup, control=self.control).difference

    @property
    def shown_limit(self) -> str:
        """The limit for people, as "1.29x" or "1.29x (assumed)"; empty where it is not known."""
        return "" if self.limit is None else f"{self.limit:.2f}x{' (assumed)' * self.limit_assumed}"


class MachineReport(Strict):
    """What else went on, over the whole comparison."""

    load: float  # mean
    busy_share: float
    steal_share: float
    lost_cores: float | None = None  # of those that the engines computed on, to other work; None where it is not known
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
    cores: int | None = None  # that the processes might use; None in files that are older than this key
    affinity: tuple[int, ...] | None = None  # numbers of those that they might run on; None in older files
    threads: dict[Role, int] = Field(default_factory=dict)  # of the engines' products; empty where they are on a GPU
    size_bytes: dict[Role, int] = Field(default_factory=dict)  # on disk; empty in files that are older than this key

    @property
    def headline(self) -> Case:
        """The shape that one sentence is about: that of the least speed-up end to end, for the others do better."""
        totals = [report for report in self.phases if report.phase == "total"]
        return min(totals, key=lambda report: report.speedup.ratio).case

    @property
    def has_several_shapes(self) -> bool:
        """Whether more than one was measured."""
        return len(self.phases) > len(PHASES)

    def title_of(self, report: PhaseReport) -> str:
        """A phase for people; with its shape where several were measured."""
        return report.title if self.has_several_shapes else PHASE_TITLES[report.phase]

    @property
    def where(self) -> str:
        """That shape, to be said behind a figure; empty where no other was measured."""
        count = len(self.phases) // len(PHASES)
        return f" at {self.headline.title}, the least of {count} shapes" if count > 1 else ""

    def of(self, phase: Phase) -> PhaseReport:
        """The report of a phase at the headline's shape."""
        shape = self.headline
        return next(report for report in self.phases if (report.phase, report.case) == (phase, shape))


def compare(
    comparison: Comparison,
    limit_of: LimitOf | None = None,
    threads: Mapping[Role, int] | None = None,
    sizes: Mapping[Role, int] | None = None,
) -> ComparisonReport:
    """Derive every figure; `limit_of` gives the limits of a shape. threads: of engines on a CPU. sizes: on disk."""
    cases = comparison.settings.cases
    found = speedups(comparison.replicates, len(cases))
    phases = tuple(
        _phase(comparison, index, phase, found[index, phase], None if limit_of is None else limit_of(case))
        for index, case in enumerate(cases)
        for phase in PHASES
    )
    replicates = comparison.replicates
    return ComparisonReport(
        claim=claim(list(found.values()), len(comparison.replicates)),
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
        machine=_machine(comparison, max((threads or {}).values(), default=HOST_THREADS)),
        cores=comparison.threads,
        affinity=comparison.affinity,
        threads=dict(threads or {}),
        size_bytes=dict(sizes or {}),
    )


def _phase(comparison: Comparison, case: int, phase: Phase, found: Speedup, limits: SpeedLimit | None) -> PhaseReport:
    dense_s, pruned_s = (medians_s(comparison.replicates, role, case) for role in ROLES)
    limit, assumed = (None, False) if limits is None else (limits.of(phase, dense_s), limits.assumed)
    ratio, device = found.found, _device(comparison, case, phase)
    return PhaseReport(
        case=comparison.settings.cases[case],
        phase=phase,
        dense_s=dense_s[phase],
        pruned_s=pruned_s[phase],
        tail=_tail(comparison, case, phase),
        speedup=ratio,
        control=found.control,
        noise_floor=found.noise_floor,
        device_speedup=None if device is None else device.speedup.ratio,
        device=device,
        limit=limit,
        limit_assumed=assumed,
        efficiency=None if limit is None or limit <= 1 else (ratio.ratio - 1) / (limit - 1),
        above_limit=limit is not None and not assumed and ratio.low > limit,
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


def _device(comparison: Comparison, case: int, phase: Phase) -> DeviceTimes | None:
    found = device_speedup(comparison.replicates, case, phase)
    if found is None:
        return None

    def middle(subject: Subject) -> float:
        blocks = [block for replicate in comparison.replicates for block in replicate.blocks[subject][case]]
        return statistics.median(time for block in blocks if (time := device_s(block, phase)) is not None)

    return DeviceTimes(dense_s=middle("dense"), pruned_s=middle("pruned"), speedup=found.found, control=found.control)


def _machine(comparison: Comparison, threads: int) -> MachineReport | None:
    """What else went on. threads: that the engines computed with on the host."""
    samples = comparison.telemetry
    if not samples:
        return None
    clocks = [sample.mhz for sample in samples if sample.mhz]
    gpus = [sample.gpu for sample in samples if sample.gpu is not None]

    return MachineReport(
        load=statistics.mean(sample.load for sample in samples),
        busy_share=statistics.mean(sample.busy_share for sample in samples),
        steal_share=statistics.mean(sample.steal_share for sample in samples),
        lost_cores=_lost_cores(samples, comparison.cores, threads),
        mhz=(min(clocks), max(clocks)) if clocks else None,
        gpu_mhz=(min(g.sm_mhz for g in gpus), max(g.sm_mhz for g in gpus)) if gpus else None,
        gpu_watts=(min(g.power_w for g in gpus), max(g.power_w for g in gpus)) if gpus else None,
        gpu_celsius=(min(g.temperature_c for g in gpus), max(g.temperature_c for g in gpus)) if gpus else None,
        throttle_reasons=tuple(sorted({reason for gpu in gpus for reason in gpu.throttle_reasons})),
        other_gpu_processes=max((gpu.other_processes for gpu in gpus), default=0),
    )


def _lost_cores(samples: Sequence[Telemetry], cores: int | None, threads: int) -> float | None:
    """Cores' worth of time that other work had of the engines', whose threads leave the other cores free to it."""
    taken = [sample.others_cores for sample in samples if sample.others_cores is not None]
    return None if cores is None or not taken else max(0.0, statistics.mean(taken) - max(0, cores - threads))


def disturbance(found: ComparisonReport) -> str:
    """Why times and ratios may be those of a busy machine; empty where nothing is known to have disturbed them.

    Turns of one comparison share what goes on, so that its ratios bear it; those of two times do not.
    """
    machine = found.machine
    if machine is None:
        return ""
    if machine.lost_cores is not None and machine.lost_cores > MOST_LOST:
        threads = max(found.threads.values(), default=HOST_THREADS)
        return (
            f"other work took the time of {machine.lost_cores:.2f} cores from the engines, which compute on {threads}"
        )
    if found.threads or not machine.other_gpu_processes:  # what computes on the host's threads is not on the GPU
        return ""
    return f"{machine.other_gpu_processes} other processes used the GPU"


def sentence(name: str, found: ComparisonReport) -> str:
    """The verdict on one engine, for people."""
    shown = [found.of(phase) for phase in ("total", "decode", "prefill")]
    parts = []
    for phase in shown:
        limit = f", limit {phase.shown_limit}" if phase.limit is not None else ""
        parts.append(f"{PHASE_TITLES[phase.phase]} {phase.speedup.text(more=limit)}")
    above = [phase.title for phase in found.phases if phase.above_limit]
    caution = f" Above its limit, so distrust it: {'; '.join(above)}." if above else ""
    others = f"; {at_others}" if (at_others := elsewhere(found)) else ""
    return f"{found.claim} on {name}{found.where}: {', '.join(parts)}{others}.{caution}"


def elsewhere(found: ComparisonReport) -> str:
    """What keeps a claim from being confirmed where no phase of the headline's shape does, for people; else empty."""
    if found.claim == "CONFIRMED" or found.replicates < FEWEST_REPLICATES:
        return ""
    difference, word = (-1, "slower") if found.claim == "NOT THERE" else (0, "not decided")
    there = [phase for phase in found.phases if phase.difference == difference]
    if not there or any(phase.case == found.headline for phase in there):
        return ""
    return f"{word}: {', '.join(f'{phase.title} {phase.speedup.text()}' for phase in there)}"


def notes(found: ComparisonReport) -> list[str]:
    """How a comparison was measured and what may have disturbed it, one line each."""
    how = {
        "precise": "the interval was narrow enough",
        "decided": "more of them would change no requirement's outcome",
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
        lines.append(
            f"control: dense against itself {whole.control.text('.3f')} end to end{found.where}, in the same blocks; "
            f"end to end, differences below {math.expm1(whole.noise_floor):.1%} cannot be told from none"
        )
    else:
        lines.append("no control: dense was not measured against itself")
    if any(phase.limit_assumed for phase in found.phases):
        lines.append(
            "limits are assumed, for this machine's rate of such products, or with the engines' own number of threads, "
            "is not measured: decoding bound by bytes, prefill by operations"
        )
    for phase in found.phases:
        if phase.limit is not None and phase.speedup.ratio > phase.limit:
            above = f"{phase.speedup.ratio:.3f}x, above its limit of {phase.limit:.3f}x"
            lines.append(f"{phase.title}: {above}; {_how_far(phase, phase.limit)}")
    machine = found.machine
    if machine is not None:
        lines.append(_load_note(found, machine))
        if clocks := _clocks_note(machine):
            lines.append(clocks)
        if disturbed := disturbance(found):
            lines.append(disturbed)
        if machine.steal_share > 0.02:
            lines.append(f"the hypervisor took {machine.steal_share:.0%} of the processors' time")
        if machine.throttle_reasons:
            lines.append(f"the GPU was throttled: {', '.join(machine.throttle_reasons)}")
    return lines


def _how_far(phase: PhaseReport, limit: float) -> str:
    """How much of a speed-up that is estimated above its limit is above it, and what follows."""
    if phase.speedup.low <= limit:
        return "its interval reaches below"
    then = "something else binds than is assumed, or distrust it" if phase.limit_assumed else "distrust it"
    return f"its whole interval is: {then}"


def _load_note(found: ComparisonReport, machine: MachineReport) -> str:
    """Who was at work meanwhile, the engines among them: one at a time, and on a GPU with one thread of the host."""
    numbers = "" if found.affinity is None else f" (of numbers {_ranges(found.affinity)})"
    where = "" if found.cores is None else f" on {found.cores} cores{numbers}"
    counts = found.threads
    own = ""
    if counts:
        same = len(set(counts.values())) == 1
        said = str(max(counts.values())) if same else ", ".join(f"{role} {count}" for role, count in counts.items())
        own = f", engine threads: {said}"
    # Of files that do not say what others did.
    others = machine.lost_cores is None and machine.load > max(counts.values(), default=HOST_THREADS) + 1
    doubt = "; more than the engines explain, so others were at work" if others else ""
    return f"load {machine.load:.1f}{where}, {machine.busy_share:.0%} busy{own}{doubt}"


def _clocks_note(machine: MachineReport) -> str:
    """Lowest and highest clocks, power and heat, as far as they are known; empty where none is."""
    parts = [] if machine.mhz is None else [f"clock {_span([f'{mhz / 1e3:.2f}' for mhz in machine.mhz], 'GHz')}"]
    of_gpu: list[tuple[tuple[float, float] | None, str]] = [
        (machine.gpu_mhz, "MHz"),
        (machine.gpu_watts, "W"),
        (machine.gpu_celsius, "degrees C"),
    ]
    known = [_span([f"{end:,.0f}" for end in ends], unit) for ends, unit in of_gpu if ends is not None]
    if known:
        parts.append(f"GPU {', '.join(known)}")
    return "; ".join(parts)


def _span(ends: Sequence[str], unit: str) -> str:
    """Lowest and highest for people, as "210 to 330 W"; one of them where both read alike."""
    low, high = ends
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers for people, as "0-3, 8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
