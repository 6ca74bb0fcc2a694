"""How much disk a run will need, by stage, before anything is written.

    plan = plan_disk(Path("runs/opt-6.7b-drop8"), recipe, config, specs, finished=job.finished())
    check_fits(plan, {})   # raises StorageError with what would fit

From the model's config and the engine specs alone; docs/memory.md has the formulae and what was measured. Steps that
need not be done again count nothing. What is made again takes the place of the old files once it is whole, so that for
a while there are both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants

from trsp_deploy.artifacts import RunLayout, free_bytes, nearest_existing, size_bytes, steps
from trsp_deploy.artifacts.layout import CHECKPOINTS, cut_name
from trsp_deploy.decoder import WeightCounts
from trsp_deploy.errors import StorageError
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec, Float, Recipe, Strict, parse_drop
from trsp_deploy.results import ROLES, Role
from trsp_deploy.tools.resources import stage_names
from trsp_deploy.tools.resources.cleaning import freed_bytes
from trsp_deploy.tools.resources.memory import MOMENT_8BIT_BYTES
from trsp_deploy.tools.resources.weights import counts_of, weights_bytes
from trsp_deploy.tools.sources.model_folders import missing_part
from trsp_deploy.tools.sources.models import converted_model
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
    kept_bytes: int  # in the finished run
    added_bytes: int  # to what the disk holds now; below 0 where what is made again is smaller
    scratch_bytes: int = 0  # on top of that, at its highest
    there: bool = False  # whether nothing of it is to be made


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
            kept += stage.added_bytes
            peak = max(peak, kept + stage.scratch_bytes)
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
    free: int | None = None,
    finished: Collection[str] = (),
    dropped: int | None = None,
) -> DiskPlan:
    """Estimate a run.

    config: transformers' config of the dense model. specs: the engines that can be built here. free: bytes; None asks
    the disk that `run` is or would be on. finished: names of the steps that need not be done again.
    dropped: how many layers go by the plan that is there; None where that is still the recipe's to say.
    Raises RecipeError when the recipe's `drop` does not suit the model.
    """
    basis = _basis(run, recipe, config, finished, dropped)
    stages = (*_download(config, run), _dense(run, config, finished), *_made(basis, recipe, config, specs))
    return DiskPlan(run=str(run), free_bytes=free_bytes(run) if free is None else free, stages=stages)


@dataclass(frozen=True)
class _Basis:
    """What the sizes of a run's stages follow from."""

    layout: RunLayout
    counts: Mapping[Role, WeightCounts]
    finished: Collection[str]  # steps
    linked: bool = False  # whether what concerns the dense model is taken over from another run, as in a sweep


def _basis(
    run: Path, recipe: Recipe, config: Any, finished: Collection[str], dropped: int | None = None, linked: bool = False
) -> _Basis:
    dense = counts_of(config)
    pruned = _without(dense, parse_drop(recipe.drop, len(dense.layers)) if dropped is None else dropped)
    return _Basis(RunLayout(run), {"dense": dense, "pruned": pruned}, finished, linked)


def _made(basis: _Basis, recipe: Recipe, config: Any, specs: Sequence[EngineSpec]) -> Iterator[StageDisk]:
    """All that a run makes of the dense model's folder."""
    words = _words_bytes(config)
    yield _pruned(basis, recipe, config)
    yield from _graphs(basis, specs, words)
    yield from _engines(basis, specs)
    yield _report(basis.layout)


def _words_bytes(config: Any) -> int:
    """A tokenizer's files."""
    words: int = getattr(config, "vocab_size", None) or counts_of(config).lm_head // config.hidden_size
    return TOKENIZER_BYTES * words


def _checkpoint_bytes(config: Any, counts: WeightCounts) -> int:
    """A Hugging Face folder, as wide as the model is stored."""
    width: int = (getattr(config, "dtype", None) or torch.float32).itemsize
    return width * counts.total + _words_bytes(config)


def _download(config: Any, run: Path) -> Iterator[StageDisk]:
    """What a model of the hub lacks in the cache, where that is on the run's disk."""
    lacking = _lacking_bytes(config)
    if lacking and _same_disk(Path(constants.HF_HUB_CACHE), run):
        yield StageDisk(stage="download", kept_bytes=lacking, added_bytes=lacking)


def check_download(config: Any, run: Path, free: int | None = None) -> None:
    """Raise StorageError where a model is to be downloaded to another disk than the run's, and has no room there.

    free: bytes; None asks the disk that the Hugging Face cache is on.
    """
    cache, lacking = Path(constants.HF_HUB_CACHE), _lacking_bytes(config)
    free = free_bytes(cache) if free is None else free
    if lacking > free and not _same_disk(cache, run):
        raise StorageError(
            f"{cache}: downloading the model needs {_gb(lacking)} of disk; {_gb(free)} are free; would fit: HF_HOME on "
            "a larger disk; --ignore-disk runs anyway"
        )


