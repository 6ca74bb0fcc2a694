"""Requests to a running Triton server by perf_analyzer, the field's load generator: every answer with its time.

    generator = find_load_generator(environment)
    requests = generator.window("127.0.0.1:8001", "pruned", prompts, new_tokens=64, concurrency=8, seconds=10)

perf_analyzer keeps `concurrency` requests in the air: one that has its last token is replaced at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trsp_deploy.errors import RunError
from trsp_deploy.results import ServedRequest
from trsp_deploy.tools.runners.generation import prompt_tokens

PROGRAM = "perf_analyzer"
TRIALS = 3  # windows that it wants at least; together they are ours
PATIENCE_S = 120  # beyond its windows, for the answers that are still under way
UNSTEADY = 10_000  # percent by which its windows may differ: what is steady enough is judged over replicates
NS = 1e-9
TOO_SHORT = "No valid requests recorded within time interval"  # its words
TEXT = (
    "the river was low that summer and people walked across it to the other town where a market was held twice a week "
    "until the rain came back in autumn and filled it again so that everyone had to use the old bridge of stone "
)


@dataclass(frozen=True)
class LoadGenerator:
    """perf_analyzer on this machine."""

    program: Path

    def version(self) -> str:
        """The version of perf_analyzer as it prints it."""
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip()  # it says it as an error
        return said.splitlines()[0] if said else "unknown"

    def window(
        self, grpc: str, model: str, prompts: Sequence[str], new_tokens: int, concurrency: int, seconds: float
    ) -> tuple[ServedRequest, ...]:
        """Keep `concurrency` requests in the air for about `seconds`; returns those that were finished, maybe none.

        grpc: address. prompts: sent in turn. Raises RunError when the server does not answer as it should.
        """
        with tempfile.TemporaryDirectory(prefix="trsp-load-") as scratch:
            data, found = Path(scratch) / "prompts.json", Path(scratch) / "found.json"
            data.write_text(json.dumps({"data": [_inputs(prompt, new_tokens) for prompt in prompts]}), encoding="utf-8")
            command: list[str | Path] = [self.program, "-m", model, "-u", grpc, "-i", "grpc", "--streaming"]
            command += ["--input-data", data, "--concurrency-range", str(concurrency)]
            command += ["--measurement-interval", str(math.ceil(1e3 * seconds / TRIALS)), "--max-trials", str(TRIALS)]
            command += ["--stability-percentage", str(UNSTEADY), "--profile-export-file", found]
            patience = 2 * seconds + PATIENCE_S
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=patience, env=_direct()
                )
            except subprocess.TimeoutExpired as problem:
                raise RunError(f"{model} on {grpc}: {PROGRAM} was not done after {patience:.0f} s") from problem
            if TOO_SHORT in done.stdout + done.stderr:
                return ()
            if not found.is_file():
                said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
                raise RunError(
                    f"{model} on {grpc}: {PROGRAM} measured nothing ({said[-1] if said else done.returncode})"
                )
            (experiment,) = json.loads(found.read_bytes())["experiments"]
        return tuple(
            _request(request, experiment["window_boundaries"][0], new_tokens, f"{model} on {grpc}")
            for request in sorted(experiment["requests"], key=lambda request: request["timestamp"])
        )


def _direct() -> dict[str, str]:
    """The environment without its proxies, for the server is near; gRPC would take loopback to one as well."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def find_load_generator(environment: Path | None) -> LoadGenerator:
    """perf_analyzer of a virtual environment, else on the path; raises RunError when there is none."""
    beside = None if environment is None else environment.absolute() / "bin" / PROGRAM
    if beside is not None and beside.is_file():
        return LoadGenerator(beside)
    found = shutil.which(PROGRAM)
    if found is None:
        where = "" if environment is None else f" in {environment} or"
        raise RunError(f"no {PROGRAM}{where} on the path; pip install perf-analyzer")
    return LoadGenerator(Path(found))


def prompts_of(tokenizer: Tokenizer, tokens: int, count: int) -> list[str]:
    """Texts of `tokens` tokens each, no two with the same beginning; raises RunError when none has that many."""
    texts = []
    for index in range(count):
        text = f"{index} {TEXT * (1 + tokens // len(TEXT.split()))}"
        encoded = tokenizer.encode(text)
        # Cut where a token ends; the last one may come out as others when it is read again.
        ends = [end for _, end in encoded.offsets]
        fitting = (text[:end] for end in ends[max(0, tokens - 3) : tokens + 3])
        texts.append(next((cut for cut in fitting if _prompt_length(tokenizer, cut) == tokens), ""))
    if not all(texts):
        raise RunError(f"--prompt-tokens {tokens}: this tokenizer makes no such text of common words")
    return texts


def _prompt_length(tokenizer: Tokenizer, text: str) -> int:
    """How many tokens a server of ours makes of a prompt."""
    encoded = tokenizer.encode(text)
    return len(prompt_tokens(encoded.ids, encoded.special_tokens_mask))


def _inputs(prompt: str, new_tokens: int) -> dict[str, Any]:
    values = {"text_input": prompt, "max_tokens": new_tokens, "stream": True, "ignore_eos": True}
    return {name: {"content": [value], "shape": [1]} for name, value in values.items()}


def _request(found: dict[str, Any], began_ns: int, new_tokens: int, where: str) -> ServedRequest:
    answers = found["response_outputs"]
    tokens = tuple(int(answer.get("output_tokens", 0)) for answer in answers)
    if not tokens or tokens[-1] != new_tokens:
        raise RunError(f"{where}: answered {tokens[-1] if tokens else 0} of {new_tokens} tokens")
    return ServedRequest(
        sent_s=round((found["timestamp"] - began_ns) * NS, 6),
        answered_s=tuple(round((at - found["timestamp"]) * NS, 6) for at in found["response_timestamps"]),
        tokens=tokens,
    )
