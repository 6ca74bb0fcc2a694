"""Texts that come and go in one batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.breadth import BREADTH
from tests.exported import LAYERS, Made
from tests.families import family_model
from tests.served_engine import MAX_LENGTH, alone, opened
from tests.tiny import save_tiny
from trsp_deploy.artifacts import ENGINE_MANIFEST, write_json
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import ExportSettings
from trsp_deploy.stages.build import build_engine
from trsp_deploy.stages.export import FILE, export_onnx
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.model_repository.generating_model import batching
from trsp_deploy.tools.runners import open_engine, read_manifest, running_batch
from trsp_deploy.tools.runners.rotation import engine_rotations
from trsp_deploy.tools.runners.running_batch import SETTLED, OneText, Rotation, RunningBatch
from trsp_deploy.tools.serving.engine import open_batch


def test_texts_that_come_and_go_are_what_they_are_alone(served_engine: Path) -> None:
    """Prompts of all lengths join and leave at random; greedy tokens are those of each prompt by itself."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 380, size=size).tolist() for size in (5, 40, 3, 17, 90, 8, 1, 60, 12, 30, 4, 25)]
    wanted = [12, 30, 5, 40, 20, 60, 9, 3, 25, 50, 1, 33]
    expected = [alone(served_engine, prompt, count) for prompt, count in zip(prompts, wanted, strict=True)]
    found: list[list[int]] = [[] for _ in prompts]
    waiting, running = list(range(len(prompts))), {}
    with opened(served_engine, 4, MAX_LENGTH) as batch:
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


def test_places_that_no_text_uses_are_given_up(served_engine: Path) -> None:
    with opened(served_engine, 2, MAX_LENGTH) as batch:
        assert isinstance(batch, RunningBatch)
        long, _ = batch.join(list(range(3, 153)))
        short, _ = batch.join([5, 6, 7])
        assert batch._length == 150
        batch.leave(long)
        assert batch._length == 3, "the short text moved to the front"
        assert batch.step({short: 9})[short].shape == (384,)
        batch.leave(short)
        assert batch._length == 0 and batch.size == 0


def test_texts_after_each_other_go_on_from_the_front_at_the_longest_place(served_engine: Path) -> None:
    """Each is short, and one joins as another leaves, so that their common end alone reaches the longest that is
    allowed: the graph's tables of positions end there."""
    longest, prompt, count, ends = 60, list(range(3, 13)), 36, []
    with opened(served_engine, 2, longest) as batch:
        assert isinstance(batch, RunningBatch)
        first, other = batch.join([5, 6, 7])[0], batch.join([8, 9])[0]
        for _ in range(40):
            batch.step({first: 3, other: 4})
        batch.leave(first)
        text, logits = batch.join(prompt)
        tokens = [int(logits.argmax())]
        for step in range(1, count):
            if step == 16:
                batch.leave(other)
            others = {other: 4} if step < 16 else {}
            tokens.append(int(batch.step({text: tokens[-1], **others})[text].argmax()))
            ends.append(batch._length)
    assert max(ends) == longest > ends[-1]
    assert tokens == alone(served_engine, prompt, count)


def test_rows_that_nobody_needs_are_given_up(served_engine: Path) -> None:
    """A text that was one of four is alone in the batch once the others are gone, and goes on as it would have."""
    prompt, count = [5, 6, 7, 8], 3 * SETTLED
    with opened(served_engine, 4, MAX_LENGTH) as batch:
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
    assert tokens == alone(served_engine, prompt, count)


def test_the_cache_is_no_larger_than_its_texts_can_use() -> None:
    """Eight of the longest texts: each has its places, one for the next token, and nothing beyond."""
    sizes: list[tuple[int, int]] = []
    twin = SimpleNamespace(cache={}, allocate=lambda rows, capacity: sizes.append((rows, capacity)))
    reader: Any = SimpleNamespace(in_place=True, cache={}, twin=lambda: twin)
    reader.prefill = reader.step = lambda *_, **__: np.zeros((1, 1, 4), dtype=np.float32)
    batch = RunningBatch(reader, 8, 1000)
    for _ in range(8):
        batch.join([1] * 900)
    assert sizes == [(1, 1001), (2, 1001), (4, 1001), (8, 1001)]


