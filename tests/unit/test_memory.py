"""The memory estimate's arithmetic: what must fit where, what control groups leave, and what is advised.

No GPU has confirmed the figures for GPUs; what a CPU confirms is in tests/integration/test_memory_measured.py.
"""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, OPTConfig

from benchmarks.kept import RESULTS
from benchmarks.memory import BUILD, ENGINES, OPT_1B3, Memory
from tests.breadth import BREADTH
from tests.families import GROUPED, family_config
from tests.tiny import FAMILIES, tiny_config
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.cli.needs import check_memory
from trsp_deploy.cli.tables import print_memory
from trsp_deploy.decoder import WeightCounts, cache_per_token, count_config, count_weights
from trsp_deploy.errors import DeviceMemoryError
from trsp_deploy.recipe import Recipe, override, read_recipe
from trsp_deploy.tools.host_memory import available_host_bytes
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.resources import memory_plan
from trsp_deploy.tools.resources.later_memory import PROCESS_BYTES, later_stages
from trsp_deploy.tools.resources.memory import MemoryEstimate
from trsp_deploy.tools.resources.memory_plan import Engines, plan_fitting, plan_memory
from trsp_deploy.tools.resources.rehearsal import rehearse, transfer_step

GIB = 2**30
# facebook/opt-6.7b and meta-llama/Llama-2-7b-hf, as their config.json have them.
OPT = OPTConfig(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096)
LLAMA = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
MODELS = {"OPT-6.7B": OPT, "Llama-2-7B": LLAMA}
LARGE = ["weights=bf16", "plan.batch_size=1", "transfer.batch_size=1"]
CASES = {
    "selection, gates alone": ("selection", []),
    "kept layers, AdamW (the default)": ("transfer", []),
    "all weights, AdamW": ("transfer", ["transfer.train=all"]),
    "all weights, 8-bit AdamW, checkpointing": (
        "transfer",
        ["transfer.train=all", "transfer.optimizer=adamw-8bit", "transfer.gradient_checkpointing=true"],
    ),
    "LoRA of rank 16": ("transfer", ["transfer.lora_rank=16"]),
    "LoRA of rank 16, checkpointing": (
        "transfer",
        ["transfer.lora_rank=16", "transfer.gradient_checkpointing=true"],
    ),
    "no training": ("transfer", ["transfer.form=none"]),
}
DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def recipe(*settings: str) -> Recipe:
    return read_recipe(override({"model": "m", "device": "cuda"}, list(settings)), "test")


