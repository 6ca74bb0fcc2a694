"""Where things lie in a run folder, and what its parts are.

    run = RunLayout(Path("runs/smollm2-135m-drop8"))
    run.engine("ort-cpu-fp32", "pruned")   # the folder, there or not

A role is "dense" or "pruned".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trsp_deploy.errors import RunError

RUN_MARK = "recipe.yaml"  # a folder that has one is a run, or a sweep
MANIFEST = "MANIFEST.json"
LOCK = ".lock"  # by which a run is known that was begun and has nothing else yet
WRITING_LOCK = ".writing.lock"  # of what is no run, where it is within
PLACE = ".place"  # what the recipe's relative paths are relative to
ENGINES = "engines"
CHECKPOINTS = "checkpoints"  # of trainings that were killed
FAILED_LOGS = f"{ENGINES}/*/*-failed.log"  # of builds
ENGINE_MANIFEST = "manifest.json"  # in an engine's folder
TEXTS = "texts"  # copies, for a machine that has not got them
PLAN = "plan.json"
PLAN_BEFORE = "plan-before.json"  # one that a chosen plan took the place of, where nothing told who had made it
PLANS = "plans"  # of a sweep
SWEEP, SWEEP_PAGE = "sweep.json", "sweep.html"
OWN_TEXT = "self-generated.jsonl"  # that the dense model wrote


def cut_name(count: int | Literal["*"]) -> str:
    """What a sweep calls its run with so many layers dropped."""
    return f"drop-{count}"


POINTS = cut_name("*")  # a sweep's runs, below its folder


@dataclass(frozen=True)
class Part:
    """Something that a run makes, by the name that `clean --keep` takes."""

    name: str
    paths: tuple[str, ...]  # below the run folder
    cleanable: bool = True  # whether a later run makes it again
    loose: bool = False  # in the manifest whatever the steps' records say of it


PARTS = (
    Part("dense", ("dense",)),
    Part("pruned", ("pruned",)),
    Part("onnx", ("onnx",)),
    Part(ENGINES, (ENGINES,)),
    Part("reports", ("report.html", "report.json", "report.md", "served.json"), loose=True),
    Part(PLANS, (PLANS,)),
    Part("sweep", (SWEEP, SWEEP_PAGE), cleanable=False, loose=True),
    Part(CHECKPOINTS, (CHECKPOINTS,)),
    # The dense model's text: written again, on another machine, it would be another, and `pruned/` made anew for it.
    Part("self-generated", (OWN_TEXT,), cleanable=False),
    Part(TEXTS, (TEXTS,), cleanable=False, loose=True),
    Part("plan", (PLAN, PLAN_BEFORE), cleanable=False, loose=True),
    Part("recipe", (RUN_MARK,), cleanable=False, loose=True),
)


RECORDS = "records"
# The first name below a run's folder of whatever the run made, and nobody else should write.
OWN = {RUN_MARK, MANIFEST, LOCK, PLACE, RECORDS, *(name for part in PARTS for name in part.paths)}


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run, there or not."""

    root: Path

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run, and no sweep of several."""
        return (self.root / RUN_MARK).is_file() and not self.is_sweep

    @property
    def is_sweep(self) -> bool:
        """Whether the folder is a sweep, begun or whole."""
        return (self.root / PLANS).is_dir() or (self.root / SWEEP).is_file()

    @property
    def is_begun(self) -> bool:
        """Whether a command of trsp-deploy has worked here: a recipe, or a folder of plans, may be a person's own."""
        marks = (LOCK, PLACE, RECORDS) if self.is_run or self.is_sweep else (LOCK,)
        return any((self.root / mark).exists() for mark in marks)

    @property
    def runs(self) -> list[RunLayout]:
        """The runs within a sweep's folder, smallest cut first; none in a run's."""
        found = [run for path in self.root.glob(POINTS) if (run := RunLayout(path)).is_run]
        return sorted(found, key=lambda run: (len(run.root.name), run.root.name))

    @property
    def plan(self) -> Path:
        """Which layers go."""
        return self.root / PLAN

    @property
    def own_text(self) -> Path:
        """What the dense model wrote for the transfer."""
        return self.root / OWN_TEXT

    def cut(self, count: int) -> Path:
        """The folder of a sweep's run with so many layers dropped."""
        return self.root / cut_name(count)

    def plan_of_cut(self, count: int) -> Path:
        """Which layers that run is to drop."""
        return self.root / PLANS / f"{cut_name(count)}.json"

    @property
    def report(self) -> Path:
        """The report for programs; for people it is beside it, as `.md` and `.html`."""
        return self.root / "report.json"

    @property
    def served(self) -> Path:
        """What `bench-server` measured."""
        return self.root / "served.json"

    @property
    def records(self) -> Path:
        """The folder of the steps' records."""
        return self.root / RECORDS

    @property
    def checkpoints(self) -> Path:
        """What killed trainings go on from, a folder a stage."""
        return self.root / CHECKPOINTS

    @property
    def engines(self) -> Path:
        """The folder of all engines, a folder each."""
        return self.root / ENGINES

    def text(self, name: str) -> Path:
        """The run's copy of a text, such as `calibration-1` and `evaluation-wiki`."""
        return self.root / TEXTS / f"{name}.json"

    def record(self, step: str) -> Path:
        """What a step read, did and wrote."""
        return self.records / f"{step}.json"

    def model(self, role: str) -> Path:
        """A Hugging Face folder."""
        return self.root / role

    def onnx(self, role: str, precision: str) -> Path:
        """The folder of an exported model; precision: of the graph, "fp32" or "fp16"."""
        return self.root / "onnx" / f"{role}-{precision}"

    def engine(self, name: str, role: str) -> Path:
        """An engine's folder."""
        return self.engines / name / role

    def below(self, path: Path) -> str:
        """How records and manifests name a path of the run."""
        return path.relative_to(self.root).as_posix()


