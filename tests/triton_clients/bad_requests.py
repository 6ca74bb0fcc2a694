"""Sends bad requests over gRPC and HTTP: ADDRESS_HTTP ADDRESS_GRPC MODEL COUNT SEED -> {what: [answers]} as JSON.

Runs in the server's environment, whose tritonclient the tests' own environment cannot have.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import np_to_triton_dtype

TIMEOUT_S = 30


def main() -> None:
    http, address, model, count, seed = sys.argv[1:]
    dice = random.Random(int(seed))
    kinds = {**{f"http {name}": make for name, make in HTTP.items()}, **{f"grpc {n}": make for n, make in GRPC.items()}}
    answers: dict[str, list[str]] = {name: [] for name in kinds}
    url = f"http://{http}/v2/models/{model}/generate"
    with grpc.InferenceServerClient(address) as client:
        for index in range(int(count)):
            name = list(kinds)[index % len(kinds)]
            made = kinds[name](dice)
            answers[name].append(post(url, made) if name.startswith("http") else ask(client, model, made))
    print(json.dumps(answers))


def text(dice: random.Random, length: int = 20) -> str:
    return "".join(dice.choice("abcdefghij ") for _ in range(length)) + "x"


def body(**inputs: Any) -> bytes:
    return json.dumps(inputs).encode()


HTTP: dict[str, Any] = {
    "nothing": lambda dice: body(),
    "not JSON": lambda dice: b"{" + text(dice).encode(),
    "a list": lambda dice: b"[1, 2]",
    "no text": lambda dice: body(max_tokens=dice.randint(1, 9)),
    "empty text": lambda dice: body(text_input=""),
    "text is a number": lambda dice: body(text_input=dice.randint(0, 9)),
    "text is an object": lambda dice: body(text_input={"a": 1}),
    "over-long": lambda dice: body(text_input=text(dice, dice.randint(5_000, 50_000))),
    "negative limit": lambda dice: body(text_input="x", max_tokens=-dice.randint(1, 10**6)),
    "huge limit": lambda dice: body(text_input="x", max_tokens=dice.randint(10**5, 2**31 - 1)),
    "limit beyond int32": lambda dice: body(text_input="x", max_tokens=2**40),
    "limit is text": lambda dice: body(text_input="x", max_tokens=text(dice)),
    "unknown parameter": lambda dice: body(text_input="x", best_of=dice.randint(1, 9)),
    "nested parameter": lambda dice: body(text_input="x", best_of=[{"nested": text(dice)}]),
    "negative temperature": lambda dice: body(text_input="x", temperature=-dice.random() - 0.1),
    "top_p beyond 1": lambda dice: body(text_input="x", top_p=1.1 + dice.random()),
    "negative top_k": lambda dice: body(text_input="x", top_k=-dice.randint(1, 99)),
    "no penalty": lambda dice: body(text_input="x", repetition_penalty=0.0),
    "negative seed": lambda dice: body(text_input="x", seed=-dice.randint(1, 2**60)),
    "empty stop": lambda dice: body(text_input="x", stop=["", text(dice)]),
    "too many stops": lambda dice: body(text_input="x", stop=[text(dice) for _ in range(40)]),
    "parameter of invalid UTF-8": lambda dice: b'{"text_input": "x", "user": "' + bytes([0xC3, 0x28]) + b'"}',
    "shortest answer beyond the longest": lambda dice: body(
        text_input="x", max_tokens=4, min_length=dice.randint(5, 9)
    ),
    "invalid UTF-8": lambda dice: b'{"text_input": "' + bytes([0xC3, 0x28, dice.randint(0x80, 0xFF)]) + b'"}',
}


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=object)


GRPC: dict[str, Any] = {
    "no inputs": lambda dice: {},
    "no text": lambda dice: {"max_tokens": np.array([dice.randint(1, 9)], np.int32)},
    "invalid UTF-8": lambda dice: {"text_input": strings(bytes([0xC3, 0x28, dice.randint(0x80, 0xFF)]))},
    "text of a wrong type": lambda dice: {"text_input": np.array([dice.random()], np.float32)},
    "two texts": lambda dice: {"text_input": strings(text(dice).encode(), b"b")},
    "text of a wrong shape": lambda dice: {"text_input": strings(b"a", b"b", b"c", b"d").reshape(2, 2)},
    "no elements": lambda dice: {"text_input": np.zeros([0], dtype=object)},
    "limit of a wrong type": lambda dice: {"text_input": strings(b"x"), "max_tokens": np.array([4], np.int64)},
    "negative limit": lambda dice: {"text_input": strings(b"x"), "max_tokens": np.array([-4], np.int32)},
    "smallest limit": lambda dice: {"text_input": strings(b"x"), "max_tokens": np.array([-(2**31)], np.int32)},
    "temperature is no number": lambda dice: {
        "text_input": strings(b"x"),
        "temperature": np.array([np.nan], np.float32),
    },
    "infinite temperature": lambda dice: {"text_input": strings(b"x"), "temperature": np.array([np.inf], np.float32)},
    "unknown input": lambda dice: {"text_input": strings(b"x"), "beam_width": np.array([2], np.int32)},
}


def post(url: str, data: bytes) -> str:
    """The server's words: those of an error, or everything."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            answer = reply.read().decode(errors="replace")
    except urllib.error.HTTPError as problem:
        answer = problem.read().decode(errors="replace")
    found = json.loads(answer)
    return f"error: {found['error']}" if "error" in found else answer


def ask(client: Any, model: str, inputs: dict[str, np.ndarray]) -> str:
    """The first answer on a gRPC stream of its own."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        tensors = []
        for name, values in inputs.items():
            tensor = grpc.InferInput(name, list(values.shape), str(np_to_triton_dtype(values.dtype)))
            tensor.set_data_from_numpy(values)
            tensors.append(tensor)
        client.async_stream_infer(model, tensors)
        result, error = answers.get(timeout=TIMEOUT_S)
        return f"error: {error.message()}" if error is not None else str(result.as_numpy("text_output"))
    finally:
        client.stop_stream()


if __name__ == "__main__":
    main()
