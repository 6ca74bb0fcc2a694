"""What is measured: models, their graphs and engines, made once in runs/bench-engines and kept."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.code import code_digest
from trsp_deploy.artifacts import provenance, writing
from trsp_deploy.decoder import decoder_layers, load_model, load_tokenizer, remove_layers
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners.calibration import INT4_TEXTS
from trsp_deploy.tools.sources.models import resolve_model
from trsp_deploy.tools.sources.texts import load_texts, tokenize_windows

HOME = Path("runs/bench-engines")
DROPPED = tuple(range(12, 19))  # 7 of SmolLM2-135M's 30 layers; speed does not depend on which
PEERS = Path(__file__).with_name("peers.py")
EXPORT = ("stages/export.py", "decoder/__init__.py")  # where the code of a graph begins, below trsp_deploy/
PEER_PACKAGES = ("onnxruntime-genai", "onnxruntime", "llama-cpp-python", "transformers")
BUILD = ("stages/build.py", "tools/sources/texts.py")  # and that of an engine


def once(name: str, make: Callable[[Path], object], made_by: str = "") -> Path:
    """The file or folder HOME/name, made when it is not there; made_by: what else decides what is in it."""
    path = HOME / (f"{name}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}" if made_by else name)
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as partial, quiet_libraries():
            make(partial)
    return path


def model(name: str) -> Path:
    """Hugging Face folder of `dense` (SmolLM2-135M), `pruned` (7 layers fewer), or random `opt-125m` or `gpt2`."""
    if name == "dense":
        return Path(resolve_model("smollm2-135m", lambda _: None).path)
    return once(f"models/{name}", {"pruned": _prune, "opt-125m": _random_opt, "gpt2": _random_gpt2}[name])


def _prune(out: Path) -> None:
    pruned = load_model(model("dense"))
    remove_layers(pruned, DROPPED)
    assert len(decoder_layers(pruned)) == 30 - len(DROPPED)
    pruned.save_pretrained(out)


def _random_opt(out: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    OPTForCausalLM(OPTConfig()).save_pretrained(out)  # the config's defaults are OPT-125M


def _random_gpt2(out: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config()).save_pretrained(out)


def onnx(name: str) -> Path:
    """Folder of a model's ONNX graph as Optimum exports it, slimmed."""
    return once(f"onnx/{name}", lambda out: export_onnx(model(name), "fp32", ExportSettings(), out), _exporter())


def _exporter() -> str:
    packages = provenance().packages
    return f"{code_digest(*EXPORT)} {[packages.get(name) for name in ('torch', 'transformers', 'optimum-onnx')]}"


def engine(name: str, kind: str) -> Path:
    """Folder of a model's ONNX Runtime engine; kind: of the spec `ort-cpu-KIND`."""
    spec = load_engine_spec(f"ort-cpu-{kind}")
    text = calibration() if name in ("dense", "pruned") else None
    # Of other code, of another spec or for another ONNX Runtime it is another engine.
    made_by = f"{_exporter()} {code_digest(*BUILD)} {spec.model_dump_json()} {provenance().packages['onnxruntime']}"
    return once(f"engines/{name}-{kind}", lambda out: build_engine(onnx(name) / FILE, spec, out, text), made_by)


def genai(name: str, precision: str, python: Path) -> Path:
    """Folder of a model as onnxruntime-genai's builder makes it; raises EngineUnavailable when it does not."""

    def make(out: Path) -> None:
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        command = [*builder, "-m", str(model(name)), "-i", str(model(name)), "-o", str(out), "-c", str(HOME / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"]
            raise EngineUnavailable(f"onnxruntime-genai's builder: {said[-1]}")

    if shutil.which(python) is None:
        raise EngineUnavailable(f"onnxruntime-genai is not installed in {python.parent.parent}")
    return once(f"genai/{name}-{precision}", make, str(peer_versions(python)))


@functools.cache
def peer_versions(python: Path) -> dict[str, str]:
    """Versions of the other engines in their environment; empty where there is none."""
    code = (
        "import importlib.metadata as m, json; "
        f"there = {{d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}}; "
        f"print(json.dumps({{n: there[n] for n in {list(PEER_PACKAGES)} if n in there}}))"
    )
    if shutil.which(python) is None:
        return {}
    versions: dict[str, str] = json.loads(
        subprocess.run([str(python), "-c", code], capture_output=True, check=True).stdout
    )
    return versions


def calibration() -> np.ndarray:
    """Tokens (8, 512) of exl-wiki: what is judged on wiki-demo is not tuned to it."""
    return windows(512, INT4_TEXTS, "exl-wiki")


def windows(tokens: int, count: int, name: str = "wiki-demo") -> np.ndarray:
    """(count, tokens) of a text."""
    found = tokenize_windows(load_texts(name, "evaluation"), load_tokenizer(model("dense")), tokens, count, name)
    array: np.ndarray = found.numpy()
    return array
