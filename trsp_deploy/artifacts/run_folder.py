"""A run folder: one record for each finished step, and the lock that keeps a second run out.

A step's record (`records/<step>.json`) names the fingerprints of its inputs, its settings,
the fingerprints of its outputs, versions and hardware. A second run compares these and redoes
only what no longer matches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from trsp_deploy import __version__
from trsp_deploy.artifacts.differences import changed_inputs, changed_settings
from trsp_deploy.artifacts.fingerprints import SIGNED, Sealed, files_below, fingerprint, leaves
from trsp_deploy.artifacts.layout import LOCK, MANIFEST, PARTS, RunLayout, run_that_owns
from trsp_deploy.artifacts.locks import locked
from trsp_deploy.artifacts.provenance import Provenance, provenance
from trsp_deploy.artifacts.storage import LEADS_NOWHERE, storage_errors, write_json
from trsp_deploy.errors import RunError, StorageError
from trsp_deploy.launch import is_main_process
from trsp_deploy.recipe import RelativePath

# Raise when a step's code changes what it makes from the same inputs, so that old records no longer match.
FORMAT = 1
STOPPED = "stopped"  # what is announced of a step that raised; the error says the rest
Result = TypeVar("Result", bound=BaseModel)


class StepRecord(Sealed):
    """What a finished step read, did and wrote."""

    step: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    outputs: dict[RelativePath, str]  # path below the run folder -> fingerprint
    result: dict[str, Any]
    elapsed_s: float
    provenance: Provenance


@dataclass(frozen=True)
class Made:
    """What another step of the run has left, as an input."""

    step: str
    path: str  # below the run folder


@dataclass(frozen=True)
class Step:
    """What a step is made by and leaves, said once: `RunFolder.do` does it, `Finished.ask` asks whether it is done.

    settings, inputs: asked for only where they are needed, for they may take a model or texts to say. inputs: by name;
    of what is no other step's the fingerprint.
    output: path below the run folder; None of a step that leaves none.
    schema: what the settings are fields of, by which an older record that lacks one was made with its default.
    """

    name: str
    settings: Callable[[], BaseModel | Mapping[str, Any]]
    inputs: Callable[[], Mapping[str, Made | str]]
    output: str | None = None
    schema: type[BaseModel] | None = None


class RunManifest(Sealed):
    """`MANIFEST.json` of a finished run: every file that the toolkit made in it; of a sweep also its runs' ones."""

    schema_version: Literal[1]
    trsp_deploy: str
    files: dict[RelativePath, str]  # path below the run folder -> SHA-256


