"""A small engine that texts are served from, once for each module, and its tokenizer.

Fixtures `served_engine` (a folder; of two families) and `served_tokenizer`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.tiny import save_tiny, tiny_tokenizer
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.serving.engine import open_batch

MAX_LENGTH = 200
# Of heads of 16, which the fused node takes.
FAMILIES = {"llama": {"hidden_size": 64}, "opt": {"hidden_size": 64, "word_embed_proj_dim": 64}}


@pytest.fixture(scope="module", params=FAMILIES)
def served_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "model", **FAMILIES[request.param])
    (folder / "onnx").mkdir()
    export_onnx(model, "fp32", ExportSettings(), folder / "onnx")
    build_engine(folder / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="module")
def served_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def opened(engine: Path, max_batch: int, max_length: int):  # type: ignore[no-untyped-def]
    return open_batch(engine, max_batch, max_length, engine_rotations(engine / "model.onnx"))


def alone(engine: Path, prompt: list[int], count: int) -> list[int]:
    with open_engine(engine) as runner:
        return generate(runner, [prompt], Sampling(max_new_tokens=count))[0].tokens
