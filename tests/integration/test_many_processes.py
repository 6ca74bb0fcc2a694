"""`accelerate launch` with two CPU processes against one process, for both stages."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.breadth import BREADTH
from tests.command import LAUNCHED
from tests.tiny import english, save_tiny
from tests.training import same_weights, transfer
from trsp_deploy.errors import RecipeError
from trsp_deploy.pipeline import _check_shares
from trsp_deploy.recipe import read_recipe
from trsp_deploy.stages import transfer as stage
from trsp_deploy.tools.training.processes import Processes

LAUNCH = {
    "ddp": ["--multi_gpu"],
    "fsdp": ["--use_fsdp", "--fsdp_version", "2"],
}
# A norm over the rows of all processes on one side, the teacher's states on the other.
TRANSFER = {
    "ddp": ["transfer.form=l2", "transfer.weight=0.1", "transfer.gradient_checkpointing=true"],
    "fsdp": ["transfer.form=anneal", "transfer.kl_weight=0.5"],
}
SETTINGS = [
    "calibration.context_length=32",
    "calibration.max_windows=16",
    "calibration.validation_windows=4",
    "plan.steps=2",
    "plan.candidates=2",
    "transfer.steps=6",
    "transfer.learning_rate=0.003",
    "checkpoint_s=0",
    "autocast='off'",
    "device=cpu",
]

# Two processes in the middle of something, of which the main one ends with a line of its own.
LEFT = """
import os
import sys
import torch.distributed as dist
import trsp_deploy.cli as cli
from trsp_deploy.errors import StorageError
from trsp_deploy.tools.training.processes import Processes

dist.destroy_process_group = lambda: print("left the group", file=sys.stderr)  # NCCL's waits for all to call it

def work(arguments):
    Processes("cpu")
    dist.barrier()
    if os.environ["RANK"] == "0":
        raise StorageError("run: the disk is full")
    dist.broadcast_object_list([None])
    return 0

cli.run = work
cli.main()
"""

# Two processes that have pruned, of which the main one goes on.
LEAVING = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
import trsp_deploy.cli as cli
from trsp_deploy.pipeline.pruning import Pruning
from trsp_deploy.tools.training.processes import Processes

destroy = dist.destroy_process_group

def together():
    dist.barrier()  # as NCCL's, which waits for all to call it
    destroy()
    print("left the group", file=sys.stderr)

class Pruned(Pruning):
    _prune_step = None
    plan = self_generated = lambda self: None
    _resumable = lambda self, *_, **__: "pruned"

def work(arguments):
    main = Processes("cpu").main
    run = SimpleNamespace(main=main, path=None)
    kept = lambda: print("went on", file=sys.stderr)
    texts = SimpleNamespace(keep_calibration=kept, keep_evaluation_at_hand=lambda: None)
    inputs = SimpleNamespace(run=run, recipe=None, texts=texts)
    Pruned(inputs, None).prune()
    return 3  # a verdict's

dist.destroy_process_group = together
cli.run = lambda arguments: cli._said(lambda: work(arguments))
cli.main()
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_tiny("llama", folder / "tiny")
    (folder / "train.txt").write_text(english()[:30_000])
    return folder


def command(out: str, launch: list[str], sets: list[str]) -> list[str]:
    """One `prune`, alone or as two processes that `launch` starts."""
    start = [sys.executable, "-m"]
    if launch:
        common = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # Port 0: a free one.
        start += ["accelerate.commands.launch", *launch, *common, "--main_process_port", "0", "-m"]
    options = ["--model", "tiny", "--drop", "2", "--calibration", "train.txt", "--out", out, "--json"]
    settings = [part for pair in (*SETTINGS, *sets) for part in ("--set", pair)]
    return [*start, "trsp_deploy", "prune", *options, *settings]


def prune(workspace: Path, out: str, launch: list[str], sets: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, launch, sets),
        cwd=workspace,
        env=LAUNCHED,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("launch", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_do_what_one_does(workspace, launch):
    alone = prune(workspace, "alone", [], TRANSFER[launch])
    done = prune(workspace, launch, LAUNCH[launch], TRANSFER[launch])
    assert alone.returncode == done.returncode == 0, alone.stderr + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1  # the main process alone
    for line in ("plan: started", "plan: done", "prune: started", "prune: done"):
        assert done.stderr.count(line) == 1
    plans, records = [
        [json.loads((workspace / out / name).read_text()) for out in ("alone", launch)]
        for name in ("plan.json", "records/prune.json")
    ]
    assert plans[0]["dropped"] == plans[1]["dropped"]
    for one, two in zip(plans[0]["picks"], plans[1]["picks"], strict=True):
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], abs=1e-4)
        assert two["gates"][-1] == pytest.approx(one["gates"][-1], abs=1e-3)
    one, two = (record["result"] for record in records)
    assert two["lm_loss"] == pytest.approx(one["lm_loss"], abs=1e-3)
    assert two["penalty"] == pytest.approx(one["penalty"], rel=1e-3, abs=1e-3)
    assert two["ppl_after_removal"] == pytest.approx(one["ppl_after_removal"], rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(workspace / launch / "pruned")
    assert model.config.num_hidden_layers == 4 and not (workspace / launch / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("ddp", "adamw-8bit")])
def test_weights_in_bf16_train_in_two_processes(workspace, launch, optimizer):
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trsp_deploy[train]'")
    sets = ["transfer.form=train", "transfer.kl_weight=0.5", "weights=bf16", "plan.method=shortgpt"]
    sets.append(f"transfer.optimizer={optimizer}")
    names = {name: f"bf16-{optimizer}-{name}" for name in ("alone", launch)}
    done = [prune(workspace, out, LAUNCH.get(name, []), sets) for name, out in names.items()]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    one, two = (json.loads((workspace / out / "records/prune.json").read_text())["result"] for out in names.values())
    assert two["lm_loss"] == pytest.approx(one["lm_loss"], abs=0.02)  # shards are rounded by other random numbers


@pytest.mark.slow
def test_a_killed_training_in_shards_ends_as_one_that_was_not(workspace):
    sets = ["transfer.form=train", "plan.method=shortgpt", "transfer.steps=60"]
    whole = prune(workspace, "whole", LAUNCH["fsdp"], sets)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launched = subprocess.Popen(command("killed", LAUNCH["fsdp"], sets), cwd=workspace, env=LAUNCHED, **quiet)
    state = workspace / "killed" / "checkpoints" / "prune" / "state.safetensors"
    seen, until = set(), time.monotonic() + 240
    while len(seen) < 4:
        assert launched.poll() is None and time.monotonic() < until, "over before it could be killed"
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.005)
    launcher = psutil.Process(launched.pid)
    for process in [launcher, *launcher.children(recursive=True)]:  # each has a session of its own
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launched.wait()
    resumed = prune(workspace, "killed", LAUNCH["fsdp"], sets)
    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    assert "goes on after" in resumed.stderr
    records = [json.loads((workspace / out / "records/prune.json").read_text()) for out in ("whole", "killed")]
    assert records[0]["result"] == records[1]["result"]
    assert same_weights(workspace / "whole" / "pruned", workspace / "killed" / "pruned")


def test_batches_that_do_not_divide_are_refused():
    processes = Processes("cpu")
    processes.count = 2
    with pytest.raises(RecipeError, match=r"transfer.batch_size 3 with 2 processes; valid: a multiple of 2"):
        processes.local_rows(torch.arange(3), "transfer.batch_size")


class OneOfTwo(Processes):
    """A process whose fellow finds what it finds."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.count = 2

    def wrap(self, losses):
        return losses

    def mean(self, tensor):
        return tensor

    def from_main(self, value):
        return value


