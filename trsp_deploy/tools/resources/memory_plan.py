"""What this machine's memories have, whether a job fits, and what else would: `--plan-memory`.

plan = plan_memory(recipe, model_config(recipe.model, print), engines)
plan_fitting(recipe, config, ["selection", "transfer"])   # raises DeviceMemoryError with what would fit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field

from trsp_deploy.errors import DeviceMemoryError
from trsp_deploy.recipe import EngineSpec, Recipe, Strict, override, read_recipe
from trsp_deploy.tools.host_memory import available_host_bytes
from trsp_deploy.tools.resources.later_memory import Device, LaterStage, later_stages
from trsp_deploy.tools.resources.memory import MemoryEstimate, Stage, StageMemory
from trsp_deploy.tools.training.shared import has_fast_bf16

GB = 1e9
Estimate = Callable[[Recipe], Sequence[StageMemory]]  # of one memory
NAMES: dict[Device, str] = {"cpu": "main memory", "cuda": "GPU memory"}


class Engines(NamedTuple):
    """The engine specs of a job: those that can be built here, and those that can run, too."""

    built: Sequence[EngineSpec] = ()
    run: Sequence[EngineSpec] = ()


class MemoryPlan(Strict):
    """What a job needs on its training device and in main memory, and what these have."""

    model: str
    device: Device
    weights: str  # dtype in training
    available_bytes: int | None  # None where it cannot be told, or the device is not in this machine
    stages: tuple[StageMemory, ...]
    at_least: bool = False  # whether activations are missing: this architecture's cannot be told without its data
    host: tuple[StageMemory, ...] = ()  # main memory of the same stages, where their device is a GPU
    host_available_bytes: int | None = None  # None, too, where the GPU is not in this machine
    later: tuple[LaterStage, ...] = ()  # exports, engines, evaluation
    later_available_bytes: dict[Device, int | None] = Field(default_factory=dict)  # where those run; None as above

    @property
    def peak_bytes(self) -> int:
        """The most that selection or transfer needs of the training device's memory."""
        return max(stage.peak.total_bytes for stage in self.stages)

    def fits(self, stage: StageMemory) -> bool:
        """Whether a stage's peak is within what is there; what cannot be told is not held against it."""
        return self.available_bytes is None or stage.peak.total_bytes <= self.available_bytes

    def host_fits(self, stage: StageMemory) -> bool:
        """The same of what a stage needs in main memory."""
        return self.host_available_bytes is None or stage.peak.total_bytes <= self.host_available_bytes

    def later_fits(self, stage: LaterStage) -> bool:
        """The same of a stage after training."""
        there = self.later_available_bytes[stage.device]
        return there is None or stage.needed_bytes <= there

    def lines(self) -> list[str]:
        """For people, a line for each memory."""
        least = "at least " if self.at_least else ""
        parts = {self.device: [f"{each.stage} {_gb(each.peak.total_bytes)}" for each in self.stages]}
        if self.host:
            parts["cpu"] = [f"{each.stage} {_gb(each.peak.total_bytes)}" for each in self.host]
        for each in self.later:
            parts.setdefault(each.device, []).append(f"{each.stage} {_gb(each.needed_bytes)}")
        there = {"cpu": self.host_available_bytes, **self.later_available_bytes, self.device: self.available_bytes}
        return [
            f"needs {least}{NAMES[device]}: {', '.join(each)}; {_gb(there[device])} there"
            for device, each in parts.items()
        ]

    def summary(self) -> dict[str, Any]:
        """The figures for scripts, as `--json` prints them; `fits` is null where it is not known what is there."""
        known, host_known = self.available_bytes is not None, self.host_available_bytes is not None
        stages = {stage.stage: _figures(stage, self.fits(stage) if known else None) for stage in self.stages}
        host = {stage.stage: _figures(stage, self.host_fits(stage) if host_known else None) for stage in self.host}
        later = {
            stage.stage: {
                "needed_bytes": stage.needed_bytes,
                "fits": None if self.later_available_bytes[stage.device] is None else self.later_fits(stage),
                "device": stage.device,
            }
            for stage in self.later
        }
        others = self.model_dump(exclude={"stages", "host", "later"})
        return {"memory": {**others, "stages": stages, "host": host, "later": later}}


def _figures(stage: StageMemory, fits: bool | None) -> dict[str, Any]:
    return {
        "needed_bytes": stage.peak.total_bytes,
        "fits": fits,
        "highest_at": stage.peak.name,
        "parts": stage.peak.parts,
        "moments": {moment.name: moment.total_bytes for moment in stage.moments},
    }


