"""Is every file still the one that was made? `trsp-deploy verify`.

    found = verify(Path("runs/smollm2-135m-drop8"))
    found.whole, found.findings

A run folder is held against its `MANIFEST.json`, or while it is not finished against the records of its steps; a
sweep's too, with every run within; an engine folder against its `manifest.json`; a Triton repository against its
`MANIFEST.json`. A manifest ends with its own SHA-256, which finds damage; whoever can write there can write both:
`signing.py` is against that.
"""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from trsp_deploy.artifacts import (
    ENGINE_MANIFEST,
    MANIFEST,
    SIGNATURE,
    RunFolder,
    RunLayout,
    RunManifest,
    files_below,
    fingerprint,
    leaves,
)
from trsp_deploy.artifacts.layout import CHECKPOINTS, ENGINES, FAILED_LOGS, LOCK, PLACE, POINTS, WRITING_LOCK
from trsp_deploy.errors import RunError
from trsp_deploy.reading import read_json, read_record
from trsp_deploy.recipe import RelativePath, Strict
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest
from trsp_deploy.tools.runners.inspection import TRTEXEC_ENGINE
from trsp_deploy.tools.runners.manifest import EngineManifest
from trsp_deploy.tools.runners.trt_log import BUILD_LOG

State = Literal["missing", "changed", "unknown", "outside", "unreadable"]
Kind = Literal["run", "sweep", "engine", "repository"]

# What lies beside the artefacts, is written anew by whoever works there, and neither read as data nor run by anybody.
BESIDE: dict[Kind, tuple[str, ...]] = {
    "run": (
        *(LOCK, PLACE, f"{CHECKPOINTS}/*", FAILED_LOGS, f"{ENGINES}/*/*{TRTEXEC_ENGINE}"),
        f"{ENGINES}/*/*/{ENGINE_MANIFEST}{SIGNATURE}",
    ),
    "sweep": (LOCK, PLACE, f"{CHECKPOINTS}/*"),
    "engine": (BUILD_LOG,),
    "repository": (WRITING_LOCK,),
}
UNREADABLE = "damaged, unsafe, or of another version"  # what a manifest is that is no record


class Finding(Strict):
    """Something that is not as the manifest, or a step's record, says."""

    state: State
    path: str  # below the folder
    detail: str

    def __str__(self) -> str:
        """One line; what is no character to be read stands as its escape, for a file's name may hold any."""
        line = f"{self.state}: {self.path}: {self.detail}"
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


class Verification(Strict):
    """What was held against what, and what differs."""

    path: str
    kind: Kind
    against: str  # the manifest's name; of an unfinished run or sweep "records"
    checked: int  # files and folders that have a SHA-256
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing differs."""
        return not self.findings


def verify(path: Path) -> Verification:
    """Compare the folder of a run, a sweep or an engine, or a Triton repository, with its manifest.

    A manifest that cannot be read is the only finding. Raises RunError where there is nothing to compare with.
    """
    return _verified(path, kind_of(path))


def _verified(path: Path, kind: Kind) -> Verification:
    manifest = ENGINE_MANIFEST if kind == "engine" else MANIFEST
    try:
        return _compared(path, kind)
    except RunError as problem:
        said = str(problem).removeprefix(f"{path / manifest}: ")
        finding = Finding(state="unreadable", path=manifest, detail=said)
        return Verification(path=str(path), kind=kind, against=manifest, checked=0, findings=(finding,))


def _compared(path: Path, kind: Kind) -> Verification:
    """Raises RunError where the manifest is no record, or an earlier version's that says too little."""
    if kind == "engine":
        manifest = read_record(path / ENGINE_MANIFEST, EngineManifest, RunError, UNREADABLE)
        if manifest.spec.on_tensorrt and not manifest.beside:
            raise RunError(
                f"{path / ENGINE_MANIFEST}: is an earlier version's, which kept no SHA-256 of the graph; build it again"
            )
        return _held_against(path, "engine", ENGINE_MANIFEST, {**manifest.files, **manifest.beside})
    if kind == "repository":
        repository = read_record(path / MANIFEST, RepositoryManifest, RunError, UNREADABLE)
        files = {f"{model.name}/{file}": sha256 for model in repository.models for file, sha256 in model.files.items()}
        return _held_against(path, "repository", MANIFEST, {**repository.files, **files})
    return _run(path) if kind == "run" else _sweep(path)


def kind_of(path: Path) -> Kind:
    """What a folder is; raises RunError when it is none of the four."""
    run = RunLayout(path)
    is_run = (path / MANIFEST).is_file() or run.is_run or run.is_sweep or run.records.is_dir()
    if (path / ENGINE_MANIFEST).is_file():
        if is_run:  # else whoever adds an engine's manifest to a run has nothing but the engine looked at
            raise RunError(f"{path}: holds an engine's {ENGINE_MANIFEST} and what a run holds; one was put there")
        return "engine"
    if (path / MANIFEST).is_file() and _is_of_models(path):
        return "repository"
    if run.is_sweep:
        return "sweep"
    if is_run:
        return "run"
    there = "is a file" if path.is_file() else "holds no manifest" if path.is_dir() else "is not there"
    raise RunError(
        f"{path}: {there}; give the folder of a run, a sweep or an engine, or a repository of `trsp-deploy triton`"
    )


def _is_of_models(path: Path) -> bool:
    """Whether a manifest is a repository's; of one that is damaged its folder tells."""
    try:
        return "models" in read_json(path / MANIFEST, RunError)
    except RunError:
        return any(path.glob("*/config.pbtxt"))


