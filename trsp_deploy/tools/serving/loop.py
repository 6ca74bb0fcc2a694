"""Serves many requests with one engine: one that waits joins when there is room, each gets a token per step.

    loop = ServingLoop(batch, tokenizer, end_tokens=(2,), max_length=2048)
    loop.submit(Ticket(request, send=print, cancelled=lambda: False))
    loop.stop()

Knows nothing of Triton: `triton_model.py` brings requests and takes answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from trsp_deploy.errors import TrspError, named, one_line
from trsp_deploy.tools.runners.generation import Sampling, choose, penalised, prompt_tokens
from trsp_deploy.tools.serving.requests import GenerationRequest, RequestError
from trsp_deploy.tools.serving.text import TextStream

# Pieces of prompts read between two steps, so that requests being answered do not wait for all new ones: so many at
# most, and none is begun after so long.
PIECES, READING_S = 8, 0.25
LOOK_S = 0.5  # between two looks at who of a full queue has left: each asks the server about everyone in it
# Whatever may go wrong with one request; a panic of the tokenizers' Rust is no Exception.
ANYTHING = BaseException
STOPPING = "the server is stopping"
MOST_WAITING = 256  # requests; one that would wait behind so many is better off elsewhere, or told to come again
Finish = Literal["length", "end", "stop", "cancelled", "error"]
Fault = Literal["request", "engine", "busy", "stopping"]


@dataclass(frozen=True)
class Answer:
    """A piece of an answer; the last one has `finish`."""

    text: str
    tokens: int  # new ones so far
    finish: Finish | None = None
    error: str | None = None
    fault: Fault = "request"  # whose fault the error is


@dataclass(frozen=True)
class Ticket:
    """A request on its way: where its answers go, and whether its client is still there."""

    request: GenerationRequest
    send: Callable[[Answer], None]
    cancelled: Callable[[], bool]


class Batch(Protocol):
    """RunningBatch or OneText (tools/runners/running_batch.py)."""

    max_batch: int  # texts at once

    @property
    def full(self) -> bool: ...

    def joining(self, prompt: Sequence[int]) -> Iterator[tuple[int, np.ndarray] | None]: ...

    def step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]: ...

    def leave(self, number: int) -> None: ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request whose prompt is read and fits."""

    ticket: Ticket
    prompt: list[int]


@dataclass
class _Running:
    """One text in the batch."""

    ticket: Ticket
    prompt: list[int]
    stream: TextStream
    sampling: Sampling
    random: np.random.Generator
    stop_tokens: frozenset[int]  # stop strings that are one special token each, and so never show in the text
    tokens: list[int] = field(default_factory=list)
    text: str = ""  # not sent yet


@dataclass
class _Joining:
    """One text whose prompt the engine is reading."""

    running: _Running  # as it will be
    reading: Iterator[tuple[int, np.ndarray] | None]


