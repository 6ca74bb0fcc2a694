"""Whether an engine is still of what it was built from: a stage may have been redone, a file changed."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.artifacts import RunFolder, RunLayout, fingerprint, run_of_engine, steps
from trsp_deploy.errors import EngineSpecError, EngineUnavailable
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners.manifest import EngineManifest, rebuild


def check_fresh(folder: Path, manifest: EngineManifest) -> None:
    """Raise EngineUnavailable for an engine of another model, graph or spec than lies where it was built from.

    What lies there no more is not known, and refuses nothing.
    """
    layout = run_of_engine(folder)
    if layout is not None and layout.is_run:
        _check_of_run(folder, manifest, layout)
        return
    _check_graph(folder, manifest)
    _check_spec(folder, manifest)


def _check_of_run(folder: Path, manifest: EngineManifest, layout: RunLayout) -> None:
    """Steps' records are compared, so that nothing large is read; what somebody changed in the run's folders by hand
    is the next rerun's matter."""
    run, role = RunFolder(layout.root), folder.resolve().name
    built = run.record(steps.build(manifest.name, role))
    if built is not None and built.result.get("files", manifest.files) != manifest.files:
        raise EngineUnavailable(
            f"engine {manifest.name}: {folder} is not what {layout.root} built; {rebuild(manifest, folder)}"
        )
    exported = run.record(steps.export(role, manifest.spec.graph_precision))
    made = run.record(steps.model(role))
    for step, name, source in ((exported, "model", made), (built, "onnx", exported)):
        if step is None or source is None or name not in step.inputs:
            continue
        if step.inputs[name] not in source.outputs.values():
            what = ", ".join(source.outputs)
            raise EngineUnavailable(
                f"engine {manifest.name}: is of another {what} than {layout.root} has by now; "
                f"{rebuild(manifest, folder)}"
            )


def _check_graph(folder: Path, manifest: EngineManifest) -> None:
    """A file of the size and time that it had is taken to be the same: others are read, however large."""
    if manifest.source is None or not (graph := folder.resolve() / manifest.source).is_file():
        return
    for name, built in manifest.source_files.items():
        path = graph.parent / name
        if not path.is_file():
            continue
        there = path.stat()
        if (there.st_size, there.st_mtime_ns) == (built.size_bytes, built.mtime_ns):
            continue
        found = fingerprint(path)
        if found != built.sha256:
            raise EngineUnavailable(
                f"engine {manifest.name}: {path.resolve()} has SHA-256 {found[:12]}… by now, the engine was built from "
                f"{built.sha256[:12]}…; {rebuild(manifest, folder)}"
            )


def _check_spec(folder: Path, manifest: EngineManifest) -> None:
    if manifest.spec_file is None or not (path := (folder.resolve() / manifest.spec_file).resolve()).is_file():
        return
    try:
        there = load_engine_spec(str(path)).settings
    except EngineSpecError as problem:
        raise EngineUnavailable(f"engine {manifest.name}: its spec has changed: {problem}") from problem
    changed = [name for name, value in manifest.spec.settings.items() if there[name] != value]
    if changed:
        raise EngineUnavailable(
            f"engine {manifest.name}: {path} has another {', '.join(changed)} by now than it was built with; "
            f"{rebuild(manifest, folder)}"
        )
