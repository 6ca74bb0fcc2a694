"""Which layers go: a JSON file that a person can read, edit and apply."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trsp_deploy.errors import PlanError
from trsp_deploy.reading import read_record
from trsp_deploy.recipe import Strict

Index = Annotated[int, Field(ge=0)]


class Pick(Strict):
    """One round of the greedy selection."""

    layer: Index
    lm_loss: tuple[float, ...]  # nats, at each gate update
    gates: tuple[tuple[float, ...], ...]  # (updates, num_layers)
    removal_loss: dict[int, float]  # of the last few candidates: nats on calibration text once it is gone too


class PruningPlan(Strict):
    """Layers to drop and to keep, as sorted indices of the dense model, and how they were chosen."""

    model: str
    num_layers: Annotated[int, Field(ge=2)]
    dropped: tuple[Index, ...]
    kept: tuple[Index, ...]
    method: str
    seed: int
    settings: dict[str, Any]
    calibration: str  # where the text came from
    dense_loss: float | None = None  # nats on held-out calibration text
    picks: tuple[Pick, ...] = ()


def complement(dropped: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The layers that stay when `dropped` go."""
    return tuple(sorted(set(range(num_layers)) - set(dropped)))


def read_plan(path: Path, num_layers: int) -> PruningPlan:
    """Read and check a plan for a model of `num_layers`; raises PlanError with one line."""
    plan = read_record(path, PruningPlan, PlanError)
    _check(plan, path, num_layers)
    return plan


def _check(plan: PruningPlan, path: Path, num_layers: int) -> None:
    if plan.num_layers != num_layers:
        raise PlanError(f"{path}: made for a model of {plan.num_layers} layers, this one has {num_layers}")
    beyond = [index for index in (*plan.dropped, *plan.kept) if index >= num_layers]
    if beyond:
        raise PlanError(f"{path}: layer {beyond[0]} does not exist; valid: 0 to {num_layers - 1}")
    if not plan.dropped or not plan.kept:
        raise PlanError(f"{path}: at least one layer must be dropped and one kept")
    both = sorted(set(plan.dropped) & set(plan.kept))
    if both:
        raise PlanError(f"{path}: layer {both[0]} is under both `dropped` and `kept`; take it out of one")
    neither = sorted(set(range(num_layers)) - set(plan.dropped) - set(plan.kept))
    if neither:
        raise PlanError(f"{path}: layer {neither[0]} is under neither `dropped` nor `kept`; add it to one")
    for name in ("dropped", "kept"):
        indices = getattr(plan, name)
        if list(indices) != sorted(set(indices)):
            raise PlanError(f"{path}: `{name}` must be sorted and without repeats, got {list(indices)}")