def _lacking_bytes(config: Any) -> int:
    """Bytes of a model of the hub that are to be downloaded; its config comes first, and by itself."""
    folder = Path(config._name_or_path)
    if not folder.is_relative_to(constants.HF_HUB_CACHE) or missing_part(folder) is None:
        return 0
    repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    if converted_model(repo) is not None:  # which is taken in its place
        return 0
    return max(0, _checkpoint_bytes(config, counts_of(config)) - size_bytes(folder))


def _dense(run: Path, config: Any, finished: Collection[str]) -> StageDisk:
    """The model's copy; of links its texts alone, which libraries change in place."""
    linked = config._name_or_path and _shares_blocks(Path(config._name_or_path), run)
    size = _words_bytes(config) if linked else _checkpoint_bytes(config, counts_of(config))
    return _stage("dense", [_Output(steps.DENSE, RunLayout(run).model("dense"), size)], finished)


def _pruned(basis: _Basis, recipe: Recipe, config: Any) -> StageDisk:
    """The checkpoint; the training's own lie beside it meanwhile."""
    size = _checkpoint_bytes(config, basis.counts["pruned"])
    checkpoints = max(0, _checkpoints(recipe, basis.counts["dense"]) - freed_bytes([basis.layout.checkpoints]))
    return _stage("pruned", [_Output(steps.PRUNE, basis.layout.model("pruned"), size)], basis.finished, checkpoints)


def _graphs(basis: _Basis, specs: Sequence[EngineSpec], words_bytes: int) -> Iterator[StageDisk]:
    """Of each precision both graphs; of fp16 a copy reads the calibration text in fp32."""
    for precision in dict.fromkeys(spec.graph_precision for spec in specs):
        outputs = [
            _Output(
                steps.export(role, precision),
                basis.layout.onnx(role, precision),
                _graph(basis.counts[role], precision) + words_bytes,
            )
            for role in ROLES
        ]
        scratch = _graph(basis.counts["dense"], precision) if precision == "fp16" else 0
        yield _stage(stage_names.export(precision), outputs, basis.finished, scratch)


def _engines(basis: _Basis, specs: Sequence[EngineSpec]) -> Iterator[StageDisk]:
    """Of each spec both engines, one after the other."""
    for spec in specs:
        outputs = [
            _Output(
                steps.build(spec.name, role),
                basis.layout.engine(spec.name, role),
                (_copied if basis.linked and role == "dense" else _engine)(spec, basis.counts[role]),
            )
            for role in ROLES
        ]
        # Two graphs at a time while the passes run; then an engine in floats, as large as one, takes a place of these.
        graphs = 0 if not spec.fuse and spec.precision == spec.graph_precision else 1
        graphs += spec.precision != spec.graph_precision
        scratch = graphs * _graph(basis.counts["dense"], spec.graph_precision)
        yield _stage(stage_names.build(spec.name), outputs, basis.finished, scratch)


def _report(layout: RunLayout) -> StageDisk:
    there = layout.report.is_file()
    return StageDisk(stage="report", kept_bytes=REPORT_BYTES, added_bytes=0 if there else REPORT_BYTES, there=there)


def plan_sweep(
    folder: Path,
    recipe: Recipe,
    config: Any,
    specs: Sequence[EngineSpec],
    counts: Sequence[int],
    free: int | None = None,
    finished: Mapping[int, Collection[str]] | None = None,
    begun: Collection[str] = (),
) -> DiskPlan:
    """Estimate a sweep, a run for each number of layers; the arguments are those of `plan_disk`.

    folder: of the sweep, whose copy of the dense model all runs have links to. What else concerns that model the first
    run makes, and the others have links to it as well, but copies of weights beside a graph (sweep.py: EXTERNAL_DATA).
    finished: by number of layers. begun: steps of the sweep itself that need not be done again.
    """
    stages = [*_download(config, folder), _dense(folder, config, begun)]
    for count in counts:
        run, point = RunLayout(folder).cut(count), recipe.model_copy(update={"drop": str(count)})
        basis = _basis(run, point, config, (finished or {}).get(count, ()), linked=count != counts[0])
        one = DiskPlan(run=str(run), free_bytes=0, stages=tuple(_made(basis, point, config, specs)))
        added = sum(stage.added_bytes for stage in one.stages)
        stages.append(
            StageDisk(
                stage=cut_name(count),
                kept_bytes=one.total_bytes,
                added_bytes=added,
                scratch_bytes=one.needed_bytes - added,
                there=all(stage.there for stage in one.stages),
            )
        )
    return DiskPlan(run=str(folder), free_bytes=free_bytes(folder) if free is None else free, stages=tuple(stages))