@pytest.mark.parametrize("moved", [False, True])
def test_numbers_that_overflow_are_one_texts_alone(moved: bool, served_engine: Path) -> None:
    """As those of an fp16 engine may: what is masked counts as zero times what lies there."""
    prompt = [7, 8, 9]
    with opened(served_engine, 2, MAX_LENGTH) as batch:
        assert isinstance(batch, RunningBatch)
        other, _ = batch.join(list(range(3, 13)))
        broken, _ = batch.join(list(range(3, 33)))
        for rows in batch._views().values():
            rows[batch._texts[broken].row, :, : batch._length] = np.nan
        if moved:
            batch._move(60)
        batch.leave(broken)
        text, logits = batch.join(prompt)
        first = int(logits.argmax())
        second = int(batch.step({other: 3, text: first})[text].argmax())
    assert [first, second] == alone(served_engine, prompt, 2)


@pytest.mark.parametrize("above", [False, True])
def test_what_lies_in_a_free_row_is_not_for_the_next_text(above: bool, served_engine: Path) -> None:
    """Nor what lies above its end, where it is moved to as a longer one joins."""
    prompt = [7, 8, 9]
    with opened(served_engine, 3, MAX_LENGTH) as batch:
        assert isinstance(batch, RunningBatch)
        other, _ = batch.join(list(range(3, 13)))
        batch.leave(batch.join([5, 6])[0])
        for rows in batch._views().values():
            rows[1, :, slice(batch._length, None) if above else slice(batch._length)] = np.nan
        text, logits = batch.join(prompt)
        tokens = [int(logits.argmax())]
        tokens.append(int(batch.step({other: 3, text: tokens[-1]})[text].argmax()))
        longer, _ = batch.join(list(range(3, 43)))
        tokens.append(int(batch.step({other: 3, text: tokens[-1], longer: 3})[text].argmax()))
    assert tokens == alone(served_engine, prompt, 3)


