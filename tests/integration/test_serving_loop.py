"""The loop that serves many requests at once, and the part of the toolkit that a server gets."""

from __future__ import annotations

import queue
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
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.breadth import BREADTH
from tests.served_engine import MAX_LENGTH, alone, opened
from tests.tiny import beginning_tokenizer, ending_tokenizer
from trsp_deploy.tools.model_repository.vendor import vendor
from trsp_deploy.tools.runners import running_batch
from trsp_deploy.tools.serving import loop as loop_module
from trsp_deploy.tools.serving.loop import LOOK_S, PIECES, READING_S, Answer, ServingLoop, Ticket
from trsp_deploy.tools.serving.requests import GenerationRequest


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


@pytest.fixture
def loop(served_engine: Path, served_tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    with opened(served_engine, 4, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, served_tokenizer, (0,), MAX_LENGTH)
        yield loop
        loop.stop()


def test_many_requests_at_once_get_the_answers_of_each_alone(
    loop: ServingLoop, served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    prompts = [f"def function_{number}(" * (number % 3 + 1) for number in range(10)]
    clients = [Client(text_input=p, max_tokens=20, stream=n % 2 == 0, ignore_eos=True) for n, p in enumerate(prompts)]
    for client in clients:
        loop.submit(client.ticket)
    for prompt, client in zip(prompts, clients, strict=True):
        answers = client.wait()
        expected = served_tokenizer.decode(alone(served_engine, served_tokenizer.encode(prompt).ids, 20))
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


def test_what_is_there_is_penalised_as_transformers_does(
    loop: ServingLoop, served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(served_engine.parent / "model", torch_dtype=torch.float32).eval()
    ids = torch.tensor([served_tokenizer.encode("class ").ids])
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "eos_token_id": -1, "pad_token_id": 0}
    texts = []
    for penalty in (1.0, 1.3):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **options)
        texts.append(served_tokenizer.decode(made[0, ids.shape[1] :].tolist()))
        client = Client(text_input="class ", max_tokens=20, ignore_eos=True, repetition_penalty=penalty)
        loop.submit(client.ticket)
        assert client.wait()[-1].text == texts[-1]
    assert texts[0] != texts[1]


def test_who_does_not_say_how_many_tokens_gets_what_fits(loop: ServingLoop, served_tokenizer: Tokenizer) -> None:
    long = " the" * (MAX_LENGTH - 40)
    room = MAX_LENGTH - len(served_tokenizer.encode(long).ids)
    assert 0 < room < 64
    client = Client(text_input=long, ignore_eos=True)
    loop.submit(client.ticket)
    last = client.wait()[-1]
    assert (last.tokens, last.finish) == (room, "length")


def test_a_client_that_goes_away_frees_its_row(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    asked, go_on = threading.Semaphore(0), threading.Semaphore(0)
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        step = batch.step

        def gated(tokens: dict[int, int]) -> dict[int, np.ndarray]:
            asked.release()
            assert go_on.acquire(timeout=30)
            return step(tokens)

        batch.step = gated  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH)
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


def test_a_prompt_that_the_engine_cannot_read_at_once_is_the_clients_affair(
    served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH, max_prompt=3)
        long, fine = Client(text_input="one two three four", max_tokens=1), Client(text_input="x", max_tokens=20)
        for client in (long, fine):
            loop.submit(client.ticket)
        refused, answer = long.wait()[-1], fine.wait()[-1]
        loop.stop()
    tokens = len(served_tokenizer.encode("one two three four").ids)
    assert (refused.error, refused.fault) == (f"input 'text_input': {tokens} tokens, at most 3", "request")
    assert answer.error is None and answer.tokens == 20, "the text may be longer than its prompt"


def test_a_prompt_ends_where_its_text_does(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    """Behind the EOS that some tokenizers put behind each text a model begins another one."""
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        loop = ServingLoop(batch, ending_tokenizer().backend_tokenizer, (), MAX_LENGTH)
        client = Client(text_input="def function_1(", max_tokens=20)
        loop.submit(client.ticket)
        found = client.wait()[-1].text
        loop.stop()
    assert found
    assert found == served_tokenizer.decode(alone(served_engine, served_tokenizer.encode("def function_1(").ids, 20))


def test_a_prompt_that_begins_with_bos_gets_no_second_one(served_engine: Path) -> None:
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        tokenizer = beginning_tokenizer()
        loop = ServingLoop(batch, tokenizer.backend_tokenizer, (), MAX_LENGTH)
        texts = ("def function_1(", f"{tokenizer.bos_token}def function_1(")
        plain, written = (Client(text_input=text, max_tokens=20, exclude_input_in_output=True) for text in texts)
        for client in (plain, written):
            loop.submit(client.ticket)
        found = [client.wait()[-1].text for client in (plain, written)]
        loop.stop()
    assert found[0] and found[0] == found[1]


def spied(tokenizer: Tokenizer, read: list[tuple[str, int]]) -> Any:
    """The same tokenizer; `read` gets the thread and the length of each prompt."""

    def encode_batch(texts: list[str], add_special_tokens: bool) -> Any:
        read.append((threading.current_thread().name, len(texts[0])))
        return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    parts = ("get_vocab", "get_added_tokens_decoder", "decode")
    return SimpleNamespace(encode_batch=encode_batch, **{name: getattr(tokenizer, name) for name in parts})


def test_a_prompt_is_read_by_who_brings_it_and_not_at_all_where_it_cannot_fit(
    served_engine: Path, served_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a megabyte takes half a second: nobody's stream waits for it."""
    read: list[tuple[str, int]] = []
    spy = spied(served_tokenizer, read)
    longest = MAX_LENGTH * max(map(len, served_tokenizer.get_vocab()))
    fine, too_long = Client(text_input="x", max_tokens=2), Client(text_input="x" * (longest + 1))
    with opened(served_engine, 4, MAX_LENGTH) as batch:
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
    monkeypatch.setattr(ServingLoop, "_let_in", lambda self, waiting: [][0])
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


def test_a_special_token_can_be_a_stop_string(
    loop: ServingLoop, served_tokenizer: Tokenizer, served_engine: Path
) -> None:
    number, token = next((n, t) for n, t in served_tokenizer.get_added_tokens_decoder().items() if t.special)
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


@pytest.mark.parametrize("most", [2, 5])
def test_a_stop_string_before_half_a_character_is_the_reason_of_the_end(most: int) -> None:
    """The text waits for the other half, and ends, by its length or a token, before it is looked into."""
    tokenizer = Tokenizer(models.BPE({"x": 0, "ENDð": 1, "</s>": 2}, []))  # ð is how byte F0 is written
    tokenizer.decoder = decoders.ByteLevel()
    logits = iter(np.eye(3, dtype=np.float32))
    batch: Any = SimpleNamespace(
        max_batch=1,
        full=False,
        joining=lambda prompt: iter([(0, next(logits))]),
        step=lambda tokens: {0: next(logits)},
        leave=lambda number: None,
    )
    loop = ServingLoop(batch, tokenizer, (2,), MAX_LENGTH)
    client = Client(text_input="x", max_tokens=most, stop=("END",))
    loop.submit(client.ticket)
    last = client.wait()[-1]
    loop.stop()
    assert (last.text, last.tokens, last.finish) == ("x", 2, "stop")


def test_who_is_answered_already_does_not_wait_for_all_who_come(
    served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    """Requests of one token leave at once: they must not keep a running text from its next one."""
    order: list[str] = []
    with opened(served_engine, 2, MAX_LENGTH) as batch:
        joining, step = batch.joining, batch.step
        batch.joining = lambda prompt: (order.append("join"), joining(prompt))[1]  # type: ignore[method-assign]
        batch.step = lambda tokens: (order.append("step"), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH)
        clients = [Client(text_input="x", max_tokens=30)] + [Client(text_input="y", max_tokens=1) for _ in range(40)]
        for client in clients:
            loop.submit(client.ticket)
        for client in clients:
            client.wait()
        loop.stop()
    longest = max(len(run) for run in "".join(name[0] for name in order).split("s"))
    assert longest <= PIECES


@BREADTH
def test_who_is_answered_already_does_not_wait_for_several_long_prompts(
    served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    order: list[str] = []
    with opened(served_engine, 4, MAX_LENGTH) as batch:
        joining, step = batch.joining, batch.step

        def slow(prompt):  # type: ignore[no-untyped-def]
            order.append("join")
            time.sleep(READING_S)
            yield from joining(prompt)

        batch.joining = slow  # type: ignore[method-assign]
        batch.step = lambda tokens: (order.append("step"), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH)
        clients = [Client(text_input="x", max_tokens=5) for _ in range(4)]
        for client in clients:
            loop.submit(client.ticket)
        for client in clients:
            client.wait()
        loop.stop()
    assert order[:7] == ["join", "step"] * 3 + ["join"]


def in_pieces(batch: Any, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read 8 tokens at a time, one piece between two steps; `order` is told."""
    monkeypatch.setattr(loop_module, "READING_S", 0.0)
    monkeypatch.setattr(running_batch, "PIECE", 8)
    joining, step = batch.joining, batch.step

    def reading(prompt):  # type: ignore[no-untyped-def]
        for each in joining(prompt):
            order.append("piece")
            yield each

    batch.joining = reading
    batch.step = lambda tokens: (order.append("step"), step(tokens))[1]


def test_a_long_prompt_is_read_between_the_steps_of_others(
    served_engine: Path, served_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    long = "def function(first, second):\n    return first + second\n" * 2
    ids = served_tokenizer.encode(long).ids
    pieces = -(-len(ids) // 8)
    with opened(served_engine, 2, MAX_LENGTH) as batch:
        in_pieces(batch, order, monkeypatch)
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH)
        running, late = Client(text_input="x", max_tokens=30), Client(text_input=long, max_tokens=10)
        for client in (running, late):
            loop.submit(client.ticket)
        answers = [client.wait()[-1] for client in (running, late)]
        loop.stop()
    begun = order.index("piece", 1)  # how many steps the first has to itself until then is the machine's to say
    assert order[:begun] == ["piece"] + ["step"] * (begun - 1) and begun > 1
    assert order[begun : begun + 2 * pieces - 1] == ["piece", "step"] * (pieces - 1) + ["piece"]
    expected = [alone(served_engine, served_tokenizer.encode("x").ids, 30), alone(served_engine, ids, 10)]
    assert [answer.text for answer in answers] == [served_tokenizer.decode(tokens) for tokens in expected]


def test_who_leaves_while_a_prompt_is_read_is_answered_and_so_is_everyone_at_the_end(
    served_engine: Path, served_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        in_pieces(batch, order, monkeypatch)
        go_on, reading = threading.Event(), batch.joining

        def held(prompt):  # type: ignore[no-untyped-def]
            for number, each in enumerate(reading(prompt)):
                yield each
                if number == 0:
                    assert go_on.wait(30)

        batch.joining = held
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH)
        left, next_one = (Client(text_input="a b c d e f g h " * 4, max_tokens=2) for _ in range(2))
        for client in (left, next_one):
            loop.submit(client.ticket)
        until = time.monotonic() + 60
        while not order:
            assert time.monotonic() < until
            time.sleep(0.01)
        left.gone = True
        go_on.set()
        assert left.wait()[-1].finish == "cancelled" and next_one.wait()[-1].finish == "length"
        go_on.clear()
        order.clear()
        last = Client(text_input="a b c d e f g h " * 4, max_tokens=2)
        loop.submit(last.ticket)
        while not order:
            assert time.monotonic() < until
            time.sleep(0.01)
        loop._stopping.set()
        go_on.set()
        loop.stop()
        assert (last.wait()[-1].finish, batch.size) == ("error", 0)


def test_the_end_comes_no_earlier_than_was_asked(loop: ServingLoop) -> None:
    plain = loop._batch.step

    def step(tokens):  # type: ignore[no-untyped-def]
        found = plain(tokens)
        for logits in found.values():
            logits[0] = 1e9
        return found

    loop._batch.step = step  # type: ignore[method-assign]
    soon, later = (Client(text_input="x", max_tokens=20, min_length=least) for least in (0, 5))
    for client in (soon, later):
        loop.submit(client.ticket)
    assert [(last.finish, last.tokens) for last in (soon.wait()[-1], later.wait()[-1])] == [("end", 1), ("end", 5)]
    too_long = Client(text_input="x" * 150, min_length=60)
    loop.submit(too_long.ticket)
    assert "input 'min_length'" in str(too_long.wait()[-1].error)


def test_a_chat_templates_text_gets_no_second_beginning(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    begin = served_tokenizer.id_to_token(1)
    tokenizer = Tokenizer.from_str(served_tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    prompts = []
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        joining = batch.joining
        batch.joining = lambda prompt: (prompts.append(prompt), joining(prompt))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, tokenizer, (), MAX_LENGTH)
        clients = [
            Client(text_input="def", max_tokens=1),
            Client(text_input=f"{begin}def", max_tokens=1, add_special_tokens=False),
        ]
        for client in clients:
            loop.submit(client.ticket)
            client.wait()
        loop.stop()
    assert prompts[0] == prompts[1] and prompts[0].count(1) == 1


def test_a_crowd_that_is_refused_does_not_have_everyone_asked_for(
    served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    """Asking the server whether a client has left takes a round trip, and those who are refused come again at once."""
    asked = []
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        go_on, step = threading.Event(), batch.step
        batch.step = lambda tokens: (go_on.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH, most_waiting=50)
        clients = [Client(text_input="x", max_tokens=2) for _ in range(151)]
        began_s = time.monotonic()
        for client in clients:
            ticket = client.ticket
            loop.submit(Ticket(ticket.request, ticket.send, lambda: bool(asked.append(1))))
        looks = 1 + (time.monotonic() - began_s) / LOOK_S
        go_on.set()
        ends = [client.wait()[-1].finish for client in clients]
        loop.stop()
    assert ends.count("error") >= 99
    assert len(asked) <= 51 * (looks + 4), "at each look, and of each when it joins and at its steps"


def test_who_finds_too_many_waiting_is_told_so_and_who_left_does_not_count(
    served_engine: Path, served_tokenizer: Tokenizer
) -> None:
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        go_on, step = threading.Event(), batch.step
        batch.step = lambda tokens: (go_on.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH, most_waiting=2)
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
        time.sleep(LOOK_S)
        loop.submit(last.ticket)
        assert left.wait()[-1].finish == "cancelled", "at once: nobody took its place while it was full"
        go_on.set()
        assert [client.wait()[-1].finish for client in (running, waiting, last)] == ["length"] * 3
        loop.stop()
        late = Client(text_input="x")
        loop.submit(late.ticket)
        assert late.wait()[-1].fault == "stopping"
    assert (refused.error, refused.fault) == ("busy: no more than 2 requests may wait", "busy")


def test_who_finds_too_many_waiting_is_told_so_unread(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    """Reading a megabyte would keep those behind it from hearing the same."""
    read: list[tuple[str, int]] = []
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        go_on, step = threading.Event(), batch.step
        batch.step = lambda tokens: (go_on.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, spied(served_tokenizer, read), (), MAX_LENGTH, most_waiting=0)
        running, busy = Client(text_input="x", max_tokens=2), Client(text_input="y" * 50)
        for client in (running, busy):
            loop.submit(client.ticket)
        refused = busy.wait()[-1]
        go_on.set()
        assert running.wait()[-1].finish == "length"
        loop.stop()
    assert refused.fault == "busy" and [size for _, size in read] == [1]


def test_nobody_is_asked_for_who_has_had_the_last_answer(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    """The server forgets a request with that, and would read what was freed."""
    too_late: list[str] = []
    with opened(served_engine, 1, MAX_LENGTH) as batch:
        go_on, step = threading.Event(), batch.step
        batch.step = lambda tokens: (go_on.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH, most_waiting=2)
        clients = {name: Client(text_input="x", max_tokens=2) for name in ("running", "first", "second", "last")}
        ended = {name: threading.Event() for name in clients}

        def ticket(name: str) -> Ticket:
            def send(answer: Answer) -> None:
                if answer.finish is not None:
                    ended[name].set()
                clients[name].answers.put(answer)

            def cancelled() -> bool:
                before = ended[name].is_set()
                if name == "first" and threading.current_thread() is threading.main_thread():
                    go_on.set()
                    ended["second"].wait(1)  # which the loop may let in and answer
                if before or ended[name].is_set():
                    too_late.append(name)
                return False

            return Ticket(clients[name].ticket.request, send, cancelled)

        loop.submit(ticket("running"))
        until = time.monotonic() + 60
        while not loop._running:
            assert time.monotonic() < until
            time.sleep(0.01)
        for name in ("first", "second", "last"):
            loop.submit(ticket(name))
        assert all(event.wait(30) for event in ended.values())
        loop.stop()
    assert too_late == []


def test_a_burst_on_an_idle_server_fills_the_batch_first(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    with opened(served_engine, 4, MAX_LENGTH) as batch:
        go_on, joining = threading.Event(), batch.joining
        batch.joining = lambda prompt: (go_on.wait(30), joining(prompt))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (), MAX_LENGTH, most_waiting=0)
        clients = [Client(text_input="x", max_tokens=2) for _ in range(4)]
        for client in clients:
            loop.submit(client.ticket)
        go_on.set()
        assert [client.wait()[-1].finish for client in clients] == ["length"] * 4
        loop.stop()


def test_stopping_answers_everyone(served_engine: Path, served_tokenizer: Tokenizer) -> None:
    """Who runs, and who waits: no step is done before the end has come, so that nobody is finished."""
    with opened(served_engine, 2, MAX_LENGTH) as batch:
        step = batch.step
        batch.step = lambda tokens: (loop._stopping.wait(30), step(tokens))[1]  # type: ignore[method-assign]
        loop = ServingLoop(batch, served_tokenizer, (0,), MAX_LENGTH)
        clients = [Client(text_input="x", max_tokens=190, ignore_eos=True) for _ in range(5)]
        for client in clients:
            loop.submit(client.ticket)
        until = time.monotonic() + 30
        while not loop._running:
            assert time.monotonic() < until
            time.sleep(0.01)
        loop.stop()
    ends = [client.wait()[-1] for client in clients]
    assert [(end.finish, end.fault) for end in ends] == [("error", "stopping")] * 5
    assert ends[0].tokens == 2, "its prompt's and that of the step that was under way"


# -- vendoring ---------------------------------------------------------------------------------------------------------


@BREADTH
def test_the_vendored_part_serves_by_itself(served_engine: Path, served_tokenizer: Tokenizer, tmp_path: Path) -> None:
    vendor(tmp_path / "vendor")
    served_tokenizer.save(str(tmp_path / "tokenizer.json"))
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
with open_batch(Path({str(served_engine)!r}), 2, 100) as batch:
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
