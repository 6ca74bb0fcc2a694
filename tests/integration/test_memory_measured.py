"""The memory estimate against the high-water mark of real stages in processes of their own, and its command line.

Estimates must not be below what was measured; docs/memory.md has the figures.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from tests.breadth import BREADTH
from tests.measure_memory import recipe_for
from tests.tiny import english, save_tiny, tiny_tokenizer
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.cli import run
from trsp_deploy.tools.resources import disk, memory_plan
from trsp_deploy.tools.resources.memory import LIBRARIES_BYTES, MemoryEstimate

pytestmark = pytest.mark.alone

SMALL = LlamaConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLAMA = LlamaConfig(  # 43M
    vocab_size=8000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
)
OPT = OPTConfig()  # the shape of facebook/opt-125m
BATCH = ["calibration.context_length=512", "plan.batch_size=4", "transfer.batch_size=4"]
CHECKPOINTING = "transfer.gradient_checkpointing=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, Path] = {}

    def save(name: str, config: PretrainedConfig) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
            tiny_tokenizer().save_pretrained(made[name])
        return made[name]

    return save


def compare(model: Path, stage: str, settings: list[str]) -> tuple[float, float]:
    """What was counted over what the kernel saw with every larger block of its own, and the estimate over what it saw.

    glibc keeps freed blocks below 32 MB for itself, and what it cannot fill again is the second figure's slack.
    """
    estimate = MemoryEstimate(AutoConfig.from_pretrained(model), "cpu", fast_bf16=False)
    stages = estimate.stages(recipe_for(model, settings))
    peak = next(found.peak for found in stages if found.stage == stage)
    own_blocks = measure(model, stage, settings, {"MALLOC_MMAP_THRESHOLD_": "1048576"})
    usual = measure(model, stage, settings, {})
    counted = peak.total_bytes - peak.parts["slack_bytes"] + LIBRARIES_BYTES
    figures = {"counted": counted, "measured": own_blocks, "estimated": peak.total_bytes, "measured as usual": usual}
    print(stage, *settings, {name: f"{size / 1e6:.0f} MB" for name, size in figures.items()})
    return counted / own_blocks, peak.total_bytes / usual


def measure(model: Path, stage: str, settings: list[str], environment: dict[str, str]) -> int:
    """High-water mark in bytes beyond what the process held before."""
    command = [sys.executable, "-m", "tests.measure_memory", str(model), stage, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_transfer_of_a_small_model(folder):
    settings = ["calibration.context_length=256", CHECKPOINTING]
    model = folder("small", SMALL)
    estimate = MemoryEstimate(AutoConfig.from_pretrained(model), "cpu", fast_bf16=False)
    peak = estimate.stages(recipe_for(model, settings))[1].peak.total_bytes
    measured = measure(model, "transfer", settings, {})
    assert measured <= peak <= 1.15 * measured + LIBRARIES_BYTES


@pytest.mark.slow
def test_weights_that_train_in_fewer_bits_than_they_are_stored_in(folder):
    settings = ["calibration.context_length=32", "weights=bf16", "transfer.form=none", "transfer.refit=none"]
    model = folder("opt", OPT)
    peak = (
        MemoryEstimate(AutoConfig.from_pretrained(model), "cpu", fast_bf16=False)
        .stages(recipe_for(model, settings))[1]
        .peak
    )
    assert peak.name == "saving" and measure(model, "transfer", settings, {}) <= peak.total_bytes


@pytest.mark.slow
@pytest.mark.parametrize("form", ["anneal", "none"])
@pytest.mark.parametrize("refit", ["span", "layers"])
def test_a_closed_form_fit(folder, refit, form):
    settings = ["calibration.context_length=512", f"transfer.refit={refit}", f"transfer.form={form}"]
    model = folder("small", SMALL)
    peak = (
        MemoryEstimate(AutoConfig.from_pretrained(model), "cpu", fast_bf16=False)
        .stages(recipe_for(model, settings))[1]
        .peak.total_bytes
    )
    measured = measure(model, "transfer", settings, {})
    assert measured <= peak <= 2 * measured  # annealing is counted for every layer, and moves those behind the cut


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [("selection", []), ("transfer", []), ("transfer", [CHECKPOINTING]), ("transfer", ["transfer.train=all"])],
    ids=["selection", "transfer", "checkpointing", "all"],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_models_of_45m_and_125m(folder, family, stage, settings):
    config = {"llama": LLAMA, "opt": OPT}[family]
    counted, estimated = compare(folder(family, config), stage, [*BATCH, *settings])
    assert 0.93 < counted < 1.1
    assert 1 <= estimated < 1.25


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(english()[:20_000])
    settings = ["--set", "calibration.context_length=32", "--set", "calibration.max_windows=8"]
    quick = ["--set", "plan.steps=1", "--set", "transfer.steps=1", "--out", "out"]
    return ["prune", "--model", "model", "--drop", "2", "--calibration", "text.txt", *settings, *quick]


def test_plan_memory_needs_the_config_alone(command, tmp_path, capsys):
    (tmp_path / "model" / "model.safetensors").unlink()
    assert run([*command, "--plan-memory"]) == 0
    said = capsys.readouterr().out
    assert "optimiser state" in said and "needed" in said and "available" in said
    assert run([*command, "--plan-memory", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]
    assert found["stages"]["transfer"]["fits"] and found["available_bytes"] > 0
    assert run([*command, "--plan-memory", "--set", "device=cuda"]) == 0
    assert re.search(r"^transfer +main memory +0\.\d\d", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_pruning_needs_no_room_for_engines(command, capsys, monkeypatch):
    """`prune --plan-memory` refused what comes after it, with a remedy that `prune` does not have."""
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 500_000_000)
    assert run([*command, "--plan-memory", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])["memory"]
    assert found["stages"]["transfer"]["fits"] and found["later"]["engine ort-cpu-fp32"]["fits"] is False
    assert run(["prune-and-build", *command[1:], "--plan-memory"]) == 1
    assert "would fit" in capsys.readouterr().err.splitlines()[-1]


@BREADTH
def test_what_cannot_fit_is_refused_before_it_starts(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 1000)
    assert run(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: selection needs about") and "transfer needs about" in last
    assert not (tmp_path / "out" / "plan.json").exists()
    assert run([*command, "--ignore-memory"]) == 0
    assert "> needs main memory: selection " in capsys.readouterr().err, "shown all the same"
    assert run(command) == 0  # all is there already: nothing to ask about


@BREADTH
@pytest.mark.parametrize("lacks", ["memory", "disk"])
def test_what_cannot_fit_leaves_a_run_its_recipe_and_manifest(command, tmp_path, capsys, monkeypatch, lacks):
    """The next command would have gone by the recipe that was refused, `report` without a look at the memory."""
    assert run(command) == 0
    with RunFolder(tmp_path / "out") as folder:
        folder.write_manifest()
    before = [(tmp_path / "out" / name).read_bytes() for name in ("recipe.yaml", "MANIFEST.json")]
    if lacks == "memory":
        monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 1000)
        assert run([*command, "--set", "seed=5"]) == 1
    else:
        monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
        judged = ["--engine", "ort-cpu-fp32", "--eval", "text=text.txt", "--set", "evaluate.context_length=64"]
        assert run(["prune-and-build", *command[1:], *judged]) == 1
    assert f"--ignore-{lacks} runs anyway" in capsys.readouterr().err.splitlines()[-1]
    assert [(tmp_path / "out" / name).read_bytes() for name in ("recipe.yaml", "MANIFEST.json")] == before


@pytest.mark.parametrize("job", ["prune-and-build", "sweep"])
def test_what_cannot_be_built_is_refused_before_anything_trains(command, tmp_path, capsys, monkeypatch, job):
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 800_000_000)  # for a tiny model's training
    options = [*command[1:], "--engine", "ort-cpu-fp32", "--eval", "text=text.txt"]
    assert run([job, *options]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "error: onnx fp32 needs about 0.9 GB, engine ort-cpu-fp32 needs about 0.9 GB, run ort-cpu-fp32"
    )
    assert "of main memory and 0.8 GB are there" in last and "--ignore-memory runs anyway" in last
    assert not list(tmp_path.rglob("plan*.json"))


def test_a_disk_that_a_sweep_would_fill_is_refused(command, capsys, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    options = ["1,2" if before == "--drop" else each for before, each in itertools.pairwise(command)]
    assert run(["sweep", *options, "--engine", "ort-cpu-fp32"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "drop-1 0.00 GB, drop-2 0.00 GB" in last and "--ignore-disk runs anyway" in last