@pytest.mark.parametrize("refit", ["span", "layers"])
def test_a_process_reads_no_more_at_once_than_its_part_of_a_batch(workspace, tmp_path, monkeypatch, refit):
    """Perplexity, teacher and fold, too: each of several GPUs has room for its part."""
    read: list[int] = []

    def note(module, args):
        if isinstance(module, torch.nn.Embedding):
            read.append(len(args[0]))

    monkeypatch.setattr(stage, "Processes", OneOfTwo)
    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        transfer(workspace / "tiny", tmp_path / "out", form="train", refit=refit, batch_size=8, steps=1)
    assert max(read) == 4


def test_batches_are_looked_at_before_anything_is_fetched():
    chosen = read_recipe({"model": "m", "plan": {"batch_size": 1}, "transfer": {"batch_size": 6}}, "test")
    with pytest.raises(RecipeError, match=r"plan.batch_size 1 with 4 processes; .* --set plan.batch_size=4"):
        _check_shares(chosen, 4)
    _check_shares(chosen.model_copy(update={"plan": chosen.plan.model_copy(update={"method": "sleb"})}), 3)


def test_first_version_of_fsdp_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"FSDP version 1 is not supported; valid: --fsdp_version 2"):
        Processes("cpu")


def two(script: str) -> tuple[tuple[str, str], tuple[int, int]]:
    """What the main process and another one said of a script, and their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**LAUNCHED, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    main, other = (
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    said = main.communicate(timeout=60)[1], other.communicate(timeout=60)[1]
    return said, (main.returncode, other.returncode)


def test_a_process_that_ends_is_no_bug_of_the_others() -> None:
    """Nor do they keep it: it leaves without a call that they would have to make too."""
    (said, lost), codes = two(LEFT)
    assert codes == (1, 1), lost
    assert said == "error: run: the disk is full\n"
    assert lost.splitlines()[-1].startswith("error: another process of this launch ended") and "Traceback" not in lost
    assert "left the group" not in lost


@BREADTH
def test_a_group_is_left_together_before_the_main_process_goes_on() -> None:
    said, codes = two(LEAVING)
    assert codes == (3, 0), said
    assert said == ("left the group\nwent on\n", "left the group\n")