def test_a_prompt_that_is_read_in_pieces_is_the_whole_prompt(
    served_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on, and one leaves, between its pieces."""
    monkeypatch.setattr(running_batch, "PIECE", 16)
    prompt = np.random.default_rng(0).integers(3, 380, size=70).tolist()
    with opened(served_engine, 3, MAX_LENGTH) as batch:
        stays, leaves = batch.join(prompt[:40])[0], batch.join([5, 6, 7])[0]
        reading = batch.joining(prompt)
        assert [next(reading) for _ in range(2)] == [None, None]
        batch.step({stays: 3, leaves: 3})
        batch.leave(leaves)
        assert [next(reading) for _ in range(2)] == [None, None]
        batch.step({stays: 4})
        text, logits = next(reading) or (0, np.zeros(1))
        tokens = [int(logits.argmax())]
        for _ in range(20):
            tokens.append(int(batch.step({stays: 5, text: tokens[-1]})[text].argmax()))
    assert tokens == alone(served_engine, prompt, 21)


@BREADTH
@pytest.mark.parametrize("family", ["mistral-sliding", "gpt2"])
def test_pieces_are_the_whole_where_attention_has_a_window_and_where_positions_are_embedded(
    family: str, exported: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_batch, "PIECE", 7)
    build_engine(exported(family) / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    prompt = np.random.default_rng(0).integers(3, 380, size=(1, 40))
    with open_engine(tmp_path / "engine") as runner:
        expected = runner.prefill(prompt, np.ones_like(prompt), last_only=True)[0, -1]
    with opened(tmp_path / "engine", 2, 64) as batch:
        assert isinstance(batch, RunningBatch)
        _, logits = batch.join(prompt[0].tolist())
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_what_does_not_fit_is_refused(served_engine: Path) -> None:
    with opened(served_engine, 1, 10) as batch:
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


def test_one_text_at_a_time_on_any_runner(served_engine: Path) -> None:
    with open_engine(served_engine) as runner:
        batch = OneText(runner, MAX_LENGTH)
        for prompt in ([5, 6, 7], [9, 8]):
            row, logits = batch.join(prompt)
            tokens = [int(logits.argmax())]
            for _ in range(5):
                tokens.append(int(batch.step({row: tokens[-1]})[row].argmax()))
            batch.leave(row)
            assert tokens == alone(served_engine, prompt, 6)


@BREADTH
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


@BREADTH
@pytest.mark.parametrize(("family", "joins"), [("falcon-rw", True), ("gemma3", False)])
def test_a_text_is_moved_to_see_whether_texts_can_join(family: str, joins: bool, tmp_path: Path) -> None:
    """Optimum tells neither graph a position: Falcon's bias comes from the mask, Gemma counts places of the cache."""
    (tmp_path / "onnx").mkdir()
    family_model(family).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", "fp32", ExportSettings(), tmp_path / "onnx")
    build_engine(tmp_path / "onnx" / FILE, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    assert "position_ids" not in read_manifest(tmp_path / "engine").inputs
    assert batching(tmp_path / "engine") == (None if joins else "its graph counts places of the cache", ())


def test_layers_may_turn_keys_in_two_ways() -> None:
    ways = [Rotation(angles=(angle,), interleaved=False, caches=(name,)) for angle, name in ((0.5, "a"), (0.1, "b"))]
    runner: Any = SimpleNamespace(in_place=True, twin=lambda: None)
    batch, keys = RunningBatch(runner, 2, 8, ways), np.ones((1, 1, 2), dtype=np.float32)
    for rotation, name in zip(ways, "ab", strict=True):
        assert (batch._moved(name, keys, 3) == rotation.turned(keys, 3)).all()
    assert (batch._moved("c", keys, 3) == keys).all(), "turned by nobody"


@BREADTH
def test_an_engine_whose_cache_grows_serves_one_text_at_a_time(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", hidden_size=64)
    (tmp_path / "onnx").mkdir()
    export_onnx(model, "fp32", ExportSettings(), tmp_path / "onnx")
    spec = load_engine_spec("ort-cpu-fp32").model_copy(update={"fuse": False})
    build_engine(tmp_path / "onnx" / FILE, spec, tmp_path / "engine")
    assert batching(tmp_path / "engine") == ("its attention was not fused", ())
    with open_batch(tmp_path / "engine", 8, MAX_LENGTH) as batch:
        assert isinstance(batch, OneText)
        row, logits = batch.join([5, 6, 7])
        tokens = [int(logits.argmax())]
        for _ in range(5):
            tokens.append(int(batch.step({row: tokens[-1]})[row].argmax()))
    assert tokens == alone(tmp_path / "engine", [5, 6, 7], 6)


def test_an_engine_that_gets_padding_wrong_serves_one_text_at_a_time(served_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(served_engine, folder)
    write_json(folder / ENGINE_MANIFEST, read_manifest(served_engine).model_copy(update={"padding": False}))
    assert [batching(engine)[0] for engine in (served_engine, folder)] == [None, "its graph gets padded texts wrong"]
    with open_batch(folder, 8, MAX_LENGTH) as batch:
        assert isinstance(batch, OneText)


@pytest.mark.parametrize("interleaved", [True, False])
def test_turning_a_key_is_what_a_later_place_gives(interleaved: bool) -> None:
    generator = np.random.default_rng(0)
    rotation = Rotation(angles=(1.0, 0.1, 0.01), interleaved=interleaved, caches=())
    keys = generator.normal(size=(2, 5, 8)).astype(np.float32)  # of 8 dimensions the first 6 are turned
    further = rotation.turned(rotation.turned(keys, 30), 12)
    np.testing.assert_allclose(further, rotation.turned(keys, 42), atol=1e-5)
    np.testing.assert_allclose(rotation.turned(further, -42), keys, atol=1e-5)
    assert (further[..., 6:] == keys[..., 6:]).all() and not np.allclose(further[..., :6], keys[..., :6])


def test_turning_a_key_of_16_bits_rounds_it_once() -> None:
    """Thirty turns, as of a text that others have moved, against one of all the places."""
    generator = np.random.default_rng(0)
    rotation = Rotation(angles=tuple(10000.0 ** (-np.arange(32) / 32)), interleaved=False, caches=())
    keys = found = generator.normal(size=(1, 200, 64)).astype(np.float16)
    for _ in range(30):
        found = rotation.turned(found, 7)
    assert found.dtype == np.float16
    apart = np.abs(found - rotation.turned(keys.astype(np.float32), 30 * 7)).mean()
    assert apart < 2e-3, "0.0012; sines, products and sums of 16 bits made it 0.0037"
