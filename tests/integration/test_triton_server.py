"""A real tritonserver that answers from a run's model repository: texts, streams, full queues, kills, load."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.command import trsp_deploy
from tests.tiny import english
from tests.triton_server import ENVIRONMENT, TELLS_WHERE_IT_IS, TritonServer, client, why_not
from trsp_deploy.errors import RunError
from trsp_deploy.tools.model_repository.config import SCHEMA
from trsp_deploy.tools.sources.packaged import find_asset
from trsp_deploy.tools.triton_server.process import VARIABLE

needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")
needs_server = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
# Until release 25.04 Triton's gRPC handler may end the server, or hang, when a stream is cancelled just as it ends (its
# pull requests 7840 and 8078). Both were seen with the 24.10 that nvidia-pytriton holds.
GRPC_RACE_TRIALS = 3
PROMPTS = [english()[start : start + 30] for start in range(0, 20_000, 1_000)]


@pytest.fixture(scope="module")
def server(served_repository: Path) -> Iterator[TritonServer]:
    with TritonServer(served_repository) as server:
        yield server


@functools.cache
def expected(served_run: Path, count: int) -> list[str]:
    """Greedy text of the pruned model in PyTorch, each prompt by itself."""
    tokenizer = Tokenizer.from_file(str(served_run / "pruned" / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(served_run / "pruned", torch_dtype=torch.float32).eval()
    # A text ends where a client that ignores the end token says.
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "eos_token_id": -1}
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :].tolist()))
    return texts


@needs_schema
@needs_server
def test_served_text_is_pytorchs_alone_and_together(server: TritonServer, served_run: Path) -> None:
    wanted = expected(served_run, 16)

    def ask(prompt: str) -> str:
        answer = server.generate("pruned", text_input=prompt, max_tokens=16, ignore_eos=True)
        return str(answer.get("text_output", answer))

    assert [ask(prompt) for prompt in PROMPTS] == wanted
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == wanted


@needs_schema
@needs_server
def test_a_stream_comes_in_pieces_and_ends_with_its_reason(server: TritonServer, served_run: Path) -> None:
    options = {"text_input": PROMPTS[0], "max_tokens": 16, "stream": True, "ignore_eos": True}
    pieces = list(server.stream("pruned", **options))
    assert "".join(piece["text_output"] for piece in pieces) == expected(served_run, 16)[0]
    assert pieces[-1]["finish_reason"] == "length" and pieces[-1]["output_tokens"] == 16
    assert all(piece["finish_reason"] == "" for piece in pieces[:-1])


@needs_schema
@needs_server
def test_the_readmes_commands_get_answers(server: TritonServer, served_repository: Path) -> None:
    page = (served_repository / "README.md").read_text()
    block = page.partition("<!-- client:start -->")[2].partition("<!-- client:end -->")[0]
    commands = [part.partition("```")[0] for part in block.split("```bash\n")[1:]]
    assert len(commands) == 2
    for command in commands:
        here = command.replace("localhost:8000", server.http)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=True)
        assert '"text_output":' in done.stdout and '"finish_reason":"' in done.stdout.replace(": ", ":"), done.stdout


@needs_schema
@needs_server
def test_200_bad_requests_get_a_line_each_and_the_server_goes_on(server: TritonServer, served_run: Path) -> None:
    answers = client("bad_requests.py", server.http, server.grpc, "pruned", 200, 0)
    assert sum(len(each) for each in answers.values()) == 200
    for what, said in answers.items():
        for line in said:
            assert line.startswith("error: ") and "\n" not in line and "Traceback" not in line, (what, line)
    ours = {
        "http no text": "input 'text_input' is missing",
        "http empty text": "at least 1 character",
        "http over-long": "characters, more than 256 tokens hold",
        "http negative limit": "input 'max_tokens'",
        "http unknown parameter": "unknown input 'best_of'; valid: add_special_tokens, exclude_input_in_output",
        "http parameter of invalid UTF-8": "a request parameter is not UTF-8 text",
        "http shortest answer beyond the longest": "at most 'max_tokens', 4",
        "http top_p beyond 1": "input 'top_p'",
        "http empty stop": "input 'stop.0'",
        "grpc invalid UTF-8": "is not UTF-8 text (byte 0)",
        "grpc temperature is no number": "got nan",
    }
    for what, words in ours.items():
        assert all(words in line for line in answers[what]), answers[what]
    fine = server.generate("pruned", text_input=PROMPTS[0], max_tokens=16, ignore_eos=True)
    assert fine["text_output"] == expected(served_run, 16)[0]


@needs_schema
@needs_server
def test_who_finds_a_full_queue_is_told_so_at_once(served_repository: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(served_repository / "pruned", tmp_path / "repository" / "pruned"))
    config = (alone / "config.pbtxt").read_text()
    assert 'key: "max_waiting" value { string_value: "256" }' in config
    (alone / "config.pbtxt").write_text(config.replace('string_value: "256"', 'string_value: "1"'))
    asked = json.dumps({"text_input": "x", "max_tokens": 250, "ignore_eos": True}).encode()

    def ask(server: TritonServer) -> tuple[int, dict[str, Any]]:
        with server.ask("pruned", asked) as reply:
            return reply.status, json.loads(reply.read())

    with TritonServer(alone.parent) as server, concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = [future.result() for future in [pool.submit(ask, server) for _ in range(24)]]
    refused = [(status, answer["error"]) for status, answer in answers if "error" in answer]
    assert {line for _, line in refused} == {"busy: no more than 1 requests may wait"} and len(refused) < 24
    assert all(status >= 400 for status, _ in refused)  # 503, if Triton did not read it from an error that it has freed
    assert all(answer["output_tokens"] == 250 for status, answer in answers if status == 200)


@needs_schema
@needs_server
def test_1000_requests_30_percent_cancelled_leave_memory_flat_and_texts_right(
    served_repository: Path, served_run: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    for model in alone.glob("*/1/model.py"):
        with model.open("a") as file:
            file.write(TELLS_WHERE_IT_IS)
    for trial in range(GRPC_RACE_TRIALS):
        with TritonServer(alone) as server:  # one of its own: the other tests' must outlive it
            try:
                ask_and_cancel(server, served_run)
                break
            except (AssertionError, psutil.Error):
                if server.lost() is None or trial == GRPC_RACE_TRIALS - 1:
                    raise


def ask_and_cancel(server: TritonServer, served_run: Path) -> None:
    asked = {"prompts": PROMPTS, "max_tokens": 16}

    def ask(count: int, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = client("streams.py", server.grpc, "pruned", count, 0.4, seed, stdin=asked)
        assert found["errors"] == []
        return found

    ask(200, 0)  # buffers grow to their size
    before = memory(server)
    found = ask(1000, 1)
    assert 300 <= found["cancelled"] <= 400  # some end before their turn to be cancelled
    assert found["texts"] == {str(index): [text] for index, text in enumerate(expected(served_run, 16))}
    assert memory(server) - before < 10e6


# Added to a served model: steps take so long that nobody's answer is complete before it is noticed that he left, and
# how and when each answer ended, and Triton was told that a request was cancelled, is written down.
SLOW = """
import time
from trsp_deploy.tools.serving import loop

