"""A run folder: one record for each finished step, and the lock that keeps a second run out.

A step's record (`records/<step>.json`) names the fingerprints of its inputs, its settings,
the fingerprints of its outputs, versions and hardware. A second run compares these and redoes
only what no longer matches.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trsp_deploy import __version__
from trsp_deploy.artifacts.fingerprints import SIGNED, Sealed, files_below, fingerprint, leaves
from trsp_deploy.artifacts.provenance import Provenance, provenance
from trsp_deploy.artifacts.storage import storage_errors, write_json
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import RelativePath, Strict

# Raise when a step's code changes what it makes from the same inputs, so that old records no longer match.
FORMAT = 1
PATIENCE_S = 1.0  # with the lock of a run that was killed and has not quite gone
MANIFEST = "MANIFEST.json"
MANIFEST_SCHEMA = 1
# What a run has beside its steps' outputs and their records.
LOOSE_FILES = ("recipe.yaml", "plan.json", "report.json", "report.md", "report.html", "served.json")
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


class RunManifest(Strict):
    """`MANIFEST.json` of a finished run: every file that the toolkit made in it."""

    schema_version: int
    trsp_deploy: str
    files: dict[RelativePath, str]  # path below the run folder -> SHA-256


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class RunFolder:
    """One run's folder: its artefacts, its step records, and the lock that keeps a second run out.

    Of several processes (`accelerate launch`) the main one holds the lock, compares, announces and writes; the others
    follow what it decides. They hear of it through `from_main`, which returns the main process's value on each.
    """

    def __init__(self, path: Path, announce: Callable[[str, str], None] = lambda step, state: None) -> None:
        self.path = path
        self.main = is_main_process()
        self.from_main: Callable[[Any], Any] = lambda value: value
        self._announce = announce if self.main else lambda step, state: None
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        if self.main:
            self._take_lock()
        return self

    def _take_lock(self) -> None:
        with storage_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path}: is a file, expected a folder for the run")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, NotADirectoryError) as problem:
                raise RunError(
                    f"{self.path}: cannot be created ({problem.strerror}); choose another --out"
                ) from problem
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(self._lock, PATIENCE_S):
            holder = os.pread(self._lock, 32, 0).decode() or "unknown"
            os.close(self._lock)
            self._lock = None
            raise RunError(f"{self.path}: in use by another trsp-deploy (process {holder.strip()})")
        with storage_errors(self.path):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, step: str) -> StepRecord | None:
        """The record of a finished step, or None when there is none that can be read, or it is another step's."""
        try:
            found = StepRecord.model_validate_json((self.path / _record_file(step)).read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found.step == step else None

    def forget(self, step: str) -> None:
        """Drop a step's record, so that it is done again whatever its key says."""
        if self.main:
            (self.path / _record_file(step)).unlink(missing_ok=True)

    def write_manifest(self) -> RunManifest:
        """Write down the SHA-256 of every file that the steps left; what no longer is what a step made stays out."""
        made = {path for name in LOOSE_FILES if (path := self.path / name).is_file()}
        for record in map(self.record, self.recorded()):
            if record is None:
                continue
            made.add(self.path / "records" / f"{record.step}.json")
            for output in record.outputs:
                if self._output_matches(record, output):
                    folder = self.path / output
                    made.update(file for file in files_below(folder) if file != folder / SIGNED)
        names = {path.relative_to(self.path).as_posix(): path for path in made if not leaves(self.path, path)}
        manifest = RunManifest(
            schema_version=MANIFEST_SCHEMA,
            trsp_deploy=__version__,
            files={name: fingerprint(names[name]) for name in sorted(names)},
        )
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def outdate_manifest(self) -> None:
        """Remove the manifest before something that it names is made anew: one that is there holds."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def recorded(self) -> list[str]:
        """Names of the steps that have a record."""
        return sorted(path.stem for path in (self.path / "records").glob("*.json"))

    def key(self, name: str, *, settings: BaseModel | Mapping[str, Any], inputs: Mapping[str, Path | str]) -> str:
        """What a step's result depends on, as one SHA-256; arguments as in `step`."""
        parts = [FORMAT, name, _plain(settings), _prints(inputs)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def step(
        self,
        name: str,
        work: Callable[[], Result],
        result_type: type[Result],
        *,
        settings: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path | str],
        outputs: Sequence[str] = (),
        together: bool = False,
    ) -> Result:
        """Return the recorded result when nothing it depends on has changed, else run `work` and record it.

        name: the step's name, unique in the run, such as "export-dense-fp32".
        work: makes every path in `outputs` and returns the step's result.
        settings: what the user chose for this step.
        inputs: name -> a file or folder, or the fingerprint of something that is neither.
        outputs: paths below the run folder.
        together: of several processes all run `work`, not the main one alone; only the main one may write.
        """
        known = self._known(name, result_type, settings, inputs) if self.main else None
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
    ) -> Result | None:
        """The recorded result of a step, where it still holds."""
        record = self.record(name)
        if record is None:
            if (self.path / _record_file(name)).exists():
                self._announce(name, f"{_record_file(name)} is damaged, or of another version; done again")
            return None
        if record.key != self.key(name, settings=settings, inputs=inputs):
            return None
        changed = self._changed_outputs(record)
        if changed:
            self._announce(name, f"{', '.join(changed)} is not what was made (SHA-256); made again")
            return None
        try:
            return result_type.model_validate(record.result)
        except ValidationError:
            return None  # written by another version of the toolkit: redo

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
        with storage_errors(self.path):
            result = work()
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
        write_json(self.path / _record_file(name), record)
        self._announce(name, f"done in {elapsed:.1f} s")
        return result

    def _changed_outputs(self, record: StepRecord) -> list[str]:
        return [path for path in record.outputs if not self._output_matches(record, path)]

    def _output_matches(self, record: StepRecord, output: str) -> bool:
        path = self.path / output
        return path.exists() and not leaves(self.path, path) and fingerprint(path) == record.outputs[output]


def _locked(file: int, patience_s: float) -> bool:
    """Lock an open file, or give up; the kernel drops a lock with its holder, so a killed run leaves nothing behind."""
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(0.02)


def _record_file(step: str) -> str:
    return f"records/{step}.json"


def _plain(settings: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    return settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)


def _prints(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    return {name: fingerprint(value) if isinstance(value, Path) else value for name, value in inputs.items()}
