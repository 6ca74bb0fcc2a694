"""The README of a model repository: how to serve exactly this one, and how to ask it."""

from __future__ import annotations

from trsp_deploy.tools.model_repository.config import IDLE_S
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel
from trsp_deploy.tools.serving.loop import MOST_WAITING

# Until 25.04 a cancelled gRPC stream may bring the server down (Triton's pull request 8078), and NVIDIA's security
# bulletin 5816 asks for 26.02. Any later one will do for an ONNX Runtime engine, whose package is installed into it.
CONTAINER = "nvcr.io/nvidia/tritonserver:26.02-py3"
INSTALL = "PIP_BREAK_SYSTEM_PACKAGES=1 pip install"  # the Python of an image of Ubuntu 24.04 is left alone otherwise
# What MatMulInteger multiplies is rounded with one scale for all texts of a step.
SHARED_SCALE = "An int8 engine's answer, with one seed too, may differ with what others ask at the same time."


def readme(repository: RepositoryManifest) -> str:
    """Markdown about every model of a repository, whichever call wrote it."""
    texts = [model for model in repository.models if model.serves == "text"]
    steps = [model for model in repository.models if model.serves == "steps"]
    return _texts_readme(repository, texts) + (_steps_readme(texts, steps) if steps else "")


def dockerfile(repository: RepositoryManifest) -> str:
    """An image of the server with what the models need; they themselves are mounted."""
    return f"""# Triton with the packages that the models of this repository need; README.md has the words to it.
FROM {repository.container}
RUN {INSTALL} --no-cache-dir {_quoted(repository.packages)}
"""


def _quoted(packages: tuple[str, ...]) -> str:
    """For a shell; a `Requirement` has no quote in it."""
    return " ".join(f"'{package}'" for package in packages)


def _texts_readme(repository: RepositoryManifest, texts: list[ServedModel]) -> str:
    name = texts[0].name
    install = f"{INSTALL} {_quoted(repository.packages)}"
    device = "" if all(model.backend == "onnxruntime-cpu" for model in repository.models) else "--gpus 1 "
    limits = [f"`{model.name}`: {model.limits}" for model in repository.models]
    if any(model.precision == "int8" and model.max_batch > 1 for model in texts):
        limits.append(SHARED_SCALE)
    listed = "\n".join(f"- {line}" for line in limits)
    return f"""# Model repository for Triton Inference Server

Made by `trsp-deploy triton`. Text in, text out, streamed; requests that come together are answered in one
batch where the engine can, else one after the other (the lines below say how many texts at once).

{listed}

Beside its weights a model holds the keys and values of the texts that it answers. Its cache grows with them up to the
figure above; while it grows the smaller one is still there, so leave room for twice that.

## Serve it

The `docker` lines were never tried: no Docker was at hand.

    docker run --rm {device}--shm-size 1g -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD:/models:ro" {CONTAINER} \\
        bash -c "{install} && tritonserver --model-repository=/models"

`Dockerfile` puts the packages into an image once instead of at every start, as a cluster wants it. The image holds no
model, so it stays what it is where only models change:

    docker build -t registry.example.com/tritonserver-trsp:1 - < Dockerfile
    docker push registry.example.com/tritonserver-trsp:1
    docker run --rm {device}--shm-size 1g -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD:/models:ro" \\
        registry.example.com/tritonserver-trsp:1 tritonserver --model-repository=/models

## Ask it

<!-- client:start -->
```bash
curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "The capital of France is", "max_tokens": 16}}'
```

```bash
curl -sN localhost:8000/v2/models/{name}/generate_stream \\
    -d '{{"text_input": "Once upon a time", "max_tokens": 32, "stream": true, "temperature": 0.8, "seed": 1}}'
```
<!-- client:end -->

| input | meaning | default |
|---|---|---|
| `text_input` | the prompt | |
| `add_special_tokens` | whether the tokenizer adds its own; false where a chat template wrote them | true |
| `max_tokens` | new tokens at most | 64, or as many as fit |
| `min_length` | new tokens at least before the end token; a stop string ends the answer before | 0 |
| `stream` | whether text comes as it is made | false |
| `exclude_input_in_output` | whether the prompt is left out of the answer | true |
| `temperature` | 0 is greedy | 0 |
| `top_k`, `top_p` | choose among so many tokens, or among those that hold this probability | 0 (all), 1 |
| `repetition_penalty` | above 1 makes what is there already less likely | 1 |
| `seed` | of the sampling; the same seed gives the same text | 0 |
| `stop` | strings that end the answer | none |
| `ignore_eos` | whether to go on after the end token | false |

Answers have `text_output`, `output_tokens` and, at the end, `finish_reason` (`length`, `end`, `stop`). A request that
cannot be answered gets one line that names the input, one that finds more than {MOST_WAITING} waiting gets
UNAVAILABLE (`max_waiting` in `config.pbtxt`). To be able to stop an answer ask over gRPC and cancel, or over HTTP at
`/generate_stream` with `"stream": true` and close the connection; Triton does not notice who leaves a plain
`/generate`, and the answer is computed to its end.
"""


