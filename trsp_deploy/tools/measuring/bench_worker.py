"""A process of its own around one engine, so that its memory is its own.

    python -m trsp_deploy.tools.measuring.bench_worker ENGINE_FOLDER_OR_ONNX_FILE

Speaks JSON lines: loads the engine when it is sent a first line, says {"load_s": ...}, then answers each block on stdin
with its raw samples. The first line may hold under "known" what its parent has read of files
(artifacts/fingerprints.py): an engine is checked before it is opened, and that would be reading gigabytes in every
process. Imports no torch unless the engine needs it.

TRSP_DEPLOY_PLANT=0.05 makes every call 5% longer by waiting in it: a slow-down whose size is known, with which
`make bench-proof` tests whether a comparison finds it. TRSP_DEPLOY_PLANT=pruned=0.05 does so to engines in a folder of
that name alone: a whole check can be tried. Threads that have waited answer the next call later, so that the slow-down
is more than that. TRSP_DEPLOY_PAUSE=0.05, for the engine that is compared with it, waits as long after each call, off
the clock: what waiting does to the next call is then in both, and the ratio is as planted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from trsp_deploy.artifacts.fingerprints import take_known
from trsp_deploy.errors import TrspError
from trsp_deploy.tools.host_memory import peak_resident_bytes, resident_bytes
from trsp_deploy.tools.measuring.telemetry import gpu_memory_own, gpu_memory_used
from trsp_deploy.tools.prctl import end_with_parent
from trsp_deploy.tools.runners import Runner, device_of, open_engine, read_manifest
from trsp_deploy.tools.runners.ort import OrtRunner

PLANTED = "TRSP_DEPLOY_PLANT"
PAUSED = "TRSP_DEPLOY_PAUSE"


def main() -> int:
    """Serve blocks until stdin ends; returns the exit code."""
    end_with_parent()  # while it is paused it would not see its stdin end
    engine = Path(sys.argv[1])
    planted, paused = (planted_share(os.environ.get(name, "0"), engine) for name in (PLANTED, PAUSED))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not get between the replies
    take_known(json.loads(sys.stdin.readline() or "{}").get("known", ()))
    try:
        used_before = gpu_memory_used() if _on_gpu(engine) else None
        opened = OrtRunner(engine) if engine.suffix == ".onnx" else open_engine(engine)
        began = time.perf_counter()  # an engine is checked by now, which is no part of loading it
        with opened as runner:
            _reply(replies, {"load_s": time.perf_counter() - began})
            for line in sys.stdin:
                block = measure_block(runner, **json.loads(line), planted=planted, paused=paused)
                _reply(replies, {**block, **_peak_memory(used_before)})
    except TrspError as problem:
        _reply(replies, {"error": str(problem)})
        return problem.exit_code
    return 0


def planted_share(text: str, engine: Path) -> float:
    """The share of its calls' time that this engine waits; text: 0.05, or pruned=0.05 for folders of that name."""
    name, _, share = text.rpartition("=")
    return float(share) if name in ("", engine.name) else 0.0


def measure_block(
    runner: Runner, prompt: list[list[int]], new_tokens: int, planted: float = 0.0, paused: float = 0.0
) -> dict[str, Any]:
    """Prefill a prompt (batch, sequence) once, then decode greedily; seconds, the keys of `results.Block`.

    planted, paused: the share of each call's time to wait in it, and after it off the clock.
    """
    input_ids = np.array(prompt, dtype=np.int64)
    mask = np.ones_like(input_ids)
    off_s = 0.0  # spent off the clock
    started = began = time.perf_counter()
    logits = runner.prefill(input_ids, mask, last_only=True)
    prefill_s = _elapsed(began, planted)
    on_device = [runner.device_s]
    decode_s: list[float] = []
    for _ in range(new_tokens):
        off_s += _pause((decode_s or [prefill_s])[-1] * paused)
        began = time.perf_counter()
        token = logits[:, -1:].argmax(-1).astype(np.int64)  # (batch, 1); generating has to choose, too
        logits = runner.decode(token)
        decode_s.append(_elapsed(began, planted))
        on_device.append(runner.device_s)
    total_s = time.perf_counter() - started - off_s
    _pause((decode_s or [prefill_s])[-1] * paused)  # before the next block
    found: dict[str, Any] = {"prefill_s": prefill_s, "decode_s": decode_s, "total_s": total_s}
    if on_device[0] is not None:
        found |= {"device_prefill_s": on_device[0], "device_decode_s": on_device[1:]}
    return found


def _elapsed(began: float, planted: float) -> float:
    elapsed = time.perf_counter() - began
    return elapsed + _pause(planted * elapsed)


def _pause(seconds: float) -> float:
    """Wait, and return how long; 0 where there is nothing to wait."""
    if not seconds:
        return 0.0
    began = now = time.perf_counter()
    while now < began + seconds:  # sleeping is too coarse for a call of a millisecond
        now = time.perf_counter()
    return now - began


def _on_gpu(engine: Path) -> bool:
    return engine.suffix != ".onnx" and device_of(read_manifest(engine).spec) == "cuda"


def _peak_memory(used_before: int | None) -> dict[str, int | None]:
    """used_before: on the whole GPU before the engine was loaded; None where it is on none.

    What the GPU holds more since is this process's as long as no other process starts (`samples.py` asks only then).
    """
    peak = peak_resident_bytes() or resident_bytes()  # gVisor's kernel tells no peak, and little is freed in between
    on_gpu, used = None, gpu_memory_used()
    if used_before is not None and used is not None:
        own = gpu_memory_own()
        on_gpu = max(0, used - used_before) if own is None else own
    return {"peak_rss_bytes": peak, "gpu_bytes": on_gpu}


def _reply(replies: object, message: dict[str, object]) -> None:
    print(json.dumps(message), file=replies, flush=True)  # type: ignore[call-overload]


if __name__ == "__main__":
    sys.exit(main())