step, finish, send = loop.ServingLoop._step, loop.ServingLoop._finish, _send

def slow_step(self):
    time.sleep(0.1)
    step(self)

def noted(self, row, reason, *rest):
    with (HERE / "ends").open("a") as file:
        print(reason, len(self._running[row].tokens), time.monotonic(), file=file)
    finish(self, row, reason, *rest)

def _send(sender, answer):
    if answer.finish == "cancelled":
        with (HERE / "told").open("a") as file:
            print(time.monotonic(), file=file)
    send(sender, answer)

loop.ServingLoop._step, loop.ServingLoop._finish = slow_step, noted
"""


@needs_schema
@needs_server
def test_who_leaves_a_long_stream_makes_room_for_the_next(served_run: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "repository"), "--name", "pruned", "--max-batch", "1"]
    assert trsp_deploy("triton", "run", *options, cwd=served_run.parent).code == 0
    version = tmp_path / "repository" / "pruned" / "1"
    with (version / "model.py").open("a") as file:
        file.write(SLOW)
    long = {"max_tokens": 250, "ignore_eos": True}
    with TritonServer(tmp_path / "repository") as server:
        (version / "ends").unlink()  # the warm-up's
        found = client("streams.py", server.grpc, "pruned", 1, 1, 0, stdin={"prompts": ["x"], **long})
        assert found["cancelled"] == 1
        answers = [server.generate("pruned", text_input="y", max_tokens=3, ignore_eos=True)]
        pieces = server.stream("pruned", text_input="x", stream=True, **long)
        assert [next(pieces)["finish_reason"] for _ in range(2)] == ["", ""]
        pieces.close()
        answers.append(server.generate("pruned", text_input="y", max_tokens=3, ignore_eos=True))
    assert [answer["output_tokens"] for answer in answers] == [3, 3]
    ends = [line.split() for line in (version / "ends").read_text().splitlines()]
    assert [reason for reason, _, _ in ends] == ["cancelled", "length"] * 2
    assert all(int(tokens) < 125 for _, tokens, _ in ends), "left long before its end"
    told = [float(line) for line in (version / "told").read_text().splitlines()]
    left = [float(at) for reason, _, at in ends if reason == "cancelled"]
    # Triton's gRPC handler may not survive an end that meets its cancellation.
    assert all(0.15 < later - at < 5 for later, at in zip(told, left, strict=True))


def memory(server: TritonServer) -> int:
    """Bytes that the server and its models' processes hold."""
    main = psutil.Process(server.server.pid)
    return sum(process.memory_info().rss for process in (main, *main.children(recursive=True)))


