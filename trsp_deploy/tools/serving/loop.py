"""Serves many requests with one engine: who waits joins as soon as there is room, everyone gets a token a step.

    loop = ServingLoop(batch, tokenizer, end_tokens=(2,), max_length=2048)
    loop.submit(Ticket(request, send=print, cancelled=lambda: False))
    loop.stop()

Knows nothing of Triton: `triton_model.py` brings requests and takes answers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from trsp_deploy.errors import TrspError
from trsp_deploy.tools.generation import Sampling, choose, penalised
from trsp_deploy.tools.serving.requests import GenerationRequest, RequestError
from trsp_deploy.tools.serving.text import TextStream

Finish = Literal["length", "end", "stop", "cancelled", "error"]


@dataclass(frozen=True)
class Answer:
    """A piece of an answer; the last one has `finish`."""

    text: str
    tokens: int  # new ones so far
    finish: Finish | None = None
    error: str | None = None


@dataclass(frozen=True)
class Ticket:
    """A request on its way: where its answers go, and whether its client is still there."""

    request: GenerationRequest
    send: Callable[[Answer], None]
    cancelled: Callable[[], bool]


class Batch(Protocol):
    """RunningBatch or OneText (tools/runners/running_batch.py)."""

    @property
    def full(self) -> bool: ...

    def join(self, prompt: Sequence[int]) -> tuple[int, np.ndarray]: ...

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]: ...

    def leave(self, row: int) -> None: ...


@dataclass
class _Running:
    """One text in the batch."""

    ticket: Ticket
    prompt: list[int]
    stream: TextStream
    sampling: Sampling
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""  # not sent yet


class ServingLoop:
    """A thread that owns the batch; requests come from any other.

    batch: empty. end_tokens: those that end a text. max_length: tokens of a text, its prompt among them.
    """

    def __init__(self, batch: Batch, tokenizer: Tokenizer, end_tokens: tuple[int, ...], max_length: int) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._max_length = max_length
        self._waiting: queue.Queue[Ticket | None] = queue.Queue()  # None: stop
        self._running: dict[int, _Running] = {}
        self._thread = threading.Thread(target=self._serve, name="trsp-deploy-serving", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Take a request; its answers are sent from the loop's thread."""
        self._waiting.put(ticket)

    def stop(self) -> None:
        """End the thread; who is not finished gets an error."""
        self._waiting.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while True:
            if not self._admit():
                break
            for row in [row for row, running in self._running.items() if running.ticket.cancelled()]:
                self._finish(row, "cancelled")
            if self._running:
                self._step()
        for row in list(self._running):
            self._finish(row, "error", "the server is stopping")
        while not self._waiting.empty():
            ticket = self._waiting.get()
            if ticket is not None:
                ticket.send(Answer("", 0, "error", "the server is stopping"))

    def _admit(self) -> bool:
        """Let in who waits while there is room; with nobody running, wait for someone. False: stop."""
        while not self._batch.full:
            try:
                ticket = self._waiting.get(block=not self._running)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if ticket.cancelled():
                ticket.send(Answer("", 0, "cancelled"))
                continue
            try:
                self._join(ticket)
            except TrspError as problem:
                ticket.send(Answer("", 0, "error", str(problem)))
        return True

    def _join(self, ticket: Ticket) -> None:
        request = ticket.request
        prompt = self._tokenizer.encode(request.text_input).ids
        room = self._max_length - len(prompt)
        if not prompt:
            raise RequestError("input 'text_input': has no tokens")
        if room < 1:
            raise RequestError(f"input 'text_input': {len(prompt)} tokens, at most {self._max_length - 1}")
        if request.max_tokens > room:
            raise RequestError(f"input 'max_tokens': {request.max_tokens}; after this prompt at most {room} fit")
        row, logits = self._batch.join(prompt)
        running = _Running(
            ticket,
            prompt,
            TextStream(self._tokenizer, prompt, request.stop),
            request.sampling(self._end_tokens),
            np.random.default_rng(request.seed),
            text="" if request.exclude_input_in_output else request.text_input,
        )
        self._running[row] = running
        self._take(row, logits)

    def _step(self) -> None:
        try:
            logits = self._batch.step({row: running.tokens[-1] for row, running in self._running.items()})
        except TrspError as problem:  # the engine stopped: nobody's text can go on
            for row in list(self._running):
                self._finish(row, "error", str(problem))
            return
        for row in list(self._running):
            self._take(row, logits[row])

    def _take(self, row: int, logits: np.ndarray) -> None:
        """Choose a text's next token and send what that shows."""
        running = self._running[row]
        request, sampling = running.ticket.request, running.sampling
        scores = penalised(logits, running.prompt + running.tokens, request.repetition_penalty)
        token = int(choose(scores[None], sampling, running.random)[0])
        if token in sampling.end:
            self._finish(row, "end")
            return
        running.tokens.append(token)
        running.text += running.stream.add(token)
        if running.stream.stopped:
            self._finish(row, "stop")
        elif len(running.tokens) == request.max_tokens:
            self._finish(row, "length")
        elif request.stream and running.text:
            running.ticket.send(Answer(running.text, len(running.tokens)))
            running.text = ""

    def _finish(self, row: int, finish: Finish, error: str | None = None) -> None:
        running = self._running.pop(row)
        self._batch.leave(row)
        text = running.text if running.stream.stopped else running.text + running.stream.end()
        running.ticket.send(Answer(text, len(running.tokens), finish, error))
