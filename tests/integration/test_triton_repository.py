"""A model repository of a run: what is in it, what it refuses, and what the linter finds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml

from tests.command import trsp_deploy
from tests.tiny import LAYERS
from trsp_deploy.artifacts import write_json
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.stages.serve_bench import Address, LoadSettings, measure_served
from trsp_deploy.stages.triton_repository import write_repository
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.model_repository.config import SCHEMA, WARMUP, parse_config
from trsp_deploy.tools.model_repository.lint import lint, own_engine
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.runners.manifest import Bound, read_manifest, spec_sha256
from trsp_deploy.tools.runners.requirements import CudaDevice
from trsp_deploy.tools.sources.packaged import find_asset

needs_schema = pytest.mark.skipif(find_asset(SCHEMA) is None, reason=f"needs: trsp-deploy fetch {SCHEMA}")


def test_every_file_of_it_is_in_its_manifest(served_run: Path, served_repository: Path, tmp_path: Path) -> None:
    assert trsp_deploy("verify", "repository", cwd=served_run.parent).code == 0
    copy = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    with (copy / "Dockerfile").open("a") as file:
        file.write("RUN curl somewhere\n")
    changed = trsp_deploy("verify", str(copy), cwd=served_run.parent)
    assert changed.code != 0 and "Dockerfile" in changed.said
    assert trsp_deploy("verify", "run", cwd=served_run.parent).code == 0  # built and not finished: against its records


def test_a_tokenizer_that_is_another_one_is_not_served(served_run: Path, tmp_path: Path) -> None:
    shutil.copytree(served_run, tmp_path / "run")
    with (tmp_path / "run/pruned/tokenizer.json").open("a") as file:
        file.write(" ")
    done = trsp_deploy("triton", "run", cwd=tmp_path)
    assert done.code == 1 and "run/pruned: is not what its step made" in done.said
    shutil.rmtree(tmp_path / "run/pruned")
    done = trsp_deploy("triton", "run", cwd=tmp_path)
    assert done.code == 1 and "run/pruned: is not there, as after `clean`; `trsp-deploy report run`" in done.said
    assert not (tmp_path / "model_repository").exists()


@needs_schema
def test_a_repository_is_whole_and_its_config_is_tritons(served_repository: Path) -> None:
    for name in ("pruned", "pruned-dense"):
        config = parse_config((served_repository / name / "config.pbtxt").read_text(), name)
        assert config.name == name and config.backend == "python" and config.model_transaction_policy.decoupled
        assert config.input[0].name == "text_input" and not config.input[0].optional
        assert all(each.optional for each in config.input[1:])
        (sample,) = config.model_warmup
        assert sample.batch_size == 1, "0 is skipped"
        for name_in, value in sample.inputs.items():
            assert (served_repository / name / "warmup" / value.input_data_file).read_bytes() == WARMUP[name_in]
        for path in ("1/model.py", "1/engine/manifest.json", "1/tokenizer.json", "1/vendor/trsp_deploy/errors.py"):
            assert (served_repository / name / path).is_file(), path
    manifest = json.loads((served_repository / "MANIFEST.json").read_text())
    assert f"'{manifest['packages'][0]}'" in (served_repository / "Dockerfile").read_text()
    assert [model["role"] for model in manifest["models"]] == ["pruned", "dense"]
    assert manifest["packages"][0].startswith("onnxruntime==")
    for model, layers in zip(manifest["models"], (LAYERS - 2, LAYERS), strict=True):
        # 4 texts of 256 tokens and one place more; keys and values of 2 heads, each of 16 fp32 numbers.
        assert model["cache_bytes"] == 4 * 257 * layers * 2 * 2 * 16 * 4
        assert f"{model['cache_bytes'] / 1e6:.1f} MB of cache at most" in (served_repository / "README.md").read_text()
    assert all((served_repository / "pruned" / file).is_file() for file in manifest["models"][0]["files"])


@needs_schema
def test_a_model_that_was_loaded_leaves_nothing_beside_it(served_repository: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    load_as_the_backend_does(repository / "pruned" / "1", tmp_path)
    assert verify(repository).findings == ()


@needs_schema
def test_a_model_that_was_loaded_is_unchanged_to_a_server_that_polls(served_repository: Path, tmp_path: Path) -> None:
    """It takes the newest time below a model's folder, and loads the model again where it is later than before."""
    model = Path(shutil.copytree(served_repository / "pruned", tmp_path / "pruned"))

    def newest_ns() -> int:
        return max(path.stat().st_mtime_ns for path in [model, *model.rglob("*")])

    before = newest_ns()
    for _ in range(2):
        load_as_the_backend_does(model / "1", tmp_path)
        assert newest_ns() <= before


