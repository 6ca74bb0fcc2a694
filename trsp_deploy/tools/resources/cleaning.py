"""Free the disk of what a run can make again: `trsp-deploy clean`.

    with RunFolder(Path("runs/smollm2-135m-drop8")) as run:
        clean(run, plan_cleaning(run, keep=("engines", "reports")))

Only the parts of CLEANABLE and leftovers are ever removed, and of a link the link alone; the recipe, the plan and the
records of the steps always stay, so the next run knows what is missing and makes that again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from trsp_deploy.artifacts import MANIFEST, RunFolder, RunManifest, files_below, leaves, storage_errors, write_json
from trsp_deploy.artifacts.layout import CHECKPOINTS, ENGINES, FAILED_LOGS, PARTS, RunLayout, check_is_run
from trsp_deploy.errors import RunError, nearest
from trsp_deploy.recipe import Strict

CLEANABLE = {part.name: part.paths for part in PARTS if part.cleanable}  # `--keep` names them, or `engines/NAME`
LEFTOVERS = (
    CHECKPOINTS,
    *(f"{place}.*.{state}" for place in ("", "*/", f"{ENGINES}/*/") for state in ("partial", "former")),  # of a kill
    FAILED_LOGS,
)


class Removal(Strict):
    """One file or folder that goes."""

    path: str  # below the run folder
    size_bytes: int
    freed_bytes: int  # less where the blocks have another name outside, such as the dense model's in its own folder


class Cleaning(Strict):
    """What goes, and what the next run makes again for it."""

    run: str
    removals: tuple[Removal, ...]
    freed_bytes: int
    redone: tuple[str, ...]  # steps

    @property
    def paths(self) -> tuple[str, ...]:
        """Below the run folder."""
        return tuple(removal.path for removal in self.removals)


def plan_cleaning(run: RunFolder, keep: Sequence[str] | None) -> Cleaning:
    """What `clean` would remove: every part that `keep` does not name, and leftovers; of None leftovers alone.

    Raises RunError for a folder that is no run, and for a part that there is not.
    """
    check_run(run.path)
    found = sorted(set(_leftovers(run.path)) | set(_parts(run.path, keep)))
    names = [run.layout.below(path) for path in found]
    removals = [
        Removal(path=name, size_bytes=_size(path), freed_bytes=freed_bytes([path]))
        for name, path in zip(names, found, strict=True)
    ]
    return Cleaning(
        run=str(run.path),
        removals=tuple(removals),
        freed_bytes=freed_bytes(found),  # two names of one file may both go
        redone=tuple(step for step in run.recorded() if _loses(run, step, names)),
    )


def check_run(folder: Path) -> None:
    """Raise RunError for a folder that is no run and no sweep."""
    if not RunLayout(folder).is_sweep:
        check_is_run(folder, "nothing is removed")


def clean(run: RunFolder, plan: Cleaning) -> None:
    """Remove what the plan names; the run's manifest then names what is left."""
    _shorten_manifest(run, plan.paths)
    with storage_errors(run.path):
        for name in plan.paths:
            path = run.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        engines = run.layout.engines
        for folder in [] if engines.is_symlink() else [*engines.glob("*"), engines]:
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()


def _parts(run: Path, keep: Sequence[str] | None) -> Iterator[Path]:
    if keep is None:
        return
    built = RunLayout(run).engines
    engines = {name for part in keep if (name := part.removeprefix(f"{ENGINES}/")) != part}
    valid = [*CLEANABLE, *(f"{ENGINES}/{path.name}" for path in sorted(built.glob("*")) if path.is_dir())]
    for part in keep:
        if part not in valid:
            raise RunError(f"--keep {part}: no such part{nearest(part, valid)}; this run has {', '.join(valid)}")
    for part, names in CLEANABLE.items():
        paths = [run / name for name in names if (run / name).exists() or (run / name).is_symlink()]
        if part in keep:
            continue
        if part == ENGINES and engines:
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


def _shorten_manifest(run: RunFolder, gone: Sequence[str]) -> None:
    path = run.path / MANIFEST
    if not path.is_file():
        return
    try:
        manifest = RunManifest.model_validate_json(path.read_bytes())
    except ValidationError:
        return  # `verify` says so
    kept = {
        name: sha256
        for name, sha256 in manifest.files.items()
        if not any(name == each or name.startswith(f"{each}/") for each in gone)
    }
    if kept != manifest.files:
        run.outdate_manifest()
        write_json(path, manifest.model_copy(update={"files": kept}))
