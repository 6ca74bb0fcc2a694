"""A run folder: artefacts that appear whole or not at all, and one record for each finished step.

A step's record (`records/<step>.json`) names the fingerprints of its inputs, its settings,
the fingerprints of its outputs, versions and hardware. A second run compares these and redoes
only what no longer matches. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from trsp_deploy import __version__
from trsp_deploy.errors import RunError, StorageError, TrspError
from trsp_deploy.recipe import RelativePath, Strict

# Raise when a step's code changes what it makes from the same inputs, so that old records no longer match.
FORMAT = 1
PATIENCE_S = 1.0  # with the lock of a run that was killed and has not quite gone
NOTHING_LEFT = 1 << 20  # bytes: a disk with less is full, whatever a library calls its error

MANIFEST = "MANIFEST.json"
MANIFEST_SCHEMA = 1
# What a run has beside its steps' outputs and their records.
LOOSE_FILES = ("recipe.yaml", "plan.json", "report.json", "report.md", "report.html", "served.json")

Result = TypeVar("Result", bound=BaseModel)

PACKAGES = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxslim",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "datasets",
    "numpy",
)


class Provenance(Strict):
    """Where and with what an artefact was made."""

    trsp_deploy: str
    python: str
    packages: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]


class Sealed(Strict):
    """A record whose file ends with the SHA-256 of what it says, so that a changed byte is found when it is read.

    Take the key `sha256` out to edit one by hand; files that never had it are taken as they are.
    """

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "sha256" not in values:
            return values
        said = {name: value for name, value in values.items() if name != "sha256"}
        if values["sha256"] != seal(said):
            raise ValueError("is not what was written (its SHA-256 is another)")
        return said


def seal(said: Mapping[str, Any]) -> str:
    """SHA-256 over all that a record says."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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


SIGNATURE = ".sig"  # behind a manifest's name
SIGNED = f"manifest.json{SIGNATURE}"  # in an engine's folder; it may come, go and change with the engine as it was


class RunManifest(Strict):
    """`MANIFEST.json` of a finished run: every file that the toolkit made in it."""

    schema_version: int
    trsp_deploy: str
    files: dict[RelativePath, str]  # path below the run folder -> SHA-256


def fingerprint(path: Path) -> str:
    """SHA-256 over a file, or over the sorted names and contents of a folder's files, but not its own signature."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / SIGNED):
            digest.update(f"{file.relative_to(path).as_posix()} {fingerprint(file)}\n".encode())
        return digest.hexdigest()
    stat = path.stat()
    return _file_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    # Size, time and inode are part of the cache key only: one process reads an unchanged file once.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(path: Path) -> list[Path]:
    """A file itself, or every file and link below a folder, in order; links are named and not followed."""
    if path.is_symlink() or path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())


def leaves(folder: Path, path: Path) -> bool:
    """Whether `path`, which is written as one below `folder`, is outside it once links are followed."""
    return not path.resolve().is_relative_to(folder.resolve())


def size_bytes(path: Path) -> int:
    """Bytes in a file or below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write below `path` into one StorageError line.

    Writers outside Python (safetensors, protobuf, ONNX Runtime, TensorRT) report a full disk as
    errors of their own, so an unknown error on a disk with nothing left counts as one too.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from problem
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{problem.filename or path}: no permission to write ({problem.strerror})") from problem
        raise
    except TrspError:
        raise
    except Exception as problem:
        said = str(problem).lower()
        if "no space left" in said or _free_bytes(path) < NOTHING_LEFT:
            raise _disk_full(path) from problem
        if "file too large" in said or "unexpected pos" in said:  # torch's words for a write that came out short
            raise StorageError(f"{path}: a file may not be that large here (`ulimit -f`); {problem}") from problem
        raise


def _disk_full(path: Path) -> StorageError:
    return StorageError(
        f"{path}: the disk is full ({_free_bytes(path) / 1e6:.0f} MB free); "
        "free some space and run the same command again: finished steps are kept"
    )


def _free_bytes(path: Path) -> int:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; it takes target's place on success.

    After an error or a kill the target is what it was before, or, of a folder, gone: it is never half of anything.
    """
    partial, former = (target.with_name(f".{target.name}.{state}") for state in ("partial", "former"))
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        _remove(former)
        try:
            with storage_errors(target):  # before the next lines make room again: how full the disk is explains much
                yield partial
                _sync(partial)
            if target.is_dir() and not partial.is_dir():
                raise RunError(f"{target}: is a folder; it is not replaced by a file")
            # A folder cannot replace a folder in one rename, so the old one steps aside first.
            if target.is_dir():
                target.replace(former)
            partial.replace(target)
        except BaseException:
            _remove(partial)
            if former.exists() and not target.exists():
                former.replace(target)
            raise
        _remove(former)


def link_tree(source: Path, target: Path, copied: tuple[str, ...] = ()) -> None:
    """Give a finished file or folder a second place: hard links, or copies where the file system has none.

    copied: ends of names of files that are copied in any case.
    """

    def link(one: str, other: str) -> None:
        if not one.endswith(copied):
            with contextlib.suppress(OSError):
                os.link(one, other)
                return
        shutil.copy2(one, other)

    with writing(target) as partial:
        if source.is_dir():
            shutil.copytree(source, partial, copy_function=link)
        else:
            link(str(source), str(partial))


def write_json(path: Path, value: BaseModel | Mapping[str, Any]) -> None:
    """Write a record or mapping as indented JSON, whole or not at all."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)
    if isinstance(value, Sealed):
        plain["sha256"] = seal(plain)
    with writing(path) as partial:
        partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


@functools.cache
def provenance() -> Provenance:
    """Versions and hardware of this process."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Provenance(
        trsp_deploy=__version__,
        python=platform.python_version(),
        packages=versions,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpu_names(),
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> tuple[str, ...]:
    # torch knows the GPUs that this process can use; without torch loaded there is nothing to say.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


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
        """The record of a finished step, or None when there is none that can be read."""
        try:
            return StepRecord.model_validate_json((self.path / _record_file(step)).read_bytes())
        except (OSError, ValidationError):
            return None

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