class _Output(NamedTuple):
    """What a step leaves."""

    step: str
    path: Path
    size_bytes: int


def _stage(stage: str, outputs: Sequence[_Output], finished: Collection[str], scratch: int = 0) -> StageDisk:
    """A stage whose steps are done one after the other, those alone that are not finished.

    scratch: what a step needs beside its output.
    """
    added, highest = 0, 0
    todo = [output for output in outputs if output.step not in finished]
    for output in todo:
        added += output.size_bytes
        highest = max(highest, added)
        added -= freed_bytes([output.path])
    return StageDisk(
        stage=stage,
        kept_bytes=sum(output.size_bytes for output in outputs),
        added_bytes=added,
        scratch_bytes=highest - added + (scratch if todo else 0),
        there=not todo,
    )


def check_fits(plan: DiskPlan, alone: Mapping[str, DiskPlan]) -> None:
    """Raise StorageError, one line with what would fit, when the job needs more disk than is free.

    alone: the same job with one engine, by the engine's name.
    """
    if plan.needed_bytes <= plan.free_bytes:
        return
    advice = [
        f"--engine {name} alone ({_gb(one.needed_bytes)})"
        for name, one in alone.items()
        if len(alone) > 1 and one.needed_bytes <= one.free_bytes
    ]
    run = RunLayout(Path(plan.run))
    if run.root.is_dir():
        keep = f" (--keep {CHECKPOINTS}: training goes on from them)" if run.checkpoints.is_dir() else ""
        advice.append(f"`trsp-deploy clean {plan.run}` and --keep to free what it holds{keep}")
    advice.append("--out on a larger disk")
    raise StorageError(f"{plan.run}: {plan.line()}; would fit: {', '.join(advice)}; --ignore-disk runs anyway")


def _without(dense: WeightCounts, dropped: int) -> WeightCounts:
    """Before the plan is known any layer may go; where they differ, the mean is taken."""
    gone = round(sum(dense.layers) * dropped / len(dense.layers))
    return dense.model_copy(update={"total": dense.total - gone, "layers": dense.layers[dropped:]})


def _graph(counts: WeightCounts, precision: Float) -> int:
    return FLOAT_BYTES[precision] * counts.total + GRAPH_BYTES * len(counts.layers)


def _engine(spec: EngineSpec, counts: WeightCounts) -> int:
    """Both what runs and, of TensorRT, the graph that it was compiled from and the log."""
    size = _copied(spec, counts) + ENGINE_GRAPH_BYTES * len(counts.layers)
    if spec.on_tensorrt:
        size += weights_bytes(spec, counts) + TENSORRT_LOG_BYTES * len(counts.layers)
    return size


def _copied(spec: EngineSpec, counts: WeightCounts) -> int:
    """What of an engine is weights beside a graph: of ONNX Runtime what runs, of TensorRT what it was compiled from."""
    weights = weights_bytes(spec, counts)
    if not spec.on_tensorrt:
        return weights
    changed = spec.fuse or spec.cache_length is not None or spec.precision in ("bf16", "int8", "int4")
    quantised = spec.is_quantised
    graph = weights if quantised else FLOAT_BYTES[spec.graph_precision] * counts.total
    return graph if changed else 0


def _checkpoints(recipe: Recipe, dense: WeightCounts) -> int:
    """Two of a training's checkpoints, the old one and the new one before it takes its place."""
    settings = recipe.transfer
    if settings.form == "none":
        return 0
    width = TRAINING_DTYPES[recipe.weights].itemsize
    moves = settings.form == "anneal" and settings.closed_form != "none"
    residue = sum(dense.layers) if moves and width < 4 else 0  # of weights that move in less than fp32
    if settings.lora_rank is not None:  # adapters are small, and what moves under them is not
        return 2 * width * ((sum(dense.layers) if moves else 0) + residue)
    trained = dense.total if settings.train == "all" else sum(dense.layers)
    moment = MOMENT_8BIT_BYTES if settings.optimizer == "adamw-8bit" else width
    return round(2 * (trained * (width + 2 * moment) + width * residue))


def _shares_blocks(source: Path, run: Path) -> bool:
    """Whether the dense copy can be hard links, which it is on one file system."""
    return source.is_dir() and _same_disk(source, run)


def _same_disk(one: Path, other: Path) -> bool:
    """Whether what is, or would be, at two paths is on one file system."""
    return nearest_existing(one).stat().st_dev == nearest_existing(other).stat().st_dev


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"
