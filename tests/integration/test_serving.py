"""Texts that come and go in one batch, the loop that serves them, and the part of the toolkit that a server gets."""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForCausalLM

from tests.exported import LAYERS, Made
from tests.families import family_model
from tests.tiny import save_tiny, tiny_tokenizer
from trsp_deploy.artifacts import ENGINE_MANIFEST, write_json
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.stages.triton_repository import _batching
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.model_repository.vendor import vendor
from trsp_deploy.tools.runners import open_engine, read_manifest
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import SETTLED, OneText, Rotation, RunningBatch
from trsp_deploy.tools.serving.engine import open_batch
from trsp_deploy.tools.serving.loop import JOINS, Answer, ServingLoop, Ticket
from trsp_deploy.tools.serving.requests import GenerationRequest, RequestError, parse
from trsp_deploy.tools.serving.text import TextStream, read_tokenizer

FAMILIES = ["llama", "opt"]
MAX_LENGTH = 200


HEADS = {"llama": {"hidden_size": 64}, "opt": {"hidden_size": 64, "word_embed_proj_dim": 64}}


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "model", **HEADS[request.param])
    (folder / "onnx").mkdir()
    export_onnx(model, "fp32", ExportSettings(), folder / "onnx")
    build_engine(folder / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def opened(engine: Path, max_batch: int, max_length: int):  # type: ignore[no-untyped-def]
    return open_batch(engine, max_batch, max_length, engine_rotations(engine / "model.onnx"))


def alone(engine: Path, prompt: list[int], count: int) -> list[int]:
    with open_engine(engine) as runner:
        return generate(runner, [prompt], Sampling(max_new_tokens=count))[0].tokens


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_texts_that_come_and_go_are_what_they_are_alone(engine: Path) -> None:
    """Prompts of all lengths join and leave at random; greedy tokens are those of each prompt by itself."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 380, size=size).tolist() for size in (5, 40, 3, 17, 90, 8, 1, 60, 12, 30, 4, 25)]
    wanted = [12, 30, 5, 40, 20, 60, 9, 3, 25, 50, 1, 33]
    expected = [alone(engine, prompt, count) for prompt, count in zip(prompts, wanted, strict=True)]
    found: list[list[int]] = [[] for _ in prompts]
    waiting, running = list(range(len(prompts))), {}
    with opened(engine, 4, MAX_LENGTH) as batch:
        while waiting or running:
            while waiting and not batch.full and (not running or generator.random() < 0.3):
                text = waiting.pop(0)
                row, logits = batch.join(prompts[text])
                assert row not in running
                running[row] = text
                found[text].append(int(logits.argmax()))
            for row in [row for row, text in running.items() if len(found[text]) >= wanted[text]]:
                del running[row]
                batch.leave(row)
            if running:
                for row, logits in batch.step({row: found[text][-1] for row, text in running.items()}).items():
                    found[running[row]].append(int(logits.argmax()))
    for text, tokens in enumerate(found):
        assert tokens[: wanted[text]] == expected[text], f"text {text}"


def test_places_that_no_text_uses_are_given_up(engine: Path) -> None:
    with opened(engine, 2, MAX_LENGTH) as batch:
        assert isinstance(batch, RunningBatch)
        long, _ = batch.join(list(range(3, 153)))
        short, _ = batch.join([5, 6, 7])
        assert batch._length == 150
        batch.leave(long)
        assert batch._length == 3, "the short text moved to the front"
        assert batch.step({short: 9})[short].shape == (384,)
        batch.leave(short)
        assert batch._length == 0 and batch.size == 0


def test_rows_that_nobody_needs_are_given_up(engine: Path) -> None:
    """A text that was one of four is alone in the batch once the others are gone, and goes on as it would have."""
    prompt, count = [5, 6, 7, 8], 3 * SETTLED
    with opened(engine, 4, MAX_LENGTH) as batch:
        assert isinstance(batch, RunningBatch)
        others = [batch.join([number, 9])[0] for number in (3, 4, 11)]
        last, logits = batch.join(prompt)
        tokens = [int(logits.argmax())]
        assert len(batch._mask) == 4
        for other in others:
            batch.leave(other)
        for step in range(1, count):
            tokens.append(int(batch.step({last: tokens[-1]})[last].argmax()))
            assert len(batch._mask) == (4 if step < SETTLED else 1)
        again, _ = batch.join([3, 9])
        assert batch.size == 2 == len(batch._mask) and again != last
    assert tokens == alone(engine, prompt, count)


def test_the_cache_is_no_larger_than_its_texts_can_use() -> None:
    """Eight of the longest texts: each has its places, one for the next token, and nothing beyond."""
    sizes: list[tuple[int, int]] = []
    twin = SimpleNamespace(cache={}, allocate=lambda rows, capacity: sizes.append((rows, capacity)))
    reader: Any = SimpleNamespace(in_place=True, cache={}, twin=lambda: twin)
    reader.prefill = lambda ids, mask, last_only: np.zeros((1, 1, 4), dtype=np.float32)
    batch = RunningBatch(reader, 8, 1000)
    for _ in range(8):
        batch.join([1] * 900)
    assert sizes == [(1, 1001), (2, 1001), (4, 1001), (8, 1001)]


def test_what_does_not_fit_is_refused(engine: Path) -> None:
    with opened(engine, 1, 10) as batch:
        for prompt in ([], list(range(3, 13))):
            with pytest.raises(EngineUnavailable, match="valid: 1 to 9"):
                batch.join(prompt)
        row, _ = batch.join([3, 4, 5, 6, 7, 8, 9, 10])
        with pytest.raises(EngineUnavailable, match="full"):
            batch.join([3])
        batch.step({row: 3})
        batch.step({row: 3})
        with pytest.raises(EngineUnavailable, match="reached 10 tokens"):
            batch.step({row: 3})


def test_one_text_at_a_time_on_any_runner(engine: Path) -> None:
    with open_engine(engine) as runner:
        batch = OneText(runner, MAX_LENGTH)
        for prompt in ([5, 6, 7], [9, 8]):
            row, logits = batch.join(prompt)
            tokens = [int(logits.argmax())]
            for _ in range(5):
                tokens.append(int(batch.step({row: tokens[-1]})[row].argmax()))
            batch.leave(row)
            assert tokens == alone(engine, prompt, 6)


def test_layers_that_turn_no_keys_keep_theirs(exported: Made, tmp_path: Path) -> None:
    """SmolLM3 has layers without rotary embedding: a text that joins behind a longer one is the text alone."""
    build_engine(exported("smollm3") / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    (rotation,) = engine_rotations(tmp_path / "engine" / "model.onnx")
    assert len(rotation.caches) == LAYERS // 2
    prompt = [5, 9, 200, 17]
    with open_engine(tmp_path / "engine") as runner:
        runner.prefill(np.array([prompt]), np.ones((1, 4), dtype=np.int64))
        expected = runner.decode(np.array([[7]]))[0, -1]
    with opened(tmp_path / "engine", 2, 64) as batch:
        other, _ = batch.join(list(range(3, 33)))
        text, _ = batch.join(prompt)
        np.testing.assert_allclose(batch.step({other: 8, text: 7})[text], expected, atol=1e-4)


@pytest.mark.parametrize(("family", "joins"), [("falcon-rw", True), ("gemma3", False)])
def test_a_text_is_moved_to_see_whether_texts_can_join(family: str, joins: bool, tmp_path: Path) -> None:
    """Optimum tells neither graph a position: Falcon's bias comes from the mask, Gemma counts places of the cache."""
    (tmp_path / "onnx").mkdir()
    family_model(family).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", "fp32", ExportSettings(), tmp_path / "onnx")
    build_engine(tmp_path / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    assert "position_ids" not in read_manifest(tmp_path / "engine").inputs
    assert _batching(tmp_path / "engine") == (joins, ())


def test_layers_may_turn_keys_in_two_ways() -> None:
    ways = [Rotation(angles=(angle,), interleaved=False, caches=(name,)) for angle, name in ((0.5, "a"), (0.1, "b"))]
    runner: Any = SimpleNamespace(in_place=True, twin=lambda: None)
    batch, keys = RunningBatch(runner, 2, 8, ways), np.ones((1, 1, 2), dtype=np.float32)
    for rotation, name in zip(ways, "ab", strict=True):
        assert (batch._moved(name, keys, 3) == rotation.turned(keys, 3)).all()
    assert (batch._moved("c", keys, 3) == keys).all(), "turned by nobody"


def test_an_engine_whose_cache_grows_serves_one_text_at_a_time(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=64)
    (tmp_path / "onnx").mkdir()
    export_onnx(model, "fp32", ExportSettings(), tmp_path / "onnx")
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    build_engine(tmp_path / "onnx" / FILE, spec, tmp_path / "engine")
    with open_batch(tmp_path / "engine", 8, MAX_LENGTH) as batch:
        assert isinstance(batch, OneText)
        row, logits = batch.join([5, 6, 7])
        tokens = [int(logits.argmax())]
        for _ in range(5):
            tokens.append(int(batch.step({row: tokens[-1]})[row].argmax()))
    assert tokens == alone(tmp_path / "engine", [5, 6, 7], 6)


def test_an_engine_that_gets_padding_wrong_serves_one_text_at_a_time(engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(engine, folder)
    write_json(folder / ENGINE_MANIFEST, read_manifest(engine).model_copy(update={"padding": False}))
    assert _batching(engine)[0] and not _batching(folder)[0]
    with open_batch(folder, 8, MAX_LENGTH) as batch:
        assert isinstance(batch, OneText)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["The quick brown fox.", "naïve café — 日本語 🙂🙂 done", "  two  spaces\n\n\tand a tab "]
)
def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    prompt, answer = tokenizer.encode("Question:").ids, tokenizer.encode(text).ids
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in answer]
    assert "".join(pieces) + stream.end() == text
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize("stop", [["END"], ["nothing", "END", "ENDING"]])
def test_nothing_of_a_stop_string_is_shown(tokenizer: Tokenizer, stop: list[str]) -> None:
    stream, shown = TextStream(tokenizer, [], stop), ""
    for token in tokenizer.encode("An EN, an ENgine, the END and more").ids:
        shown += stream.add(token)
        if stream.stopped:
            break
    assert stream.stopped and shown == "An EN, an ENgine, the "


def byte_fallback() -> Tokenizer:
    """As Llama 2's and Mistral's: what is no word is one token a byte, and a run of bytes is text as a whole or not."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁end", "▁the"]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("prompt", ["", "안녕", "🙂"])
@pytest.mark.parametrize("text", ["😀😁😂🤣😃😄", "안녕하세요여러분", "naïve"])
def test_characters_of_many_tokens_are_never_torn(prompt: str, text: str) -> None:
    tokenizer = byte_fallback()
    tokens = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    before = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in prompt.encode()]
    stream = TextStream(tokenizer, [tokenizer.token_to_id("▁the"), *before])
    pieces = [stream.add(token) for token in [*tokens, tokenizer.token_to_id("▁end")]]
    assert "".join(pieces) + stream.end() == f"{text} end"


@pytest.mark.parametrize("count", [1, 5, 6, 40])
def test_a_space_is_kept_behind_special_tokens(count: int) -> None:
    """They have no text, and a Llama's tokenizer takes the space off what nothing is in front of."""
    tokenizer = byte_fallback()
    the, end, special = (tokenizer.token_to_id(word) for word in ("▁the", "▁end", "</s>"))
    stream = TextStream(tokenizer, [the])
    assert "".join(stream.add(token) for token in [the, *[special] * count, end, the]) == " the end the"
    after_them = TextStream(tokenizer, [the, *[special] * count])
    assert "".join(after_them.add(token) for token in [end, the]) == " end the"


def test_the_first_stop_string_of_the_text_ends_it(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ["\n", "."])
    shown = ""
    for token in tokenizer.encode("Paris.\nAnd").ids:
        shown += stream.add(token)
        if stream.stopped:
            break
    assert shown == "Paris" and stream.stopped
    stream = TextStream(tokenizer, [], ["later", "first"])
    stream._held = "the first and later"  # both in one piece
    assert stream._show("") == "the "


def test_limits_that_training_left_in_a_tokenizer_are_not_for_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(2)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    text = "a prompt of several tokens"
    assert read_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == tokenizer.encode(text).ids


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "input 'text_input' is missing"),
        ({"text_input": ""}, "input 'text_input': string should have at least 1 character, got ''"),
        ({"text_input": "x", "max_tokens": 0}, "input 'max_tokens': should be greater than or equal to 1, got 0"),
        ({"text_input": "x", "max_tokens": -5}, "input 'max_tokens'"),
        ({"text_input": "x", "temperature": float("nan")}, "input 'temperature'"),
        ({"text_input": "x", "temperature": -1.0}, "input 'temperature'"),
        ({"text_input": "x", "top_p": 0.0}, "input 'top_p'"),
        ({"text_input": "x", "top_k": -1}, "input 'top_k'"),
        ({"text_input": "x", "seed": -1}, "input 'seed'"),
        ({"text_input": "x", "stop": ("",)}, "input 'stop.0'"),
        ({"text_input": "x", "stop": ("a",) * 17}, "input 'stop': 17 strings, at most 16"),
        (
            {"text_input": "x", "beam_width": 4},
            "unknown input 'beam_width'; valid: exclude_input_in_output, ignore_eos",
        ),
        ({"text_input": "x", "max_token": 4}, "unknown input 'max_token'; did you mean 'max_tokens'?"),
        ({"text_inputs": "x"}, "unknown input 'text_inputs'; did you mean 'text_input'?"),
    ],
)
def test_a_bad_request_is_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(values)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_client_asks_for_is_how_its_tokens_are_chosen() -> None:
    chosen = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 2**63 - 1}
    request = parse({"text_input": "x", "max_tokens": 9, **chosen})
    assert request.sampling((7,)) == Sampling.model_validate({"max_new_tokens": 9, "end": (7,), **chosen})
    greedy = parse({"text_input": "x", "ignore_eos": True}).sampling((7,))
    assert greedy == Sampling(max_new_tokens=64, temperature=0, top_k=0, top_p=1, seed=0, end=())


