"""The served model with TensorRT's and ONNX Runtime's CUDA engines, on a tritonserver of this machine.

TRSP_DEPLOY_TRITON names a virtual environment with nvidia-pytriton and the engine's package; else tritonserver is taken
from the path, as inside Triton's container.
"""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.tiny import english, save_tiny
from tests.triton_server import TritonServer
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.recipe import read_recipe
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import check_can_build, check_can_run, open_engine
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.triton_server.process import find_installation

PROMPTS = [english()[start : start + 30] for start in range(0, 20_000, 1_000)]
NEW_TOKENS = 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("engine", ["ort-cuda-fp16", "tensorrt-fp16", "tensorrt-rtx-fp16"])
def test_served_text_is_the_engines(engine: str, tmp_path: Path) -> None:
    spec = load_engine_spec(engine)
    try:
        check_can_build(spec)
        check_can_run(spec)
        installation = find_installation()
    except (EngineUnavailable, RunError) as reason:
        pytest.skip(str(reason))
    run = small_run(engine, tmp_path)
    folder = run / "engines" / engine / "pruned"
    repository = tmp_path / "repository"
    write_repository({"pruned": folder}, run / "pruned", {"pruned": "pruned"}, repository, 4, 64)
    tokenizer = Tokenizer.from_file(str(run / "pruned" / "tokenizer.json"))
    with open_engine(folder) as runner:
        ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        wanted = [
            tokenizer.decode(generate(runner, [each], Sampling(max_new_tokens=NEW_TOKENS))[0].tokens) for each in ids
        ]
    with TritonServer(repository, installation=installation) as server:

        def ask(prompt: str) -> str:
            answer = server.generate("pruned", text_input=prompt, max_tokens=NEW_TOKENS, ignore_eos=True)
            return str(answer.get("text_output", answer))

        assert [ask(prompt) for prompt in PROMPTS] == wanted
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, PROMPTS)) == wanted


def small_run(engine: str, folder: Path) -> Path:
    """A tiny model, pruned without training, and its engines."""
    model = save_tiny("llama", folder / "model", hidden_size=256, intermediate_size=512)
    (folder / "text.txt").write_text(english()[:60_000])
    values = {
        "model": str(model),
        "drop": "2",
        "calibration": {
            "texts": str(folder / "text.txt"),
            "context_length": 32,
            "max_windows": 4,
            "validation_windows": 1,
        },
        "plan": {"method": "shortgpt"},
        "transfer": {"form": "none"},
        "engines": [engine],
    }
    with RunFolder(folder / "run") as run:
        job = Pipeline(run, read_recipe(values, "test"), None, lambda line: None)
        job.pruning.prune()
        job.engines.build()
    return folder / "run"
