"""A process of its own around one engine, so that its memory is its own.

    python -m trsp_deploy.tools.bench_worker ENGINE_FOLDER

Speaks JSON lines: says {"ready": ...} once the engine is loaded, then answers each block on stdin with its raw samples.
Imports no torch unless the engine needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from trsp_deploy.errors import TrspError
from trsp_deploy.tools.runners import Runner, open_engine


def main() -> int:
    """Serve blocks until stdin ends; returns the exit code."""
    folder = Path(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not get between the replies
    gpu_before = _gpu_memory_used()
    began = time.perf_counter()
    try:
        with open_engine(folder) as runner:
            _reply(replies, {"ready": True, "load_s": time.perf_counter() - began})
            for line in sys.stdin:
                block = measure_block(runner, **json.loads(line))
                gpu_after = _gpu_memory_used()
                _reply(replies, {**block, **_peak_memory(gpu_before, gpu_after)})
    except TrspError as problem:
        _reply(replies, {"error": str(problem)})
        return problem.exit_code
    return 0


def measure_block(runner: Runner, prompt: list[list[int]], new_tokens: int) -> dict[str, float | list[float]]:
    """Prefill a prompt (batch, sequence) once, then decode greedily; seconds on the host's clock."""
    input_ids = np.array(prompt, dtype=np.int64)
    began = time.perf_counter()
    logits = runner.prefill(input_ids, np.ones_like(input_ids), last_only=True)
    prefill_s = time.perf_counter() - began
    decode_s = []
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(-1).astype(np.int64)  # (batch, 1)
        began = time.perf_counter()
        logits = runner.decode(token)
        decode_s.append(time.perf_counter() - began)
    return {"prefill_s": prefill_s, "decode_s": decode_s}


def _peak_memory(gpu_before: int | None, gpu_after: int | None) -> dict[str, int | None]:
    # Not ru_maxrss: that one starts from the size of the process that forked this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    on_gpu = None if gpu_before is None or gpu_after is None else max(0, gpu_after - gpu_before)
    return {"peak_rss_bytes": peak, "gpu_bytes": on_gpu}


def _gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU, by everyone; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(said.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _reply(replies: object, message: dict[str, object]) -> None:
    print(json.dumps(message), file=replies, flush=True)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
