"""What is compared with itself: a small engine, and a neighbour to disturb it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from trsp_deploy.artifacts import writing
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import EngineSpec, ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners.manifest import bound_to, check_manifest, read_manifest, spec_sha256
from trsp_deploy.tools.runners.requirements import package_version

HOME = Path("runs/bench-proof")
VOCABULARY = 4096


def small_engine() -> Path:
    """A random Llama of 8 layers on ONNX Runtime, 1 ms a token on 2 cores: short calls, where noise is worst."""
    folder, spec = HOME / "engine", load_engine_spec("ort-cpu-fp32")
    if not fits(folder, spec):
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=2048,
        )
        with quiet_libraries():
            AutoModelForCausalLM.from_config(config).save_pretrained(HOME / "model")
            with writing(HOME / "onnx") as partial:
                export_onnx(HOME / "model", "fp32", ExportSettings(), partial)
            build_engine(HOME / "onnx" / FILE, spec, folder)
    return folder


def fits(folder: Path, spec: EngineSpec) -> bool:
    """Whether an engine is there that would be built alike here and now."""
    try:
        manifest = read_manifest(folder)
        check_manifest(folder, manifest, package_version(spec.backend), bound_to(spec))
    except EngineUnavailable:
        return False
    return manifest.spec_sha256 == spec_sha256(spec)


@contextlib.contextmanager
def background_load() -> Iterator[None]:
    """A neighbour that computes in bursts of up to two seconds, half of the time, on one core."""
    command = [sys.executable, "-m", "benchmarks.proof.neighbour"]
    neighbour = psutil.Process(int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    try:
        yield
    finally:
        neighbour.kill()
