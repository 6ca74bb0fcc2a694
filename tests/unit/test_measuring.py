"""How long is measured, and what is measured at once."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.samples import made_up
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.results import Comparison, Subject
from trsp_deploy.tools.judging.statistics import FEWEST_REPLICATES, device_speedup, replicate_ratios, speedup
from trsp_deploy.tools.measuring import samples
from trsp_deploy.tools.measuring.samples import _arranged, _Schedule


@pytest.mark.parametrize(("asked", "made"), [(2, FEWEST_REPLICATES), (4, FEWEST_REPLICATES), (7, 7)])
def test_a_measurement_does_not_end_as_precise_before_it_can_decide(asked: int, made: int) -> None:
    schedule = _Schedule(BenchSettings(replicates=asked, budget_s=60), None)
    replicates = made_up(noise=1e-5, replicates=8).replicates
    ends = [count for count in range(1, 9) if schedule.stop(replicates[:count], 1.0) is not None]
    assert ends[0] == made and schedule.stop(replicates[:made], 1.0) == "precise"


def test_a_budget_is_shared_out_among_the_replicates_that_decide() -> None:
    """Of two replicates wanted, the first one's cycles must not take what five need."""
    one = made_up(replicates=1).replicates[0]
    few, five = (_Schedule(BenchSettings(replicates=count, budget_s=60), None) for count in (2, FEWEST_REPLICATES))
    for schedule in (few, five):
        schedule.learn(one, 1, 10.0, 10.0)
    assert few.cycles == five.cycles


@pytest.mark.parametrize(
    ("took_s", "asked", "made", "end_s"),
    [
        (10.0, 6, 6, 60.0),  # all that was asked for is within the budget
        (18.0, 6, FEWEST_REPLICATES, 90.0),  # three are, and the fewest that decide within twice as long
        (26.0, 6, 2, 60.0),  # not even those are: no more than the budget
        (18.0, 3, 3, 60.0),  # nothing has to be decided
        (90.0, 6, 2, 60.0),
    ],
)
def test_a_budget_that_decides_nothing_is_exceeded_where_twice_as_much_decides(
    took_s: float, asked: int, made: int, end_s: float
) -> None:
    replicates = made_up(noise=0.1, replicates=8).replicates
    schedule = _Schedule(BenchSettings(replicates=asked, budget_s=60, precision=1e-9), None)
    schedule._overhead_s = took_s  # starting is all that a replicate takes
    count = next(count for count in range(1, 9) if schedule.stop(replicates[:count], count * took_s) is not None)
    assert (count, schedule.end_s) == (made, end_s)


GB = 10**9


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Subject, Path]:
    """Two folders of TensorRT engines: 4 and 3 GB, and as much again as a graph beside each."""
    sizes: dict[Subject, int] = {"dense": 4 * GB, "pruned": 3 * GB}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        for file in ("model.engine", "model.onnx.data"):
            with (tmp_path / name / file).open("wb") as sparse:
                sparse.truncate(size)
    small = {f"past_key_values.0.{kind}": ("float16", ("b", 1, "past", 1)) for kind in ("key", "value")}
    monkeypatch.setattr(
        samples, "read_manifest", lambda folder: SimpleNamespace(size_bytes=sizes[folder.name], inputs=small)
    )
    return {name: tmp_path / name for name in sizes}