@pytest.fixture(scope="module")
def estimates() -> dict[str, MemoryEstimate]:
    return {name: MemoryEstimate(config, "cuda", fast_bf16=True) for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def needed(estimates):
    def peak(model: str, case: str) -> int:
        stage, settings = CASES[case]
        stages = estimates[model].stages(recipe(*LARGE, *settings))
        return next(found.peak.total_bytes for found in stages if found.stage == stage)

    return peak


@BREADTH
def test_a_fold_that_is_annealed_holds_the_dense_layers_meanwhile(estimates):
    def highest(form):
        settings = [f"transfer.form={form}", "transfer.refit=span"]
        moments = estimates["Llama-2-7B"]._transfer(recipe(*LARGE, *settings))
        return {moment.name: moment.refit_bytes for moment in moments}

    layers = 2 * sum(estimates["Llama-2-7B"].counts.layers)  # bf16
    assert highest("anneal")["fold"] - highest("train")["fold"] == layers


@BREADTH
def test_families_that_say_their_body_otherwise_are_counted():
    """Gemma 3's text model names itself as its body."""
    found = MemoryEstimate(family_config("gemma3"), "cpu", fast_bf16=False).stages(recipe())
    assert all(stage.peak.total_bytes > 0 for stage in found)


@pytest.mark.parametrize(
    ("case", "card_gib"),
    [
        ("all weights, 8-bit AdamW, checkpointing", 80),
        ("LoRA of rank 16, checkpointing", 24),
        ("selection, gates alone", 24),
        ("no training", 24),
    ],
)
def test_opt_6_7b_fits(needed, case, card_gib):
    assert needed("OPT-6.7B", case) < card_gib * GIB


def test_without_the_options_a_24_gib_card_is_too_small(needed):
    assert needed("OPT-6.7B", "kept layers, AdamW (the default)") > 24 * GIB


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_is_computed(needed):
    section = DOCS.read_text(encoding="utf-8").split("\n## ")[2]
    assert section.startswith("OPT-6.7B and Llama-2-7B\n")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert [row[0] for row in rows] == list(CASES)
    for case, *figures in rows:
        assert [f"{needed(model, case) / 1e9:.1f}" for model in MODELS] == figures, case


def test_the_parts_that_are_arithmetic(estimates):
    opt = estimates["OPT-6.7B"]
    _, transfer = opt.stages(recipe(*LARGE, "transfer.train=all", "transfer.form=l2"))
    forward, update = (next(m for m in transfer.moments if m.name == name) for name in ("forward", "optimiser step"))
    parameters = sum(opt.counts.layers) + 50272 * 4096 + 2050 * 4096 + 2 * 4096  # embeddings, final norm
    assert opt.counts.total == parameters
    assert forward.gradients_bytes == 0 and update.gradients_bytes == 2 * parameters
    assert forward.optimizer_bytes == update.optimizer_bytes == 4 * parameters


@pytest.mark.parametrize("measured", sorted(RESULTS.glob("memory-*.json")), ids=lambda path: path.stem)
def test_exports_and_builds_need_what_the_bench_measured(measured):
    config = OPTConfig(**OPT_1B3, word_embed_proj_dim=OPT_1B3["hidden_size"])
    found = Memory.model_validate_json(measured.read_bytes())
    specs = [load_engine_spec(name) for names in ENGINES.values() for name in names]
    planned = later_stages(recipe(), config, count_config(config), specs, [], "cpu")
    needed = {stage.stage: stage.needed_bytes - PROCESS_BYTES for stage in planned}
    for row in found.rows:
        if row.job == "export and parity" or row.job.startswith(BUILD):
            stage = f"onnx {row.precision}" if row.job == "export and parity" else row.job.replace(BUILD, "engine ")
            held = row.anonymous_bytes - row.libraries_bytes
            assert 0.95 * held - 0.5 * GIB < needed[stage] < 1.3 * held + 0.5 * GIB, row.job


@BREADTH
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_counted_and_grows_with_the_batch(family):
    estimate = MemoryEstimate(tiny_config(family), "cpu", fast_bf16=False)
    small, large = (
        activations(estimate, "calibration.context_length=64", f"plan.batch_size={n}", f"transfer.batch_size={n}")
        for n in (2, 8)
    )
    for moment in ("gate update, forward", "backward"):
        assert 3 * small[moment] < large[moment] < 6 * small[moment]  # gradients and masks grow otherwise


def activations(estimate: MemoryEstimate, *settings: str) -> dict[str, int]:
    """Bytes by moment; of moments of one name the first."""
    stages = estimate.stages(recipe(*settings, "transfer.form=train"))
    moments = [moment for stage in stages for moment in stage.moments]
    return {moment.name: moment.activations_bytes for moment in reversed(moments)}


@BREADTH
def test_slebs_trials_hold_what_enters_each_layer():
    tokens, wide = 2 * 64, LlamaConfig(hidden_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000)
    sizes = {
        method: MemoryEstimate(wide, "cpu", False)
        .stages(recipe("device=cpu", f"plan.method={method}", "plan.batch_size=2", "calibration.context_length=64"))[0]
        .moments[0]
        .activations_bytes
        for method in ("shortgpt", "sleb")
    }
    assert sizes["sleb"] - sizes["shortgpt"] == 8 * tokens * 1024 * 4


@BREADTH
def test_checkpointing_keeps_one_state_a_layer():
    estimate = MemoryEstimate(tiny_config("llama"), "cpu", fast_bf16=False)
    length = "calibration.context_length=128"
    everything = activations(estimate, length)["forward"]
    assert activations(estimate, length, "transfer.gradient_checkpointing=true")["forward"] < everything / 3


@BREADTH
def test_a_model_that_reads_a_value_while_it_is_made_is_counted():
    """Apertus' activation (xIELU) does; on "meta" there is none."""
    config = transformers.ApertusConfig(**GROUPED)
    estimate = MemoryEstimate(config, "cpu", fast_bf16=False)
    assert estimate.counts.total == count_weights(transformers.AutoModelForCausalLM.from_config(config)).total
    assert all(stage.peak.total_bytes for stage in estimate.stages(recipe("plan.method=shortgpt")))


@BREADTH
def test_a_step_in_parts_keeps_gradients_and_few_activations():
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024)
    whole, parts = (
        {m.name: m for m in plan_memory(recipe(*SMALL, "transfer.batch_size=8", *more), config).stages[1].moments}
        for more in ([], ["transfer.micro_batch=1"])
    )
    assert parts["forward"].activations_bytes < whole["forward"].activations_bytes / 6
    assert (
        parts["forward"].gradients_bytes == parts["backward"].gradients_bytes == parts["optimiser step"].gradients_bytes
    )
    assert not whole["forward"].gradients_bytes


