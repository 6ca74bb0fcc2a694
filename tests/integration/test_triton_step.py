"""The step model: an engine's graph with its state, in plain ONNX Runtime and in a real tritonserver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests import stand_in_backend
from tests.command import trsp_deploy
from tests.exported import DROPPED, LAYERS, Made, onnx_of
from tests.tiny import english, tiny_tokenizer
from tests.triton_server import TritonServer, client, why_not
from trsp_deploy.artifacts import RUN_MARK, write_json
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.stages.build import build_engine
from trsp_deploy.tools.graphs.nodes import NoMatch
from trsp_deploy.tools.graphs.static_cache import fix_cache
from trsp_deploy.tools.graphs.step import State, keep_state
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.model_repository.config import SCHEMA, parse_config
from trsp_deploy.tools.model_repository.step_model import write_step_model
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.runners.generation import Sampling, generate
from trsp_deploy.tools.runners.manifest import read_manifest, spec_sha256
from trsp_deploy.tools.sources.packaged import find_asset

needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")
no_server = why_not() or stand_in_backend.why_not()
needs_server = pytest.mark.skipif(no_server is not None, reason=str(no_server))
ENGINE = "ort-cpu-fp32"
LENGTH = 32
REQUESTS = [[5, 9, 200, 17], [7], [8, 90, 12], [55]]  # of one sequence; a request may have several tokens at any time
COUNT = 16
MODELS = ("pruned_step", "pruned-dense_step")


# -- the graph ---------------------------------------------------------------------------------------------------------


class StepSession:
    """A step model's graph, driven as a server with implicit state drives it."""

    def __init__(self, graph: Path, states: list[State]) -> None:
        self._session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self._states = states
        self.begin()

    def begin(self) -> None:
        """No tokens so far, in a cache whose numbers would show if anything read them."""
        self._values = {
            state.input_name: np.full((1, *state.dims), 0 if state.dtype == "int64" else np.nan, state.dtype)
            for state in self._states
        }

    def step(self, tokens: list[int]) -> np.ndarray:
        """Logits (1, vocabulary)."""
        names = [state.output_name for state in self._states]
        feeds = {"input_ids": np.array([tokens], dtype=np.int64), **self._values}
        logits, *values = self._session.run(["logits", *names], feeds)
        assert [value.shape for value in values] == [(1, *state.dims) for state in self._states]
        self._values = dict(zip(self._values, values, strict=True))
        found: np.ndarray = logits
        return found


def engine_of(source: Path, out: Path, **changes: Any) -> Path:
    spec = load_engine_spec(ENGINE)
    build_engine(onnx_of(source), EngineSpec.model_validate({**spec.model_dump(), "threads": 1, **changes}), out)
    return out


def step_of(engine: Path) -> StepSession:
    model = ir.load(engine / "model.onnx")
    states = keep_state(model, LENGTH)
    ir.save(model, engine / "step.onnx")
    return StepSession(engine / "step.onnx", states)


