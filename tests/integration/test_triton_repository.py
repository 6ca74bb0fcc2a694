"""A model repository of a run: what is in it, and a real tritonserver that answers from it."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from tests.integration.test_check import trsp_deploy
from tests.tiny import english, save_tiny
from tests.triton_server import TritonServer, why_not
from trsp_deploy.errors import RunError
from trsp_deploy.tools.generation import Sampling, generate
from trsp_deploy.tools.packaged import find_asset
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.triton_config import SCHEMA, parse_config, warmup_file

needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")
needs_server = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
PROMPTS = [english()[start : start + 30] for start in range(0, 20_000, 1_000)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    save_tiny("llama", folder / "tiny", hidden_size=64)
    (folder / "text.txt").write_text(english()[:30_000])
    settings = ["calibration.context_length=32", "calibration.max_windows=4", "calibration.validation_windows=1"]
    settings += ["plan.method=shortgpt", "transfer.form=none", "engines=[ort-cpu-fp32]"]
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
    done = trsp_deploy("triton", "run", *options, cwd=run.parent)
    assert done.code == 0, done.said
    assert json.loads(done.stdout)["models"] == ["pruned", "pruned-dense"]
    return out


@needs_schema
def test_a_repository_is_whole_and_its_config_is_tritons(repository: Path) -> None:
    for name in ("pruned", "pruned-dense"):
        config = parse_config((repository / name / "config.pbtxt").read_text(), name)
        assert config.name == name and config.backend == "python" and config.model_transaction_policy.decoupled
        assert config.input[0].name == "text_input" and not config.input[0].optional
        assert all(each.optional for each in config.input[1:])
        for path in ("1/model.py", "1/engine/manifest.json", "1/tokenizer.json", "1/vendor/trsp_deploy/errors.py"):
            assert (repository / name / path).is_file(), path
    manifest = json.loads((repository / "MANIFEST.json").read_text())
    assert [model["role"] for model in manifest["models"]] == ["pruned", "dense"]
    assert manifest["packages"][0].startswith("onnxruntime==")
    assert all((repository / "pruned" / file).is_file() for file in manifest["models"][0]["files"])


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


def test_warmup_is_a_length_and_text() -> None:
    assert warmup_file("Hé") == b"\x03\x00\x00\x00H\xc3\xa9"


@needs_schema
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], ["nowhere", "no run of trsp-deploy"]),
        (["run", "--name", "../x"], ["--name '../x'", "letters"]),
        (["run", "--engine", "ort"], ["no engine 'ort'"]),
    ],
)
def test_bad_input_is_one_line(run: Path, options: list[str], words: list[str]) -> None:
    done = trsp_deploy("triton", *options, cwd=run.parent)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


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


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(repository, tmp_path_factory.mktemp("server")) as server:
        yield server


def expected(run: Path, prompts: list[str], count: int) -> list[str]:
    """Greedy text of the pruned engine, each prompt by itself."""
    tokenizer = Tokenizer.from_file(str(run / "pruned" / "tokenizer.json"))
    with open_engine(run / "engines" / "ort-cpu-fp32" / "pruned") as runner:
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        return [tokenizer.decode(generate(runner, [each], Sampling(max_new_tokens=count))[0]) for each in ids]


@needs_schema
@needs_server
def test_served_text_is_the_engines_alone_and_together(server: TritonServer, run: Path) -> None:
    wanted = expected(run, PROMPTS, 16)

    def ask(prompt: str) -> str:
        answer = server.generate("pruned", text_input=prompt, max_tokens=16, ignore_eos=True)
        return str(answer.get("text_output", answer))

    assert [ask(prompt) for prompt in PROMPTS[:4]] == wanted[:4]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == wanted


@needs_schema
@needs_server
def test_a_stream_comes_in_pieces_and_ends_with_its_reason(server: TritonServer, run: Path) -> None:
    options = {"text_input": PROMPTS[0], "max_tokens": 16, "stream": True, "ignore_eos": True}
    pieces = list(server.stream("pruned", **options))
    assert "".join(piece["text_output"] for piece in pieces) == expected(run, PROMPTS[:1], 16)[0]
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
        here = command.replace("localhost:8000", f"127.0.0.1:{server.http}")
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=True)
        assert '"text_output":' in done.stdout and '"finish_reason":"' in done.stdout.replace(": ", ":"), done.stdout


@needs_schema
@needs_server
@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({}, "text_input"),
        ({"text_input": ""}, "at least 1 character"),
        ({"text_input": "x", "max_tokens": 0}, "input 'max_tokens'"),
        ({"text_input": "x", "max_tokens": 10_000}, "after this prompt at most"),
        ({"text_input": "x " * 2_000}, "at most 255"),
        ({"text_input": "x", "temperature": -1.0}, "input 'temperature'"),
        ({"text_input": "x", "top_p": 7.0}, "input 'top_p'"),
        ({"text_input": "x", "stop": [""]}, "input 'stop.0'"),
    ],
)
def test_a_bad_request_gets_one_line_and_the_server_goes_on(
    server: TritonServer, inputs: dict[str, object], line: str
) -> None:
    assert line in server.generate("pruned", **inputs)["error"]
    fine = server.generate("pruned-dense", text_input="x", max_tokens=1, ignore_eos=True)
    assert fine["output_tokens"] == 1


@needs_schema
@needs_server
def test_a_repository_on_a_machine_without_its_engine_says_so(repository: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(repository / "pruned", tmp_path / "repository" / "pruned"))
    (broken / "1" / "engine" / "model.onnx.data").unlink()
    with (
        pytest.raises(RuntimeError, match=r"model.onnx.data is missing"),
        TritonServer(tmp_path / "repository", tmp_path / "server"),
    ):
        pass
