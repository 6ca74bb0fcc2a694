"""Drives a step model through the code of a repository's README; run in the server's environment, prints JSON.

stdin: {"folder": of the repository, "block": the README's code, "address": "127.0.0.1:8001", "prompts": [[5, 9], ...],
"count": 16, "most": 64}
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import tritonclient.grpc as grpc

Step = Callable[..., Any]


def interleaved(step: Step, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of sequences that take turns."""
    texts: list[list[int]] = [[] for _ in prompts]
    for number in range(count):
        for sequence, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=100):
            flags = {"sequence_start": number == 0, "sequence_end": number == count - 1}
            text.append(int(step(text[-1:] or prompt, sequence, **flags).argmax()))
    return texts


def refused(step: Step, *arguments: Any, **flags: Any) -> str:
    """What the server says to a request that it cannot answer."""
    from tritonclient.utils import InferenceServerException

    try:
        step(*arguments, **flags)
    except InferenceServerException as problem:
        return str(problem)
    return ""


def past_the_end(step: Step, prompt: list[int], most: int) -> dict[str, Any]:
    """A sequence that asks for too much, goes on as if it had not until it is full, and leaves its number to another
    without an end."""
    tokens = [int(step(prompt, 200, sequence_start=True).argmax())]
    at_once = refused(step, [1] * (most - len(prompt) + 1), 200)
    tokens.append(int(step(tokens, 200).argmax()))
    step([1] * (most - len(prompt) - 1), 200)
    one_more = refused(step, [1], 200)
    begun = int(step(prompt, 200, sequence_start=True, sequence_end=True).argmax())
    return {"at once": at_once, "one more": one_more, "tokens": tokens, "begun anew": begun}


def main() -> None:
    asked = json.load(sys.stdin)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.chdir(asked["folder"]), contextlib.redirect_stdout(printed):
        exec(asked["block"].replace("localhost:8001", asked["address"]), names)
    step, greedy, prompts, count = names["step"], names["greedy"], asked["prompts"], asked["count"]
    with grpc.InferenceServerClient(asked["address"]) as names["client"]:  # the README has closed its own
        found = {
            "printed": printed.getvalue(),
            "alone": [greedy(prompt, count, sequence=7) for prompt in prompts],
            "interleaved": interleaved(step, prompts, count),
            "past the end": past_the_end(step, prompts[0], asked["most"]),
            "never begun": refused(step, [1], 300),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