@needs_schema
@needs_server
def test_a_server_killed_in_a_stream_leaves_nothing_after_stop_and_starts_again(
    served_repository: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "repository"
    shutil.copytree(served_repository / "pruned", alone / "pruned")
    options = ["--server", str(ENVIRONMENT), "--json"]
    state = json.loads(trsp_deploy("triton-start", "repository", *options, cwd=tmp_path).stdout)
    twice = trsp_deploy("triton-start", "repository", *options, cwd=tmp_path)
    assert twice.code == 1 and f"is served already on port {state['http']}" in twice.stderr
    url = f"http://127.0.0.1:{state['http']}/v2/models/pruned/generate_stream"
    body = json.dumps({"text_input": "x", "max_tokens": 250, "stream": True, "ignore_eos": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as reply:
        assert reply.readline().startswith(b"data:")
        os.kill(state["pid"], signal.SIGKILL)
    assert list(Path("/dev/shm").glob(f"{state['shared_memory']}*")), "nothing to clean up: the test shows nothing"
    stopped = json.loads(trsp_deploy("triton-stop", "repository", "--json", cwd=tmp_path).stdout)
    assert not stopped["was_running"] and stopped["removed"]
    assert not list(Path("/dev/shm").glob(f"{state['shared_memory']}*"))
    with TritonServer(alone) as again:
        assert again.generate("pruned", text_input="x", max_tokens=1, ignore_eos=True)["output_tokens"] == 1
        prefix = again.server.shared_memory
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["triton-start", ".", "--server", "nowhere"], ["nowhere: no virtual environment with nvidia-pytriton"]),
        (["triton-start", "."], ["no tritonserver on the path", "--server"]),
    ],
)
def test_no_server_is_one_line(
    command: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)  # a server that the tests of this file may use
    done = trsp_deploy(*command, cwd=tmp_path)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


def test_stopping_what_never_ran_is_no_error(tmp_path: Path) -> None:
    done = trsp_deploy("triton-stop", ".", cwd=tmp_path)
    assert done.code == 0 and "was not running" in done.stdout


@needs_schema
@needs_server
def test_a_repository_on_a_machine_without_its_engine_says_so(served_repository: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(served_repository / "pruned", tmp_path / "repository" / "pruned"))
    (broken / "1" / "engine" / "model.onnx.data").unlink()
    with (
        pytest.raises(RunError, match=r"tritonserver ended: model 'pruned': .*model.onnx.data is missing"),
        TritonServer(tmp_path / "repository"),
    ):
        pass