def run_of_engine(engine: Path) -> RunLayout | None:
    """The run, there or not, of an engine's folder that lies as in one (`RunLayout.engine`); None for any other."""
    folder = engine.resolve()
    return RunLayout(folder.parents[2]) if folder.parent.parent.name == ENGINES else None


def model_of_engine(engine: Path) -> Path | None:
    """The Hugging Face folder, there or not, of an engine in a run; None for any other engine."""
    run = run_of_engine(engine)
    return None if run is None else run.model(engine.resolve().name)


def check_is_run(folder: Path, then: str = "") -> None:
    """Raise RunError for a folder that is no run; then: what follows from it, for the message's end."""
    check_no_sweep(folder)
    if not RunLayout(folder).is_run:
        raise RunError(f"{folder}: no run of trsp-deploy ({RUN_MARK} is missing){f'; {then}' if then else ''}")


def check_no_sweep(folder: Path) -> None:
    """Raise RunError for a sweep's folder where a run's is wanted; the message names one of its runs."""
    sweep = RunLayout(folder)
    if sweep.is_sweep:
        hint = f"give one of its runs, such as {sweep.runs[0].root}" if sweep.runs else "it has no run yet"
        raise RunError(f"{folder}: is a sweep and no run; {hint}")


def check_no_model(folder: Path) -> None:
    """Raise RunError for a Hugging Face model's folder: with more in it the model would have another fingerprint."""
    if (folder / "config.json").is_file():
        raise RunError(f"{folder}: is a model's folder; choose another --out")


def run_that_owns(path: Path) -> RunLayout | None:
    """The run or sweep that made, or will make, what lies at a path; None of any other place, beside such files too."""
    place = path.resolve()
    for folder in place.parents:
        run = RunLayout(folder)
        if run.records.is_dir() and (run.is_run or run.is_sweep) and place.relative_to(folder).parts[0] in OWN:
            return run
    return None


def check_can_hold(folder: Path, *, sweep: bool) -> None:
    """Raise RunError for a folder that cannot become a run, or a sweep, without taking what is not its own."""
    layout = RunLayout(folder)
    around = run_that_owns(folder)
    if around is not None:
        raise RunError(f"{folder}: is a part of the run {around.root}; choose another --out")
    if not sweep:
        check_no_sweep(folder)
    elif layout.is_run and layout.plan.is_file():
        raise RunError(f"{folder}: is a run of one cut and no sweep; choose another --out")
    if layout.is_begun:
        return
    check_no_model(folder)
    names = (MANIFEST, *(name for part in PARTS for name in part.paths))  # a manifest: of a model repository
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        instead = ", or move it away (--recipe takes it from anywhere)" if taken == [RUN_MARK] else ""
        raise RunError(f"{folder}: has {', '.join(taken)} and is no run of trsp-deploy; choose another --out{instead}")


def check_can_hold_cuts(folder: Path, counts: Iterable[int]) -> None:
    """Raise RunError for a folder in which the runs of a sweep would take what is not their own; counts: of layers."""
    for count in counts:
        cut = RunLayout(folder).cut(count)
        check_can_hold(cut, sweep=False)
        if RunLayout(cut).is_begun and not RunLayout(folder).is_begun:
            raise RunError(f"{cut}: is a run, and of no sweep, for {folder} is none yet; choose another --out")
