"""Texts that come and go in one batch (continuous batching), over an engine whose cache is written in place.

    with OrtRunner(engine) as runner:
        batch = RunningBatch(runner, max_batch=8, max_length=2048)
        text, logits = batch.join([5, 9, 7])
        logits = batch.step({text: 42})[text]
        batch.leave(text)

A long prompt need not keep the others from their next token: `joining` reads it piece by piece.

Each text has a row of the cache; there are as many rows as the texts of late have needed, for an empty one costs as
much time as any. All rows end at the same place of the cache, `length`, and begin where their own text does: what lies
before is masked, as left padding is. A text that joins is read by itself and copied to end at `length`; the others go
on as they were. Where attention turns keys by their place in the cache (GroupQueryAttention, `do_rotary`), keys that
move are turned on by as many places: attention depends on differences of places alone. A graph that counts places
otherwise cannot be served so, and `texts_can_move` tells.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.runners.base import Runner
from trsp_deploy.tools.runners.ort import OrtRunner

SLACK = 128  # places that no text uses any more, before all move to the front
FIRST_CAPACITY = 256
# Tokens of a prompt that one call reads: fewer are read no faster each, of more the others' tokens wait longer.
PIECE = 256
SETTLED = 8  # steps in which half of the rows had no text, before there are fewer
PROBE = (1, 2, 3, 4, 5, 6, 7)  # tokens of the text that is moved to see whether texts can be
MOVED = 11  # places
SAME = 0.05  # of the logits' standard deviation: a text that keeps its place twice differs by a thousandth


class Rotation(Strict):
    """How far a key is turned for each place of the cache (rotary embedding, arXiv 2104.09864, equation 34)."""

    angles: tuple[float, ...]  # radians a place, one for each pair of a head's first dimensions
    interleaved: bool  # whether a pair is two neighbours, or one of each half
    caches: tuple[str, ...]  # names of the caches whose keys are turned; those of other layers stay what they are

    def turned(self, keys: np.ndarray, places: int) -> np.ndarray:
        """Keys (heads, tokens, head_dim) as they would be `places` places further on; rounded to their type once."""
        if places == 0:
            return keys
        half, turn = len(self.angles), places * np.asarray(self.angles)
        cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
        first, second = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
            if self.interleaved
            else (slice(0, half), slice(half, 2 * half))
        )
        wide = keys.astype(np.float32, copy=False)
        result = wide.copy()
        result[..., first] = wide[..., first] * cos - wide[..., second] * sin
        result[..., second] = wide[..., first] * sin + wide[..., second] * cos
        return result.astype(keys.dtype, copy=False)


@dataclass
class _Text:
    """A running text: its row and its length."""

    row: int
    tokens: int


class RunningBatch:
    """Rows of a shared cache.

    runner: entered, on the CPU. max_batch: texts at once. max_length: tokens of one text, new ones among them.
    rotations: of the graph's keys by their place in the cache; none where it does not turn them so.
    Raises EngineUnavailable where the engine's cache is not written in place: `OneText` is for such an engine.
    """

    def __init__(self, runner: OrtRunner, max_batch: int, max_length: int, rotations: Sequence[Rotation] = ()) -> None:
        if not runner.in_place:
            raise EngineUnavailable(f"{runner.model}: its cache is not written in place, so texts cannot join a batch")
        self._reader = runner  # reads prompts, one at a time
        self._decoder = runner.twin()  # the same session with the shared cache
        self._rotations = {name: rotation for rotation in rotations for name in rotation.caches}
        self.max_batch = max_batch
        self._max_length = max_length
        self._texts: dict[int, _Text] = {}  # by the number that callers know them by
        self._joined = 0  # texts so far
        self._spacious = 0  # steps on end in which half of the rows had no text
        self._length = 0  # where all of them end
        self._mask = np.zeros((0, 0), dtype=np.int64)  # (rows, capacity)

    @property
    def size(self) -> int:
        """Texts that are running."""
        return len(self._texts)

    @property
    def full(self) -> bool:
        """Whether no further text can join."""
        return self.size == self.max_batch

    def join(self, prompt: Sequence[int]) -> tuple[int, np.ndarray]:
        """Read a prompt and add its text; returns its number and the logits (vocabulary,) of its next token.

        Raises EngineUnavailable when the batch is full or the prompt leaves no room for a token.
        """
        return joined(self.joining(prompt))

    def joining(self, prompt: Sequence[int]) -> Iterator[tuple[int, np.ndarray] | None]:
        """The same piece by piece: None after each but the last. Others may go on and leave meanwhile; nobody joins."""
        if self.full:
            raise EngineUnavailable(f"the batch is full: {self.max_batch} texts")
        if not 0 < len(prompt) < self._max_length:
            raise EngineUnavailable(f"a prompt of {len(prompt)} tokens; valid: 1 to {self._max_length - 1}")
        input_ids = np.array([prompt], dtype=np.int64)
        mask = np.ones_like(input_ids)
        logits = self._reader.prefill(input_ids[:, :PIECE], mask[:, :PIECE], last_only=True)
        for start in range(PIECE, len(prompt), PIECE):
            yield None
            end = start + PIECE
            logits = self._reader.step(input_ids[:, start:end], mask[:, :end])
        yield self._add(prompt, logits[0, -1])

    def _add(self, prompt: Sequence[int], logits: np.ndarray) -> tuple[int, np.ndarray]:
        """Give the text that was read a row of its own."""
        if len(prompt) > self._length:
            self._move(len(prompt))
        self._reserve(self._length + 1)
        row = self._free_row()  # last: room for more places moves texts to other rows
        start = self._length - len(prompt)
        for name, rows in self._views().items():
            source = view(self._reader.cache[name])  # (1, heads, capacity, head_dim)
            # Steps write into free rows too, and one may have stopped halfway: see `_vacate`. A step reads as much.
            rows[row] = 0
            rows[row, :, start : self._length] = self._moved(name, source[0, :, : len(prompt)], start)
        self._mask[row] = 0
        self._mask[row, start : self._length] = 1
        self._joined += 1
        self._texts[self._joined] = _Text(row, len(prompt))
        return self._joined, logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append one token to every running text; returns the logits (vocabulary,) of each one's next.

        Raises EngineUnavailable where a text is as long as it may be.
        """
        longest = self._longest
        if longest >= self._max_length:
            raise EngineUnavailable(f"a text has reached {self._max_length} tokens")
        if self._length == self._max_length:  # the graph's tables of positions end there
            self._move(longest)
        self._settle()
        self._reserve(self._length + 1)
        input_ids = np.zeros((len(self._mask), 1), dtype=np.int64)  # rows without a text compute what is not read
        for number, token in tokens.items():
            input_ids[self._texts[number].row] = token
        self._mask[:, self._length] = 1
        logits = self._decoder.step(input_ids, self._mask[:, : self._length + 1])
        self._length += 1
        for text in self._texts.values():
            text.tokens += 1
        self._mask[list(self._free_rows())] = 0
        return {number: logits[text.row, -1] for number, text in self._texts.items()}

    def leave(self, number: int) -> None:
        """End a text; its row is free for another."""
        text = self._texts.pop(number)
        self._mask[text.row] = 0
        for rows in self._views().values():
            self._vacate(rows, text)
        if not self._texts:
            self._length = 0
        elif self._length - self._longest >= SLACK:
            self._move(self._longest)

    @property
    def _longest(self) -> int:
        return max(text.tokens for text in self._texts.values())

    def _free_rows(self) -> set[int]:
        return set(range(len(self._mask))) - {text.row for text in self._texts.values()}

    def _free_row(self) -> int:
        free = self._free_rows()
        if free:
            return min(free)
        self._allocate(min(self.max_batch, 2 * self.size), self._mask.shape[1])
        return self.size  # the texts have moved to the first rows

    def _settle(self) -> None:
        """Give up rows that have had no text for a while."""
        self._spacious = self._spacious + 1 if 2 * self.size <= len(self._mask) else 0
        if self._spacious == SETTLED:
            self._allocate(self.size, self._mask.shape[1])
            self._spacious = 0

    def _reserve(self, length: int) -> None:
        """Make room for `length` places, more than are needed so that this is rare.

        No text ends beyond the longest that is allowed; one place is behind it, for the next token.
        """
        if length > self._mask.shape[1]:
            self._allocate(max(1, len(self._mask)), min(max(FIRST_CAPACITY, 2 * length), self._max_length + 1))

    def _move(self, length: int) -> None:
        """Let all texts end at `length` instead."""
        self._reserve(length + 1)
        for text in self._texts.values():
            row, tokens = text.row, text.tokens
            for name, rows in self._views().items():
                there = rows[row, :, self._length - tokens : self._length].copy()
                self._vacate(rows, text)
                rows[row, :, length - tokens : length] = self._moved(name, there, length - self._length)
            self._mask[row] = 0
            self._mask[row, length - tokens : length] = 1
        self._length = length

    def _vacate(self, rows: np.ndarray, text: _Text) -> None:
        """Clear a text's places: attention multiplies what is masked by zero, and what overflowed in one text would be
        no number for the next one either."""
        rows[text.row, :, self._length - text.tokens : self._length] = 0

    def _moved(self, name: str, values: np.ndarray, places: int) -> np.ndarray:
        """Part of a cache (heads, tokens, head_dim) as it has to be `places` places further on."""
        return self._rotations[name].turned(values, places) if name in self._rotations else values

    def _allocate(self, rows: int, capacity: int) -> None:
        """Move every text into a cache of another size, to its first rows."""
        values, mask = self._decoder.cache, self._mask  # the values outlive the views of them
        old = {name: view(value) for name, value in values.items()}
        self._decoder.allocate(rows, capacity)
        places = [text.row for text in self._texts.values()]
        for name, new in self._views().items():
            new[...] = 0
            if places:
                new[: len(places), :, : self._length] = old[name][places, :, : self._length]
        self._mask = np.zeros((rows, capacity), dtype=np.int64)
        self._mask[: len(places), : mask.shape[1]] = mask[places]
        for row, text in enumerate(self._texts.values()):
            text.row = row

    def _views(self) -> dict[str, np.ndarray]:
        return {name: view(value) for name, value in self._decoder.cache.items()}