def _steps_readme(texts: list[ServedModel], steps: list[ServedModel]) -> str:
    """What follows where the repository has step models; the code asks the first of them."""
    name, max_length = steps[0].name, steps[0].max_length
    # Each was written beside a model that has its tokenizer.
    text_model = next((model.name for model in texts if f"{model.name}_step" == name), texts[0].name)
    versions = " and ".join(sorted({model.backend_version for model in steps}))
    return f"""
## Step by step

`{name}` is the bare engine in Triton's stock onnxruntime backend, for a decode loop of your own. The token ids of a
sequence go in, first the prompt and then what was chosen; out come the logits of its next token, `(1, vocabulary)`. The
KV cache and the number of tokens so far stay in the server as implicit state. It takes
`pip install 'tritonclient[grpc]' tokenizers`.

<!-- step:start -->
```python
import numpy as np
import tritonclient.grpc as grpc
from tokenizers import Tokenizer


def step(ids, sequence, **flags):  # logits (vocabulary,) of what follows `ids`, the sequence's next tokens
    tensor = grpc.InferInput("input_ids", [1, len(ids)], "INT64")
    tensor.set_data_from_numpy(np.array([ids], dtype=np.int64))
    return client.infer("{name}", [tensor], sequence_id=sequence, **flags).as_numpy("logits")[0]


def greedy(prompt, count, sequence):  # `sequence`: a number above 0 that no other text has at the time
    tokens = []
    for number in range(count):
        flags = {{"sequence_start": number == 0, "sequence_end": number == count - 1}}
        logits = step(tokens[-1:] or prompt, sequence, **flags)
        tokens.append(int(logits.argmax()))
    return tokens


tokenizer = Tokenizer.from_file("{text_model}/1/tokenizer.json")
with grpc.InferenceServerClient("localhost:8001") as client:
    print(tokenizer.decode(greedy(tokenizer.encode("The capital of France is").ids, 16, sequence=1)))
```
<!-- step:end -->

- `sequence_start` begins anew, whatever the number had before. A sequence without `sequence_end` ends when nothing was
  heard of it for {IDLE_S} s. When as many sequences run as the list above says, further ones wait for an end.
- A request that would make a sequence of `{name}` longer than {max_length} tokens gets an error that says
  `a_sequence_has_at_most_{max_length}_tokens`; the sequence stays what it was.
- The backend copies the whole state at every step: `--max-length` as long as needed and no longer.
- The engine was built with ONNX Runtime {versions}, and an older one in the server may not know its operators; the
  model is then not loaded, and `--exit-on-error=false` lets the others serve. Where a probe asks `/v2/health/ready`,
  add `--strict-readiness=false`, or the server is not ready for want of that model.
"""