@needs_schema
@needs_server
def test_fresh_servers_under_load_are_in_the_runs_report(served_repository: Path, served_run: Path) -> None:
    shutil.copytree(served_repository, served_run.parent / "for-load")
    options = ["--run", "run", "--server", str(ENVIRONMENT), "--concurrency", "1,3", "--window", "1", "--json"]
    options += ["--replicates", "2", "--prompt-tokens", "12", "--new-tokens", "24"]
    done = trsp_deploy("bench-server", "for-load", *options, cwd=served_run.parent)
    assert done.code == 0, done.said
    shown = json.loads(done.stdout.splitlines()[-1])
    assert [level["concurrency"] for level in shown["levels"]] == [1, 3]
    assert all(level["figures"]["pruned"]["requests"] > 0 for level in shown["levels"])
    assert set(shown["levels"][0]["speedup"]) == {"throughput", "first", "inter_token", "request"}
    report = json.loads((served_run / "report.json").read_text())
    assert report["served"] == shown and "as served on ort-cpu-fp32" in report["verdict"]
    assert (
        "On a server" in (served_run / "report.html").read_text()
        and "On a server" in (served_run / "report.md").read_text()
    )
    raw = json.loads((served_run / "served.json").read_text())
    assert len(raw["windows"]) == 2 * 2 * 3 and raw["server"].startswith("triton 2.") and raw["fresh"]
    assert trsp_deploy("triton-stop", "for-load", cwd=served_run.parent).stdout == "for-load: was not running\n"


@needs_schema
@needs_server
def test_a_server_that_runs_can_be_loaded(server: TritonServer, served_repository: Path) -> None:
    url = f"127.0.0.1:{server.server.http}:{server.server.grpc}"
    options = ["--server", str(ENVIRONMENT), "--concurrency", "2", "--window", "1", "--replicates", "2", "--json"]
    options += ["--prompt-tokens", "12", "--new-tokens", "24"]
    busy = trsp_deploy("bench-server", "repository", *options, cwd=served_repository.parent)
    assert busy.code == 1 and f"is served already on port {server.server.http}" in busy.stderr.splitlines()[-1]
    done = trsp_deploy("bench-server", "repository", "--url", url, *options, cwd=served_repository.parent)
    assert done.code == 0 and "the same server" in done.stderr and server.generate("pruned", text_input="x"), done.said


@needs_schema
@needs_server
def test_genai_perfs_requests_are_answered(server: TritonServer, tmp_path: Path) -> None:
    """GenAI-Perf (kserve, tensorrtllm) writes such a file and calls perf_analyzer so; it is not in the environment."""
    asked = [
        {
            "text_input": [prompt],
            "max_tokens": [8],
            "min_length": [8],  # of its --output-tokens-mean-deterministic
            "stream": [True],
            "exclude_input_in_output": [True],
        }
        for prompt in PROMPTS[:4]
    ]
    (tmp_path / "inputs.json").write_text(json.dumps({"data": asked}))
    command = [ENVIRONMENT / "bin" / "perf_analyzer", "-m", "pruned", "--async", "--service-kind", "triton"]
    command += ["-u", server.grpc, "-i", "grpc", "--streaming", "--input-data", "inputs.json"]
    command += ["--shape", "max_tokens:1", "--shape", "text_input:1", "--concurrency-range", "2"]
    command += ["--request-count", "12", "--stability-percentage", "999", "--profile-export-file", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (experiment,) = json.loads((tmp_path / "found.json").read_text())["experiments"]
    requests = experiment["requests"]
    assert len(requests) >= 12
    for request in requests:
        text = "".join(str(answer["text_output"]) for answer in request["response_outputs"])
        assert not any(prompt in text for prompt in PROMPTS[:4]), "the prompt is left out"
        assert request["response_outputs"][-1]["finish_reason"] == "length"
    assert max(len(request["response_timestamps"]) for request in requests) > 1, "some came in pieces"


@needs_schema
@needs_server
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--concurrency", "0"], ["--concurrency '0'", "such as 1,8"]),
        (["--url", "localhost"], ["--url 'localhost'", "expected HOST:HTTP_PORT:GRPC_PORT, such as"]),
        (["--url", "127.0.0.1:1:2"], ["127.0.0.1:1: no Triton server answers"]),
        (["--prompt-tokens", "255", "--new-tokens", "8"], ["'pruned' takes 256 tokens in all"]),
    ],
)
def test_a_load_that_cannot_be_is_one_line(
    server: TritonServer, served_repository: Path, options: list[str], words: list[str]
) -> None:
    done = trsp_deploy(
        "bench-server", "repository", "--server", str(ENVIRONMENT), *options, cwd=served_repository.parent
    )
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


