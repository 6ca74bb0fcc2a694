"""A Triton model of one step, for callers with a decode loop of their own: the bare engine in a stock backend.

The server keeps the sequence's state (tools/graphs/step.py); tokens go in and logits come out.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from trsp_deploy.artifacts import link_tree
from trsp_deploy.errors import RunError
from trsp_deploy.results import Role
from trsp_deploy.tools.graphs.nodes import NoMatch
from trsp_deploy.tools.graphs.step import keep_state
from trsp_deploy.tools.model_repository.config import STEPS, parse_config, step_config
from trsp_deploy.tools.model_repository.manifest import ServedModel, fingerprints_below
from trsp_deploy.tools.runners import device_of, read_manifest

BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda")
GRAPH = "model.onnx"  # what Triton's onnxruntime backend opens


def check_can_step(engine: Path) -> None:
    """Raise RunError for an engine that no stock backend can run step by step."""
    spec = read_manifest(engine).spec
    if spec.backend not in BACKENDS:
        raise RunError(
            f"--step: engine '{spec.name}' is of {spec.backend}: its cache is one memory for input and output, or"
            " grows, and Triton's stock backend copies state between buffers of its own;"
            f" valid: an engine of {' or '.join(BACKENDS)}"
        )


def is_step_model(folder: Path) -> bool:
    """Whether a folder is a step model that this version or an older one has written."""
    config = folder / "config.pbtxt"
    try:
        return config.is_file() and STEPS.encode() in config.read_bytes()
    except OSError:
        return False


def write_step_model(engine: Path, role: Role, name: str, folder: Path, max_length: int, max_batch: int) -> ServedModel:
    """Write the model `name` into `folder` and return its record. The engine's weights are hard links.

    max_length: tokens of a sequence at most. max_batch: sequences that the server keeps at once.
    Raises RunError where the engine cannot be a step.
    """
    check_can_step(engine)
    manifest = read_manifest(engine)
    version = folder / "1"
    version.mkdir(parents=True)
    model = ir.load(engine / manifest.file)
    try:
        states = keep_state(model, max_length)
    except NoMatch as problem:
        raise RunError(f"--step: engine '{manifest.spec.name}' cannot be a step: {problem}") from problem
    ir.save(model, version / GRAPH)  # names the weights' file and does not copy it
    for file in manifest.files:
        if file != manifest.file:
            link_tree(engine / file, version / file)
    dtype, shape = manifest.outputs["logits"]
    kind = "KIND_CPU" if device_of(manifest.spec) == "cpu" else "KIND_GPU"
    config = step_config(name, kind, (dtype, int(shape[-1])), states, max_batch, manifest.spec.threads)
    parse_config(config, f"{name}/config.pbtxt")
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    (folder / "configs").mkdir()
    on_cpu = step_config(name, "KIND_CPU", (dtype, int(shape[-1])), states, max_batch, manifest.spec.threads)
    (folder / "configs" / "cpu.pbtxt").write_text(on_cpu, encoding="utf-8")
    return ServedModel(
        name=name,
        role=role,
        engine=manifest.spec.name,
        backend=manifest.spec.backend,
        backend_version=manifest.backend_version,
        precision=manifest.spec.precision,
        packages=(),
        bound=manifest.bound,
        serves="steps",
        max_batch=max_batch,
        max_length=max_length,
        state_bytes=sum(state.size_bytes for state in states),  # of one sequence
        files=fingerprints_below(folder),
    )
