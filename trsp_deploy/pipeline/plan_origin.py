"""Who made a run's `plan.json`: the run itself, or a person, who handed it in or edited it.

A person's plan is an input of its step by one of the two names, so that it is taken for no choice of the run.
"""

from __future__ import annotations

from typing import Any

from trsp_deploy.artifacts import RunFolder, StepRecord, fingerprint, steps
from trsp_deploy.artifacts.differences import changed_settings
from trsp_deploy.artifacts.layout import PLAN
from trsp_deploy.recipe import Recipe

GIVEN, EDITED = "given", "edited"


def recorded_origin(record: StepRecord | None) -> str | None:
    """How a person made a recorded plan; None of a chosen one."""
    return next((how for how in (EDITED, GIVEN) if record is not None and how in record.inputs), None)


def made_by_a_person(run: RunFolder) -> str | None:
    """How a person made the `plan.json` that is there; None of a chosen one."""
    record, path = run.record(steps.PLAN), run.layout.plan
    if record is None or not path.is_file():
        return None
    return EDITED if fingerprint(path) != record.outputs[PLAN] else recorded_origin(record)


def was_edited(run: RunFolder) -> bool:
    """Whether a person has edited `plan.json` after its layers were chosen."""
    record = run.record(steps.PLAN)
    return record is not None and EDITED in record.inputs


def chosen_alike(run: RunFolder, settings: dict[str, Any]) -> bool:
    """Whether a run's plan was made with these settings; older records name the texts among theirs."""
    record = run.record(steps.PLAN)
    if record is None:
        return False
    texts = {name: value for name, value in record.settings["calibration"].items() if name != "texts"}
    return not changed_settings({**record.settings, "calibration": texts}, settings, Recipe)
