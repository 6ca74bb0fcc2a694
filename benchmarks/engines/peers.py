"""A measuring process around a peer's engine, speaking the lines of trsp_deploy/tools/measuring/bench_worker.py.

    python benchmarks/engines/peers.py optimum FOLDER        # ORTModelForCausalLM
    python benchmarks/engines/peers.py genai FOLDER          # onnxruntime-genai
    python benchmarks/engines/peers.py llama FILE.gguf       # llama.cpp

A file of its own that imports nothing of trsp_deploy: onnxruntime-genai's model builder needs another transformers than
Optimum does, so it runs in an environment of its own. A block may ask for `perplexity` of windows instead of for times.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

THREADS = len(os.sched_getaffinity(0))
Steps = Iterator[None]  # a step done: the prompt first, then a token each
Peer = Callable[[np.ndarray, int], Steps]  # (batch, prompt) token ids, new tokens


def main() -> int:
    """Serve blocks until stdin ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a paused process does not see its stdin end
    kind, path = sys.argv[1], Path(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not get between the replies
    sys.stdin.readline()  # the word to load
    began = time.perf_counter()
    try:
        peer = PEERS[kind](path)
    except Exception as problem:
        print(json.dumps({"error": f"{kind}: {type(problem).__name__}: {problem}"}), file=replies, flush=True)
        return 1
    print(json.dumps({"ready": True, "load_s": time.perf_counter() - began}), file=replies, flush=True)
    for line in sys.stdin:
        block = json.loads(line)
        found = perplexity(path, block["windows"]) if "windows" in block else measure(peer, **block)
        print(json.dumps({**found, **peak_memory()}), file=replies, flush=True)
    return 0


def measure(peer: Peer, prompt: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Seconds of the prompt and of each token after it."""
    times = [time.perf_counter()]
    for _ in peer(np.array(prompt, dtype=np.int64), new_tokens):
        times.append(time.perf_counter())
    steps = np.diff(times).tolist()
    return {"prefill_s": steps[0], "decode_s": steps[1:]}


def optimum(path: Path) -> Peer:
    """Optimum's own runner of its own graph."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(THREADS)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = ORTModelForCausalLM.from_pretrained(path, session_options=options, local_files_only=True)

    def steps(prompt: np.ndarray, new_tokens: int) -> Steps:
        ids, cache = torch.from_numpy(prompt), None
        mask = torch.ones_like(ids)
        for _ in range(new_tokens + 1):
            positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            # numpy's: torch would wake threads of its own beside ONNX Runtime's.
            cache, ids = out.past_key_values, torch.from_numpy(out.logits[:, -1:].numpy().argmax(-1))
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            yield

    return steps


def genai(path: Path) -> Peer:
    """onnxruntime-genai's generator, greedy."""
    import onnxruntime_genai

    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = THREADS
    (path / "genai_config.json").write_text(json.dumps(config, indent=1))
    model = onnxruntime_genai.Model(str(path))

    def steps(prompt: np.ndarray, new_tokens: int) -> Steps:
        length = prompt.shape[1] + new_tokens + 1
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompt))
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(prompt.astype(np.int32))
        for _ in range(new_tokens + 1):  # the first one waits for the prompt
            generator.generate_next_token()
            yield

    return steps


def llama(path: Path) -> Peer:
    """llama.cpp through its Python binding, greedy, one text."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def steps(prompt: np.ndarray, new_tokens: int) -> Steps:
        model.reset()
        tokens = prompt[0].tolist()
        for _ in range(new_tokens + 1):
            model.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(model.n_vocab(),))
            tokens = [int(np.argmax(logits))]
            yield

    return steps


PEERS: dict[str, Callable[[Path], Peer]] = {"optimum": optimum, "genai": genai, "llama": llama}


def perplexity(folder: Path, windows: list[list[int]]) -> dict[str, Any]:
    """Perplexity of windows (windows, tokens) by the graph that genai built, run by ONNX Runtime itself."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, config["num_key_value_heads"], 0, config["head_size"]), dtype=np.float32)
    cache = {value.name: empty for value in session.get_inputs() if value.name.startswith("past_key_values")}
    losses = []
    for window in np.array(windows, dtype=np.int64):
        ids = window[None]
        (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache})
        losses.append(negative_log_likelihood(logits[0], window))
    return {"perplexity": float(np.exp(np.mean(losses)))}


def negative_log_likelihood(logits: np.ndarray, window: np.ndarray) -> float:
    """Mean loss in nats of a window's tokens but the first; logits (tokens, vocabulary)."""
    scores = logits[:-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(scores).sum(axis=-1))
    return float((log_sum - scores[np.arange(len(scores)), window[1:]]).mean())


def peak_memory() -> dict[str, int | None]:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"peak_rss_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024, "gpu_bytes": None}


if __name__ == "__main__":
    sys.exit(main())
