"""How much disk a run will need, by stage, before anything is written.

    plan = plan_disk(Path("runs/opt-6.7b-drop8"), recipe, config, specs)
    check_disk(plan, recipe)   # raises StorageError with what would fit

From the model's config and the engine specs alone; docs/memory.md has the formulae and what was measured. Stages whose
files are there already count nothing: made again, they take the place of the old ones once they are whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trsp_deploy.decoder import WeightCounts, count_config
from trsp_deploy.errors import StorageError
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, Float, Recipe, Strict, parse_drop
from trsp_deploy.results import ROLES, Role
from trsp_deploy.tools.judging.limits import stored_by
from trsp_deploy.tools.resources.memory import MOMENT_8BIT_BYTES
from trsp_deploy.tools.training.shared import TRAINING_DTYPES

GB = 1e9
TOKENIZER_BYTES = 72  # a token, in tokenizer.json and vocabulary files; SmolLM2's 49,152 take 3.5 MB
GRAPH_BYTES = 30_000  # a layer, in an exported ONNX file; 24 to 35 kB were seen
ENGINE_GRAPH_BYTES = 7_000  # a layer, fused
TENSORRT_LOG_BYTES = 200_000  # a layer: build.log with every kernel
REPORT_BYTES = 150_000  # pages, records and raw samples of a short run


class StageDisk(Strict):
    """What one stage leaves, and what it needs on top while it works."""

    stage: str
    kept_bytes: int
    scratch_bytes: int = 0
    there: bool = False  # whether its files are in the run already


class DiskPlan(Strict):
    """Every stage in order, and what is free where the run is."""

    run: str
    free_bytes: int
    stages: tuple[StageDisk, ...]

    @property
    def needed_bytes(self) -> int:
        """The high-water mark beyond what is there: everything before a stage, and its scratch."""
        kept, peak = 0, 0
        for stage in self.stages:
            kept += 0 if stage.there else stage.kept_bytes
            peak = max(peak, kept + (0 if stage.there else stage.scratch_bytes))
        return peak

    @property
    def total_bytes(self) -> int:
        """What the finished run holds."""
        return sum(stage.kept_bytes for stage in self.stages)

    def line(self) -> str:
        """For people, on one line."""
        parts = ", ".join(f"{each.stage} {'there' if each.there else _gb(each.kept_bytes)}" for each in self.stages)
        return f"needs {_gb(self.needed_bytes)} of disk ({parts}); {_gb(self.free_bytes)} are free"


def plan_disk(
    run: Path,
    recipe: Recipe,
    config: Any,
    specs: Sequence[EngineSpec],
    plain: Float | None = None,
    free: int | None = None,
) -> DiskPlan:
    """Estimate a run.

    config: transformers' config of the dense model. specs: the engines that can be built here. plain: precision
    of the graphs in `onnx/dense`, else of the first spec. free: bytes; None asks the disk that `run` is or would be on.
    Raises RecipeError when the recipe's `drop` does not suit the model.
    """
    dense = counts_of(config)
    dropped = parse_drop(recipe.drop, len(dense.layers))
    pruned = _without(dense, dropped)
    counts: dict[Role, WeightCounts] = {"dense": dense, "pruned": pruned}
    width = (getattr(config, "dtype", None) or torch.float32).itemsize
    words = TOKENIZER_BYTES * (getattr(config, "vocab_size", None) or dense.lm_head // config.hidden_size)
    shared = bool(config._name_or_path) and _shares_blocks(Path(config._name_or_path), run)
    stages = [
        StageDisk(
            stage="dense", kept_bytes=0 if shared else width * dense.total + words, there=(run / "dense").is_dir()
        ),
        StageDisk(
            stage="pruned",
            kept_bytes=width * pruned.total + words,
            scratch_bytes=_checkpoint(recipe, dense),
            there=(run / "pruned").is_dir(),
        ),
    ]
    for precision in dict.fromkeys(spec.graph_precision for spec in specs):
        kept = sum(_graph(counts[role], precision) + words for role in ROLES)
        folders = [
            run / "onnx" / (role if precision == (plain or specs[0].graph_precision) else f"{role}-{precision}")
            for role in ROLES
        ]
        there = all(folder.is_dir() for folder in folders)
        # The copy of an fp16 graph that reads the calibration text in fp32.
        scratch = _graph(dense, precision) if precision == "fp16" else 0
        stages.append(StageDisk(stage=f"onnx {precision}", kept_bytes=kept, scratch_bytes=scratch, there=there))
    for spec in specs:
        kept = sum(_engine(spec, counts[role]) for role in ROLES)
        there = all((run / "engines" / spec.name / role).is_dir() for role in ROLES)
        # Two graphs at a time while the passes run; then an engine in floats, as large as one, takes a place of these.
        graphs = 0 if not spec.fuse and spec.precision == spec.graph_precision else 1
        graphs += spec.precision != spec.graph_precision
        scratch = graphs * _graph(dense, spec.graph_precision)
        stages.append(StageDisk(stage=f"engine {spec.name}", kept_bytes=kept, scratch_bytes=scratch, there=there))
    stages.append(StageDisk(stage="report", kept_bytes=REPORT_BYTES, there=(run / "report.json").is_file()))
    if free is None:
        free = shutil.disk_usage(next(path for path in (run, *run.absolute().parents) if path.exists())).free
    return DiskPlan(run=str(run), free_bytes=free, stages=tuple(stages))


def check_disk(plan: DiskPlan, recipe: Recipe, config: Any, specs: Sequence[EngineSpec]) -> None:
    """Raise StorageError, one line with what would fit, when the run needs more disk than is free."""
    if plan.needed_bytes <= plan.free_bytes:
        return
    advice = []
    for spec in specs:
        one = plan_disk(Path(plan.run), recipe, config, [spec], free=plan.free_bytes)
        if len(specs) > 1 and one.needed_bytes <= one.free_bytes:
            advice.append(f"--engine {spec.name} alone ({_gb(one.needed_bytes)})")
    if Path(plan.run).is_dir():
        advice.append(f"`trsp-deploy clean {plan.run}` and --keep to free what it holds")
    advice.append("--out on a larger disk")
    raise StorageError(f"{plan.run}: {plan.line()}; would fit: {', '.join(advice)}; --ignore-disk runs anyway")


def counts_of(config: Any) -> WeightCounts:
    """Weights of what a config describes; asked again for every piece of advice, so it is kept."""
    text = f"{type(config).__name__} {config.to_json_string()}"
    if text not in _COUNTED:
        _COUNTED[text] = count_config(config)
    return _COUNTED[text]


_COUNTED: dict[str, WeightCounts] = {}


def _without(dense: WeightCounts, dropped: int) -> WeightCounts:
    """Before the plan is known any layer may go; where they differ, the mean is taken."""
    gone = round(sum(dense.layers) * dropped / len(dense.layers))
    return dense.model_copy(update={"total": dense.total - gone, "layers": dense.layers[dropped:]})


def _tied(counts: WeightCounts) -> bool:
    return counts.total < sum(counts.layers) + counts.lm_head + counts.embeddings


def _graph(counts: WeightCounts, precision: Float) -> int:
    return FLOAT_BYTES[precision] * counts.total + GRAPH_BYTES * len(counts.layers)


def _engine(spec: EngineSpec, counts: WeightCounts) -> int:
    """Both what runs and, of TensorRT, the graph that it was compiled from and the log."""
    _, layers, head, _ = stored_by(spec)
    width = FLOAT_BYTES[spec.graph_precision]
    if spec.precision in ("fp32", "fp16", "bf16"):
        # A tied head is stored a second time, the way its product wants it.
        weights = width * (counts.total + (counts.lm_head if _tied(counts) else 0))
    else:
        table = layers if spec.precision == "int4" and not spec.backend.startswith("tensorrt") else width
        weights = round(layers * sum(counts.layers) + head * counts.lm_head + table * counts.embeddings)
    size = weights + ENGINE_GRAPH_BYTES * len(counts.layers)
    if spec.backend.startswith("tensorrt"):
        changed = spec.fuse or spec.cache_length is not None or spec.precision in ("bf16", "int8", "int4")
        quantised = spec.precision in ("int8", "int4")
        graph = weights if quantised else width * counts.total
        size += (graph if changed else 0) + TENSORRT_LOG_BYTES * len(counts.layers)
    return size


def _checkpoint(recipe: Recipe, dense: WeightCounts) -> int:
    """Two of a training's checkpoints, the old one and the new one before it takes its place."""
    settings = recipe.transfer
    if settings.form == "none":
        return 0
    width = TRAINING_DTYPES[recipe.weights].itemsize
    moves = settings.form == "anneal" and settings.closed_form != "none"
    kept_back = sum(dense.layers) if moves and width < 4 else 0  # of weights that move in less than fp32
    if settings.lora_rank is not None:  # adapters are small, and what moves under them is not
        return 2 * width * ((sum(dense.layers) if moves else 0) + kept_back)
    trained = dense.total if settings.train == "all" else sum(dense.layers)
    moment = MOMENT_8BIT_BYTES if settings.optimizer == "adamw-8bit" else width
    return round(2 * (trained * (width + 2 * moment) + width * kept_back))


def _shares_blocks(source: Path, run: Path) -> bool:
    """Whether the dense copy can be hard links, which it is on one file system."""
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    return source.is_dir() and source.stat().st_dev == place.stat().st_dev


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"