@BREADTH
def test_of_what_depends_on_data_the_rest_is_told_and_checked(card):
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2
    )
    chosen = recipe("drop=1", "transfer.form=anneal", "transfer.refit=none", "device=cpu")
    found = plan_memory(chosen, config)
    trained = sum(weights for weights in MemoryEstimate(config, "cpu", False).counts.layers)
    moments = {moment.name: moment for moment in found.stages[1].moments}
    assert found.at_least and not moments["forward"].activations_bytes
    assert moments["optimiser step"].gradients_bytes == 4 * trained
    assert moments["optimiser step"].optimizer_bytes == 2 * 4 * trained
    card(1_000_000)
    with pytest.raises(DeviceMemoryError, match="transfer needs at least"):
        plan_fitting(chosen, config, ["transfer"])


@BREADTH
def test_what_is_planned_is_refused_with_what_would_fit(card):
    """`--plan-memory` says the same as a run that would not begin."""
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024)
    peaks = {stage.stage: stage.peak.total_bytes for stage in plan_memory(recipe(*SMALL), config).stages}
    card(peaks["transfer"] - 1_000_000)
    with pytest.raises(DeviceMemoryError, match=r"transfer needs about .*would fit: --set"):
        memory_plan.check_plan(recipe(*SMALL), config, plan_memory(recipe(*SMALL), config))


@pytest.fixture
def card(monkeypatch):
    def with_bytes(free: int) -> None:
        monkeypatch.setattr(memory_plan, "available_bytes", lambda device: free)

    return with_bytes


SMALL = ["calibration.context_length=128", "drop=1", "device=cpu", "autocast='off'"]


def test_a_sweep_is_held_against_the_cut_that_needs_most(card, tmp_path):
    """The smallest alone was looked at; without training the largest has the most spans, and so the most equations."""
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    folded = ["plan.method=shortgpt", "transfer.form=none", "transfer.refit=span", *SMALL]
    peaks = [plan_memory(recipe(*folded, f"drop={count}"), config).peak_bytes for count in (1, 4)]
    assert peaks[0] < peaks[1]
    card((peaks[0] + peaks[1]) // 2)
    job: Any = SimpleNamespace(
        recipe=recipe(*folded),
        run=RunFolder(tmp_path),
        pruning=SimpleNamespace(unfinished=lambda: ["selection", "transfer"]),
        engines=SimpleNamespace(buildable=list, specs=()),
        inputs=SimpleNamespace(model=SimpleNamespace(config=lambda: config)),
    )
    check_memory(job, None, ignore=False, counts=(1,))
    with pytest.raises(DeviceMemoryError, match="transfer needs about"):
        check_memory(job, None, ignore=False, counts=(1, 2, 4))


@BREADTH
def test_a_checkpoint_is_saved_in_its_stored_dtype_whatever_it_trained_in():
    """Trained in bf16, a model that is stored in fp32 is largest when it is saved."""
    none = ["weights=bf16", "transfer.form=none", "transfer.refit=none", "drop=1", *SMALL]
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        config = tiny_config("llama", hidden_size=512, intermediate_size=2048, dtype=dtype)
        estimate = MemoryEstimate(config, "cpu", fast_bf16=False)
        saving = next(moment for moment in estimate.stages(recipe(*none))[1].moments if moment.name == "saving")
        pruned = estimate.counts.total - estimate.counts.layers[0]
        assert (saving.weights_bytes, saving.activations_bytes) == (width * pruned, width * pruned)


def test_a_refusal_names_what_would_fit(card):
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024)
    peaks = {stage.stage: stage.peak.total_bytes for stage in plan_memory(recipe(*SMALL), config).stages}
    card(peaks["transfer"] - 1_000_000)
    with pytest.raises(DeviceMemoryError) as refusal:
        plan_fitting(recipe(*SMALL), config, ["transfer"])
    line = str(refusal.value)
    assert line.startswith("transfer needs about") and "\n" not in line
    assert "--set transfer.gradient_checkpointing=true (" in line and "--ignore-memory" in line
    card(peaks["transfer"])
    plan_fitting(recipe(*SMALL), config, ["transfer"])