# -- the loop ----------------------------------------------------------------------------------------------------------


class Client:
    """Collects one request's answers."""

    def __init__(self, **values: object) -> None:
        self.answers: queue.Queue[Answer] = queue.Queue()
        self.gone = False
        self.ticket = Ticket(GenerationRequest.model_validate(values), self.answers.put, lambda: self.gone)

    def wait(self) -> list[Answer]:
        found = [self.answers.get(timeout=30)]
        while found[-1].finish is None:
            found.append(self.answers.get(timeout=30))
        return found


@pytest.mark.parametrize("interleaved", [True, False])
def test_turning_a_key_is_what_a_later_place_gives(interleaved: bool) -> None:
    generator = np.random.default_rng(0)
    rotation = Rotation(angles=(1.0, 0.1, 0.01), interleaved=interleaved, caches=())
    keys = generator.normal(size=(2, 5, 8)).astype(np.float32)  # of 8 dimensions the first 6 are turned
    further = rotation.turned(rotation.turned(keys, 30), 12)
    np.testing.assert_allclose(further, rotation.turned(keys, 42), atol=1e-5)
    np.testing.assert_allclose(rotation.turned(further, -42), keys, atol=1e-5)
    assert (further[..., 6:] == keys[..., 6:]).all() and not np.allclose(further[..., :6], keys[..., :6])