class RunFolder:
    """One run's folder: its artefacts, its step records, and the lock that keeps a second run out.

    Of several processes (`accelerate launch`) the main one holds the lock, compares, announces and writes; the others
    follow what it decides. They hear of it through `from_main`, which returns the main process's value on each.
    """

    def __init__(self, path: Path | str, announce: Callable[[str, str], None] = lambda step, state: None) -> None:
        self.path = Path(path)
        self.layout = RunLayout(self.path)
        self.main = is_main_process()
        self.made: dict[str, Provenance] = {}  # of each step that was asked for: when and with what it was done
        self.from_main: Callable[[Any], Any] = lambda value: value
        self._announce = announce if self.main else lambda step, state: None
        self._held = contextlib.ExitStack()  # the lock
        self._entered = False

    def __enter__(self) -> RunFolder:
        if self.main:
            self._take_lock()
        self._entered = True
        return self

    def _take_lock(self) -> None:
        with storage_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path}: is a file, expected a folder for the run")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileExistsError as problem:  # and no folder: of a disk that is not mounted, mostly
                raise RunError(
                    f"{self.path}: cannot be created ({problem.filename} is a link that leads nowhere); "
                    "choose another --out"
                ) from problem
            except (FileNotFoundError, NotADirectoryError) as problem:
                raise RunError(
                    f"{self.path}: cannot be created ({problem.strerror}); choose another --out"
                ) from problem
        self._held.enter_context(locked(self.path / LOCK, self.path))

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._held.close()

    def record(self, step: str) -> StepRecord | None:
        """The record of a finished step, or None when there is none that can be read, or it is another step's."""
        try:
            found = StepRecord.model_validate_json(self.layout.record(step).read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found.step == step else None

    def holds(self, record: StepRecord) -> bool:
        """Whether a step's outputs are what it made."""
        return not self._changed_outputs(record)

    def has_outputs(self, record: StepRecord) -> bool:
        """Whether a step's outputs are there, whatever they are by now."""
        return all((self.path / output).exists() for output in record.outputs)

    def write_manifest(self) -> RunManifest:
        """Write down the SHA-256 of every file that the steps left, and of the manifests of a sweep's runs; what no
        longer is what a step made stays out."""
        loose = [self.path / name for part in PARTS if part.loose for name in part.paths]
        loose += [run.root / MANIFEST for run in self.layout.runs]
        made = {file for path in loose if path.exists() for file in files_below(path)}
        for record in map(self.record, self.recorded()):
            if record is None:
                continue
            made.add(self.layout.record(record.step))
            for output in record.outputs:
                if self._output_matches(record, output):
                    folder = self.path / output
                    made.update(file for file in files_below(folder) if file != folder / SIGNED)
        names = {self.layout.below(path): path for path in made if not leaves(self.path, path)}
        manifest = RunManifest(
            schema_version=1,
            trsp_deploy=__version__,
            files={name: fingerprint(names[name]) for name in sorted(names)},
        )
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def outdate_manifest(self) -> None:
        """Remove the manifest, and that of the sweep which the run is of, before something that it names is made anew:
        one that is there holds."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        around = RunLayout(self.path.resolve().parent)
        if around.is_sweep and around.is_begun:
            (around.root / MANIFEST).unlink(missing_ok=True)

    def recorded(self) -> list[str]:
        """Names of the steps that have a record."""
        return sorted(path.stem for path in self.layout.records.glob("*.json"))

    def key(self, name: str, *, settings: BaseModel | Mapping[str, Any], inputs: Mapping[str, Path | str]) -> str:
        """What a step's result depends on, as one SHA-256; arguments as in `step`."""
        parts = [FORMAT, name, _plain(settings), _prints(inputs)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def key_of(self, step: Step) -> str:
        """The same of a step whose inputs are there."""
        return self.key(step.name, settings=step.settings(), inputs=self._there(step))

    def do(
        self, step: Step, work: Callable[[], Result], result_type: type[Result], *, together: bool = False
    ) -> Result:
        """`step` of one that is asked about too, whose inputs are there."""
        return self.step(
            step.name,
            work,
            result_type,
            settings=step.settings(),
            inputs=self._there(step),
            outputs=[] if step.output is None else [step.output],
            schema=step.schema,
            together=together,
        )

    def _there(self, step: Step) -> dict[str, Path | str]:
        return {name: self.path / of.path if isinstance(of, Made) else of for name, of in step.inputs().items()}

    def step(
        self,
        name: str,
        work: Callable[[], Result],
        result_type: type[Result],
        *,
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path | str],
        outputs: Sequence[str] = (),
        schema: type[BaseModel] | None = None,
        together: bool = False,
    ) -> Result:
        """Return the recorded result when nothing it depends on has changed, else run `work` and record it.

        name: the step's name, unique in the run, such as "export-dense-fp32".
        work: makes every path in `outputs` and returns the step's result.
        settings: what the user chose for this step.
        inputs: name -> a file or folder, or the fingerprint of something that is neither.
        outputs: paths below the run folder.
        schema: as in `Step`.
        together: of several processes all run `work`, not the main one alone; only the main one may write.
        """
        if not self._entered:  # without the lock two commands would write the same step
            raise RunError(f"{self.path}: is not entered; `with RunFolder(path) as run:` holds it while it is written")
        known = self._known(name, result_type, settings, inputs, outputs, schema) if self.main else None
        result: Result | None = self.from_main(known)
        if result is not None:
            self._announce(name, "reused")
            return result
        if self.main:
            result = self._run(name, work, settings, inputs, outputs)
        elif together:
            work()
        found: Result = self.from_main(result)
        return found

    def _known(
        self,
        name: str,
        result_type: type[Result],
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path | str],
        outputs: Sequence[str],
        schema: type[BaseModel] | None,
    ) -> Result | None:
        """The recorded result of a step, where it still holds."""
        record = self.record(name)
        if record is None:
            if (file := self.layout.record(name)).exists():
                self._announce(name, f"{self.layout.below(file)} is damaged, or of another version; done again")
            return None
        if others := self.differences(record, settings, _prints(inputs), schema):
            self._announce(name, f"{'; '.join(others)}; done again")
            return None
        if record.outputs.keys() != set(outputs):
            return None
        if changed := self._changed_outputs(record):
            for path in changed:
                _check_link(self.path, path, record.outputs[path])
            # `clean` removes what a later run makes again, and that is no damage.
            gone = [path for path in changed if not (self.path / path).exists()]
            others = [path for path in changed if path not in gone]
            said = [f"{', '.join(gone)} is not there"] if gone else []
            said += [f"{', '.join(others)} is not what was made (SHA-256)"] if others else []
            self._announce(name, f"{'; '.join(said)}; made again")
            return None
        try:
            result = result_type.model_validate(record.result)
        except ValidationError:
            self._announce(name, "what was recorded of it is of another version; done again")
            return None
        self.made[name] = record.provenance
        return result

    def differences(
        self,
        record: StepRecord,
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, str | None],
        schema: type[BaseModel] | None = None,
    ) -> list[str]:
        """Why a step is to be done again that has a record: what is other than it was, a few words each.

        inputs: fingerprints by name; None of what is still to be made. schema: as in `Step`.
        """
        if record.key != self.key(record.step, settings=record.settings, inputs=record.inputs):
            return ["it was done by another version"]
        schema = type(settings) if isinstance(settings, BaseModel) else schema
        return changed_settings(record.settings, _plain(settings), schema) + changed_inputs(record.inputs, inputs)

    def _run(
        self,
        name: str,
        work: Callable[[], Result],
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path | str],
        outputs: Sequence[str],
    ) -> Result:
        # Before the work, which may change what is on disk.
        plain, prints, key = _plain(settings), _prints(inputs), self.key(name, settings=settings, inputs=inputs)
        self._announce(name, "started")
        self.outdate_manifest()
        began = time.perf_counter()
        try:
            with storage_errors(self.path):
                result = work()
        except BaseException:
            self._announce(name, STOPPED)
            raise
        elapsed = time.perf_counter() - began
        record = StepRecord(
            step=name,
            key=key,
            settings=plain,
            inputs=prints,
            outputs={path: fingerprint(self.path / path) for path in outputs},
            result=result.model_dump(mode="json"),
            elapsed_s=elapsed,
            provenance=provenance(),
        )
        write_json(self.layout.record(name), record)
        self.made[name] = record.provenance
        self._announce(name, f"done in {elapsed:.1f} s")
        return result

    def _changed_outputs(self, record: StepRecord) -> list[str]:
        return [path for path in record.outputs if not self._output_matches(record, path)]

    def _output_matches(self, record: StepRecord, output: str) -> bool:
        path = self.path / output
        return path.exists() and not leaves(self.path, path) and fingerprint(path) == record.outputs[output]