@BREADTH
def test_what_comes_after_training_is_refused_with_the_engines_that_would_fit(card):
    config = tiny_config("llama", hidden_size=512, intermediate_size=4096, vocab_size=100_000)
    small, large = (load_engine_spec(f"ort-cpu-{precision}") for precision in ("fp32", "int8"))
    both = Engines([small, large], [small, large])
    chosen = recipe(*SMALL, "evaluate.context_length=64")
    needed = {stage.stage: stage.needed_bytes for stage in plan_memory(chosen, config, engines=both).later}
    engines = [f"{what} ort-cpu-{precision}" for what in ("engine", "run") for precision in ("fp32", "int8")]
    assert list(needed) == ["onnx fp32", *engines, "evaluation"]
    card(needed["engine ort-cpu-int8"] - 1_000_000)
    found = plan_memory(chosen, config, engines=both)
    assert [stage.stage for stage in found.later if not found.later_fits(stage)] == ["engine ort-cpu-int8"]
    (line,) = found.lines()
    assert line.startswith("needs main memory: selection ") and "engine ort-cpu-int8 " in line
    with pytest.raises(DeviceMemoryError) as refusal:
        plan_fitting(chosen, config, list(needed), engines=both)
    said = str(refusal.value)
    assert said.startswith("engine ort-cpu-int8 needs about ") and "\n" not in said
    assert "would fit: --engine ort-cpu-fp32 alone (" in said and "ort-cpu-int8 alone" not in said
    plan_fitting(chosen, config, ["selection", "engine ort-cpu-fp32"], engines=both)  # the other is there already
    card(1000)
    with pytest.raises(DeviceMemoryError, match="no engine of this recipe would fit"):
        plan_fitting(chosen, config, ["onnx fp32"], engines=both)


def test_stages_that_lack_two_memories_are_named_with_their_own(monkeypatch):
    """All were said to lack what the first of them lacks."""
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: {"cpu": 2_000_000, "cuda": 1_000_000}[device])
    config = tiny_config("llama")
    engines = Engines([load_engine_spec("ort-cpu-fp32")], [load_engine_spec("ort-cuda-fp16")])
    with pytest.raises(DeviceMemoryError) as refusal:
        plan_fitting(recipe(*SMALL), config, ["engine ort-cpu-fp32", "run ort-cuda-fp16"], engines=engines)
    line = str(refusal.value)
    assert re.match(r"engine ort-cpu-fp32 needs about \S+ GB of main memory and 0.0 GB are there; ", line), line
    assert re.search(r"; run ort-cuda-fp16 needs about \S+ GB of GPU memory and 0.0 GB are there; no engine", line), (
        line
    )


@pytest.mark.parametrize("kind", ["Llama4Config", "FuyuConfig", "MambaConfig", "BltConfig", "RwkvConfig"])
def test_what_comes_after_training_is_told_of_configs_that_say_it_otherwise(kind):
    """The decoder's config within another, no attention heads, no vocabulary."""
    counts = WeightCounts(total=1000, layers=(300, 300), lm_head=200, embeddings=200)
    spec = load_engine_spec("ort-cpu-fp32")
    chosen = recipe("evaluation={text: wiki-demo}")
    found = later_stages(chosen, getattr(transformers, kind)(), counts, [spec], [spec], "cpu")
    assert [stage.stage for stage in found][-2:] == ["run ort-cpu-fp32", "evaluation"]
    assert all(stage.needed_bytes > PROCESS_BYTES for stage in found)


def test_an_engine_that_answers_tasks_holds_their_logits():
    """Without texts to evaluate too: a call of choices has as many tokens as a window."""
    config, spec = tiny_config("llama", vocab_size=50_000), load_engine_spec("ort-cpu-fp32")
    needed = [
        later_stages(recipe("evaluation={}", *more), config, count_config(config), [], [spec], "cpu")[-1].needed_bytes
        for more in ([], ["evaluate.tasks=[piqa]"])
    ]
    assert needed[1] >= needed[0] + 4 * 50_000 * 1024


@BREADTH
@pytest.mark.parametrize(("family", "more"), [("opt", True), ("llama", False)])
@pytest.mark.parametrize("recomputed", [False, "selective", True])
def test_layer_norms_are_in_fp32_where_cudas_autocast_is(family, more, recomputed):
    settings = recipe(f"transfer.gradient_checkpointing={recomputed}").transfer
    step = functools.partial(transfer_step, settings, 1)
    cpu, cuda, plain = (
        rehearse(tiny_config(family), torch.bfloat16, autocast, (2, 64), step, device)
        for autocast, device in ((True, "cpu"), (True, "cuda"), (False, "cuda"))
    )
    grown = cuda.backward_bytes if recomputed else cuda.kept_bytes
    assert (grown > (cpu.backward_bytes if recomputed else cpu.kept_bytes)) == more
    assert more or cuda == cpu
    assert plain == rehearse(tiny_config(family), torch.bfloat16, False, (2, 64), step)