def plan_memory(
    recipe: Recipe, config: Any, dropped: tuple[int, ...] | None = None, engines: Engines | None = None
) -> MemoryPlan:
    """Estimate selection and transfer, and where `engines` are given what comes after them.

    dropped: the plan's layers, once they are known.
    """
    return _plan(recipe, _estimate(recipe, config, dropped), engines)


def plan_fitting(
    recipe: Recipe,
    config: Any,
    stages: Sequence[str],
    dropped: tuple[int, ...] | None = None,
    engines: Engines | None = None,
) -> MemoryPlan:
    """Raise DeviceMemoryError, one line with settings that would fit, when one of `stages` needs more than there is."""
    estimate = _estimate(recipe, config, dropped)
    plan = _plan(recipe, estimate, engines)
    _refuse(recipe, estimate, plan, stages, engines)
    return plan


def check_plan(
    recipe: Recipe,
    config: Any,
    plan: MemoryPlan,
    dropped: tuple[int, ...] | None = None,
    engines: Engines | None = None,
) -> None:
    """Raise DeviceMemoryError, as `plan_fitting` does, when a stage of a plan needs more than there is: selection and
    transfer, and where `engines` are given what comes after them."""
    later = plan.later if engines is not None else ()
    stages = [*(stage.stage for stage in plan.stages), *(stage.stage for stage in later)]
    _refuse(recipe, _estimate(recipe, config, dropped), plan, stages, engines)


def _refuse(
    recipe: Recipe, estimate: MemoryEstimate, plan: MemoryPlan, stages: Sequence[str], engines: Engines | None
) -> None:
    problems = [
        _too_large(recipe, stage, plan.device, plan.available_bytes, estimate.stages, _changes, plan.at_least)
        for stage in plan.stages
        if stage.stage in stages and not plan.fits(stage)
    ]
    problems += [
        _too_large(recipe, stage, "cpu", plan.host_available_bytes, estimate.host_stages, _host_changes)
        for stage in plan.host
        if stage.stage in stages and not plan.host_fits(stage)
    ]
    too_large = [stage for stage in plan.later if stage.stage in stages and not plan.later_fits(stage)]
    for device in dict.fromkeys(stage.device for stage in too_large):
        lacking = [stage for stage in too_large if stage.device == device]
        sizes = ", ".join(f"{stage.stage} needs about {stage.needed_bytes / GB:.1f} GB" for stage in lacking)
        there = (plan.later_available_bytes[device] or 0) / GB
        problems.append(f"{sizes} of {NAMES[device]} and {there:.1f} GB are there")
    if too_large:
        problems.append(_other_engines(recipe, estimate, plan, engines))
    if problems:
        raise DeviceMemoryError(f"{'; '.join(problems)}; --plan-memory shows the parts, --ignore-memory runs anyway")


def _estimate(recipe: Recipe, config: Any, dropped: tuple[int, ...] | None) -> MemoryEstimate:
    device = _device(recipe)
    # A GPU that is not here is taken for one of the last years.
    fast = True if device == "cuda" and not torch.cuda.is_available() else has_fast_bf16(device)
    return MemoryEstimate(config, device, fast, dropped)


def _plan(recipe: Recipe, estimate: MemoryEstimate, engines: Engines | None) -> MemoryPlan:
    stages = estimate.stages(recipe)
    device = _device(recipe)
    available = available_bytes(device)
    later = _later(recipe, estimate, engines) if engines is not None else ()
    elsewhere = device == "cuda" and available is None  # nor is this machine's main memory that of the GPU's
    return MemoryPlan(
        model=recipe.public.model,
        device=device,
        weights=recipe.weights,
        available_bytes=available,
        stages=stages,
        at_least=estimate.at_least,
        host=estimate.host_stages(recipe),
        host_available_bytes=None if elsewhere else available_bytes("cpu"),
        later=later,
        later_available_bytes={
            each: None if elsewhere else available_bytes(each)
            for each in dict.fromkeys(stage.device for stage in later)
        },
    )


def _later(recipe: Recipe, estimate: MemoryEstimate, engines: Engines) -> tuple[LaterStage, ...]:
    return later_stages(recipe, estimate.config, estimate.counts, engines.built, engines.run, _device(recipe))


def _device(recipe: Recipe) -> Device:
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.device


# -- what would fit ----------------------------------------------------------------------------------------------------