@pytest.fixture
def loop(engine: Path, tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    with opened(engine, 4, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, tokenizer, (0,), MAX_LENGTH)
        yield loop
        loop.stop()


def test_many_requests_at_once_get_the_answers_of_each_alone(
    loop: ServingLoop, engine: Path, tokenizer: Tokenizer
) -> None:
    prompts = [f"def function_{number}(" * (number % 3 + 1) for number in range(10)]
    clients = [Client(text_input=p, max_tokens=20, stream=n % 2 == 0, ignore_eos=True) for n, p in enumerate(prompts)]
    for client in clients:
        loop.submit(client.ticket)
    for prompt, client in zip(prompts, clients, strict=True):
        answers = client.wait()
        expected = tokenizer.decode(alone(engine, tokenizer.encode(prompt).ids, 20))
        assert "".join(answer.text for answer in answers) == expected
        assert answers[-1].tokens == 20 and answers[-1].finish == "length"
        assert client.ticket.request.stream or len(answers) == 1


def test_sampling_is_repeatable_by_seed_and_echo_is_on_request(loop: ServingLoop) -> None:
    def answer(**more: object) -> str:
        client = Client(text_input="class ", max_tokens=16, temperature=1.5, ignore_eos=True, **more)
        loop.submit(client.ticket)
        return client.wait()[-1].text

    assert answer(seed=7) == answer(seed=7) != answer(seed=8)
    assert answer(seed=7, exclude_input_in_output=False) == "class " + answer(seed=7)


def test_what_is_there_is_penalised_as_transformers_does(loop: ServingLoop, engine: Path, tokenizer: Tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(engine.parent / "model", torch_dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("class ").ids])
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "eos_token_id": -1, "pad_token_id": 0}
    texts = []
    for penalty in (1.0, 1.3):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **options)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :].tolist()))
        client = Client(text_input="class ", max_tokens=20, ignore_eos=True, repetition_penalty=penalty)
        loop.submit(client.ticket)
        assert client.wait()[-1].text == texts[-1]
    assert texts[0] != texts[1]


