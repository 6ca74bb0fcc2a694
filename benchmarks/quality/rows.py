"""What a row is: everything that decides its outcome, as a frozen record whose hash is the row's key."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from trsp_deploy.recipe import Recipe, Strict, read_recipe
from trsp_deploy.results import Role, ZeroShot

Kind = Literal["dense", "untrained", "curve", "selection", "trained", "dense-trained", "zero-shot"]
Work = Literal["losses", "selection", "zero-shot"]
WORK: dict[Kind, Work] = {
    "dense": "losses",
    "untrained": "losses",
    "curve": "losses",
    "selection": "selection",
    "trained": "losses",
    "dense-trained": "losses",
    "zero-shot": "zero-shot",
}
# Raise one when the code changes what that work finds from the same settings: its rows are then made again.
VERSIONS: dict[Work, int] = {"losses": 1, "selection": 2, "zero-shot": 1}


class Subject(Strict):
    """The model and the text. Windows are non-overlapping."""

    model: str
    calibration: str
    context_length: int  # tokens of a calibration window
    pool_windows: int | None  # calibration windows read; None takes the whole text
    validation_windows: int  # the text's last, held out from everything: removal losses are judged on them
    fit_windows: int  # that a refit is fitted to where nothing trains; else those that the training reads
    tests: dict[str, str]  # name -> texts; the first is in the calibration text's domain
    test_context: int  # tokens of a test window
    test_windows: int  # of each test text


class Row(Strict):
    """One row. `kind`, `arm` and `keep` are labels: rows that differ in nothing else are one row."""

    kind: Kind
    arm: str  # its name in the table
    subject: Subject
    seed: int  # which calibration windows are read, and their order
    drop: int = 0  # layers; 0 is the dense model
    plan: dict[str, Any] = Field(default_factory=dict)  # the recipe's `plan` as written; empty: dense
    windows: int = 0  # calibration windows that the selection reads
    selected: int = 0  # layers of the selection that the first `drop` picks are taken of
    transfer: dict[str, Any] = Field(default_factory=dict)  # likewise; empty where nothing is removed or trained
    self_generated: float = 0.0  # share of the windows that the transfer reads, written by the dense model
    # test text -> share of those windows that is of the same source, from documents behind the test windows
    test_sources: dict[str, float] = Field(default_factory=dict)
    tasks: tuple[str, ...] = ()  # zero-shot
    items: int = 0  # of each task
    keep: bool = False  # keep the checkpoint for zero-shot rows

    @property
    def work(self) -> Work:
        """What has to be done for it."""
        return WORK[self.kind]

    @property
    def role(self) -> Role:
        """What the row's model is called in the library's records."""
        return "pruned" if self.drop else "dense"

    @property
    def key(self) -> str:
        """Hash of everything that decides the outcome."""
        return _hashed([self.work, VERSIONS[self.work], self._values("kind", "arm", "keep")])

    def twin_key(self, dropped: tuple[int, ...]) -> str:
        """Hash of what decides the outcome once the layers are known: rows that share it are one computation."""
        values = self._values("kind", "arm", "keep", "plan", "windows", "selected")
        return _hashed([self.work, VERSIONS[self.work], {**values, "dropped": list(dropped)}])

    def _values(self, *without: str) -> dict[str, Any]:
        # Rows from before there were such texts are what they were.
        none = [name for name in ("self_generated", "test_sources") if not getattr(self, name)]
        return self.model_dump(mode="json", exclude={*without, *none})

    @property
    def steps(self) -> int:
        """Training steps; 0 for none."""
        return 0 if self.transfer.get("form", "none") == "none" else int(self.transfer["steps"])

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * int(self.transfer.get("batch_size", 0)) * self.subject.context_length

    @property
    def title(self) -> str:
        """For people: what the row is."""
        parts = [self.kind, "" if self.arm == self.kind else self.arm]
        parts += [f"{self.drop} layers" if self.drop else "", f"{self.tokens / 1e3:.0f}k tokens" if self.tokens else ""]
        parts += [
            f"{self.items} items a task" if self.items else "",
            f"seed {self.seed}" if self.kind != "dense" else "",
        ]
        return ", ".join(part for part in parts if part)

    def selection(self) -> Row | None:
        """The row that chose this one's layers; None where none were chosen or this is it."""
        if not self.plan or self.kind == "selection":
            return None
        cleared = {"transfer": {}, "self_generated": 0.0, "test_sources": {}, "tasks": (), "items": 0, "keep": False}
        return self.model_copy(update={"kind": "selection", "drop": self.selected, **cleared})

    def checkpoint(self) -> Row:
        """Of a zero-shot row, the row that makes the model it asks."""
        kind: Kind = "trained" if self.drop else "dense"
        return self.model_copy(update={"kind": kind, "tasks": (), "items": 0, "keep": True})


def _hashed(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def recipe_of(row: Row) -> Recipe:
    """The row as the library's recipe."""
    subject = row.subject
    values: dict[str, Any] = {
        "model": subject.model,
        "drop": str(row.drop or 1),
        "seed": row.seed,
        "calibration": {
            "texts": subject.calibration,
            "context_length": subject.context_length,
            "self_generated": row.self_generated,
        },
        "plan": row.plan,
        "transfer": row.transfer,
        "evaluation": subject.tests,
        "evaluate": {"context_length": subject.test_context},
    }
    return read_recipe(values, f"row '{row.title}'")


class Selected(Strict):
    """Outcome of a selection."""

    of: Literal["selection"] = "selection"
    plan: dict[str, Any]  # a PruningPlan
    dense_loss: FiniteFloat  # nats on the validation windows
    removal_loss: FiniteFloat  # the same without the layers
    window_passes: float  # forward passes of one window through all layers; a backward pass counts as 2 more
    select_s: float


class Losses(Strict):
    """Outcome of removing and training: raw losses on each text, and the library's record of the checkpoint."""

    of: Literal["losses"] = "losses"
    nll: dict[str, tuple[FiniteFloat, ...]]  # text -> nats a token, one number a window
    checkpoint: dict[str, Any]  # a PrunedCheckpoint; empty for the dense model
    transfer_s: float


class Accuracies(Strict):
    """Outcome of a zero-shot evaluation."""

    of: Literal["zero-shot"] = "zero-shot"
    score: ZeroShot


Outcome = Annotated[Selected | Losses | Accuracies, Field(discriminator="of")]