class ServingLoop:
    """A thread that owns the batch; requests come from any other.

    batch: empty. end_tokens: those that end a text. max_length: tokens of a text, its prompt among them.
    most_waiting: requests beside those that are running; further ones are refused. max_prompt: tokens of a prompt; None
    is as many as a text may have.
    """

    def __init__(
        self,
        batch: Batch,
        tokenizer: Tokenizer,
        end_tokens: tuple[int, ...],
        max_length: int,
        most_waiting: int = MOST_WAITING,
        max_prompt: int | None = None,
    ) -> None:
        self._batch = batch
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._max_length = max_length
        self._max_prompt = max_length - 1 if max_prompt is None else min(max_prompt, max_length - 1)
        # What is longer than so many tokens of the longest kind is refused unread, also where a tokenizer would have
        # made one token for anything unknown of a part of it.
        self._most_characters = max_length * max(map(len, tokenizer.get_vocab()))
        self._special = {
            token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._most_waiting = most_waiting
        self._waiting: deque[_Waiting] = deque()
        self._news = threading.Condition()  # around `_waiting`: someone came, or the end has
        self._stopping = threading.Event()
        self._looked_s = -LOOK_S  # when it was last looked who has left
        self._joining: _Joining | None = None
        self._running: dict[int, _Running] = {}
        self._thread = threading.Thread(target=self._serve, name="trsp-deploy-serving", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Take a request; its answers are sent from the loop's thread, or from this one where it cannot be answered.

        The prompt is read here: a megabyte of it takes half a second, which nobody's stream should wait for.
        """
        if self._crowded() and time.monotonic() - self._looked_s >= LOOK_S:
            self._forget_who_left()
        try:  # who finds no place is told so at once, unread: those behind him wait here too
            waiting = None if self._crowded() else self._read(ticket)
        except ANYTHING as problem:
            _refuse(ticket, problem)
            return
        with self._news:
            if self._stopping.is_set():
                ticket.send(Answer("", 0, "error", STOPPING, "stopping"))
            elif waiting is None or self._crowded():
                busy = f"busy: no more than {self._most_waiting} requests may wait"
                ticket.send(Answer("", 0, "error", busy, "busy"))
            else:
                self._waiting.append(waiting)
                self._news.notify()

    def stop(self) -> None:
        """End the thread; a request that is not finished gets an error."""
        self._stopping.set()
        with self._news:
            self._news.notify()
        self._thread.join()

    def _crowded(self) -> bool:
        """Whether as many wait as may, beside those whom the batch has room for."""
        inside = len(self._running) + (self._joining is not None)
        return len(self._waiting) + inside >= self._most_waiting + self._batch.max_batch

    def _forget_who_left(self) -> None:
        """Answer those who wait and whose client is gone; they would be in the way of others. The loop goes on
        meanwhile, and may let some of them in.

        A request that has had its last answer may not be asked about any more: the server has forgotten it, and reads
        what was freed. So each is asked while the loop cannot take it, which the loop, where it has a row to give, may
        have to wait for: at the worst for as many round trips as requests wait, once in LOOK_S.
        """
        with self._news:
            waiting = list(self._waiting)
        for each in waiting:
            with self._news:
                if each in self._waiting and _cancelled(each.ticket):
                    self._waiting.remove(each)
                    each.ticket.send(Answer("", 0, "cancelled"))
        self._looked_s = time.monotonic()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._admit()
            for number in [number for number, running in self._running.items() if _cancelled(running.ticket)]:
                self._finish(number, "cancelled")
            if self._running:
                self._step()
        for number in list(self._running):
            self._finish(number, "error", STOPPING, "stopping")
        with self._news:
            left = [waiting.ticket for waiting in self._waiting]
            self._waiting.clear()
        for ticket in [self._joining.running.ticket, *left] if self._joining is not None else left:
            ticket.send(Answer("", 0, "error", STOPPING, "stopping"))

    def _admit(self) -> None:
        """Read the prompts of waiting requests while there is room; with none running, wait for one."""
        began_s: float | None = None
        for _ in range(PIECES):
            if self._joining is None and not self._begin():
                return
            began_s = began_s or time.monotonic()
            self._read_on()
            if time.monotonic() - began_s >= READING_S:
                return

    def _begin(self) -> bool:
        """Let in who has waited longest; whether there was room, and anyone."""
        waiting = None if self._batch.full else self._next()
        if waiting is not None:
            # Whatever goes wrong is one client's: a thread that ends would leave all of them waiting for ever.
            try:
                self._joining = self._let_in(waiting)
            except ANYTHING as problem:
                _refuse(waiting.ticket, problem)
        return waiting is not None

    def _read_on(self) -> None:
        """Read a piece of the prompt of who was let in; with the last one the text runs."""
        if self._joining is None:  # who was let in could not be
            return
        running, found = self._joining.running, None
        if _cancelled(running.ticket):
            self._joining = None
            running.ticket.send(Answer("", 0, "cancelled"))
            return
        try:
            found = next(self._joining.reading)
        except ANYTHING as problem:
            self._joining = None
            _refuse(running.ticket, problem)
        if found is not None:
            self._joining = None
            number, logits = found
            self._running[number] = running
            self._take(number, logits)

    def _next(self) -> _Waiting | None:
        """Who has waited longest; None where nobody does and texts are running, or at the end."""
        with self._news:
            while not (self._waiting or self._running or self._stopping.is_set()):
                self._news.wait()
            return self._waiting.popleft() if self._waiting and not self._stopping.is_set() else None

    def _read(self, ticket: Ticket) -> _Waiting:
        """Make tokens of a request's text; raises RequestError where they do not fit."""
        request = ticket.request
        if len(request.text_input) > self._most_characters:
            raise RequestError(
                f"input 'text_input': {len(request.text_input)} characters, more than {self._max_length} tokens hold; "
                f"at most {self._most_characters}"
            )
        # Of a batch, for that lets other threads go on meanwhile; reading one text alone does not.
        (encoded,) = self._tokenizer.encode_batch([request.text_input], add_special_tokens=request.add_special_tokens)
        prompt = prompt_tokens(encoded.ids, encoded.special_tokens_mask)
        room = self._max_length - len(prompt)
        if not prompt:
            raise RequestError("input 'text_input': has no tokens")
        if len(prompt) > self._max_prompt:
            raise RequestError(f"input 'text_input': {len(prompt)} tokens, at most {self._max_prompt}")
        if request.max_tokens > room:
            if "max_tokens" in request.model_fields_set:
                raise RequestError(f"input 'max_tokens': {request.max_tokens}; after this prompt at most {room} fit")
            if request.min_length > room:
                raise RequestError(f"input 'min_length': {request.min_length}; after this prompt at most {room} fit")
            request = request.model_copy(update={"max_tokens": room})  # the client asked for no number
            ticket = replace(ticket, request=request)
        return _Waiting(ticket, prompt)

    def _let_in(self, waiting: _Waiting) -> _Joining:
        ticket, prompt = waiting.ticket, waiting.prompt
        request = ticket.request
        running = _Running(
            ticket,
            prompt,
            TextStream(self._tokenizer, prompt, request.stop),
            request.sampling(self._end_tokens),
            np.random.default_rng(request.seed),
            frozenset(self._special[word] for word in request.stop if word in self._special),
            text="" if request.exclude_input_in_output else request.text_input,
        )
        return _Joining(running, self._batch.joining(prompt))

    def _step(self) -> None:
        try:
            logits = self._batch.step({number: running.tokens[-1] for number, running in self._running.items()})
        except ANYTHING as problem:  # the engine stopped: no text can go on
            for number in list(self._running):
                self._finish(number, "error", _line(problem))
            return
        for number in list(self._running):
            self._take(number, logits[number])

    def _take(self, number: int, logits: np.ndarray) -> None:
        """Choose a text's next token and send what that shows; what goes wrong ends this text alone."""
        try:
            self._advance(number, self._running[number], logits)
        except ANYTHING as problem:
            if number in self._running:
                self._finish(number, "error", _line(problem))

    def _advance(self, number: int, running: _Running, logits: np.ndarray) -> None:
        request, sampling = running.ticket.request, running.sampling
        scores = penalised(logits, running.prompt + running.tokens, request.repetition_penalty)
        if len(running.tokens) < request.min_length:
            scores = scores.copy()
            scores[[end for end in sampling.end if end < len(scores)]] = -np.inf
        token = int(choose(scores[None], sampling, running.random)[0])
        if token in running.stop_tokens:
            self._finish(number, "stop")
            return
        if token in sampling.end:
            self._finish(number, "end")
            return
        running.tokens.append(token)
        running.text += running.stream.add(token)
        if running.stream.stopped:
            self._finish(number, "stop")
        elif len(running.tokens) == request.max_tokens:
            self._finish(number, "length")
        elif request.stream and running.text:
            running.ticket.send(Answer(running.text, len(running.tokens)))
            running.text = ""

    def _finish(self, number: int, finish: Finish, error: str | None = None, fault: Fault = "engine") -> None:
        running = self._running.pop(number)
        text = running.text
        try:
            self._batch.leave(number)
            if not running.stream.stopped and finish != "error":
                text += running.stream.end()
                if running.stream.stopped and finish in ("length", "end"):  # by a token that ends in half a character
                    finish = "stop"
        except ANYTHING as problem:
            finish, error = "error", error or _line(problem)
        running.ticket.send(Answer(text, len(running.tokens), finish, error, fault))


def _refuse(ticket: Ticket, problem: BaseException) -> None:
    fault: Fault = "request" if isinstance(problem, RequestError) else "engine"
    ticket.send(Answer("", 0, "error", _line(problem), fault))


def _cancelled(ticket: Ticket) -> bool:
    """Whether a client is gone; so is one that cannot be asked."""
    try:
        return ticket.cancelled()
    except ANYTHING:
        return True


def _line(problem: BaseException) -> str:
    """An error as one line for a client, with its kind where it is none of ours."""
    return one_line(problem) if isinstance(problem, TrspError) else named(problem)
