"""Which folder of a user's an engine that is built alone may replace: a new or empty one, or an engine's own."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.artifacts import ENGINE_MANIFEST, files_below
from trsp_deploy.artifacts.fingerprints import SIGNED
from trsp_deploy.artifacts.layout import run_that_owns
from trsp_deploy.errors import RecipeError
from trsp_deploy.reading import read_json
from trsp_deploy.tools.runners.trt_log import BUILD_LOG


def check_engine_folder(out: Path) -> None:
    """Raise RecipeError for a folder that an engine would replace, and that is none."""
    run = run_that_owns(out)
    if run is not None:
        raise RecipeError(f"--out {out}: is of the run {run.root}, whose engines `build RUN` makes; name another one")
    if Path.cwd().is_relative_to(out.resolve()):
        raise RecipeError(f"--out {out}: is the folder that this runs in, or one around it; name a new one")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out}: is a file, and an engine is a folder; name a new one")
    if out.is_dir() and any(out.iterdir()) and not _of_the_build(out):
        raise RecipeError(f"--out {out}: holds other things than an engine; name a new folder, or an engine's")


def check_nothing_else(folder: Path) -> None:
    """Raise RecipeError where an engine's folder, which is about to be replaced, holds what no build has put there."""
    own = _of_the_build(folder)
    names = (file.relative_to(folder).as_posix() for file in files_below(folder))
    other = next((name for name in names if name not in own), None)
    if other is not None:
        raise RecipeError(f"--out {folder}: is replaced by the new engine, and {other} in it is yours: move that away")


def _of_the_build(folder: Path) -> set[str]:
    """What a build has put into an engine's folder, as its manifest names it; nothing where it has no engine's.

    By the manifest as it is written: another version's, or one that was edited, is no record, and names its files too.
    """
    try:
        manifest = read_json(folder / ENGINE_MANIFEST, RecipeError)
    except RecipeError:
        return set()
    files, beside = manifest.get("files"), manifest.get("beside", {})
    if not (isinstance(manifest.get("spec"), dict) and isinstance(files, dict) and isinstance(beside, dict)):
        return set()
    return {*files, *beside, ENGINE_MANIFEST, SIGNED, BUILD_LOG}
