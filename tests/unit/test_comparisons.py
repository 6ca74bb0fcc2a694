"""What a comparison's report says of its figures: sentences, notes, limits and what disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.samples import busy, made_up, made_up_report, same_limit
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.results import GpuTelemetry, Role, Telemetry
from trsp_deploy.stages.bench import derive
from trsp_deploy.tools.judging import comparisons
from trsp_deploy.tools.judging.goals import PHASE_TITLES
from trsp_deploy.tools.judging.statistics import Ratio, Speedup
from trsp_deploy.tools.judging.verdicts import claim
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.reports import html
from trsp_deploy.tools.reports.rows import (
    comparison_rows,
    engine_rows,
)

BOTH: dict[Role, int] = {"dense": 2, "pruned": 2}


@pytest.mark.parametrize(
    ("others", "cores", "threads", "said"),
    [
        (0.8, 2, BOTH, "other work took the time of 0.80 cores from the engines, which compute on 2"),
        (0.08, 2, BOTH, ""),  # what a machine does of itself
        (0.8, 8, BOTH, ""),  # on cores that the engines leave free
        (7.2, 8, BOTH, "other work took the time of 1.20 cores from the engines, which compute on 2"),
        (1.8, 2, {}, "other work took the time of 0.80 cores from the engines, which compute on 1"),  # engines on a GPU
        (None, 2, BOTH, ""),  # files older than this figure
        (0.8, None, BOTH, ""),
    ],
)
def test_what_others_took_from_the_engines_is_counted(
    others: float | None, cores: int | None, threads: dict[Role, int], said: str
) -> None:
    found = comparisons.compare(busy(made_up(), others, cores), threads=threads)
    assert comparisons.disturbance(found).startswith(said) and bool(comparisons.disturbance(found)) == bool(said)
    assert not said or any(note.startswith(said) for note in comparisons.notes(found))


@pytest.mark.parametrize(("threads", "said"), [({}, "1 other processes used the GPU"), (BOTH, "")])
def test_who_uses_the_gpu_does_not_concern_an_engine_of_the_cpu(threads: dict[Role, int], said: str) -> None:
    made = busy(made_up(), None)
    gpu = GpuTelemetry(
        sm_mhz=1, memory_mhz=1, power_w=1, temperature_c=1, throttle_reasons=(), other_processes=1, used_bytes=1
    )
    seen = made.model_copy(update={"telemetry": tuple(t.model_copy(update={"gpu": gpu}) for t in made.telemetry)})
    assert comparisons.disturbance(comparisons.compare(seen, threads=threads)) == said


def report(speed: float, noise: float = 0.005, limit: float = 1.3) -> comparisons.ComparisonReport:
    made = made_up(speedup=speed, noise=noise)
    return comparisons.compare(made, lambda case: same_limit(limit))


@pytest.mark.parametrize(
    ("speed", "noise", "words"),
    [
        (1.25, 0.005, ["CONFIRMED on e: end to end 1.2"]),
        (1.01, 0.05, ["INCONCLUSIVE on e"]),
        (0.8, 0.005, ["NOT THERE on e"]),
        (1.5, 0.005, ["CONFIRMED on e", "Above its limit, so distrust it: prefill, batch 1, prompt 128; decode"]),
    ],
)
def test_the_sentence_follows_the_intervals(speed: float, noise: float, words: list[str]) -> None:
    text = comparisons.sentence("e", report(speed, noise))
    assert all(word in text for word in words), text


@BREADTH
@pytest.mark.parametrize(
    ("prefill", "words"),
    [
        ((0.88, 0.9, 0.92), "NOT THERE on e at batch 1, prompt 128, the least of 2 shapes: {}; slower: {}"),
        ((0.97, 1.0, 1.03), "INCONCLUSIVE on e at batch 1, prompt 128, the least of 2 shapes: {}; not decided: {}"),
        ((1.3, 1.32, 1.34), "CONFIRMED on e at batch 1, prompt 128, the least of 2 shapes: {}"),
    ],
)
def test_a_claim_by_another_shape_names_what_it_rests_on(prefill: tuple[float, float, float], words: str) -> None:
    """A prompt that was read more slowly at one shape was NOT THERE beside intervals of another, all above 1."""
    made = made_up(speedup=1.2, noise=0.001, shapes=(1.0, 1.1))
    found = comparisons.compare(made)
    low, ratio, high = prefill
    changed = Ratio(ratio=ratio, low=low, high=high)
    place = next(n for n, p in enumerate(found.phases) if p.phase == "prefill" and p.case != found.headline)
    phases = list(found.phases)
    phases[place] = phases[place].model_copy(update={"speedup": changed})
    claimed = claim([Speedup(found=p.speedup, control=p.control) for p in phases], found.replicates)
    other = found.model_copy(update={"phases": tuple(phases), "claim": claimed})
    figures = (found.of("total"), found.of("decode"), found.of("prefill"))
    shown = (f"{PHASE_TITLES[figure.phase]} {figure.speedup.text()}" for figure in figures)
    said = f"prefill, batch 1, prompt 256 {changed.text()}"
    assert comparisons.sentence("e", other) == words.format(", ".join(shown), said) + "."
    few = other.model_copy(update={"replicates": 4, "claim": "INCONCLUSIVE"})
    assert "slower" not in comparisons.sentence("e", few) and "not decided" not in comparisons.sentence("e", few)
    whole = made_up_report(made)
    engines = (whole.engines[0].model_copy(update={"comparison": other}),)
    page = html.render(whole.model_copy(update={"engines": engines}), {"ort-cpu-fp32": made})
    assert (f"At another shape, {words.rpartition('; ')[2].format(said)}." in page) == (claimed != "CONFIRMED")


def test_a_figure_above_its_limit_is_noted_wherever_notes_are() -> None:
    lines = [line for line in comparisons.notes(report(1.5, 0.005)) if "above its limit" in line]
    assert len(lines) == 3 and all(line.endswith("distrust it") for line in lines)
    assert lines[2].startswith("end to end, batch 1, prompt 128: 1.5") and "above its limit of 1.300x" in lines[2]
    noisy = report(1.31, 0.05)
    estimates = [phase for phase in noisy.phases if phase.speedup.ratio > 1.3]
    assert estimates and not any(phase.above_limit for phase in noisy.phases)
    reaching = [line for line in comparisons.notes(noisy) if line.endswith("its interval reaches below")]
    assert len(reaching) == len(estimates)
    assert not any("limit" in line for line in comparisons.notes(report(1.2, 0.005)))


def test_an_assumed_limit_says_so() -> None:
    made = made_up(speedup=1.2, noise=0.005)
    found = comparisons.compare(made, lambda case: same_limit(1.3, assumed=True))
    assert all(phase.limit_assumed for phase in found.phases)
    assert any(line.startswith("limits are assumed") for line in comparisons.notes(found))
    assert not any("assumed" in line for line in comparisons.notes(report(1.2)))
    assert comparisons.sentence("e", found).count(", limit 1.30x (assumed))") == 3
    assert [row[4] for row in comparison_rows(found)[:3]] == ["1.30x (assumed)"] * 3
    assert "assumed" not in comparisons.sentence("e", report(1.2)) + str(comparison_rows(report(1.2)))


def test_above_an_assumed_limit_nothing_is_said_to_be_impossible() -> None:
    """Products that are bound otherwise may be quicker: an int4 engine was, at 1.05 of its limit."""
    found = comparisons.compare(made_up(speedup=1.5, noise=0.005), lambda case: same_limit(1.3, assumed=True))
    assert not any(phase.above_limit for phase in found.phases)
    assert "distrust" not in comparisons.sentence("e", found) and "(!)" not in str(comparison_rows(found))
    lines = [line for line in comparisons.notes(found) if "above its limit of 1.300x" in line]
    ending = "; its whole interval is: something else binds than is assumed, or distrust it"
    assert len(lines) == 3 and all(line.endswith(ending) for line in lines)


def test_efficiency_is_the_share_of_what_was_possible() -> None:
    found = report(1.15, noise=0.001)
    assert found.of("decode").efficiency == pytest.approx(0.5, abs=0.02)
    assert found.blocks == 8 * 3 * 12 and found.replicates == 8


def test_cuda_events_tell_the_gpus_time_from_the_hosts() -> None:
    found = comparisons.compare(made_up(speedup=1.25, noise=0.005, host_s=0.02))
    decode = found.of("decode")
    assert decode.speedup.ratio == pytest.approx(0.030 / 0.028, rel=0.01)  # the host takes 20 ms of each token
    assert decode.device is not None and decode.device.control is not None
    assert decode.device.dense_s == pytest.approx(0.010, rel=0.02)
    assert decode.device.pruned_s == pytest.approx(0.008, rel=0.02)
    assert 1 < decode.device.speedup.low < 1.25 < decode.device.speedup.high and decode.device_speedup is not None
    assert decode.device_speedup == decode.device.speedup.ratio == pytest.approx(1.25, rel=0.01)
    assert decode.device.control.low < 1 < decode.device.control.high
    rows = {row[0]: row for row in comparison_rows(found)}
    assert (
        rows["decode, GPU time by CUDA events"][1] == "10.0 ms"
        and "1.25x (" in rows["decode, GPU time by CUDA events"][3]
    )
    assert "prefill, GPU time by CUDA events" in rows and "end to end, GPU time by CUDA events" not in rows
    assert found.of("total").device is None, "the host takes part in it"


def test_a_cpu_has_no_gpu_time() -> None:
    made = made_up()
    assert all(phase.device is phase.device_speedup is None for phase in comparisons.compare(made).phases)
    assert not any("CUDA" in row[0] for row in comparison_rows(comparisons.compare(made)))
    others = made_up(host_s=0.02).replicates[1:]
    some = made.model_copy(update={"replicates": (made.replicates[0], *others)})  # a driver that failed once
    assert comparisons.compare(some).of("decode").device is None
    older = comparisons.compare(made).model_dump(mode="json")
    for phase in older["phases"]:
        del phase["device"]
    assert comparisons.ComparisonReport.model_validate(older) == comparisons.compare(made)


def test_a_percentile_needs_samples_beyond_it() -> None:
    few, many = (comparisons.compare(made_up(cycles=cycles)) for cycles in (4, 20))
    assert set(few.of("decode").tail) == {"p90"} and not few.of("prefill").tail  # 384 tokens, 96 prompts
    assert set(many.of("decode").tail) == {"p90", "p95"}
    dense, pruned = many.of("decode").tail["p95"]
    assert dense > many.of("decode").dense_s and pruned > many.of("decode").pruned_s


def test_what_disturbed_is_said() -> None:
    samples = tuple(Telemetry(at_s=i, load=2, busy_share=0.9, steal_share=0.1, mhz=None) for i in range(3))
    found = comparisons.compare(made_up().model_copy(update={"telemetry": samples}))
    assert any("hypervisor took 10%" in note for note in comparisons.notes(found))
    assert any("dense against itself" in note for note in comparisons.notes(found))
    assert "load 2.0 on 2 cores, 90% busy" in comparisons.notes(found)[-2]
    alone = comparisons.compare(made_up(control=False))
    assert any("no control" in note for note in comparisons.notes(alone))


@pytest.mark.parametrize(
    ("load", "threads", "note"),
    [
        (1.4, {"dense": 1, "pruned": 1}, "load 1.4 on 2 cores, 50% busy, engine threads: 1"),
        (2.9, {"dense": 2, "pruned": 2}, "load 2.9 on 2 cores, 50% busy, engine threads: 2"),
        (2.9, {"dense": 2, "pruned": 1}, "load 2.9 on 2 cores, 50% busy, engine threads: dense 2, pruned 1"),
        (9.0, {"dense": 2, "pruned": 2}, "engine threads: 2; more than the engines explain, so others were at work"),
        (2.5, {}, "load 2.5 on 2 cores, 50% busy; more than the engines explain, so others were at work"),  # a GPU
    ],
)
def test_load_and_threads_are_told(load: float, threads: dict[Role, int], note: str) -> None:
    samples = tuple(Telemetry(at_s=i, load=load, busy_share=0.5, steal_share=0, mhz=None) for i in range(3))
    found = comparisons.compare(made_up().model_copy(update={"telemetry": samples}), threads=threads)
    (line,) = [line for line in comparisons.notes(found) if line.startswith("load ")]
    assert line.endswith(note)


def beside_gpu(mhz: tuple[float | None, float | None], gpu: bool) -> comparisons.ComparisonReport:
    """A comparison of two samples of the machine's clocks; gpu: whether a GPU's are known."""
    samples = tuple(
        Telemetry(
            at_s=place,
            load=1,
            busy_share=0.5,
            steal_share=0,
            mhz=clock,
            gpu=GpuTelemetry(
                sm_mhz=(1980, 1410)[place],
                memory_mhz=2619,
                power_w=(329.6, 210.2)[place],
                temperature_c=(51, 64)[place],
                throttle_reasons=(),
                other_processes=0,
                used_bytes=1,
            )
            if gpu
            else None,
        )
        for place, clock in enumerate(mhz)
    )
    return comparisons.compare(made_up().model_copy(update={"telemetry": samples}))


@pytest.mark.parametrize(
    ("mhz", "gpu", "said"),
    [
        ((3100, 2800), False, ["clock 2.80 to 3.10 GHz"]),
        ((2600, 2601), False, ["clock 2.60 GHz"]),
        ((None, None), True, ["GPU 1,410 to 1,980 MHz, 210 to 330 W, 51 to 64 degrees C"]),
        ((3100, 2800), True, ["clock 2.80 to 3.10 GHz; GPU 1,410 to 1,980 MHz, 210 to 330 W, 51 to 64 degrees C"]),
        ((None, None), False, []),
    ],
)
def test_clocks_power_and_heat_are_one_line(mhz: tuple[float | None, float | None], gpu: bool, said: list[str]) -> None:
    """They were in `report.json` and a plot alone."""
    lines = comparisons.notes(beside_gpu(mhz, gpu))
    assert [line for line in lines if "Hz" in line or "degrees" in line] == said


@pytest.mark.parametrize(("affinity", "said"), [((0, 1), "0-1"), ((0, 2, 3, 4, 9), "0, 2-4, 9"), ((7,), "7")])
def test_the_cores_that_a_comparison_may_run_on_are_named(affinity: tuple[int, ...], said: str) -> None:
    samples = (Telemetry(at_s=0, load=1, busy_share=0.5, steal_share=0, mhz=None),)
    made = made_up().model_copy(update={"telemetry": samples, "affinity": affinity})
    found = comparisons.compare(made)
    assert found.affinity == affinity
    assert any(note.startswith(f"load 1.0 on 2 cores (of numbers {said}), ") for note in comparisons.notes(found))


def test_of_several_processes_the_largest_peak_counts_and_the_median_load() -> None:
    made, mib = made_up(replicates=3), 1 << 20
    replicates = tuple(
        replicate.model_copy(
            update={
                "load_s": {"dense": load, "pruned": load / 2},
                "peak_rss_bytes": {"dense": peak, "pruned": peak // 2},
                "gpu_bytes": {"dense": peak * 2, "pruned": peak},
            }
        )
        for replicate, load, peak in zip(made.replicates, (0.5, 9.0, 0.6), (2 * mib, 8 * mib, 4 * mib), strict=True)
    )
    found = comparisons.compare(made.model_copy(update={"replicates": replicates}))
    assert found.load_s == {"dense": 0.6, "pruned": 0.3}
    assert found.peak_rss_bytes == {"dense": 8 * mib, "pruned": 4 * mib}
    assert found.gpu_bytes == {"dense": 16 * mib, "pruned": 8 * mib}


def test_threads_are_the_engines_own() -> None:
    cpu, gpu = load_engine_spec("ort-cpu-fp32"), load_engine_spec("tensorrt-fp16")

    def of(spec: EngineSpec | None) -> Subject:
        return Subject(path=Path("e"), spec=spec, vocabulary=9, cuts_logits=True, size=None)

    one = of(cpu.model_copy(update={"threads": 1}))
    assert derive(one, of(None), made_up()).threads == {"dense": 1, "pruned": 2}  # a file takes every core
    assert derive(of(gpu), of(gpu), made_up()).threads == {} and derive(of(gpu), of(gpu), made_up()).cores == 2


def test_the_size_on_disk_has_one_row() -> None:
    dense, pruned = (
        Subject(path=Path("e"), spec=None, vocabulary=9, cuts_logits=True, size=None, size_bytes=size)
        for size in (538_000_000, 430_000_000)
    )
    found = derive(dense, pruned, made_up())
    assert found.size_bytes == {"dense": 538_000_000, "pruned": 430_000_000}
    assert [row for row in comparison_rows(found) if "size" in row[0]] == [("size", "538 MB", "430 MB", "", "", "")]
    older = found.model_dump(mode="json", exclude={"size_bytes"})
    unknown = comparisons.ComparisonReport.model_validate(older)
    assert unknown == comparisons.compare(made_up(), threads=found.threads)
    assert comparison_rows(unknown) == comparison_rows(found)[:-1]
    report = made_up_report(made_up())
    engines = (report.engines[0].model_copy(update={"comparison": found}),)
    rows = engine_rows(report.model_copy(update={"engines": engines}))
    assert [row[2:5] for row in rows if row[2] == "size"] == [("size", "100 MB", "100 MB")], "its build's"


def test_every_percentile_has_its_row() -> None:
    titles = [row[0] for row in comparison_rows(comparisons.compare(made_up(cycles=20)))]
    assert "decode, p90" in titles and "decode, p95" in titles
