"""A real model on a real tritonserver: its greedy text is PyTorch's, alone, together, and beside clients who leave.

The demo's run where it is there (`make triton-demo`); else SmolLM2-135M without 8 of its layers, not trained. Minutes
on two cores: `make test-triton` leaves it out, `make test-slow` runs it.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.tiny import english
from tests.triton_server import TritonServer, client, why_not
from trsp_deploy.artifacts import RunFolder
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.recipe import Recipe
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.model_repository.config import SCHEMA
from trsp_deploy.tools.sources.packaged import find_asset

MODEL, ENGINE = "smollm2-135m", "ort-cpu-fp32"
DEMO = Path("runs/smollm2-135m-drop8")
PROMPTS = [english()[start : start + 40 + start // 100] for start in range(0, 20_000, 1_000)]  # 40 to 230 characters
SHORT, LONG = 24, 120  # new tokens
LONG_ONES = 4  # prompts
TIE = 1e-2  # between the two best logits: the graph adds up in another order than PyTorch


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}"),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.skipif(find_asset(MODEL) is None, reason=f"needs: trsp-deploy fetch {MODEL}"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (DEMO / "engines" / ENGINE / "pruned").is_dir():
        return DEMO
    folder = tmp_path_factory.mktemp("real")
    (folder / "text.txt").write_text(english()[:60_000])
    texts = {"texts": str(folder / "text.txt"), "context_length": 128, "max_windows": 4, "validation_windows": 1}
    values = {"model": MODEL, "drop": "8", "calibration": texts, "engines": [ENGINE]}
    values |= {"plan": {"method": "shortgpt"}, "transfer": {"form": "none"}}
    with RunFolder(folder / "run") as run:
        job = Pipeline(run, Recipe.model_validate(values), None, lambda line: None)
        job.pruning.prune()
        job.engines.build()
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[int, list[str]]:
    """New tokens -> the greedy text of each prompt by itself in PyTorch, up to where two tokens are equally good."""
    tokenizer = Tokenizer.from_file(str(run / "pruned" / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(run / "pruned", torch_dtype=torch.float32).eval()
    texts: dict[int, list[str]] = {SHORT: [], LONG: []}
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        count = LONG if number < LONG_ONES else SHORT
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(made.logits)[:, 0].topk(2).values  # (count, 2)
        ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
        certain = int(ties[0]) if len(ties) else count
        tokens = made.sequences[0, ids.shape[1] :].tolist()
        texts[SHORT].append(tokenizer.decode(tokens[: min(certain, SHORT)]))
        if count == LONG:
            texts[LONG].append(tokenizer.decode(tokens[:certain]))
    return texts


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("real-server") / "repository"
    engine = run / "engines" / ENGINE / "pruned"
    write_repository({"pruned": engine}, run / "pruned", {"pruned": "pruned"}, repository, 8, 512)
    with TritonServer(repository) as server:
        yield server


def ask(server: TritonServer, prompt: str, count: int) -> str:
    answer = server.generate("pruned", text_input=prompt, max_tokens=count, ignore_eos=True)
    assert answer.get("output_tokens") == count, answer
    return str(answer["text_output"])


def compare(found: list[str], wanted: list[str]) -> None:
    for text, beginning in zip(found, wanted, strict=True):
        assert text.startswith(beginning), (text, beginning)
    assert sum(map(len, wanted)) > 0.5 * sum(map(len, found)), "most of it was compared"


def test_texts_are_pytorchs_alone_and_eight_at_once(server: TritonServer, expected: dict[int, list[str]]) -> None:
    compare([ask(server, prompt, SHORT) for prompt in PROMPTS], expected[SHORT])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        long = [pool.submit(ask, server, prompt, LONG) for prompt in PROMPTS[:LONG_ONES]]
        short = [pool.submit(ask, server, prompt, SHORT) for prompt in PROMPTS]
        compare([each.result() for each in short], expected[SHORT])
        compare([each.result() for each in long], expected[LONG])


def test_texts_are_pytorchs_beside_clients_who_leave(server: TritonServer, expected: dict[int, list[str]]) -> None:
    asked = {"prompts": PROMPTS[:LONG_ONES], "max_tokens": LONG}
    found = client("streams.py", server.grpc, "pruned", 6 * LONG_ONES, 0.4, 2, stdin=asked)
    assert found["errors"] == [] and found["cancelled"] > 0
    for number, texts in found["texts"].items():
        compare(texts, [expected[LONG][int(number)]] * len(texts))