def test_a_cache_that_grows_is_there_twice_on_a_gpu():
    """It is read while it is written anew; one of fixed length is written in place."""
    config, spec = tiny_config("llama"), load_engine_spec("ort-cuda-fp16")
    counts, fixed = count_config(config), spec.model_copy(update={"cache_length": 1024})
    bench = ["bench.batch_sizes=[4]", "bench.prompt_tokens=[1000]", "bench.new_tokens=24"]
    chosen = recipe("evaluation={}", *bench)
    grows, stays = (later_stages(chosen, config, counts, [], [each], "cpu")[-1].needed_bytes for each in (spec, fixed))
    assert grows - stays == 4 * 1024 * cache_per_token(config) * len(counts.layers) * 2  # fp16


@BREADTH
def test_text_by_a_model_without_a_cache_that_grows_is_planned_for():
    """Mamba's state has no heads."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=4, state_size=8, vocab_size=384)
    chosen = recipe("calibration.self_generated=0.2", "calibration.context_length=8", "calibration.max_windows=8")
    stages = plan_memory(chosen, config).stages
    assert [stage.stage for stage in stages] == ["selection", "transfer"]


@BREADTH
def test_an_engine_of_a_gpu_is_held_against_that(monkeypatch):
    config = tiny_config("llama")
    there = {"cpu": 10**12, "cuda": 1000}
    monkeypatch.setattr(memory_plan, "available_bytes", there.get)
    spec = load_engine_spec("ort-cuda-fp16")
    with pytest.raises(DeviceMemoryError, match=r"run ort-cuda-fp16 needs about .* GB of GPU memory"):
        plan_fitting(recipe(*SMALL), config, ["run ort-cuda-fp16"], engines=Engines([spec], [spec]))


def test_training_on_a_gpu_needs_main_memory_too():
    """Weights of another dtype than the stored one on their way, the states of all windows, the pruned model saved."""
    half = LlamaConfig(**{**LLAMA.to_dict(), "dtype": "bfloat16"})
    windows = ["calibration.max_windows=100", "calibration.context_length=2000", "drop=8"]

    def moments(config: LlamaConfig, *settings: str) -> dict[str, int]:
        estimate = MemoryEstimate(config, "cuda", fast_bf16=True)
        selection, transfer = estimate.host_stages(recipe(*windows, *settings))
        found = {moment.name: moment.total_bytes - moment.slack_bytes for moment in transfer.moments}
        assert selection.peak.total_bytes - selection.peak.slack_bytes == found["loading"]
        return found

    counts = count_config(half)
    pruned = counts.total - sum(counts.layers[:8])
    states = 2 * 100 * 2000 * 4096
    stored, widened = moments(half, "weights=bf16"), moments(half, "weights=fp32", "transfer.steps=5")
    assert stored == {
        "loading": 0,  # pages of the file
        "hidden states of all windows": states,
        "saving": 2 * pruned + 5 * 10**9,
    }
    assert widened["loading"] == 4 * counts.total
    assert widened["hidden states of all windows"] == states // 5, "5 steps of 4 windows"
    refit = moments(half, "weights=bf16", "transfer.refit=layers", "transfer.form=none")
    outputs = 4 * 4096 + 2 * 11008 + 4096
    assert refit["hidden states of all windows"] == 2 * 100 * 2000 * (3 * 4096 + outputs)
    on_cpu = MemoryEstimate(tiny_config("llama"), "cpu", fast_bf16=False)
    assert not on_cpu.host_stages(recipe(*SMALL)), "all of it is in `stages`"


@BREADTH
def test_main_memory_that_a_gpus_job_lacks_is_refused_with_what_would_fit(monkeypatch):
    config = tiny_config("llama", hidden_size=512, intermediate_size=2048, dtype="bfloat16")
    chosen = recipe("calibration.context_length=256", "calibration.max_windows=2048", "transfer.steps=512", "drop=1")
    there = {"cpu": 10**12, "cuda": 10**12}
    monkeypatch.setattr(memory_plan, "available_bytes", there.get)
    found = plan_fitting(chosen, config, ["selection", "transfer"])
    needed = {stage.stage: stage.peak.total_bytes for stage in found.host}
    on_gpu, in_main = found.lines()
    assert on_gpu.startswith("needs GPU memory: selection ") and "1000.00 GB there" in on_gpu
    assert in_main.startswith(f"needs main memory: selection {needed['selection'] / 1e9:.2f} GB, transfer 0.60 GB; ")
    assert found.summary()["memory"]["host"]["transfer"]["needed_bytes"] == needed["transfer"]
    there["cpu"] = needed["transfer"] - 1
    with pytest.raises(DeviceMemoryError) as refusal:
        plan_fitting(chosen, config, ["selection", "transfer"])
    said = str(refusal.value)
    assert said.startswith("transfer needs about 0.6 GB of main memory and 0.6 GB are there; would fit: --set ")
    assert "--set calibration.max_windows=1024 (0.3 GB), or --set transfer.kl_weight=0 (" in said and "\n" not in said
    plan_fitting(chosen, config, ["selection"])
    there["cuda"] = None  # no such machine: nor is its main memory this one's
    there["cpu"] = 1000
    engine = load_engine_spec("ort-cpu-fp32")
    chosen = chosen.model_copy(update={"evaluation": {"text": "wiki-demo"}})
    absent = plan_fitting(chosen, config, ["engine ort-cpu-fp32", "evaluation"], engines=Engines([engine], [engine]))
    assert absent.host_available_bytes is None and all(map(absent.host_fits, absent.host))
    print_memory(absent, shown := io.StringIO())
    assert {line.device for line in absent.later} == {"cpu", "cuda"} and "yes" not in shown.getvalue()


@BREADTH
def test_no_setting_is_tried_that_a_recipe_refuses(monkeypatch):
    """Fewer windows than texts; and no teacher where that is all there is to learn from."""
    config = tiny_config("llama", hidden_size=512, intermediate_size=2048, dtype="bfloat16")
    there = {"cpu": 10**8, "cuda": 10**12}
    monkeypatch.setattr(memory_plan, "available_bytes", there.get)
    windows = ["calibration.texts=[a,b,c]", "calibration.max_windows=4", "transfer.batch_size=1", "drop=1"]
    for setting in ("transfer.ce_weight=0.5", "transfer.ce_weight=0"):
        with pytest.raises(DeviceMemoryError, match=r"^transfer needs about \d\.\d GB of main memory and 0\.1 GB"):
            plan_fitting(recipe(*windows, setting), config, ["transfer"])


@BREADTH
def test_settings_are_tried_together_and_nothing_is_promised(card):
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024)
    card(1000)
    with pytest.raises(DeviceMemoryError, match="no setting of this recipe would fit"):
        plan_fitting(recipe(*SMALL), config, ["selection"])


def test_control_groups_count(tmp_path):
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_host_bytes(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    assert available_host_bytes(tmp_path) == 8_192_000_000
    write("proc/self/cgroup", "0::/jobs/mine\n")
    write("sys/fs/cgroup/jobs/mine/memory.max", "max\n")
    write("sys/fs/cgroup/jobs/memory.max", "4000000000\n")
    write("sys/fs/cgroup/jobs/memory.current", "3000000000\n")
    write("sys/fs/cgroup/jobs/memory.stat", "file 7\ninactive_file 500000000\nactive_file 700000000\n")
    assert available_host_bytes(tmp_path) == 2_200_000_000
    write("proc/self/cgroup", "9:cpu,memory:/pod/mine\n")
    write("sys/fs/cgroup/memory/pod/memory.limit_in_bytes", "2000000000\n")
    write("sys/fs/cgroup/memory/pod/memory.usage_in_bytes", "1000000000\n")
    assert available_host_bytes(tmp_path) == 1_000_000_000
    files = "inactive_file 0\nactive_file 16384\ntotal_inactive_file 300000000\ntotal_active_file 400000000\n"
    write("sys/fs/cgroup/memory/pod/memory.stat", files)  # its own, and with those of the groups within
    assert available_host_bytes(tmp_path) == 1_700_000_000


@BREADTH
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_here_is_planned_for():
    plan = plan_memory(recipe(*SMALL[:2]), tiny_config("opt"))
    assert plan.device == "cuda" and plan.available_bytes is None and all(map(plan.fits, plan.stages))
    told = plan.summary()["memory"]
    assert {stage["fits"] for part in ("stages", "host") for stage in told[part].values()} == {None}