ECHO = """
import triton_python_backend_utils as pb
class TritonPythonModel:
    def execute(self, requests):
        values = [pb.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        return [pb.InferenceResponse([pb.Tensor("y", value)]) for value in values]
"""
TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
"""


def ensemble_of(step: str, batch: int) -> str:
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    scheduling = f'ensemble_scheduling {{ step [ {{ model_name: "{step}" model_version: -1 {maps} }} ] }}'
    return f'platform: "ensemble" max_batch_size: {batch}\n{TENSORS}\n{scheduling}'


def echo(batch: int, policy: str = "") -> str:
    return f'backend: "python" max_batch_size: {batch}\n{TENSORS}\n{policy}'


@needs_schema
@needs_server
def test_a_folder_that_is_no_model_keeps_the_server_from_starting_and_a_file_does_not(tmp_path: Path) -> None:
    """Which `triton` must not leave, hidden or not, and the linter calls an error."""
    repository = tmp_path / "repository"
    (repository / "m" / "1").mkdir(parents=True)
    (repository / "m" / "config.pbtxt").write_text(f'name: "m"\n{echo(0)}')
    (repository / "m" / "1" / "model.py").write_text(ECHO)
    for name in (".writing.lock", ".README.md.partial"):
        (repository / name).touch()
    with TritonServer(repository):
        pass
    shutil.copytree(repository / "m", tmp_path / "whole")
    (tmp_path / "hidden").mkdir()
    for source, name in (("whole", ".m.partial"), ("hidden", ".hidden")):
        folder = Path(shutil.copytree(tmp_path / source, repository / name))
        assert trsp_deploy("triton-lint", "repository", cwd=tmp_path).code == 2
        with pytest.raises(RunError, match="tritonserver ended"), TritonServer(repository):
            pass
        shutil.rmtree(folder)


@needs_schema
@needs_server
@pytest.mark.parametrize(
    ("models", "found", "refused"),
    [
        (
            {"m": echo(0, "version_policy { latest { } }")},
            "m: version_policy latest serves no version",
            "at least one version must be available under the version policy",
        ),
        ({"m": echo(-1)}, "m: max_batch_size -1: the server takes none below 0", "must be non-negative"),
        (
            {"a": ensemble_of("b", 0), "b": ensemble_of("a", 0)},
            "a: the ensemble is a step of its own",
            "circular dependency between ensembles",
        ),
        (
            {"m": echo(4), "e": ensemble_of("m", 8)},
            "e: max_batch_size 8, and step 'm' takes 4",
            "allows maximum batch size 8, but it contains model m which only allows",
        ),
    ],
    ids=["policy", "negative", "circle", "batch"],
)
def test_what_the_linter_calls_an_error_the_server_does_not_load(
    models: dict[str, str], found: str, refused: str, tmp_path: Path
) -> None:
    for name, config in models.items():
        version = tmp_path / "repository" / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
        if "python" in config:
            (version / "model.py").write_text(ECHO)
    lint = trsp_deploy("triton-lint", "repository", cwd=tmp_path)
    assert lint.code == 2 and found in lint.said
    done = trsp_deploy("triton-start", "repository", "--server", str(ENVIRONMENT), cwd=tmp_path)
    trsp_deploy("triton-stop", "repository", cwd=tmp_path)
    assert done.code == 1 and refused in done.stderr.splitlines()[-1], done.stderr
