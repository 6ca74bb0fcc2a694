"""The disk estimate against sizes that real runs had, and what is said when a disk is too small.

A tiny run's own files are held against it in tests/integration/test_pipeline.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file
from transformers import GPT2Config, LlamaConfig, OPTConfig

from trsp_deploy.cli import jobs
from trsp_deploy.decoder import WeightCounts
from trsp_deploy.errors import StorageError
from trsp_deploy.recipe import EngineSpec, Recipe, read_recipe
from trsp_deploy.results import ROLES
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.resources import disk
from trsp_deploy.tools.resources.disk import DiskPlan, check_download, check_fits, plan_disk, plan_sweep
from trsp_deploy.tools.resources.weights import weights_bytes

MB = 1e6
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
OPT = OPTConfig(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768)
SPECS = [load_engine_spec(name) for name in ("ort-cpu-fp32", "tensorrt-rtx-fp16")]
# MB that a run of SmolLM2-135M left, 8 of 30 layers dropped: dense (a copy), pruned, each precision's graphs, engines.
MEASURED = {
    "dense": 541.6,
    "pruned": 428.3,
    "onnx fp32": 971.7,
    "onnx fp16": 490.4,
    "engine ort-cpu-fp32": 1194.0,
    "engine tensorrt-rtx-fp16": 1071.3,
}
# MB of dense engines that `build --onnx` made.
ENGINES = {
    "SmolLM2-135M, ort-cpu-int8": (SMOLLM2, "ort-cpu-int8", 257.6),
    "SmolLM2-135M, ort-cpu-int4": (SMOLLM2, "ort-cpu-int4", 95.8),
    "SmolLM2-135M, ort-cpu-int4-accurate": (SMOLLM2, "ort-cpu-int4-accurate", 110.8),
    "OPT-125M, ort-cpu-fp32": (OPT, "ort-cpu-fp32", 655.1),
    "GPT-2, ort-cpu-fp32": (GPT2Config(), "ort-cpu-fp32", 652.2),
}
DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def recipe(**changes: object) -> Recipe:
    return read_recipe({"model": "m", "drop": "8", "transfer": {"form": "none"}, **changes}, "test")


def smollm2(run: Path, specs: list[EngineSpec] = SPECS, free: int | None = None) -> DiskPlan:
    return plan_disk(run, recipe(), SMOLLM2, specs, free=free)


def estimates(run: Path) -> dict[str, tuple[float, float]]:
    """Measured and estimated MB by row of the page's table."""
    stages = {stage.stage: stage.kept_bytes / MB for stage in smollm2(run).stages}
    rows = {stage: (size, stages[stage]) for stage, size in MEASURED.items()}
    for name, (config, engine, size) in ENGINES.items():
        rows[name] = (
            size,
            disk._engine(load_engine_spec(engine), disk.counts_of(config)) / MB,
        )
    return rows


def test_within_a_fifth_of_what_was_measured(tmp_path: Path) -> None:
    rows = estimates(tmp_path / "run")
    for name, (measured, estimate) in rows.items():
        assert estimate == pytest.approx(measured, rel=0.05), name
    page = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+ \| [\d.]+) \|$", DOCS.read_text().partition("## Disk")[2], re.M))
    assert page == {name: f"{measured:.1f} | {estimate:.1f}" for name, (measured, estimate) in rows.items()}


def test_the_highest_moment_is_what_has_to_fit(tmp_path: Path) -> None:
    plan = smollm2(tmp_path / "run")
    before = sum(stage.kept_bytes for stage in plan.stages[:-1])
    assert before < plan.needed_bytes < before + 0.6e9, "a graph lies beside the last engine while it is built"
    training = plan_disk(tmp_path / "run", recipe(transfer={"form": "anneal"}), SMOLLM2, SPECS)
    scratch = {stage.stage: stage.scratch_bytes for stage in training.stages}
    assert scratch["pruned"] == 2 * 3 * 4 * sum(disk.counts_of(SMOLLM2).layers), (
        "two checkpoints of weights and moments"
    )


def test_graphs_lie_beside_what_is_made_of_them(tmp_path: Path) -> None:
    """As docs/memory.md has it: for an fp16 export one more, for an engine in floats one, in integers two."""
    fp32, fp16 = SPECS
    as_exported = fp32.model_copy(update={"name": "as-exported", "fuse": False})
    plan = smollm2(tmp_path / "run", [as_exported, fp32, fp16, load_engine_spec("ort-cpu-int8")])
    scratch = {stage.stage: stage.scratch_bytes for stage in plan.stages}
    counts = disk.counts_of(SMOLLM2)
    large, small = disk._graph(counts, "fp32"), disk._graph(counts, "fp16")
    assert (scratch["onnx fp32"], scratch["onnx fp16"]) == (0, small)
    assert (scratch["engine as-exported"], scratch["engine ort-cpu-fp32"]) == (0, large)
    assert (scratch["engine tensorrt-rtx-fp16"], scratch["engine ort-cpu-int8"]) == (small, 2 * large)


