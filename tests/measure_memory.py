"""Peak memory of the real stages, for tests: `python -m tests.measure_memory MODEL STAGE SETTING=VALUE...`.

Run in a process of its own, since the kernel's high-water mark counts a whole process. Prints bytes beyond what the
process held before the model was loaded.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from trsp_deploy.decoder import load_model
from trsp_deploy.recipe import Recipe, override, parse_drop, read_recipe
from trsp_deploy.stages.selection import select_layers
from trsp_deploy.stages.transfer import transfer_and_remove
from trsp_deploy.tools.host_memory import forget_peak, peak_resident_bytes, resident_bytes
from trsp_deploy.tools.plan import PruningPlan, complement
from trsp_deploy.tools.sources.models import ModelSource

QUICK = ["drop=1", "calibration.max_windows=4", "plan.steps=2", "plan.candidates=1", "plan.batch_size=2"]
QUICK += ["transfer.batch_size=2", "transfer.steps=2", "autocast='off'"]


def recipe_for(model: Path, settings: list[str]) -> Recipe:
    """Two steps of either stage, in plain fp32."""
    return read_recipe(override({"model": str(model), "device": "cpu"}, [*QUICK, *settings]), "test")


def run_stage(folder: Path, stage: str, recipe: Recipe) -> None:
    """The stage as the pipeline calls it, on random tokens."""
    length = recipe.calibration.context_length
    train, validation = torch.randint(300, (4, length)), torch.randint(300, (2, length))
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    count = parse_drop(recipe.drop, layers)
    if stage == "selection":
        select_layers(load_model(folder, "cpu", torch.float32), train, validation, count, recipe, "random")
        return
    dropped = tuple(range(1, 1 + count))
    plan = PruningPlan(
        model="m",
        num_layers=layers,
        dropped=dropped,
        kept=complement(dropped, layers),
        method="trsp",
        seed=0,
        settings={},
        calibration="random",
        dense_loss=0.0,
        picks=(),
    )
    source = ModelSource(name="m", kind="folder", path=str(folder), origin="random")
    with tempfile.TemporaryDirectory() as out:
        transfer_and_remove(
            dense=folder,
            source=source,
            plan=plan,
            train=train,
            validation=validation,
            recipe=recipe,
            out=Path(out) / "pruned",
        )


if __name__ == "__main__":
    chosen = recipe_for(Path(sys.argv[1]), sys.argv[3:])
    # Libraries that load at their first use are not the stage's.
    if chosen.transfer.lora_rank is not None:
        importlib.import_module("peft")
    torch.nn.functional.scaled_dot_product_attention(*torch.rand(3, 1, 2, 64, 32, requires_grad=True)).sum().backward()
    before = resident_bytes() or 0
    forget_peak()
    run_stage(Path(sys.argv[1]), sys.argv[2], chosen)
    print((peak_resident_bytes() or 0) - before)