@pytest.mark.parametrize("fuse", [True, False], ids=["in-place", "growing"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt2", "opt"])
def test_steps_give_the_engines_logits(name: str, fuse: bool, exported: Made, tmp_path: Path) -> None:
    engine = engine_of(exported(name), tmp_path / "engine", fuse=fuse)
    step = step_of(engine)
    found = [step.step(tokens) for tokens in REQUESTS]
    with open_engine(engine) as runner:
        for count, logits in enumerate(found, start=1):
            ids = np.array([[token for request in REQUESTS[:count] for token in request]])
            whole = runner.prefill(ids, np.ones_like(ids))[:, -1]
            np.testing.assert_allclose(logits, whole, atol=1e-4 * whole.std())
    step.begin()
    np.testing.assert_array_equal(step.step(REQUESTS[0]), found[0])


@pytest.mark.parametrize("fuse", [True, False], ids=["in-place", "growing"])
def test_a_sequence_that_is_full_says_so(fuse: bool, exported: Made, tmp_path: Path) -> None:
    step = step_of(engine_of(exported("llama"), tmp_path / "engine", fuse=fuse))
    step.step([1] * (LENGTH - 1))
    with pytest.raises(Exception, match=f"a_sequence_has_at_most_{LENGTH}_tokens"):
        step.step([1, 1])
    step.step([1])
    with pytest.raises(Exception, match=f"a_sequence_has_at_most_{LENGTH}_tokens"):
        step.step([1])


def test_graphs_that_ask_for_more_are_refused(exported: Made) -> None:
    model = ir.load(onnx_of(exported("llama")))
    fix_cache(model, LENGTH)
    with pytest.raises(NoMatch, match="input 'write_indices'"):
        keep_state(model, LENGTH)


# -- the repository ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(exported: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `triton` reads of a run: a model with its tokenizer, and its engines."""
    run = tmp_path_factory.mktemp("step") / "run"
    pruned, dense = exported("llama", dropped=DROPPED), exported("llama")
    shutil.copytree(pruned / "model", run / "pruned")
    tiny_tokenizer().save_pretrained(run / "pruned")
    (run / RUN_MARK).touch()
    (run / "engines" / ENGINE).mkdir(parents=True)
    for role, source in {"pruned": pruned, "dense": dense}.items():
        engine_of(source, run / "engines" / ENGINE / role)
    return run


@pytest.fixture(scope="module")
def repository(run: Path) -> Path:
    options = ["--out", "repository", "--name", "pruned", "--dense", "--step", "--max-length", "64", "--json"]
    done = trsp_deploy("triton", "run", *options, cwd=run.parent)
    assert done.code == 0, done.said
    assert json.loads(done.stdout)["models"] == ["pruned", "pruned_step", "pruned-dense", "pruned-dense_step"]
    assert "pruned_step: ort-cpu-fp32, one step of a loop of your own, 8 sequences at once" in done.stderr
    return run.parent / "repository"


@needs_schema
def test_the_repository_has_the_bare_engine(repository: Path, run: Path) -> None:
    for name, layers in zip(MODELS, (LAYERS - len(DROPPED), LAYERS), strict=True):
        config = parse_config((repository / name / "config.pbtxt").read_text(), name)
        assert config.backend == "onnxruntime" and config.max_batch_size == 1
        assert len(config.sequence_batching.state) == 2 * layers + 1
        weights = repository / name / "1" / "model.onnx.data"
        built = run / "engines" / ENGINE / ("dense" if "dense" in name else "pruned") / weights.name
        assert weights.samefile(built)
        assert len(onnx.load(weights.with_suffix(""), load_external_data=False).SerializeToString()) < 100_000
    step = json.loads((repository / "MANIFEST.json").read_text())["models"][1]
    keys_and_values = (LAYERS - len(DROPPED)) * 2 * 2 * 64 * 16 * 4  # layers, both, heads, tokens, head size, bytes
    assert step["serves"] == "steps" and step["state_bytes"] == keys_and_values + 8
    assert f"64 tokens and {keys_and_values / 1e6:.1f} MB of state each" in (repository / "README.md").read_text()


@needs_schema
def test_a_step_for_a_gpu_can_be_loaded_on_a_cpu(exported: Made, tmp_path: Path) -> None:
    engine = engine_of(exported("llama"), tmp_path / "engine")
    found = read_manifest(engine)
    spec = found.spec.model_copy(update={"backend": "onnxruntime-cuda"})
    write_json(engine / "manifest.json", found.model_copy(update={"spec": spec, "spec_sha256": spec_sha256(spec)}))
    write_step_model(engine, "pruned", "m", tmp_path / "m", LENGTH, 3)
    files = [tmp_path / "m" / name for name in ("config.pbtxt", "configs/cpu.pbtxt")]
    gpu, cpu = (parse_config(path.read_text(), path.name) for path in files)
    for config, kind, gpus in ((gpu, "KIND_GPU", [0]), (cpu, "KIND_CPU", [])):
        (group,) = config.instance_group
        assert (group.Kind.Name(group.kind), group.count, list(group.gpus)) == (kind, 1, gpus)
        config.ClearField("instance_group")
    assert gpu == cpu and cpu.sequence_batching.oldest.max_candidate_sequences == 3


@needs_schema
def test_a_later_call_without_steps_keeps_what_the_readme_says_of_them(
    repository: Path, run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    done = trsp_deploy("triton", "run", "--out", str(copy), "--name", "other", cwd=run.parent)
    assert done.code == 0, done.said
    assert 'client.infer("pruned_step"' in (copy / "README.md").read_text()


@needs_schema
def test_a_later_call_of_the_same_name_without_steps_leaves_none_of_other_weights(
    repository: Path, run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    done = trsp_deploy("triton", "run", "--out", str(copy), "--name", "pruned", "--max-length", "64", cwd=run.parent)
    assert done.code == 0, done.said
    names = [model["name"] for model in json.loads((copy / "MANIFEST.json").read_text())["models"]]
    assert names == ["pruned", "pruned-dense", "pruned-dense_step"] and not (copy / "pruned_step").exists()
    assert trsp_deploy("verify", str(copy), cwd=tmp_path).code == 0


@needs_schema
def test_an_engine_may_be_in_several_repositories(repository: Path, run: Path, tmp_path: Path) -> None:
    weights = run / "engines" / ENGINE / "pruned" / "model.onnx.data"
    assert weights.stat().st_nlink > 1
    done = trsp_deploy("triton", str(run), "--out", "second", "--name", "pruned", cwd=tmp_path)
    assert done.code == 0, done.said
    settings = [each / "pruned" / "1" / "serving.json" for each in (repository, tmp_path / "second")]
    first, second = (json.loads(path.read_text())["rotations"] for path in settings)
    assert first == second and len(first) == 1


@needs_schema
def test_the_linter_knows_states(repository: Path, tmp_path: Path) -> None:
    clean = trsp_deploy("triton-lint", str(repository), cwd=tmp_path)
    assert clean.code == 0 and "0 errors, 0 warnings" in clean.stdout, clean.said
    folder = tmp_path / "broken" / "pruned_step"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").hardlink_to(repository / "pruned_step" / "1" / "model.onnx")
    text = (repository / "pruned_step" / "config.pbtxt").read_text()
    text = text.replace('"kv_out_01_key"', '"kv_out_9"').replace("dims: [ 2, 64, 16 ]", "dims: [ 2, 32, 16 ]", 1)
    (folder / "config.pbtxt").write_text(text.replace("TYPE_INT64 dims: [ 1 ]", "TYPE_FP32 dims: [ 1 ]"))
    done = trsp_deploy("triton-lint", str(folder.parent), cwd=tmp_path)
    for line in (
        "sorted by input name, their outputs are out of order",
        "state output 'kv_out_9': the graph has logits, kv_out_00_key",
        "state 'kv_in_00_key': its initial_state is of another type or other dims",
        "state input 'kv_in_00_key': dims [-1, 2, 32, 16] with the batch, [-1, 2, 64, 16] in the graph",
        "state input 'length_in': TYPE_FP32 in the config, TYPE_INT64 in the graph",
        "1/model.onnx.data is missing: it holds weights of model.onnx",
    ):
        assert line in done.stdout, done.said


@needs_schema
def test_what_cannot_be_a_step_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    done = trsp_deploy("triton", str(run), "--step", "--max-length", "65", "--out", "no", cwd=tmp_path)
    assert (
        done.code == 1 and "--max-length 65: the model and its engines take 64 tokens" in done.stderr.splitlines()[-1]
    )
    engine = tmp_path / "run" / "engines" / "tensorrt-fp16" / "pruned"
    engine.mkdir(parents=True)
    (tmp_path / "run" / RUN_MARK).touch()
    (tmp_path / "run" / "pruned").symlink_to(run / "pruned")
    manifest = json.loads((run / "engines" / ENGINE / "pruned" / "manifest.json").read_text())
    del manifest["sha256"]  # by hand
    manifest["spec"] = load_engine_spec("tensorrt-fp16").model_dump(mode="json")
    (engine / "manifest.json").write_text(json.dumps(manifest))
    done = trsp_deploy("triton", "run", "--engine", "tensorrt-fp16", "--step", "--out", "no", cwd=tmp_path)
    assert done.code == 1 and "--step: engine 'tensorrt-fp16' is of tensorrt" in done.stderr.splitlines()[-1], done.said
    assert not (tmp_path / "no").exists()


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    installation, option = stand_in_backend.with_stand_in(tmp_path_factory.mktemp("server") / "backends")
    with TritonServer(repository, option, installation=installation) as server:
        yield server


@needs_schema
@needs_server
def test_the_readmes_loop_gives_the_engines_tokens(server: TritonServer, repository: Path, run: Path) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer.encode(english()[start : start + 30]) for start in range(0, 4_000, 1_000)]
    page = (repository / "README.md").read_text()
    block = page.partition("<!-- step:start -->\n```python\n")[2].partition("```\n<!-- step:end -->")[0]
    asked = {"block": block, "folder": str(repository), "address": server.grpc, "prompts": prompts}
    found = client("steps.py", stdin={**asked, "count": COUNT, "most": 64})
    readme_prompt = tokenizer.encode("The capital of France is")
    with open_engine(run / "engines" / ENGINE / "pruned") as runner:
        texts = [
            generate(runner, [prompt], Sampling(max_new_tokens=COUNT))[0].tokens for prompt in (*prompts, readme_prompt)
        ]
    assert found["alone"] == texts[:-1] and found["interleaved"] == texts[:-1]
    assert found["printed"].rstrip("\n") == tokenizer.decode(texts[-1]).rstrip("\n")
    full = found["past the end"]
    assert "a_sequence_has_at_most_64_tokens" in full["at once"] and "_64_tokens" in full["one more"]
    assert full["tokens"] == texts[0][:2] and full["begun anew"] == texts[0][0]
    assert "must specify the START flag" in found["never begun"]