def texts_can_move(runner: OrtRunner) -> bool:
    """Whether a text goes on as it would where its keys have been moved to other places of the cache: tried."""

    def logits(places: int) -> np.ndarray:
        batch = RunningBatch(runner, 1, len(PROBE) + MOVED + 2)
        text, _ = batch.join(PROBE)
        if places:
            batch._move(len(PROBE) + places)
        return batch.step({text: PROBE[0]})[text]

    still, moved = logits(0), logits(MOVED)
    return bool(np.abs(moved - still).max() <= SAME * still.std())


class OneText:
    """`RunningBatch` for any runner, one text at a time."""

    max_batch = 1

    def __init__(self, runner: Runner, max_length: int) -> None:
        self._runner = runner
        self._max_length = max_length
        self._length = 0  # of the text that is running; 0 is none

    @property
    def full(self) -> bool:
        """Whether no further text can join."""
        return self._length > 0

    def join(self, prompt: Sequence[int]) -> tuple[int, np.ndarray]:
        """Read a prompt as the only text; returns its number, 0, and the logits (vocabulary,) of its next token."""
        return joined(self.joining(prompt))

    def joining(self, prompt: Sequence[int]) -> Iterator[tuple[int, np.ndarray] | None]:
        """The same, in one piece: there is nobody who could go on meanwhile."""
        if self.full:
            raise EngineUnavailable("the batch is full: 1 text")
        if not 0 < len(prompt) < self._max_length:
            raise EngineUnavailable(f"a prompt of {len(prompt)} tokens; valid: 1 to {self._max_length - 1}")
        input_ids = np.array([prompt], dtype=np.int64)
        logits = self._runner.prefill(input_ids, np.ones_like(input_ids), last_only=True)
        self._length = len(prompt)
        yield 0, logits[0, -1]

    def step(self, tokens: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Append one token to the text; returns the logits (vocabulary,) of its next one."""
        if self._length >= self._max_length:
            raise EngineUnavailable(f"a text has reached {self._max_length} tokens")
        logits = self._runner.decode(np.array([[tokens[0]]], dtype=np.int64))
        self._length += 1
        return {0: logits[0, -1]}

    def leave(self, number: int) -> None:
        """End the text; another can join."""
        self._length = 0


def joined(reading: Iterator[tuple[int, np.ndarray] | None]) -> tuple[int, np.ndarray]:
    """The text that a prompt has become, when all of it is read."""
    return next(filter(None, reading))


def view(value: Any) -> np.ndarray:
    """An OrtValue's own memory on the CPU as an array that can be written; the value has to outlive it."""
    dtype = np.dtype({"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.data_type()])
    shape = tuple(value.shape())
    size = int(np.prod(shape)) * dtype.itemsize
    memory: Any = (ctypes.c_char * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
