"""Many streamed requests over gRPC, some cancelled before or after the first piece: ADDRESS MODEL COUNT SHARE SEED.

stdin: {"prompts": [...], "max_tokens": n} as JSON. Prints {"texts": {prompt: [texts of those that were
not cancelled]}, "cancelled": n, "errors": [...]}. Runs in the server's environment, which has tritonclient.
Ends with code 3 where no answer comes for a minute.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import random
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

CLIENTS = 8
TIMEOUT_S = 60


def main() -> None:
    address, model, count, share, seed = sys.argv[1:]
    asked = json.load(sys.stdin)
    dice = random.Random(int(seed))
    jobs: queue.Queue[tuple[int, int | None]] = queue.Queue()
    for index in range(int(count)):
        # None: to its end; else after so many pieces.
        after = dice.randint(0, 1) if dice.random() < float(share) else None
        jobs.put((index % len(asked["prompts"]), after))
    texts: dict[int, set[str]] = defaultdict(set)
    cancelled, errors = 0, []
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for done in pool.map(lambda _: work(address, model, asked, jobs), range(CLIENTS)):
            for prompt, text, error, stopped in done:
                cancelled += stopped
                if error is not None:
                    errors.append(error)
                elif not stopped:
                    texts[prompt].add(text)
    found = {"texts": {k: sorted(v) for k, v in texts.items()}, "cancelled": cancelled, "errors": errors}
    print(json.dumps(found))


def work(address: str, model: str, asked: dict[str, Any], jobs: queue.Queue[Any]) -> list[tuple[int, str, Any, bool]]:
    found = []
    with grpc.InferenceServerClient(address) as client:
        while True:
            try:
                prompt, after = jobs.get_nowait()
            except queue.Empty:
                return found
            found.append((prompt, *stream(client, model, asked, prompt, after)))


def stream(client: Any, model: str, asked: dict[str, Any], prompt: int, after: int | None) -> tuple[str, Any, bool]:
    """Text, error and whether it was cancelled."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    inputs = {
        "text_input": np.array([asked["prompts"][prompt].encode()], dtype=object),
        "max_tokens": np.array([asked["max_tokens"]], np.int32),
        "stream": np.array([True]),
        "ignore_eos": np.array([True]),
    }
    tensors = []
    for name, values in inputs.items():
        tensor = grpc.InferInput(name, [1], {"O": "BYTES", "i": "INT32", "?": "BOOL"}[values.dtype.char])
        tensor.set_data_from_numpy(values)
        tensors.append(tensor)
    client.async_stream_infer(model, tensors)
    text, pieces = "", 0
    while True:
        if after is not None and pieces >= after:
            client.stop_stream(cancel_requests=True)
            return text, None, True
        try:
            result, error = answers.get(timeout=TIMEOUT_S)
        except queue.Empty:
            print(f"no answer to a request for {TIMEOUT_S} s", file=sys.stderr, flush=True)
            os._exit(3)  # closing a stream waits for its answers, without end
        if error is not None:
            client.stop_stream()
            return text, error.message(), False
        pieces += 1
        text += result.as_numpy("text_output")[0].decode()
        if result.as_numpy("finish_reason")[0]:
            client.stop_stream()
            return text, None, False


if __name__ == "__main__":
    main()