def test_who_does_not_say_how_many_tokens_gets_what_fits(loop: ServingLoop, tokenizer: Tokenizer) -> None:
    long = " the" * (MAX_LENGTH - 40)
    room = MAX_LENGTH - len(tokenizer.encode(long).ids)
    assert 0 < room < 64
    client = Client(text_input=long, ignore_eos=True)
    loop.submit(client.ticket)
    last = client.wait()[-1]
    assert (last.tokens, last.finish) == (room, "length")


def test_a_client_that_goes_away_frees_its_row(engine: Path, tokenizer: Tokenizer) -> None:
    asked, go_on = threading.Semaphore(0), threading.Semaphore(0)
    with opened(engine, 1, MAX_LENGTH) as batch:
        step = batch.step

        def gated(tokens: dict[int, int]) -> dict[int, np.ndarray]:
            asked.release()
            assert go_on.acquire(timeout=30)
            return step(tokens)

        batch.step = gated  # type: ignore[method-assign]
        loop = ServingLoop(batch, tokenizer, (), MAX_LENGTH)
        gone, after = Client(text_input="x", max_tokens=150), Client(text_input="y", max_tokens=2)
        for client in (gone, after):
            loop.submit(client.ticket)
        for _ in range(3):
            go_on.release()
            assert asked.acquire(timeout=30)
        assert asked.acquire(timeout=30)  # the fourth step waits
        gone.gone = True
        go_on.release(MAX_LENGTH)
        last = gone.wait()[-1]
        assert after.wait()[-1].finish == "length"
        loop.stop()
    assert (last.finish, last.tokens) == ("cancelled", 5), "one of the prompt's, and four steps'"


