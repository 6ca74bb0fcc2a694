"""Whether a run's engine is still of the model that lies in the run: a stage may have been redone since."""

from __future__ import annotations

from pathlib import Path

from trsp_deploy.artifacts import RunFolder, run_of_engine
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.runners.manifest import EngineManifest, rebuild

MODEL_STEPS = {"dense": "dense", "pruned": "prune"}  # role -> the step that makes the model's folder


def check_of_run(folder: Path, manifest: EngineManifest) -> None:
    """Raise EngineUnavailable for an engine of a run whose model or ONNX file has been made anew since.

    Steps' records are compared, so that nothing large is read; without them, and outside of runs, nothing is known and
    nothing refused. What somebody changed in these folders by hand is the next rerun's matter.
    """
    layout = run_of_engine(folder)
    if layout is None or not layout.is_run:
        return
    run, role = RunFolder(layout.root), folder.resolve().name
    built = run.record(f"build-{manifest.name}-{role}")
    exported = run.record(f"export-{role}-{manifest.spec.graph_precision}")
    made = run.record(MODEL_STEPS.get(role, role))
    for step, name, source in ((exported, "model", made), (built, "onnx", exported)):
        if step is None or source is None or name not in step.inputs:
            continue
        if step.inputs[name] not in source.outputs.values():
            what = ", ".join(source.outputs)
            raise EngineUnavailable(
                f"engine {manifest.name}: is of another {what} than {layout.root} has by now; "
                f"{rebuild(manifest, folder)}"
            )
