"""Free the disk of what a run, or each run of a sweep, can make again: `trsp-deploy clean`.

    with held(Path("runs/smollm2-135m-drop8")) as runs:
        clean(runs, plan_cleaning(runs, keep=("engines", "reports")))

Only the parts of CLEANABLE and leftovers are ever removed, and of a link the link alone; recipe, plan, texts and the
records of the steps always stay, so the next run knows what is missing and makes that again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from trsp_deploy.artifacts import (
    MANIFEST,
    SIGNATURE,
    RunFolder,
    RunManifest,
    files_below,
    fingerprint,
    leaves,
    storage_errors,
    write_json,
)
from trsp_deploy.artifacts.layout import CHECKPOINTS, ENGINES, FAILED_LOGS, PARTS, RunLayout, check_is_run
from trsp_deploy.artifacts.storage import remove
from trsp_deploy.errors import RunError, nearest
from trsp_deploy.recipe import Strict

CLEANABLE = {part.name: part.paths for part in PARTS if part.cleanable}  # `--keep` names them, or `engines/NAME`
_PLACES = ("", "*/", f"{ENGINES}/*/", f"{CHECKPOINTS}/*/")
LEFTOVERS = (*(f"{place}.*.{state}" for place in _PLACES for state in ("partial", "former")), FAILED_LOGS)  # of a kill
Runs = Sequence[RunFolder]  # a run alone, or a sweep and the runs within; all of them locked


class Removal(Strict):
    """One file or folder that goes."""

    path: str  # below the folder of the run or sweep
    size_bytes: int
    freed_bytes: int  # less where the blocks have another name outside, such as the dense model's in its own folder


class Cleaning(Strict):
    """What goes, and what the next run makes again for it."""

    run: str
    removals: tuple[Removal, ...]
    freed_bytes: int
    redone: tuple[str, ...]  # steps; of a sweep's runs with the run's name before it

    @property
    def paths(self) -> tuple[str, ...]:
        """Below the folder of the run or sweep."""
        return tuple(removal.path for removal in self.removals)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Runs]:
    """A run, or a sweep and then every run that lies in it, each locked meanwhile.

    Raises RunError for a folder that is neither, before a lock is left in it.
    """
    if not RunLayout(folder).is_sweep:
        check_is_run(folder, "nothing is removed")
    if not RunLayout(folder).is_begun:
        raise RunError(f"{folder}: no command of trsp-deploy has worked in it; nothing is removed")
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(RunFolder(folder))
        within = [run.root for run in root.layout.runs if run.is_begun and not leaves(folder, run.root)]
        yield (root, *(stack.enter_context(RunFolder(path)) for path in within))


def plan_cleaning(runs: Runs, keep: Sequence[str] | None) -> Cleaning:
    """What `clean` would remove: every part that `keep` does not name, and leftovers; of None leftovers alone.

    Raises RunError for a part that none of them has.
    """
    root = runs[0]
    _check_parts(runs, keep)
    found = sorted({path for run in runs for path in (*_leftovers(run.path), *_parts(run.path, keep))})
    removals = [
        Removal(path=root.layout.below(path), size_bytes=_size(path), freed_bytes=freed_bytes([path])) for path in found
    ]
    return Cleaning(
        run=str(root.path),
        removals=tuple(removals),
        freed_bytes=freed_bytes(found),  # two names of one file may both go
        redone=tuple(
            step if run is root else f"{root.layout.below(run.path)}/{step}"
            for run in runs
            for step in run.recorded()
            if _loses(run, step, _below(run, found))
        ),
    )


def clean(runs: Runs, plan: Cleaning) -> None:
    """Remove what the plan names; the manifests then name what is left, and have to be signed again."""
    root = runs[0]
    paths = [root.path / name for name in plan.paths]
    _shorten_manifests(runs, paths)
    with storage_errors(root.path):
        for path in paths:
            remove(path)
        for engines in [run.layout.engines for run in runs]:
            for folder in [] if engines.is_symlink() else [*engines.glob("*"), engines]:
                if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                    folder.rmdir()


def _below(run: RunFolder, paths: Iterable[Path]) -> list[str]:
    """Those of the paths that lie in the run's folder, as its records and manifest name them."""
    return [run.layout.below(path) for path in paths if path.is_relative_to(run.path)]


def _check_parts(runs: Runs, keep: Sequence[str] | None) -> None:
    built = sorted({path.name for run in runs for path in run.layout.engines.glob("*") if path.is_dir()})
    valid = [*CLEANABLE, *(f"{ENGINES}/{name}" for name in built)]
    for part in keep or ():
        if part not in valid:
            raise RunError(f"--keep {part}: no such part{nearest(part, valid)}; this run has {', '.join(valid)}")


def _parts(run: Path, keep: Sequence[str] | None) -> Iterator[Path]:
    if keep is None:
        return
    built = RunLayout(run).engines
    engines = {name for part in keep if (name := part.removeprefix(f"{ENGINES}/")) != part}
    for part, names in CLEANABLE.items():
        paths = [run / name for name in names if (run / name).exists() or (run / name).is_symlink()]
        if part in keep:
            continue
        if part == ENGINES and engines and paths:
            paths = [path for path in built.iterdir() if path.name not in engines]
        yield from (path for path in paths if not leaves(run, path.parent))


def _leftovers(run: Path) -> Iterator[Path]:
    for pattern in LEFTOVERS:
        for path in run.glob(pattern):
            if not leaves(run, path.parent):
                yield path


def _loses(run: RunFolder, step: str, names: Iterable[str]) -> bool:
    record = run.record(step)
    outputs = () if record is None else record.outputs
    return any(output == name or output.startswith(f"{name}/") for output in outputs for name in names)


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in files_below(path))


def freed_bytes(paths: Sequence[Path]) -> int:
    """Bytes of files that lose their last name."""
    seen: dict[tuple[int, int], list[int]] = {}
    for file in {file for path in paths for file in files_below(path)}:
        stat = file.lstat()
        seen.setdefault((stat.st_dev, stat.st_ino), [0, stat.st_nlink, stat.st_size])[0] += 1
    return sum(size for names, links, size in seen.values() if names == links)


def _shorten_manifests(runs: Runs, gone: Sequence[Path]) -> None:
    """Take what goes out of every manifest; what was no longer as a manifest says stays a difference from it."""
    root = runs[0]
    # Read before a run's is another, which outdates its sweep's.
    manifests = [(run, _manifest(run)) for run in runs]
    within = {root.layout.below(path): path for run in runs[1:] if (path := run.path / MANIFEST).is_file()}
    before = {name: fingerprint(path) for name, path in within.items()}
    for run, manifest in reversed(manifests):  # a sweep's last, for it names those of its runs
        if manifest is None:
            continue
        names = _below(run, gone)
        files = {
            name: fingerprint(within[name]) if run is root and before.get(name) == sha256 else sha256
            for name, sha256 in manifest.files.items()
            if not any(name == each or name.startswith(f"{each}/") for each in names)
        }
        if files != manifest.files:
            run.outdate_manifest()
            (run.path / f"{MANIFEST}{SIGNATURE}").unlink(missing_ok=True)  # of the manifest that is gone
            write_json(run.path / MANIFEST, manifest.model_copy(update={"files": files}))


def _manifest(run: RunFolder) -> RunManifest | None:
    try:
        return RunManifest.model_validate_json((run.path / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None  # of one that cannot be read `verify` says so