def test_what_the_engine_cannot_hold_is_an_error_and_the_loop_goes_on(loop: ServingLoop) -> None:
    long, many = Client(text_input="word " * 500), Client(text_input="x", max_tokens=500)
    for client in (long, many):
        loop.submit(client.ticket)
    too_long, too_many = long.wait()[-1], many.wait()[-1]
    assert "at most 199" in (too_long.error or "")
    assert "input 'max_tokens': 500; after this prompt at most" in (too_many.error or "")
    assert too_long.fault == too_many.fault == "request"
    fine = Client(text_input="x", max_tokens=1)
    loop.submit(fine.ticket)
    assert fine.wait()[-1].error is None


def test_a_prompt_is_read_by_who_brings_it_and_not_at_all_where_it_cannot_fit(
    engine: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a megabyte takes half a second: nobody's stream waits for it."""
    read: list[tuple[str, int]] = []

    def encode_batch(texts: list[str]) -> Any:
        read.append((threading.current_thread().name, len(texts[0])))
        return tokenizer.encode_batch(texts)

    parts = ("get_vocab", "get_added_tokens_decoder", "decode")
    spy: Any = SimpleNamespace(encode_batch=encode_batch, **{name: getattr(tokenizer, name) for name in parts})
    longest = MAX_LENGTH * max(map(len, tokenizer.get_vocab()))
    fine, too_long = Client(text_input="x", max_tokens=2), Client(text_input="x" * (longest + 1))
    with opened(engine, 4, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, spy, (), MAX_LENGTH)
        for client in (fine, too_long):
            loop.submit(client.ticket)
        assert fine.wait()[-1].finish == "length"
        refused = too_long.wait()[-1]
        loop.stop()
    assert f"{longest + 1} characters, more than {MAX_LENGTH} tokens hold; at most {longest}" in (refused.error or "")
    assert refused.fault == "request" and read == [(threading.current_thread().name, 1)]


def test_an_error_that_nobody_thought_of_ends_one_request_alone(
    loop: ServingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ServingLoop._advance

    def odd(self, row, running, logits):  # type: ignore[no-untyped-def]
        if running.ticket.request.text_input == "odd" and len(running.tokens) == 3:
            raise ZeroDivisionError("by zero\nat all")
        plain(self, row, running, logits)

    monkeypatch.setattr(ServingLoop, "_advance", odd)
    bad, good = (Client(text_input=text, max_tokens=8, ignore_eos=True) for text in ("odd", "even"))
    for client in (bad, good):
        loop.submit(client.ticket)
    failed = bad.wait()[-1]
    assert (failed.error, failed.fault) == ("ZeroDivisionError: by zero at all", "engine")
    assert good.wait()[-1].finish == "length"
    monkeypatch.setattr(ServingLoop, "_join", lambda self, ticket: [][0])
    lost = Client(text_input="x", max_tokens=1)
    loop.submit(lost.ticket)
    failed = lost.wait()[-1]
    assert (failed.error, failed.fault) == ("IndexError: list index out of range", "engine")


def test_a_client_that_cannot_be_asked_is_gone_and_the_loop_goes_on(loop: ServingLoop) -> None:
    lost, good = Client(text_input="x", max_tokens=150, ignore_eos=True), Client(text_input="y", max_tokens=3)

    def broken() -> bool:
        raise RuntimeError("no shared memory")

    loop.submit(Ticket(lost.ticket.request, lost.answers.put, broken))
    loop.submit(good.ticket)
    assert lost.wait()[-1].finish == "cancelled" and good.wait()[-1].error is None


def test_a_special_token_can_be_a_stop_string(loop: ServingLoop, tokenizer: Tokenizer, engine: Path) -> None:
    number, token = next((n, t) for n, t in tokenizer.get_added_tokens_decoder().items() if t.special)
    forced = Client(text_input="x", max_tokens=20, ignore_eos=True, stop=(token.content,))
    plain = loop._batch.step

    def step(tokens):  # type: ignore[no-untyped-def]
        found = plain(tokens)
        for logits in found.values():
            logits[number] = 1e9
        return found

    loop._batch.step = step  # type: ignore[method-assign]
    loop.submit(forced.ticket)
    last = forced.wait()[-1]
    assert last.finish == "stop" and last.tokens == 1


def test_who_is_answered_already_does_not_wait_for_all_who_come(engine: Path, tokenizer: Tokenizer) -> None:
    """Requests of one token leave at once: they must not keep a running text from its next one."""
    order: list[str] = []
    with opened(engine, 2, MAX_LENGTH) as batch:
        join, step = batch.join, batch.step
        batch.join = lambda prompt: (order.append("join"), join(prompt))[1]  # type: ignore[method-assign]
        batch.step = lambda tokens: (order.append("step"), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, tokenizer, (), MAX_LENGTH)
        clients = [Client(text_input="x", max_tokens=30)] + [Client(text_input="y", max_tokens=1) for _ in range(40)]
        for client in clients:
            loop.submit(client.ticket)
        for client in clients:
            client.wait()
        loop.stop()
    longest = max(len(run) for run in "".join(name[0] for name in order).split("s"))
    assert longest <= JOINS


def test_who_finds_too_many_waiting_is_told_so_and_who_left_does_not_count(engine: Path, tokenizer: Tokenizer) -> None:
    with opened(engine, 1, MAX_LENGTH) as batch:
        go_on, step = threading.Event(), batch.step
        batch.step = lambda tokens: (go_on.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, tokenizer, (), MAX_LENGTH, most_waiting=2)
        running, left, waiting, busy, last = (Client(text_input="x", max_tokens=2) for _ in range(5))
        loop.submit(running.ticket)
        until = time.monotonic() + 60
        while not loop._running:
            assert time.monotonic() < until
            time.sleep(0.01)
        for client in (left, waiting, busy):
            loop.submit(client.ticket)
        refused = busy.wait()[-1]
        left.gone = True
        loop.submit(last.ticket)
        assert left.wait()[-1].finish == "cancelled", "at once: nobody took its place while it was full"
        go_on.set()
        assert [client.wait()[-1].finish for client in (running, waiting, last)] == ["length"] * 3
        loop.stop()
        late = Client(text_input="x")
        loop.submit(late.ticket)
        assert late.wait()[-1].fault == "stopping"
    assert (refused.error, refused.fault) == ("busy: 2 requests wait already", "busy")


def test_stopping_answers_everyone(engine: Path, tokenizer: Tokenizer) -> None:
    with opened(engine, 2, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, tokenizer, (0,), MAX_LENGTH)
        clients = [Client(text_input="x", max_tokens=190, ignore_eos=True) for _ in range(5)]
        for client in clients:
            loop.submit(client.ticket)
        loop.stop()
    for client in clients:
        last = client.wait()[-1]
        assert last.finish == "length" or (last.finish, last.fault) == ("error", "stopping")


# -- vendoring ---------------------------------------------------------------------------------------------------------


def test_the_vendored_part_serves_by_itself(engine: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    vendor(tmp_path / "vendor")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "vendor")!r})
from pathlib import Path
import trsp_deploy
assert Path(trsp_deploy.__file__).is_relative_to({str(tmp_path)!r}), trsp_deploy.__file__
from tokenizers import Tokenizer
from trsp_deploy.tools.serving.engine import open_batch
from trsp_deploy.tools.serving.loop import ServingLoop, Ticket
from trsp_deploy.tools.serving.requests import parse
import queue
answers = queue.Queue()
with open_batch(Path({str(engine)!r}), 2, 100) as batch:
    loop = ServingLoop(batch, Tokenizer.from_file({str(tmp_path / "tokenizer.json")!r}), (), 100)
    loop.submit(Ticket(parse({{"text_input": "x", "max_tokens": 3}}), answers.put, lambda: False))
    print(answers.get(timeout=30).finish)
    loop.stop()
print(sorted(set(sys.modules) & {{"torch", "transformers", "onnx", "onnx_ir", "scipy"}}))
# A package without an __init__ would take in what is installed by that name.
print([name for name, module in sys.modules.items() if name.startswith("trsp_deploy") and module.__file__ is None])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["length", "[]", "[]"]
