"""A finished run or sweep of small made-up files, for what works on their files and never looks into them.

run = made_run(tmp_path / "run")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trsp_deploy.artifacts import RunFolder, fingerprint, provenance, write_json
from trsp_deploy.recipe import EngineSpec, Strict
from trsp_deploy.tools.graphs.decoder_io import Bindings
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel
from trsp_deploy.tools.runners.manifest import EngineManifest, spec_sha256

SPEC = EngineSpec(name="ort-cpu-fp32", description="", backend="onnxruntime-cpu", precision="fp32")
# Of an engine: keys and values of one layer.
CACHE: Bindings = {f"past_key_values.0.{kind}": ("float32", ("batch", 2, "past", 16)) for kind in ("key", "value")}
# Step -> its output.
OUTPUTS = {
    "dense": "dense",
    "prune": "pruned",
    "export-dense-fp32": "onnx/dense-fp32",
    "export-pruned-fp32": "onnx/pruned-fp32",
    "build-ort-cpu-fp32-dense": "engines/ort-cpu-fp32/dense",
    "build-ort-cpu-fp32-pruned": "engines/ort-cpu-fp32/pruned",
}


class Nothing(Strict):
    """A result."""


def made_run(folder: Path, finished: bool = True) -> Path:
    """Write a run with a step for each of OUTPUTS, `plan.json` and reports; its manifest too where it is finished."""
    with RunFolder(folder) as run:
        (folder / "recipe.yaml").write_text("model: tiny\n")
        run.step("plan", lambda: _write(folder / "plan.json"), Nothing, settings={}, inputs={}, outputs=["plan.json"])
        for step, output in OUTPUTS.items():
            run.step(step, _maker(folder / output), Nothing, settings={}, inputs={}, outputs=[output])
        run.step("evaluate-own-dense", Nothing, Nothing, settings={}, inputs={})
        if finished:
            for name in ("report.json", "report.md", "report.html"):
                _write(folder / name)
            run.write_manifest()
    return folder


def made_sweep(folder: Path, finished: bool = True) -> Path:
    """Write a sweep of two cuts, drop-4 and drop-10; its own manifest too where it is finished."""
    with RunFolder(folder) as sweep:
        (folder / "recipe.yaml").write_text("model: tiny\n")
        for step in ("dense", "plans"):
            make = _maker(folder / step)
            sweep.step(step, make, Nothing, settings={}, inputs={}, outputs=[step])
        for count in (10, 4):
            made_run(folder / f"drop-{count}")
        for name in ("sweep.json", "sweep.html"):
            _write(folder / name)
        if finished:
            sweep.write_manifest()
    return folder


def _maker(folder: Path) -> Callable[[], Nothing]:
    def make() -> Nothing:
        if "engines" in folder.parts:
            return _write_engine(folder)
        file = "model.onnx" if "onnx" in folder.parts else "model.safetensors"
        return _write(folder / file, f"{folder} " * 100)

    return make


def _write(path: Path, text: str = "{}") -> Nothing:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Nothing()


def _write_engine(folder: Path) -> Nothing:
    for file in ("model.onnx", "model.onnx.data"):
        _write(folder / file, f"{folder.name} {file} " * 50)
    files = {file: fingerprint(folder / file) for file in ("model.onnx", "model.onnx.data")}
    manifest = EngineManifest(
        name=SPEC.name,
        spec=SPEC,
        onnx_sha256="0",
        spec_sha256=spec_sha256(SPEC),
        backend_version="1",
        file="model.onnx",
        files=files,
        size_bytes=1,
        build_s=1.0,
        built_on=provenance(),
        inputs=CACHE,
        outputs={},
    )
    write_json(folder / "manifest.json", manifest)
    return Nothing()


def served_repository() -> dict[str, Any]:
    """A repository's manifest, as a `triton` writes it."""
    model = ServedModel(
        name="m",
        role="pruned",
        engine="ort-cpu-fp32",
        backend="onnxruntime-cpu",
        backend_version="1",
        precision="fp32",
        packages=("onnxruntime==1",),
        max_batch=1,
        max_length=8,
        files={"1/model.py": "0" * 64},
    )
    return RepositoryManifest(
        models=(model,), packages=model.packages, gpu=None, container="c", provenance=provenance()
    ).model_dump(mode="json")