def manifest_of(path: Path) -> Path:
    """The file that has the SHA-256 of everything in a folder; raises RunError where there is none yet."""
    kind = kind_of(path)
    if kind == "engine":
        return path / ENGINE_MANIFEST
    if not (path / MANIFEST).is_file():
        finishes = f"`trsp-deploy report {path}`" if kind == "run" else "its `trsp-deploy sweep` again"
        raise RunError(f"{path}: has no {MANIFEST} yet; {finishes} finishes the {kind} and writes it")
    return path / MANIFEST


def _run(path: Path) -> Verification:
    if (path / MANIFEST).is_file():
        return _held_against(path, "run", MANIFEST, _files_of_run(path))
    return _unfinished(path, "run")


def _sweep(path: Path) -> Verification:
    """What lies at a sweep's root, and every run within."""
    there = [run.root.name for run in RunLayout(path).runs]
    if (path / MANIFEST).is_file():
        files = _files_of_run(path)
        runs = [name.removesuffix(f"/{MANIFEST}") for name in files if fnmatch.fnmatch(name, f"{POINTS}/{MANIFEST}")]
        others = [name for name in there if name not in runs and not leaves(path, path / name)]
        found = _held_against(path, "sweep", MANIFEST, files, tuple(f"{name}/*" for name in (*runs, *others)))
    else:
        runs, others = there, []
        found = _unfinished(path, "sweep")
    checked, findings = found.checked, [*found.findings, *(_not_of(path, name) for name in others)]
    for name in runs:
        within = path / name
        if leaves(path, within):
            findings.append(_outside(name))
            continue
        one = _verified(within, "run")
        checked += one.checked
        findings += _seen_from_above(name, one.findings)
    return found.model_copy(update={"checked": checked, "findings": _in_order(findings)})


def _not_of(sweep: Path, name: str) -> Finding:
    """A run that a sweep was finished without, as one finding, however many files it has."""
    run = shlex.quote(str(sweep / name))
    detail = (
        f"a run that {MANIFEST} does not name, for it was not finished, or was put there; "
        f"`trsp-deploy report {run}` and the same `trsp-deploy sweep` make it a part, or delete it"
    )
    return Finding(state="unknown", path=name, detail=detail)


def _files_of_run(path: Path) -> dict[RelativePath, str]:
    return read_record(path / MANIFEST, RunManifest, RunError, UNREADABLE).files


def _seen_from_above(name: str, findings: Iterable[Finding]) -> list[Finding]:
    """Findings of a folder within another, with paths below the other."""
    return [finding.model_copy(update={"path": f"{name}/{finding.path}"}) for finding in findings]


def _held_against(
    folder: Path, kind: Kind, manifest: str, files: Mapping[str, str], elsewhere: tuple[str, ...] = ()
) -> Verification:
    """elsewhere: patterns of files that another manifest names."""
    findings = [finding for name, sha256 in sorted(files.items()) if (finding := _differs(folder, name, sha256))]
    beside = (manifest, f"{manifest}{SIGNATURE}", *BESIDE[kind], *elsewhere)
    findings += _unknown(folder, files, beside, manifest)
    return Verification(path=str(folder), kind=kind, against=manifest, checked=len(files), findings=_in_order(findings))


def _unfinished(folder: Path, kind: Kind) -> Verification:
    """What the records of a run's steps say of their outputs, each one fingerprint, and the engines of their files."""
    findings: list[Finding] = []
    outputs: dict[str, str] = {}
    run = RunFolder(folder)
    for step in run.recorded():
        record = run.record(step)
        if record is None:
            findings.append(_unreadable(run.layout.below(run.layout.record(step))))
        else:
            outputs |= record.outputs
    for name, expected in sorted(outputs.items()):
        inside = [file for file in files_below(folder / name) if leaves(folder, file)]
        findings += [_outside(file.relative_to(folder).as_posix()) for file in inside]
        finding = None if inside else _differs(folder, name, expected)
        if finding is not None:
            findings += _files_of_engine(folder, name) or [finding]
    return Verification(
        path=str(folder), kind=kind, against="records", checked=len(outputs), findings=_in_order(findings)
    )


def _files_of_engine(folder: Path, name: str) -> list[Finding]:
    """Which files of an engine differ, where the engine's own manifest can still tell."""
    try:
        if not (folder / name / ENGINE_MANIFEST).is_file():
            return []
        return _seen_from_above(name, verify(folder / name).findings)
    except RunError:
        return []


def _differs(folder: Path, name: str, expected: str) -> Finding | None:
    path = folder / name
    if leaves(folder, path):
        return _outside(name)
    if not path.exists():
        return Finding(state="missing", path=name, detail="it is named and not there")
    found = fingerprint(path)
    if found == expected:
        return None
    return Finding(state="changed", path=name, detail=f"SHA-256 {found[:12]}…, {expected[:12]}… when it was made")


def _unknown(folder: Path, known: Mapping[str, str], beside: tuple[str, ...], manifest: str) -> Iterator[Finding]:
    root = folder.resolve()  # of a link the folder, of which alone there are files
    for file in files_below(root):
        name = file.relative_to(root).as_posix()
        if leaves(root, file):
            if name not in known:  # else it has been said
                yield _outside(name)
        elif name not in known and not any(fnmatch.fnmatch(name, pattern) for pattern in beside):
            yield Finding(state="unknown", path=name, detail=f"{manifest} does not name it")


def _outside(name: str) -> Finding:
    return Finding(state="outside", path=name, detail="a link that leads out of the folder; it was not read")


def _in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: (finding.path, finding.state)))


def _unreadable(name: str) -> Finding:
    detail = "no record of this version, or damaged; the step is done again by the same command"
    return Finding(state="unreadable", path=name, detail=detail)
