"""A model repository of a run: what is in it, and a real tritonserver that answers from it."""

from __future__ import annotations

import concurrent.futures
import contextlib
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

import onnxruntime
import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.command import trsp_deploy
from tests.planted import SECRETS, check_no_secret
from tests.tiny import LAYERS, english, save_tiny
from tests.triton_server import ENVIRONMENT, TritonServer, client, why_not
from trsp_deploy.artifacts import write_json
from trsp_deploy.errors import RunError
from trsp_deploy.stages.serve_bench import Address, LoadSettings, measure_served
from trsp_deploy.tools.model_repository.config import SCHEMA, WARMUP, parse_config
from trsp_deploy.tools.model_repository.lint import lint, own_engine
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.runners.manifest import Bound, read_manifest, spec_sha256
from trsp_deploy.tools.runners.requirements import CudaDevice
from trsp_deploy.tools.sources.packaged import find_asset

needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")
needs_server = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
# Until release 25.04 Triton's gRPC handler may end the server when a stream is cancelled just as it ends (its pull
# request 8078). Of the 24.10 that nvidia-pytriton holds a server was lost here in CI once, and can be made to abort.
GRPC_RACE_TRIALS = 3
PROMPTS = [english()[start : start + 30] for start in range(0, 20_000, 1_000)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    save_tiny("llama", folder / "tiny", hidden_size=64)
    (folder / "text.txt").write_text(english()[:30_000])
    settings = ["calibration.context_length=32", "calibration.max_windows=4", "calibration.validation_windows=1"]
    settings += ["plan.method=shortgpt", "transfer.form=none", "engines=[ort-cpu-fp32]"]
    settings += ["bench.budget_s=2", "bench.replicates=2", "bench.prompt_tokens=8", "bench.new_tokens=4"]
    settings += ["evaluate.context_length=32", "evaluate.max_tokens=512", "evaluation={own: text.txt}"]
    options = [option for pair in settings for option in ("--set", pair)]
    common = ["--model", "tiny", "--drop", "2", "--calibration", "text.txt"]
    for command in (["prune", *common, *options, "--out", "run"], ["build", "run"]):
        done = trsp_deploy(*command, cwd=folder)
        assert done.code == 0, done.said
    return folder / "run"


@pytest.fixture(scope="module")
def repository(run: Path) -> Path:
    out = run.parent / "repository"
    options = ["--out", str(out), "--name", "pruned", "--dense", "--max-batch", "4", "--json"]
    done = trsp_deploy("triton", "run", *options, cwd=run.parent, **SECRETS)
    assert done.code == 0, done.said
    assert json.loads(done.stdout)["models"] == ["pruned", "pruned-dense"]
    assert check_no_secret(out, done.said) > 20
    return out


def test_every_file_of_it_is_in_its_manifest(run: Path, repository: Path, tmp_path: Path) -> None:
    assert trsp_deploy("verify", "repository", cwd=run.parent).code == 0
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    with (copy / "Dockerfile").open("a") as file:
        file.write("RUN curl somewhere\n")
    changed = trsp_deploy("verify", str(copy), cwd=run.parent)
    assert changed.code != 0 and "Dockerfile" in changed.said
    assert trsp_deploy("verify", "run", cwd=run.parent).code == 0  # built and not finished: against its records


def test_a_tokenizer_that_is_another_one_is_not_served(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run/pruned/tokenizer.json").open("a") as file:
        file.write(" ")
    done = trsp_deploy("triton", "run", cwd=tmp_path)
    assert done.code == 1 and "run/pruned: is not what its step made" in done.said
    assert not (tmp_path / "model_repository").exists()


@needs_schema
def test_a_repository_is_whole_and_its_config_is_tritons(repository: Path) -> None:
    for name in ("pruned", "pruned-dense"):
        config = parse_config((repository / name / "config.pbtxt").read_text(), name)
        assert config.name == name and config.backend == "python" and config.model_transaction_policy.decoupled
        assert config.input[0].name == "text_input" and not config.input[0].optional
        assert all(each.optional for each in config.input[1:])
        (sample,) = config.model_warmup
        assert sample.batch_size == 1, "0 is skipped"
        for name_in, value in sample.inputs.items():
            assert (repository / name / "warmup" / value.input_data_file).read_bytes() == WARMUP[name_in]
        for path in ("1/model.py", "1/engine/manifest.json", "1/tokenizer.json", "1/vendor/trsp_deploy/errors.py"):
            assert (repository / name / path).is_file(), path
    manifest = json.loads((repository / "MANIFEST.json").read_text())
    assert f"'{manifest['packages'][0]}'" in (repository / "Dockerfile").read_text()
    assert [model["role"] for model in manifest["models"]] == ["pruned", "dense"]
    assert manifest["packages"][0].startswith("onnxruntime==")
    for model, layers in zip(manifest["models"], (LAYERS - 2, LAYERS), strict=True):
        # 4 texts of 256 tokens and one place more; keys and values of 2 heads, each of 16 fp32 numbers.
        assert model["cache_bytes"] == 4 * 257 * layers * 2 * 2 * 16 * 4
        assert f"{model['cache_bytes'] / 1e6:.1f} MB of cache at most" in (repository / "README.md").read_text()
    assert all((repository / "pruned" / file).is_file() for file in manifest["models"][0]["files"])


@needs_schema
def test_what_is_there_stays_in_the_manifest(run: Path, repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    again = trsp_deploy("triton", "run", "--out", str(copy), "--name", "other", cwd=run.parent)
    assert again.code == 0, again.said
    names = [model["name"] for model in json.loads((copy / "MANIFEST.json").read_text())["models"]]
    assert names == ["other", "pruned", "pruned-dense"]
    assert trsp_deploy("verify", str(copy), cwd=tmp_path).code == 0
    assert all(f"`{name}`: " in (copy / "README.md").read_text() for name in names)


@needs_schema
@pytest.mark.parametrize("package", ["onnxruntime==1.0.0", "onnxruntime-gpu==1.32.0"])
def test_models_that_one_python_cannot_serve_are_not_put_together(
    package: str, run: Path, repository: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    manifest["models"][1]["packages"][0] = package
    manifest.pop("sha256")
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    done = trsp_deploy("triton", "run", "--out", str(copy), "--name", "other", cwd=run.parent)
    assert done.code == 1 and "one server's Python cannot have both" in done.said
    assert f"'pruned-dense' {package}" in done.said or f"'pruned' needs {package}" in done.said, done.said
    assert not (copy / "other").exists() and json.loads((copy / "MANIFEST.json").read_text()) == manifest


@needs_schema
def test_dense_and_pruned_have_one_engine(run: Path, tmp_path: Path) -> None:
    """The first engine that the run has of both, and no comparison where a repository has two."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    another = Path(shutil.copytree(copy / "engines" / "ort-cpu-fp32" / "pruned", copy / "engines" / "a" / "pruned"))
    found = read_manifest(another)
    spec = found.spec.model_copy(update={"name": "a", "threads": 1})
    changed = found.model_copy(update={"name": "a", "spec": spec, "spec_sha256": spec_sha256(spec)})
    write_json(another / "manifest.json", changed)
    for options in (["--dense", "--out", "both"], ["--out", "mixed", "--name", "alone"]):
        done = trsp_deploy("triton", "run", *options, cwd=tmp_path)
        assert done.code == 0, done.said
    engines = [model["engine"] for model in json.loads((tmp_path / "both" / "MANIFEST.json").read_text())["models"]]
    assert engines == ["ort-cpu-fp32", "ort-cpu-fp32"]
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "both" / "run-pruned-dense", mixed / "run-pruned-dense")
    both, alone = (read_repository(tmp_path / name) for name in ("both", "mixed"))
    write_json(mixed / "MANIFEST.json", alone.model_copy(update={"models": (*alone.models, both.models[1])}))
    generator: Any = None  # never asked
    with pytest.raises(RunError, match=r"'alone' by a \(onnxruntime-cpu .* a comparison is of one engine"):
        measure_served(mixed, lambda: contextlib.nullcontext(Address("", "")), generator, LoadSettings())


@needs_schema
@pytest.mark.parametrize("file", ["README.md", "Dockerfile"])
def test_another_projects_files_are_left_alone(file: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text("a project")
    done = trsp_deploy("triton", "run", "--out", str(tmp_path), cwd=run.parent)
    assert done.code == 1 and f"has a {file} that is not of a model repository of ours" in done.said
    assert (tmp_path / file).read_text() == "a project"


@needs_schema
def test_a_config_that_is_none_says_where() -> None:
    with pytest.raises(RunError, match=r"x/config.pbtxt: 2:1"):
        parse_config('name: "x"\nbackends: "python"', "x/config.pbtxt")


def test_the_kubernetes_manifest_probes_what_the_server_has() -> None:
    manifest = Path(__file__).parents[2] / "deploy" / "kubernetes" / "triton.yaml"
    service, deployment = yaml.safe_load_all(manifest.read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


@needs_schema
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], ["nowhere", "no run of trsp-deploy"]),
        (["run", "--name", "../x"], ["--name '../x'", "letters, digits, dots"]),
        (["run", "--engine", "ort"], ["no engine 'ort'"]),
        (["run", "--name", "m" * 101], ["--name: a model would be 'mmm", "of 101 characters; at most 100"]),
        (["run", "--name", "m" * 95, "--dense"], ["m-dense', of 101 characters"]),
        (["run", "--name", "m" * 96, "--step"], ["m_step', of 101 characters"]),
    ],
)
def test_bad_input_is_one_line(run: Path, options: list[str], words: list[str]) -> None:
    done = trsp_deploy("triton", *options, cwd=run.parent)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert not (run.parent / "model_repository").exists()


@needs_schema
def test_the_linter_finds_what_went_missing(repository: Path, tmp_path: Path) -> None:
    clean = trsp_deploy("triton-lint", str(repository), cwd=tmp_path)
    assert clean.code == 0 and "0 errors, 0 warnings" in clean.stdout, clean.said
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    data = copy / "pruned" / "1" / "engine" / "model.onnx.data"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    (copy / "pruned-dense" / "1" / "tokenizer.json").unlink()
    done = trsp_deploy("triton-lint", str(copy), "--json", cwd=tmp_path)
    assert done.code == 2
    messages = [finding["message"] for finding in json.loads(done.stdout)["findings"]]
    assert messages == [
        "1/engine/model.onnx.data is not the file that was built (SHA-256)",
        "1/tokenizer.json is missing",
    ]


@needs_schema
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"backend_version": "1.0.0"}, f"with onnxruntime-cpu 1.0.0, here is {onnxruntime.__version__}"),
        ({"bound": Bound(gpu="sm89", driver="580.82.07")}, "under NVIDIA driver 580.82.07, here is 580.65.06"),
        ({"bound": Bound(gpu="sm89", driver="580.65.06")}, None),
        ({"bound": Bound(gpu="sm90")}, "for a GPU of compute capability sm90, here is sm89"),
        ({"compute_capabilities": ("sm86", "sm120")}, "for GPUs of compute capability sm86, sm120, here is sm89"),
        ({"compute_capabilities": ("SM89",)}, None),
    ],
)
def test_the_linter_holds_an_engine_against_package_gpu_and_driver(
    changes: dict[str, Any], message: str | None, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU, of engines whose manifests say so."""
    model = Path(shutil.copytree(repository / "pruned", tmp_path / "pruned"))
    found = read_manifest(model / "1" / "engine")
    spec = {"compute_capabilities": changes.get("compute_capabilities", ())}
    changed = {
        "bound": changes.get("bound", Bound()),
        "backend_version": changes.get("backend_version", found.backend_version),
        "spec": found.spec.model_copy(update=spec),
    }
    monkeypatch.setattr(own_engine, "read_manifest", lambda folder: found.model_copy(update=changed))
    monkeypatch.setattr(own_engine, "cuda_devices", lambda: [CudaDevice("a GPU", "sm89", 2**30)])
    monkeypatch.setattr(own_engine, "driver_version", lambda: "580.65.06")
    assert [each.message for each in lint(tmp_path)] == ([f"the engine was built {message}"] if message else [])


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as server:
        yield server


@functools.cache
def expected(run: Path, count: int) -> list[str]:
    """Greedy text of the pruned model in PyTorch, each prompt by itself."""
    tokenizer = Tokenizer.from_file(str(run / "pruned" / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(run / "pruned", torch_dtype=torch.float32).eval()
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
def test_served_text_is_pytorchs_alone_and_together(server: TritonServer, run: Path) -> None:
    wanted = expected(run, 16)

    def ask(prompt: str) -> str:
        answer = server.generate("pruned", text_input=prompt, max_tokens=16, ignore_eos=True)
        return str(answer.get("text_output", answer))

    assert [ask(prompt) for prompt in PROMPTS] == wanted
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == wanted


@needs_schema
@needs_server
def test_a_stream_comes_in_pieces_and_ends_with_its_reason(server: TritonServer, run: Path) -> None:
    options = {"text_input": PROMPTS[0], "max_tokens": 16, "stream": True, "ignore_eos": True}
    pieces = list(server.stream("pruned", **options))
    assert "".join(piece["text_output"] for piece in pieces) == expected(run, 16)[0]
    assert pieces[-1]["finish_reason"] == "length" and pieces[-1]["output_tokens"] == 16
    assert all(piece["finish_reason"] == "" for piece in pieces[:-1])


@needs_schema
@needs_server
def test_the_readmes_commands_get_answers(server: TritonServer, repository: Path) -> None:
    page = (repository / "README.md").read_text()
    block = page.partition("<!-- client:start -->")[2].partition("<!-- client:end -->")[0]
    commands = [part.partition("```")[0] for part in block.split("```bash\n")[1:]]
    assert len(commands) == 2
    for command in commands:
        here = command.replace("localhost:8000", server.http)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=True)
        assert '"text_output":' in done.stdout and '"finish_reason":"' in done.stdout.replace(": ", ":"), done.stdout


@needs_schema
@needs_server
def test_200_bad_requests_get_a_line_each_and_the_server_goes_on(server: TritonServer, run: Path) -> None:
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
        "http unknown parameter": "unknown input 'best_of'; valid: exclude_input_in_output, ignore_eos",
        "http top_p beyond 1": "input 'top_p'",
        "http empty stop": "input 'stop.0'",
        "grpc invalid UTF-8": "is not UTF-8 text (byte 0)",
        "grpc temperature is no number": "got nan",
    }
    for what, words in ours.items():
        assert all(words in line for line in answers[what]), answers[what]
    fine = server.generate("pruned", text_input=PROMPTS[0], max_tokens=16, ignore_eos=True)
    assert fine["text_output"] == expected(run, 16)[0]


@needs_schema
@needs_server
def test_who_finds_a_full_queue_is_told_so_at_once(repository: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(repository / "pruned", tmp_path / "repository" / "pruned"))
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
    assert {line for _, line in refused} == {"busy: 1 requests wait already"} and len(refused) < 24
    assert all(status >= 400 for status, _ in refused)  # 503, if Triton did not read it from an error that it has freed
    assert all(answer["output_tokens"] == 250 for status, answer in answers if status == 200)


@needs_schema
@needs_server
def test_1000_requests_30_percent_cancelled_leave_memory_flat_and_texts_right(
    repository: Path, run: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(repository, tmp_path / "repository"))
    for trial in range(GRPC_RACE_TRIALS):
        with TritonServer(alone) as server:  # one of its own: the other tests' must outlive it
            try:
                ask_and_cancel(server, run)
                break
            except (AssertionError, psutil.Error):
                if not server.crashed() or trial == GRPC_RACE_TRIALS - 1:
                    raise


def ask_and_cancel(server: TritonServer, run: Path) -> None:
    asked = {"prompts": PROMPTS, "max_tokens": 16}

    def ask(count: int, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = client("streams.py", server.grpc, "pruned", count, 0.4, seed, stdin=asked)
        assert found["errors"] == []
        return found

    ask(200, 0)  # buffers grow to their size
    before = memory(server)
    found = ask(1000, 1)
    assert 300 <= found["cancelled"] <= 400  # some end before their turn to be cancelled
    assert found["texts"] == {str(index): [text] for index, text in enumerate(expected(run, 16))}
    assert memory(server) - before < 10e6


# Added to a served model: steps take so long that nobody's answer is complete before it is noticed that he left, and
# how each answer ended is written down.
SLOW = """
import time
from trsp_deploy.tools.serving import loop

step, finish = loop.ServingLoop._step, loop.ServingLoop._finish

def slow_step(self):
    time.sleep(0.1)
    step(self)

def noted(self, row, reason, *rest):
    with (HERE / "ends").open("a") as file:
        print(reason, len(self._running[row].tokens), file=file)
    finish(self, row, reason, *rest)

loop.ServingLoop._step, loop.ServingLoop._finish = slow_step, noted
"""


@needs_schema
@needs_server
def test_who_leaves_a_long_stream_makes_room_for_the_next(run: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "repository"), "--name", "pruned", "--max-batch", "1"]
    assert trsp_deploy("triton", "run", *options, cwd=run.parent).code == 0
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
    assert [reason for reason, _ in ends] == ["cancelled", "length"] * 2
    assert all(int(tokens) < 125 for _, tokens in ends), "left long before its end"


def memory(server: TritonServer) -> int:
    """Bytes that the server and its models' processes hold."""
    main = psutil.Process(server.server.pid)
    return sum(process.memory_info().rss for process in (main, *main.children(recursive=True)))


@needs_schema
@needs_server
def test_a_server_killed_in_a_stream_leaves_nothing_after_stop_and_starts_again(
    repository: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "repository"
    shutil.copytree(repository / "pruned", alone / "pruned")
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
def test_no_server_is_one_line(command: list[str], words: list[str], tmp_path: Path) -> None:
    done = trsp_deploy(*command, cwd=tmp_path)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


def test_stopping_what_never_ran_is_no_error(tmp_path: Path) -> None:
    done = trsp_deploy("triton-stop", ".", cwd=tmp_path)
    assert done.code == 0 and "was not running" in done.stdout


@needs_schema
@needs_server
def test_a_repository_on_a_machine_without_its_engine_says_so(repository: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(repository / "pruned", tmp_path / "repository" / "pruned"))
    (broken / "1" / "engine" / "model.onnx.data").unlink()
    with (
        pytest.raises(RunError, match=r"tritonserver ended: model 'pruned': .*model.onnx.data is missing"),
        TritonServer(tmp_path / "repository"),
    ):
        pass


@needs_schema
@needs_server
def test_fresh_servers_under_load_are_in_the_runs_report(repository: Path, run: Path) -> None:
    shutil.copytree(repository, run.parent / "for-load")
    options = ["--run", "run", "--server", str(ENVIRONMENT), "--concurrency", "1,3", "--window", "1", "--json"]
    options += ["--replicates", "2", "--prompt-tokens", "12", "--new-tokens", "24"]
    done = trsp_deploy("bench-server", "for-load", *options, cwd=run.parent)
    assert done.code == 0, done.said
    shown = json.loads(done.stdout.splitlines()[-1])
    assert [level["concurrency"] for level in shown["levels"]] == [1, 3]
    assert all(level["figures"]["pruned"]["requests"] > 0 for level in shown["levels"])
    assert set(shown["levels"][0]["speedup"]) == {"throughput", "first", "inter_token", "request"}
    report = json.loads((run / "report.json").read_text())
    assert report["served"] == shown and "as served on ort-cpu-fp32" in report["verdict"]
    assert "On a server" in (run / "report.html").read_text() and "On a server" in (run / "report.md").read_text()
    raw = json.loads((run / "served.json").read_text())
    assert len(raw["windows"]) == 2 * 2 * 3 and raw["server"].startswith("triton 2.") and raw["fresh"]
    assert trsp_deploy("triton-stop", "for-load", cwd=run.parent).stdout == "for-load: was not running\n"


@needs_schema
@needs_server
def test_a_server_that_runs_can_be_loaded(server: TritonServer, repository: Path) -> None:
    url = f"127.0.0.1:{server.server.http}:{server.server.grpc}"
    options = ["--server", str(ENVIRONMENT), "--concurrency", "2", "--window", "1", "--replicates", "2", "--json"]
    options += ["--prompt-tokens", "12", "--new-tokens", "24"]
    busy = trsp_deploy("bench-server", "repository", *options, cwd=repository.parent)
    assert busy.code == 1 and f"is served already on port {server.server.http}" in busy.stderr.splitlines()[-1]
    done = trsp_deploy("bench-server", "repository", "--url", url, *options, cwd=repository.parent)
    assert done.code == 0 and "the same server" in done.stderr and server.generate("pruned", text_input="x"), done.said


@needs_schema
@needs_server
def test_genai_perfs_requests_are_answered(server: TritonServer, tmp_path: Path) -> None:
    """GenAI-Perf (kserve, tensorrtllm) writes such a file and calls perf_analyzer so; it is not in the environment."""
    asked = [
        {"text_input": [prompt], "max_tokens": [8], "stream": [True], "exclude_input_in_output": [True]}
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
        assert request["response_outputs"][-1]["finish_reason"] in ("length", "end")
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
    server: TritonServer, repository: Path, options: list[str], words: list[str]
) -> None:
    done = trsp_deploy("bench-server", "repository", "--server", str(ENVIRONMENT), *options, cwd=repository.parent)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
