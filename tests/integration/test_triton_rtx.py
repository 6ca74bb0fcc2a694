"""The model repository of a TensorRT-RTX engine, which is built without a GPU and served where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.breadth import BREADTH
from tests.command import trsp_deploy
from tests.exported import Made, onnx_of
from tests.tiny import tiny_tokenizer
from trsp_deploy.artifacts import RUN_MARK
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.model_repository.config import SCHEMA, parse_config
from trsp_deploy.tools.model_repository.lint import config_alone, lint, own_engine
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.runners.requirements import CudaDevice
from trsp_deploy.tools.sources.packaged import find_asset

pytestmark = [
    BREADTH,
    pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}"),
]
ENGINE = "tensorrt-rtx-fp16"
GPUS = ("sm86", "sm89")


@pytest.fixture(scope="module")
def repository(exported: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    run = tmp_path_factory.mktemp("rtx") / "run"
    source = exported("llama-wide", "fp16")
    shutil.copytree(source / "model", run / "pruned")
    tiny_tokenizer().save_pretrained(run / "pruned")
    (run / RUN_MARK).touch()
    spec = load_engine_spec(ENGINE).model_copy(update={"compute_capabilities": GPUS})
    (run / "engines" / ENGINE).mkdir(parents=True)
    build_engine(onnx_of(source, "fp16"), spec, run / "engines" / ENGINE / "pruned")
    done = trsp_deploy("triton", "run", "--engine", ENGINE, "--name", "m", "--out", "repository", cwd=run.parent)
    assert done.code == 0, done.said
    return run.parent / "repository"


def test_it_says_what_a_server_needs(repository: Path) -> None:
    import tensorrt_rtx

    (group,) = parse_config((repository / "m" / "config.pbtxt").read_text(), "m").instance_group
    assert group.Kind.Name(group.kind) == "KIND_GPU" and list(group.gpus) == [0]
    manifest = read_repository(repository)
    (model,) = manifest.models
    assert (model.backend, model.compute_capabilities, model.max_batch) == ("tensorrt-rtx", GPUS, 1)
    assert manifest.packages[0] == f"tensorrt-rtx=={tensorrt_rtx.__version__}" and "torch" in manifest.packages
    page = (repository / "README.md").read_text()
    assert "runs on GPUs of compute capability sm86, sm89 alone" in page and "docker run --rm --gpus 1 " in page
    assert all(f"'{package}'" in (repository / "Dockerfile").read_text() for package in manifest.packages)


@pytest.mark.parametrize(
    ("gpu", "line"),
    [
        (None, "warning: m: KIND_GPU does not load here (no CUDA device)"),
        ("sm89", ""),
        ("sm120", "error: m: the engine was built for GPUs of compute capability sm86, sm89, here is sm120"),
    ],
)
def test_the_linter_holds_it_against_the_gpu(
    gpu: str | None, line: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> list[CudaDevice]:
        if gpu is None:
            raise EngineUnavailable("no CUDA device")
        return [CudaDevice("a GPU", gpu, 2**30)]

    for part in (config_alone, own_engine):
        monkeypatch.setattr(part, "cuda_devices", devices)
    assert "\n".join(map(str, lint(repository))) == line


def test_its_runner_comes_along(repository: Path) -> None:
    """What the server imports is all in the repository."""
    vendored = repository / "m" / "1" / "vendor"
    program = f"""
import sys
sys.path.insert(0, {str(vendored)!r})
import trsp_deploy.tools.runners.trt
from pathlib import Path
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.tools.serving.engine import open_batch
try:
    with open_batch(Path({str(repository / "m/1/engine")!r}), 1, 32) as batch:
        assert not batch.full
except EngineUnavailable as problem:
    assert "no CUDA device" in str(problem) or "built for GPUs" in str(problem), problem
ours = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "trsp_deploy"]
print(len(ours) > 10 and all(Path(file).is_relative_to({str(vendored)!r}) for file in ours))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
