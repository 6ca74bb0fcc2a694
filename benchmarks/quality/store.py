"""The file of finished rows: one JSON object a line, each whole or not there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from benchmarks.code import code_digest
from benchmarks.kept import keep, kept_in
from benchmarks.quality.rows import Losses, Outcome, Row, Selected, Work, recipe_of
from trsp_deploy.artifacts import Provenance, provenance
from trsp_deploy.recipe import Strict

# Where each work's code begins, below trsp_deploy/; what it imports belongs to it. Its digest is kept with each row.
TRAINING = ("stages/transfer.py", "tools/sources/texts.py", "tools/training/self_calibration.py")
CODE: dict[Work, tuple[str, ...]] = {
    "selection": ("stages/selection.py", "tools/sources/texts.py"),
    "losses": ("stages/selection.py", *TRAINING, "stages/evaluate.py"),
    "zero-shot": ("stages/selection.py", *TRAINING, "stages/zeroshot.py"),
}
# Imported, but of no influence on a number. Of `recipe` only the values count, and those are in the digest themselves;
# `runners` are engines, and every row asks PyTorch.
NO_INFLUENCE = frozenset(
    [
        "errors",
        "artifacts",
        "results",
        "recipe",
        "assets",
        "packaged",
        "models",
        "model_card",
        "progress",
        "quiet",
        "runners",
    ]
)
# What of a resolved recipe decides a row; the rest of it (engines, bench, ...) does not.
DECIDES = {"calibration", "plan", "transfer", "evaluate", "weights", "autocast", "device", "seed"}


class Line(Strict):
    """A finished row."""

    key: str
    row: Row
    outcome: Outcome
    elapsed_s: float
    code: str  # digest of the code and the resolved settings that made it
    provenance: Provenance
    products: Literal["", "bf16", "fp32"] = ""  # of matrices: processors of one name differ in it; older rows lack it
    same_as: str = ""  # key of the row whose outcome this is: the same layers removed, the same training


class Store:
    """Finished rows by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = _read_lines(path)

    def add(self, row: Row, outcome: Outcome, elapsed_s: float) -> None:
        """Keep a row's outcome, in place of an earlier one; the file is replaced as a whole."""
        line = Line(
            key=row.key,
            row=row,
            outcome=outcome,
            elapsed_s=round(elapsed_s, 1),
            code=digest(row),
            provenance=provenance(),
            products=products_here(row),
        )
        self._keep(line)

    def reuse(self, row: Row, twin: Line) -> None:
        """Keep a twin's outcome as the row's own; it counts as made by the code that made the twin."""
        code = twin.code if self.stale(twin.row) else digest(row)
        self._keep(twin.model_copy(update={"key": row.key, "row": row, "code": code, "same_as": twin.key}))

    def twin(self, row: Row) -> Line | None:
        """A finished row that removed the same layers and trained alike, whoever chose them; None without one."""
        dropped = self.dropped(row)
        if not dropped or row.kind == "selection":
            return None
        wanted = row.twin_key(dropped)
        for line in self.lines.values():
            if line.row.work == row.work and not line.same_as and line.key != row.key:
                theirs = self.removed(line)
                if theirs and line.row.twin_key(theirs) == wanted:
                    return line
        return None

    def dropped(self, row: Row) -> tuple[int, ...] | None:
        """The layers that a row removes: the first of what its selection row chose; None while that is not there."""
        chosen = row.selection()
        line = self.get(chosen) if chosen else None
        if line is None or not isinstance(line.outcome, Selected):
            return None
        plan = line.outcome.plan
        if row.drop == len(plan["dropped"]):
            return tuple(plan["dropped"])
        return tuple(sorted(plan["settings"]["scores"]["order"][: row.drop]))

    def removed(self, line: Line) -> tuple[int, ...] | None:
        """The layers that a finished row did remove, which may not be those that its selection row chooses today."""
        if isinstance(line.outcome, Losses):
            return tuple(line.outcome.checkpoint.get("dropped", ()))
        return self.dropped(line.row)

    def _keep(self, line: Line) -> None:
        # What others have finished since this process read the file stays in it.
        self.lines = _read_lines(self.path) | {line.key: line}
        keep(self.path, *self.lines.values())

    def __contains__(self, row: Row) -> bool:
        return row.key in self.lines

    def get(self, row: Row) -> Line | None:
        """The row's line, or None while it has none."""
        return self.lines.get(row.key)

    def stale(self, row: Row) -> bool:
        """Whether the row was made by other code than there is now, or without other layers than are chosen now."""
        line = self.get(row)
        if line is None:
            return False
        chosen = self.dropped(row)
        return line.code != digest(row) or (chosen is not None and self.removed(line) != chosen)


def digest(row: Row) -> str:
    """Hash of the code that makes a row and of the settings that it resolves to, defaults among them."""
    settings = recipe_of(row).model_dump_json(include=DECIDES)
    return hashlib.sha256(f"{work_digest(row.work)} {settings}".encode()).hexdigest()[:16]


def work_digest(work: Work) -> str:
    """Hash of the code that this work runs."""
    return code_digest(*CODE[work], without=NO_INFLUENCE)


def products_here(row: Row) -> Literal["bf16", "fp32"]:
    """In which precision this machine multiplies a row's matrices."""
    from trsp_deploy.tools.training.shared import has_fast_bf16, pick_device  # torch, which a report does without

    recipe = recipe_of(row)
    return "bf16" if recipe.autocast == "auto" and has_fast_bf16(pick_device(recipe)) else "fp32"


def _read_lines(path: Path) -> dict[str, Line]:
    """Finished rows by key; none where there is no file."""
    return {line.key: line for line in kept_in(path, Line, "delete the line to make its row again")}