@pytest.mark.parametrize(
    ("free_gb", "control", "who", "together"),
    [
        (17, True, {"dense", "again", "pruned"}, True),  # 1.5 x (2 x 4 + 3) = 16.5
        (16, True, {"dense", "pruned"}, False),  # each turn a process of its own, so that dense has a control
        (16, False, {"dense", "pruned"}, True),  # 1.5 x (4 + 3) = 10.5
        (10, False, {"dense", "pruned"}, False),
        (None, True, {"dense", "again", "pruned"}, True),  # what memory there is is not known
    ],
)
def test_who_is_in_memory_at_once(
    engines: dict[Subject, Path],
    free_gb: int | None,
    control: bool,
    who: set[str],
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = None if free_gb is None else free_gb * GB
    monkeypatch.setattr(samples, "gpu_memory_free", lambda: free)
    monkeypatch.setattr(samples, "available_host_bytes", lambda: None)
    everyone, stay = _arranged(engines, BenchSettings(control=control), "cuda")
    assert (set(everyone), stay) == (who, together)
    if "again" in everyone:
        assert everyone["again"] == engines["dense"]
    monkeypatch.setattr(samples, "available_host_bytes", lambda: free)
    monkeypatch.setattr(samples, "gpu_memory_free", lambda: pytest.fail("a CPU's engines need main memory"))
    assert _arranged(engines, BenchSettings(control=control), "cpu") == (everyone, stay)


@pytest.mark.parametrize(("length", "free_gb", "together"), [("past", 3, False), ("past", 4, True), (1024, 3, True)])
def test_caches_have_to_fit_beside_the_weights(
    length: str | int, free_gb: int, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 texts of 1,024 tokens: two engines were held together whose caches had no room."""
    cache = {f"past_key_values.0.{kind}": ("float16", ("b", 8, length, 256)) for kind in ("key", "value")}
    monkeypatch.setattr(samples, "read_manifest", lambda folder: SimpleNamespace(size_bytes=GB // 2, inputs=cache))
    monkeypatch.setattr(samples, "gpu_memory_free", lambda: free_gb * GB)
    settings = BenchSettings(batch_sizes=(1, 64), prompt_tokens=(1008,), new_tokens=16, control=False)
    pair: dict[Subject, Path] = {"dense": tmp_path, "pruned": tmp_path}
    # 1.5 GB of weights; 0.54 GB of keys and values for each, and twice that of a cache that grows.
    assert _arranged(pair, settings, "cuda")[1] is together


def test_a_graph_is_as_large_as_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold a model in eight precisions: counted together, none of them has room beside another."""
    for name, size in {"dense.onnx": 4000, "pruned.onnx": 3000, "pruned_int8.onnx": 10**6}.items():
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(samples, "available_host_bytes", lambda: 17_000)
    pair: dict[Subject, Path] = {"dense": tmp_path / "dense.onnx", "pruned": tmp_path / "pruned.onnx"}
    assert _arranged(pair, BenchSettings(), "cpu")[1]


def apart(made: Comparison, second_slower: float) -> Comparison:
    """The same, every turn a process of its own; dense's second turn of each cycle so much slower."""
    replicates = []
    for replicate in made.replicates:
        (blocks,) = replicate.blocks["dense"]
        dense = tuple(
            block.model_copy(update={"total_s": block.total_s * (1 + second_slower * (place % 2))})
            for place, block in enumerate(blocks)
        )
        changes = {"together": False, "blocks": {**replicate.blocks, "dense": (dense,)}}
        replicates.append(replicate.model_copy(update=changes))
    return made.model_copy(update={"replicates": tuple(replicates)})


def test_fresh_processes_of_dense_are_each_others_control() -> None:
    made = made_up(speedup=1.2, noise=0.001, control=False)
    assert speedup(made.replicates, 0, "total").control is None, "two turns of one process are no control"
    found = speedup(apart(made, 0.08).replicates, 0, "total")
    assert found.noise_floor == pytest.approx(math.log(1.08), abs=0.01)
    assert found.found.low < found.found.ratio / 1.07
    quiet = speedup(apart(made, 0.0).replicates, 0, "total")
    assert quiet.control is not None and quiet.noise_floor == pytest.approx(0, abs=0.01)


def test_the_gpus_time_has_the_gpus_control() -> None:
    """The host's 50 ms of a call must not hide that dense took 30% longer on the GPU in its second turn."""
    made = apart(made_up(noise=0, control=False, host_s=0.05), 0.0)
    replicate = made.replicates[0]
    ((first, *_),) = replicate.blocks["dense"]
    assert first.device_prefill_s is not None
    slow = first.model_copy(update={"device_prefill_s": 1.3 * first.device_prefill_s})
    one = replicate.model_copy(update={"blocks": {"dense": ((first, slow),), "pruned": ((first, first),)}})
    found = device_speedup([one, one], 0, "prefill")
    assert found is not None and found.noise_floor == pytest.approx(math.log(1.3))
    assert speedup([one, one], 0, "prefill").noise_floor == 0


def test_a_turn_of_several_blocks_is_one_turn() -> None:
    """Two blocks a turn: the first two of four are dense's first turn."""
    made = apart(made_up(noise=0, control=False, cycles=2), 0.0)
    replicate = made.replicates[0]
    ((first, *_),) = replicate.blocks["dense"]
    slow = first.model_copy(update={"prefill_s": 2 * first.prefill_s})
    blocks = {"dense": ((first, first, slow, slow),), "pruned": ((first,) * 4,)}
    one = replicate.model_copy(update={"blocks_per_turn": 2, "blocks": blocks})
    assert replicate_ratios([one], 0, "prefill")[1] == [pytest.approx(math.log(2))]