def _too_large(
    recipe: Recipe,
    stage: StageMemory,
    device: Device,
    available: int | None,
    estimate: Estimate,
    changes: Callable[[Recipe, Stage], list[list[str]]],
    at_least: bool = False,
) -> str:
    """What a stage needs of a memory and what is there of it, with what would fit."""
    assert available is not None  # else everything fits and nobody asks
    roughly = "at least" if at_least else "about"
    advice = _advice(recipe, stage.stage, available, estimate, changes(recipe, stage.stage))
    return (
        f"{stage.stage} needs {roughly} {stage.peak.total_bytes / GB:.1f} GB of {NAMES[device]} and "
        f"{available / GB:.1f} GB are there; {advice}"
    )


def _advice(recipe: Recipe, stage: Stage, available: int, estimate: Estimate, changes: list[list[str]]) -> str:
    """Each single setting that would fit, else the shortest run of them that does together."""
    singles = [(change, _peak(recipe, estimate, [change], stage)) for change in changes]
    within = [f"{_options([change])} ({peak / GB:.1f} GB)" for change, peak in singles if peak <= available]
    if within:
        return f"would fit: {', or '.join(within)}"
    for count in range(2, len(changes) + 1):
        peak = _peak(recipe, estimate, changes[:count], stage)
        if peak <= available:
            return f"would fit: {_options(changes[:count])} ({peak / GB:.1f} GB)"
    return "no setting of this recipe would fit: take a smaller model or a larger device"


def _other_engines(recipe: Recipe, estimate: MemoryEstimate, plan: MemoryPlan, engines: Engines | None) -> str:
    """Each engine that would fit were it the only one, with what its highest stage needs."""
    within = []
    for spec in engines.built if engines is not None else ():
        alone = _later(recipe, estimate, Engines([spec], [spec] if engines and spec in engines.run else []))
        if all(map(plan.later_fits, alone)):
            within.append(f"--engine {spec.name} alone ({max(each.needed_bytes for each in alone) / GB:.1f} GB)")
    return (
        f"would fit: {', or '.join(within)}" if within else "no engine of this recipe would fit: take a larger machine"
    )


def _changes(recipe: Recipe, stage: Stage) -> list[list[str]]:
    """Settings to try, as lists of `--set`s; those that cost the result least come first."""
    group = "plan" if stage == "selection" else "transfer"
    batch = getattr(recipe, group).batch_size
    smaller = [[f"{group}.batch_size=1"]] if batch > 1 else []
    half = [["weights=bf16"]] if recipe.weights == "fp32" else []
    transfer = recipe.transfer
    if stage == "transfer" and transfer.form in ("anneal", "train"):  # the same training, a window at a time
        smaller = [["transfer.micro_batch=1"]] if transfer.forward_batch > 1 else []
    plain = [["transfer.refit=none"]] if stage == "transfer" and transfer.closed_form != "none" else []
    if stage == "selection" or transfer.form == "none":
        return smaller + half + plain
    lora = ["transfer.lora_rank=16"] + (["transfer.train=layers"] if transfer.train == "all" else [])
    return [
        *([] if transfer.gradient_checkpointing is True else [["transfer.gradient_checkpointing=true"]]),
        *smaller,
        *([["transfer.optimizer=adamw-8bit"]] if transfer.optimizer == "adamw" else []),
        *half,
        *([lora] if transfer.lora_rank is None else []),
        *plain,
        ["transfer.form=none"],
    ]


def _host_changes(recipe: Recipe, stage: Stage) -> list[list[str]]:
    """The same of main memory, where a GPU trains."""
    half = [["weights=bf16"]] if recipe.weights == "fp32" else []
    transfer, windows = recipe.transfer, recipe.calibration.max_windows
    if stage == "selection" or transfer.form == "none":
        return half + ([["transfer.refit=none"]] if stage == "transfer" and transfer.closed_form == "layers" else [])
    fewer = max(transfer.batch_size, len(recipe.calibration.texts), windows // 2)
    return [
        *half,
        *([[f"calibration.max_windows={fewer}"]] if fewer < windows else []),
        *([["transfer.refit=none"]] if transfer.closed_form == "layers" else []),
        *([["transfer.kl_weight=0"]] if transfer.kl_weight and transfer.ce_weight else []),
    ]


def _peak(recipe: Recipe, estimate: Estimate, changes: list[list[str]], stage: Stage) -> int:
    values = override(recipe.model_dump(mode="json"), [setting for change in changes for setting in change])
    other = read_recipe(values, "settings that would fit")
    return {found.stage: found.peak.total_bytes for found in estimate(other)}[stage]


def _options(changes: list[list[str]]) -> str:
    return " ".join(f"--set {setting}" for change in changes for setting in change)


def _gb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GB:.2f} GB"


# -- what there is -----------------------------------------------------------------------------------------------------


def available_bytes(device: Device) -> int | None:
    """Bytes that a new process could have: free on the GPU, or of main memory. None where the device is absent."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return available_host_bytes()