@contextlib.contextmanager
def reading_alone(*paths: Path) -> Iterator[None]:
    """Keep others from making anew what is read for minutes: the lock of each run that a path is, or lies in.

    A run that cannot be written is read without one. Raises RunError that names the holder.
    """
    runs = {run.resolve(): run for run in map(_run_of, paths) if run is not None}
    with contextlib.ExitStack() as held:
        for run in runs.values():
            with contextlib.suppress(StorageError):
                held.enter_context(RunFolder(run))
        yield


def _run_of(path: Path) -> Path | None:
    here = RunLayout(path)
    around = here if here.is_run and here.is_begun else run_that_owns(path)
    return None if around is None else around.root


class Finished:
    """The steps of a run that need not be done again, as far as its records tell.

    Nothing is made, and no artefact is read: one that was changed since is found by `RunFolder.step` alone.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.steps: set[str] = set()
        # step -> fingerprint of its output, also where that is to be made again as it was
        self.left: dict[str, str] = {}

    def ask(self, step: Step) -> None:
        """Enter a step whose record is of its settings and of its inputs, these and no others, and whose output is
        there. What another step has to make again is none that a record could be of."""
        record = self.run.record(step.name)
        if record is None or (step.output is not None and step.output not in record.outputs):
            return
        now = {name: self.left.get(of.step) if isinstance(of, Made) else of for name, of in step.inputs().items()}
        if self.run.differences(record, step.settings(), now, step.schema):
            return
        self.left[step.name] = "" if step.output is None else record.outputs[step.output]
        if step.output is None or (self.run.path / step.output).exists():
            self.steps.add(step.name)

    def recorded(self, step: str, *names: str) -> dict[str, str]:
        """A step's inputs of these names as its record has them, where it has: for what is compared elsewhere."""
        record = self.run.record(step)
        return {} if record is None else {name: record.inputs[name] for name in names if name in record.inputs}


def check_made(run: Path, step: str, output: str) -> None:
    """Raise RunError where a step's output is not there or not what it made; without a record there is no telling."""
    record, path = RunFolder(run).record(step), run / output
    if not path.exists():
        raise RunError(f"{path}: is not there, as after `clean`; `trsp-deploy report {run}` makes it again")
    if record is not None:
        _check_link(run, output, record.outputs.get(output))
    if record is not None and (leaves(run, path) or fingerprint(path) != record.outputs.get(output)):
        raise RunError(f"{path}: is not what its step made (`trsp-deploy verify {run}` names the file); make it again")


def _check_link(run: Path, output: str, made: str | None) -> None:
    """Raise RunError where a link is all that is wrong with an output, or may be, which would be made again for it.

    made: its fingerprint, as its step made it.
    """
    path = run / output
    link = next((each for each in (path, *path.parents) if each.is_symlink()), None)
    if link is None or not leaves(run, path):
        return
    if not path.exists():
        raise RunError(f"{link}: {LEADS_NOWHERE}")
    if fingerprint(path) == made:
        raise RunError(
            f"{link}: is a link out of the run; move the whole run and link that, or remove the link to have it made "
            "again"
        )


def _plain(settings: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a record has them, which is JSON."""
    if isinstance(settings, BaseModel):
        return settings.model_dump(mode="json")
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return plain


def _prints(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    return {name: fingerprint(value) if isinstance(value, Path) else value for name, value in inputs.items()}