def test_a_training_that_goes_on_needs_room_for_one_checkpoint(tmp_path: Path) -> None:
    """The one that is there gives way once the next is whole; a run is not refused where it was let begin."""
    run, settings = tmp_path / "run", recipe(transfer={"form": "anneal"})
    fresh = plan_disk(run, settings, SMOLLM2, SPECS).stages[1].scratch_bytes
    state = run / "checkpoints" / "prune" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"")
    os.truncate(state, fresh // 2)
    plan = plan_disk(run, settings, SMOLLM2, SPECS, free=0)
    assert plan.stages[1].scratch_bytes == fresh - fresh // 2
    with pytest.raises(StorageError, match="--keep checkpoints: training goes on from them"):
        check_fits(plan, {})


def test_what_is_finished_costs_nothing_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = smollm2(run)
    finished = ["dense", "prune", "export-dense-fp32", "export-pruned-fp32", "build-ort-cpu-fp32-dense"]
    plan = plan_disk(run, recipe(), SMOLLM2, SPECS, finished=finished)
    assert [stage.stage for stage in plan.stages if stage.there] == ["dense", "pruned", "onnx fp32"]
    engine = disk._engine(SPECS[0], disk.counts_of(SMOLLM2))
    before = sum(stage.kept_bytes for stage in whole.stages[:3])
    assert plan.needed_bytes == whole.needed_bytes - before - engine


def test_what_is_made_again_lies_beside_the_old_until_it_is_whole(tmp_path: Path) -> None:
    """A folder alone says nothing: its step may have been of other settings."""
    run = tmp_path / "run"
    whole = {stage.stage: stage for stage in smollm2(run).stages}
    old = 300_000_000
    for folder in ("dense", "pruned", "onnx/dense-fp32", "onnx/pruned-fp32", "elsewhere"):
        (run / folder).mkdir(parents=True)
    for folder in ("pruned", "onnx/pruned-fp32"):
        with (run / folder / "weights").open("wb") as file:
            file.truncate(old)
    finished = ["dense", "export-dense-fp32"]
    plan = plan_disk(run, recipe(), SMOLLM2, SPECS[:1], finished=finished)
    stages = {stage.stage: stage for stage in plan.stages}
    assert [name for name, stage in stages.items() if stage.there] == ["dense"]
    size = whole["pruned"].kept_bytes
    assert (stages["pruned"].added_bytes, stages["pruned"].scratch_bytes) == (size - old, old)
    assert stages["onnx fp32"].kept_bytes == whole["onnx fp32"].kept_bytes
    graphs = stages["onnx fp32"].added_bytes + old  # of the pruned model alone
    assert 0.4e9 < graphs < 0.5e9 < whole["onnx fp32"].kept_bytes and stages["onnx fp32"].scratch_bytes == old
    added = sum(stage.added_bytes for stage in plan.stages[:-1])
    assert added < plan.needed_bytes == added + stages["engine ort-cpu-fp32"].scratch_bytes
    (run / "elsewhere" / "weights").hardlink_to(run / "pruned" / "weights")
    linked = plan_disk(run, recipe(), SMOLLM2, SPECS[:1], finished=finished)
    assert linked.needed_bytes == plan.needed_bytes + old, "nothing is freed while the blocks have another name"


def test_hard_links_cost_nothing(tmp_path: Path) -> None:
    here = LlamaConfig.from_dict(SMOLLM2.to_dict())
    here._name_or_path = str(tmp_path)
    tokenizer = plan_disk(tmp_path / "run", recipe(), here, SPECS).stages[0].kept_bytes
    assert tokenizer == 72 * 49_152, "a text, of which there is a copy"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    """The config of a model of the hub, as it lies in the cache before the model itself is asked for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = LlamaConfig.from_dict(SMOLLM2.to_dict())
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0"
    here.save_pretrained(snapshot)
    here._name_or_path = str(snapshot)
    return here


def test_a_model_that_is_to_be_downloaded_takes_disk(tmp_path: Path, cached: LlamaConfig) -> None:
    """It was taken for one that is there, of which the run has links."""
    run, snapshot = tmp_path / "run", Path(cached._name_or_path)
    copied, plan = smollm2(run), plan_disk(run, recipe(), cached, SPECS)
    assert [stage.stage for stage in plan.stages[:3]] == ["download", "dense", "pruned"]
    assert plan.needed_bytes == pytest.approx(copied.needed_bytes, rel=0.01), "downloaded, and then linked"
    swept = plan_sweep(run, recipe(), cached, SPECS, (3, 12))
    assert [stage.stage for stage in swept.stages] == ["download", "dense", "drop-3", "drop-12"]
    assert plan.stages[0].added_bytes == swept.stages[0].added_bytes == pytest.approx(541e6, rel=0.01)
    save_file({"weight": np.zeros(1)}, snapshot / "model.safetensors")
    (snapshot / "tokenizer.json").write_text("{}")
    assert plan_disk(run, recipe(), cached, SPECS).stages[0].stage == "dense", "it is all there"


def test_a_download_to_another_disk_is_asked_about_there(
    tmp_path: Path, cached: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_download(cached, tmp_path / "run", free=0)  # of the run's own disk it is a part of the plan
    monkeypatch.setattr(disk, "_same_disk", lambda one, other: False)
    assert plan_disk(tmp_path / "run", recipe(), cached, SPECS).stages[0].stage == "dense"
    check_download(cached, tmp_path / "run", free=10**9)
    with pytest.raises(StorageError, match=r"hub: downloading the model needs 0\.54 GB of disk; 0\.10 GB are free"):
        check_download(cached, tmp_path / "run", free=10**8)


def test_a_checkpoint_holds_what_moves_under_adapters() -> None:
    counts = WeightCounts(total=1000, layers=(300, 300), lm_head=200, embeddings=200)

    def size(**transfer: object) -> int:
        return disk._checkpoints(read_recipe({"model": "m", "weights": "bf16", "transfer": transfer}, "test"), counts)

    assert size(lora_rank=8, form="train", refit="layers") == 0
    assert size(lora_rank=8, form="anneal", refit="layers") == 2 * 2 * (600 + 600)  # weights, and what was rounded off
    assert size(form="train") == 2 * 600 * (2 + 2 * 2), "weights and two moments, twice"
    assert size(form="train", train="all") == 2 * 1000 * (2 + 2 * 2)
    assert size(form="train", optimizer="adamw-8bit") == round(2 * 600 * (2 + 2 * (1 + 4 / 256)))
    assert size(form="anneal", refit="layers") - size(form="anneal", refit="none") == 2 * 2 * 600


def test_too_small_a_disk_is_one_line_with_what_would_fit(tmp_path: Path) -> None:
    plan = smollm2(tmp_path / "run", free=4_000_000_000)
    with pytest.raises(StorageError) as caught:
        check_fits(plan, alone(tmp_path / "run", 4_000_000_000))
    line = str(caught.value)
    assert "\n" not in line and "4.00 GB are free" in line and "--ignore-disk" in line
    assert "--engine ort-cpu-fp32 alone (3." in line and "--out on a larger disk" in line and "clean" not in line
    with pytest.raises(StorageError, match=r"would fit: --engine tensorrt-rtx-fp16 alone \(2\.82 GB\), --out"):
        check_fits(smollm2(tmp_path / "run", free=3 * 10**9), alone(tmp_path / "run", 3 * 10**9))
    (tmp_path / "run").mkdir()
    with pytest.raises(StorageError, match="trsp-deploy clean"):
        check_fits(smollm2(tmp_path / "run", free=10), alone(tmp_path / "run", 10))
    check_fits(smollm2(tmp_path / "run", free=10**11), {})


def alone(run: Path, free: int) -> dict[str, DiskPlan]:
    return {spec.name: smollm2(run, [spec], free) for spec in SPECS}


def test_a_sweep_needs_a_run_for_every_number_of_layers(tmp_path: Path) -> None:
    def planned(*counts: int) -> DiskPlan:
        return plan_sweep(tmp_path, recipe(), SMOLLM2, SPECS, counts, free=10**10)

    few, many, both = planned(3), planned(12), planned(3, 12)
    assert few.needed_bytes > many.needed_bytes, "fewer layers go"
    assert few.needed_bytes == plan_disk(tmp_path / "drop-3", recipe(drop=3), SMOLLM2, SPECS).needed_bytes
    assert [stage.stage for stage in both.stages] == ["dense", "drop-3", "drop-12"]
    linked = 30 * (disk.ENGINE_GRAPH_BYTES * 2 + disk.TENSORRT_LOG_BYTES)  # and the plan file of TensorRT
    linked += weights_bytes(SPECS[1], disk.counts_of(SMOLLM2))
    assert both.needed_bytes == few.stages[1].kept_bytes + many.needed_bytes - linked
    steps = ["dense", "prune", *(f"export-{role}-{each}" for role in ROLES for each in ("fp32", "fp16"))]
    steps += [f"build-{spec.name}-{role}" for spec in SPECS for role in ROLES]
    again = plan_sweep(tmp_path, recipe(), SMOLLM2, SPECS, (3, 12), finished={3: steps}, begun=steps)
    dense = both.stages[0].kept_bytes
    assert again.needed_bytes == many.needed_bytes - dense - linked + disk.REPORT_BYTES
    with pytest.raises(StorageError, match="drop-12"):
        check_fits(plan_sweep(tmp_path, recipe(), SMOLLM2, SPECS, (3, 12), free=both.needed_bytes - 1), {})


def test_the_command_asks_before_the_work() -> None:
    assert "ignore_disk" in jobs.prune_and_build.__annotations__