def load_as_the_backend_does(version: Path, beside: Path) -> None:
    """Import a model's file in a process of its own, whose Python is isolated and so heeds no variable."""
    (beside / "triton_python_backend_utils.py").write_text("TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1")
    load = "import sys; sys.path += sys.argv[1:]; import model"
    subprocess.run([sys.executable, "-I", "-c", load, version, beside], check=True)


@needs_schema
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("sys.modules['onnxruntime'] = None", ["onnxruntime is not installed", "the repository's Dockerfile installs"]),
        (
            "open(sys.argv[1] + '/tokenizer.json', 'w').write('{}')",
            ["tokenizer.json: is no tokenizer that can be read"],
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_says_so(
    prepare: str, words: list[str], served_repository: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(served_repository / "pruned" / "1", tmp_path / "1"))
    (tmp_path / "triton_python_backend_utils.py").write_text(
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1\nclass TritonModelException(Exception): ..."
    )
    load = f"import sys; sys.path += sys.argv[1:]; {prepare}; import model; model.TritonPythonModel().initialize({{}})"
    done = subprocess.run(
        [sys.executable, "-I", "-c", load, model, tmp_path], capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("triton_python_backend_utils.TritonModelException: "), done.stderr
    assert all(word in last for word in words), last


@needs_schema
def test_what_is_there_stays_in_the_manifest(served_run: Path, served_repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    again = trsp_deploy("triton", "run", "--out", str(copy), "--name", "other", cwd=served_run.parent)
    assert again.code == 0, again.said
    names = [model["name"] for model in json.loads((copy / "MANIFEST.json").read_text())["models"]]
    assert names == ["other", "pruned", "pruned-dense"]
    assert trsp_deploy("verify", str(copy), cwd=tmp_path).code == 0
    assert all(f"`{name}`: " in (copy / "README.md").read_text() for name in names)


@needs_schema
@pytest.mark.parametrize("package", ["onnxruntime==1.0.0", "onnxruntime-gpu==1.32.0"])
def test_models_that_one_python_cannot_serve_are_not_put_together(
    package: str, served_run: Path, served_repository: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    manifest["models"][1]["packages"][0] = package
    manifest.pop("sha256")
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    done = trsp_deploy("triton", "run", "--out", str(copy), "--name", "other", cwd=served_run.parent)
    assert done.code == 1 and "one server's Python cannot have both" in done.said
    assert f"'pruned-dense' {package}" in done.said or f"'pruned' needs {package}" in done.said, done.said
    assert not (copy / "other").exists() and json.loads((copy / "MANIFEST.json").read_text()) == manifest


@needs_schema
def test_dense_and_pruned_have_one_engine(served_run: Path, tmp_path: Path) -> None:
    """The first engine that the run has of both, and no comparison where a repository has two."""
    copy = Path(shutil.copytree(served_run, tmp_path / "run"))
    another = Path(shutil.copytree(copy / "engines" / "ort-cpu-fp32" / "pruned", copy / "engines" / "a" / "pruned"))
    found = read_manifest(another)
    spec = found.spec.model_copy(update={"name": "a", "threads": 1})
    changed = found.model_copy(update={"name": "a", "spec": spec, "spec_sha256": spec_sha256(spec)})
    write_json(another / "manifest.json", changed)
    for options in (["--dense", "--out", "both"], ["--out", "mixed", "--name", "alone", "--engine", "a"]):
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


def profiled(run: Path, out: Path, sequence: int) -> Path:
    """The run's pruned engine, as one of TensorRT that reads so many tokens in a call."""
    engine = Path(shutil.copytree(run / "engines" / "ort-cpu-fp32" / "pruned", out))
    one = {"min": 1, "opt": 1, "max": 1}
    profile = {"batch": one, "sequence": {**one, "max": sequence}, "past": {"min": 0, "opt": 64, "max": 127}}
    spec = EngineSpec.model_validate({**load_engine_spec("tensorrt-fp16").model_dump(), "profiles": [profile]})
    found = read_manifest(engine).model_copy(update={"spec": spec, "spec_sha256": spec_sha256(spec)})
    write_json(engine / "manifest.json", found)
    return engine


@needs_schema
@pytest.mark.parametrize(("sequence", "expected"), [(16, 16), (127, None)])
def test_a_server_is_told_how_long_a_prompt_the_engine_reads(
    sequence: int, expected: int | None, served_run: Path, tmp_path: Path
) -> None:
    """By TensorRT's profiles: a text ends where the longest cache does, and a prompt where one call does."""
    engine = profiled(served_run, tmp_path / "engine", sequence)
    made = write_repository({"pruned": engine}, served_run / "pruned", {"pruned": "m"}, tmp_path / "repository", 4)
    settings = json.loads((tmp_path / "repository/m/1/serving.json").read_text())
    assert (settings["max_length"], settings.get("max_prompt")) == (128, expected)
    assert (made.models[0].max_length, made.models[0].max_prompt) == (128, expected)


@needs_schema
def test_an_engine_that_cannot_read_the_warm_up_is_refused(served_run: Path, tmp_path: Path) -> None:
    """The server would not load it."""
    engine = profiled(served_run, tmp_path / "engine", 1)
    said = "engine 'tensorrt-fp16': reads prompts of 1 tokens at most; the server's warm-up, 'Hello', has [0-9]+: "
    with pytest.raises(RunError, match=said):
        write_repository({"pruned": engine}, served_run / "pruned", {"pruned": "m"}, tmp_path / "repository", 4)


@needs_schema
@pytest.mark.parametrize(("more", "expected"), [({"max_prompt": 16}, 16), ({}, None)])
def test_a_served_model_passes_the_longest_prompt_on(
    more: dict[str, int], expected: int | None, served_repository: Path, tmp_path: Path
) -> None:
    """A repository of an older version says none."""
    model = Path(shutil.copytree(served_repository / "pruned" / "1", tmp_path / "1"))
    settings = json.loads((model / "serving.json").read_text())
    (model / "serving.json").write_text(json.dumps({**settings, **more}))
    (tmp_path / "triton_python_backend_utils.py").write_text("TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1")
    load = (
        "import sys; sys.path += sys.argv[1:]; import model; served = model.TritonPythonModel(); "
        "served.initialize({'model_config': '{}'}); print(served._loop._max_prompt); served.finalize()"
    )
    command = [sys.executable, "-I", "-c", load, model, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(expected or settings["max_length"] - 1)], done.stderr


@needs_schema
def test_another_runs_engine_is_not_measured_for_a_report(
    served_run: Path, served_repository: Path, tmp_path: Path
) -> None:
    """Not after the measurement, which would have taken the place of an earlier one of the run's own engine."""
    shutil.copytree(served_run, tmp_path / "run")
    built = tmp_path / "run" / "engines" / "ort-cpu-fp32" / "pruned" / "manifest.json"
    built.write_text(built.read_text() + "\n")
    generator: Any = None  # never asked
    for run, words in (
        (tmp_path / "run", "is not the run's pruned engine ort-cpu-fp32"),
        (served_run, "--prompt-tokens"),
    ):
        with pytest.raises(RunError, match=words):
            measure_served(
                served_repository,
                lambda: contextlib.nullcontext(Address("", "")),
                generator,
                LoadSettings(prompt_tokens=10_000),
                run=run,
            )


@needs_schema
@pytest.mark.parametrize("file", ["README.md", "Dockerfile"])
def test_another_projects_files_are_left_alone(file: str, served_run: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text("a project")
    done = trsp_deploy("triton", "run", "--out", str(tmp_path), cwd=served_run.parent)
    assert done.code == 1 and f"has a {file} that is not of a model repository of ours" in done.said
    assert (tmp_path / file).read_text() == "a project"


@needs_schema
def test_folders_that_are_none_of_its_own_stay(served_run: Path, tmp_path: Path) -> None:
    models = {"run-pruned": "mine.txt", "run-pruned_step": "config.pbtxt"}  # the second one's name is as of ours
    for name, file in models.items():
        out = tmp_path / name
        mine = out / name / file
        mine.parent.mkdir(parents=True)
        mine.write_text(f'name: "{name}"')
        done = trsp_deploy("triton", "run", "--step", "--out", str(out), cwd=served_run.parent)
        assert done.code == 1 and f"{mine.parent}: is no model of a repository of ours" in done.said
        assert mine.read_text() == f'name: "{name}"'
        assert [path.name for path in out.iterdir() if path.is_dir()] == [name]
    engines = served_run / "engines"
    done = trsp_deploy("triton", "run", "--out", str(engines), "--name", "ort-cpu-fp32", cwd=served_run.parent)
    assert done.code == 1 and f"--out {engines}: is a part of the run {served_run}" in done.said
    assert (engines / "ort-cpu-fp32" / "pruned" / "manifest.json").is_file()


@needs_schema
def test_a_repository_whose_surroundings_are_not_ours_is_written(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root of a container is nobody's who is not root. Root, which may run the tests, is refused nothing."""
    out = tmp_path / "volume" / "models"
    out.mkdir(parents=True)
    make, open_file = os.mkdir, os.open

    def refuse(path: Any) -> None:
        if Path(path).parent == out.parent and not os.path.lexists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        refuse(path)
        make(path, *rest, **more)

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            refuse(path)
        return open_file(path, flags, *rest, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "open", opened)
    done = trsp_deploy("triton", "run", "--name", "m", "--out", str(out), cwd=served_run.parent)
    assert done.code == 0, done.said
    assert (out / "m" / "config.pbtxt").is_file() and [path.name for path in out.parent.iterdir()] == ["models"]


@needs_schema
def test_a_call_that_was_killed_is_made_again(served_run: Path, tmp_path: Path) -> None:
    """Its models lie there without the repository's manifest."""
    call = ["triton", "run", "--step", "--out", str(tmp_path / "out")]
    assert trsp_deploy(*call, cwd=served_run.parent).code == 0
    (tmp_path / "out" / "MANIFEST.json").unlink()
    for file in ("README.md", "Dockerfile"):
        (tmp_path / "out" / file).unlink()
    assert trsp_deploy(*call, cwd=served_run.parent).code == 0


@needs_schema
def test_what_is_said_of_another_versions_repository_helps(served_run: Path, tmp_path: Path) -> None:
    call = ["triton", "run", "--out", str(tmp_path / "out")]
    assert trsp_deploy(*call, cwd=served_run.parent).code == 0
    (tmp_path / "out" / "MANIFEST.json").write_text('{"models": []}')
    done = trsp_deploy(*call, cwd=served_run.parent)
    assert done.code == 1 and "delete the folder and write it again: trsp-deploy triton RUN --out" in done.said
    shutil.rmtree(tmp_path / "out")
    assert trsp_deploy(*call, cwd=served_run.parent).code == 0


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
    liveness = container["livenessProbe"]["httpGet"]
    assert liveness == {"path": "/v2/models/NAME/ready", "port": "http"}, (
        "the server lives on when a model's process dies"
    )
    (models,) = [mount for mount in container["volumeMounts"] if mount["name"] == "models"]
    assert models["subPath"] == "model_repository" and models["readOnly"], "a volume's root may have a lost+found"
    page = (manifest.parents[2] / "docs" / "triton.md").read_text()
    assert "`NAME` in the liveness probe" in page and f"the folder `{models['subPath']}`" in page
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    (stopping,) = [arg.partition("=")[2] for arg in container["args"] if arg.startswith("--exit-timeout-secs=")]
    assert sleep == "sleep"
    assert int(seconds) + int(stopping) < deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


@needs_schema
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], ["nowhere", "no run of trsp-deploy"]),
        (["run", "--name", "../x"], ["--name '../x'", "letters, digits, dots"]),
        (["run", "--engine", "ort"], ["no engine 'ort'"]),
        (["run", "--name", "m" * 101], ["--name: a model would be 'mmm", "of 101 characters; at most 100"]),
        (["run", "--name", "m" * 95, "--dense"], ["m-dense', of 101 characters"]),
        (["run", "--max-length", "2"], ["--max-length 2: the server's warm-up, 'Hello' and 2 new tokens, has"]),
        (["run", "--name", "m" * 96, "--step"], ["m_step', of 101 characters"]),
    ],
)
def test_bad_input_is_one_line(served_run: Path, options: list[str], words: list[str]) -> None:
    done = trsp_deploy("triton", *options, cwd=served_run.parent)
    assert done.code == 1 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
    assert not (served_run.parent / "model_repository").exists()


@needs_schema
def test_the_linter_finds_what_went_missing(served_repository: Path, tmp_path: Path) -> None:
    clean = trsp_deploy("triton-lint", str(served_repository), cwd=tmp_path)
    assert clean.code == 0 and "0 errors, 0 warnings" in clean.stdout, clean.said
    copy = Path(shutil.copytree(served_repository, tmp_path / "repository"))
    data = copy / "pruned" / "1" / "engine" / "model.onnx.data"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    (copy / "pruned-dense" / "1" / "tokenizer.json").unlink()
    damaged = copy / "pruned" / "1" / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    done = trsp_deploy("triton-lint", str(copy), "--json", cwd=tmp_path)
    assert done.code == 2
    messages = [finding["message"] for finding in json.loads(done.stdout)["findings"]]
    assert messages.pop(0).startswith(f"{damaged}: is no tokenizer that can be read (EOF while parsing")
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
        ({"bound": Bound(gpu="sm89", device="a GPU")}, None),
        (
            {"bound": Bound(gpu="sm89", device="an L40")},
            "for an L40, here is a GPU (`hardware_compatibility: same-compute-capability` in its spec allows both)",
        ),
        ({"compute_capabilities": ("sm86", "sm120")}, "for GPUs of compute capability sm86, sm120, here is sm89"),
        ({"compute_capabilities": ("SM89",)}, None),
    ],
)
def test_the_linter_holds_an_engine_against_package_gpu_and_driver(
    changes: dict[str, Any],
    message: str | None,
    served_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine with a GPU, of engines whose manifests say so."""
    model = Path(shutil.copytree(served_repository / "pruned", tmp_path / "pruned"))
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


@needs_schema
@pytest.mark.parametrize("gpus", [[], [CudaDevice("a GPU", "sm89", 2**30)]])
def test_the_linter_holds_an_int8_engine_against_the_processor(
    gpus: list[CudaDevice], served_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(served_repository / "pruned", tmp_path / "pruned"))
    changed = read_manifest(model / "1" / "engine").model_copy(update={"bound": Bound(exact_int8=True)})

    def devices() -> list[CudaDevice]:
        if not gpus:
            raise EngineUnavailable("no CUDA device")
        return gpus

    monkeypatch.setattr(own_engine, "read_manifest", lambda folder: changed)
    monkeypatch.setattr(own_engine, "cuda_devices", devices)
    monkeypatch.setattr(own_engine, "driver_version", lambda: None)
    monkeypatch.setattr(own_engine, "adds_int8_exactly", lambda: False)
    assert [each.message for each in lint(tmp_path)] == [
        "the engine was built for a processor with VNNI; on this one, without, its int8 products would overflow"
    ]
