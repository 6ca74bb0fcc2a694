"""What the README of a model repository says, of models that one call or several have written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticUndefined

from trsp_deploy.artifacts import provenance
from trsp_deploy.tools.model_repository.config import OUTPUTS, generation_config
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel
from trsp_deploy.tools.model_repository.readme import SHARED_SCALE, dockerfile, readme
from trsp_deploy.tools.runners.manifest import Bound
from trsp_deploy.tools.serving.requests import GenerationRequest

WORDS: dict[str, object] = {"": PydanticUndefined, "none": ()}  # of the table; all others are JSON


def model(name: str, **changes: Any) -> ServedModel:
    values: dict[str, Any] = {
        "name": name,
        "role": "pruned",
        "engine": "e",
        "backend": "onnxruntime-cpu",
        "backend_version": "1.32.0",
        "precision": "fp32",
        "packages": ("onnxruntime==1.32.0", "tokenizers"),
        "max_batch": 8,
        "max_length": 64,
        "files": {},
    }
    return ServedModel.model_validate({**values, **changes})


def manifest(*models: ServedModel) -> RepositoryManifest:
    packages = ("onnxruntime==1.32.0", "tokenizers")
    return RepositoryManifest(models=models, packages=packages, gpu=None, container="c", provenance=provenance())


def page(*models: ServedModel) -> str:
    return readme(manifest(*models))


def test_it_is_of_all_models_whichever_was_written_last() -> None:
    step = model("old_step", serves="steps", max_length=32, backend_version="1.31.0", packages=())
    int8 = model("old", precision="int8")
    text = page(model("new"), int8, step)
    assert all(f"`{name}`: " in text for name in ("new", "old", "old_step"))
    assert "/v2/models/new/generate" in text and "--gpus" not in text
    assert SHARED_SCALE in text, "of the second model"
    assert 'Tokenizer.from_file("old/1/tokenizer.json")' in text and 'client.infer("old_step"' in text
    assert 'with grpc.InferenceServerClient("localhost:8001") as client:' in text, "which closes it"
    assert "a_sequence_has_at_most_32_tokens" in text and "built with ONNX Runtime 1.31.0" in text
    assert "add `--strict-readiness=false`, or the server is not ready" in text, "a server is strict by itself"


def test_what_may_be_asked_has_one_set_of_names_and_defaults() -> None:
    """The config, the README and what checks a request each had their own."""
    rows = re.findall(r"^\| (`.*`) \| .* \| (.*)\|$", page(model("m")), re.MULTILINE)
    said = {}
    for names, defaults in rows:
        for name, words in zip(names.split(", "), defaults.split(", "), strict=False):
            word = words.partition(" ")[0]
            said[name.strip("`")] = WORDS[word] if word in WORDS else json.loads(word)
    fields = GenerationRequest.model_fields
    assert said == {name: field.default for name, field in fields.items()}
    inputs = re.findall(r'name: "(\w+)" .* dims: \[ -?1 \]( optional: true)? }', generation_config("m", "KIND_CPU", 1))
    optional = {name: bool(words) for name, words in inputs if name not in OUTPUTS}
    assert optional == {name: not field.is_required() for name, field in fields.items()}


def test_it_says_how_long_a_prompt_may_be_where_that_is_less() -> None:
    assert "`m`: e, 8 texts at once, 64 tokens each, " in page(model("m"))
    assert "`m`: e, 8 texts at once, 64 tokens each with prompts of at most 16, " in page(model("m", max_prompt=16))


def test_it_says_nothing_of_what_is_not_there() -> None:
    text = page(model("m", precision="int8", max_batch=1))
    assert "Step by step" not in text and SHARED_SCALE not in text


def test_the_image_has_the_packages_and_the_cluster_its_name() -> None:
    repository = manifest(model("m"))
    _, start, install = dockerfile(repository).splitlines()
    assert start == "FROM c" and install.endswith(" 'onnxruntime==1.32.0' 'tokenizers'")
    _, deployment = yaml.safe_load_all((Path(__file__).parents[2] / "deploy/kubernetes/triton.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert f"docker build -t {container['image']} - < Dockerfile" in readme(repository)
    assert f"docker push {container['image']}" in readme(repository)
    assert f'bash -c "{install.removeprefix("RUN ").replace(" --no-cache-dir", "")} && tritonserver' in readme(
        repository
    )


def test_it_says_that_the_containers_lines_were_never_tried() -> None:
    """It stood in a comment of the code alone."""
    before, _, after = page(model("m")).partition("The `docker` lines were never tried: no Docker was at hand. ")
    assert before.endswith("## Serve it\n\n") and "docker run" not in before and "\n    docker run" in after


def test_its_ports_are_published_to_this_machine_alone() -> None:
    """Triton asks nobody who they are; the log said so before the page did."""
    published = re.findall(r"-p (\S+)", page(model("m")))
    assert len(published) == 6 and all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in published)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"backend": "tensorrt", "bound": Bound(gpu="sm89", driver="580.65.06")},
            "; runs on GPUs of compute capability sm89 under NVIDIA driver 580.65.06 alone",
        ),
        (
            {"backend": "tensorrt", "bound": Bound(gpu="sm90", device="NVIDIA H200", driver="580.65.06")},
            "; runs on NVIDIA H200 (sm90) under NVIDIA driver 580.65.06 alone",
        ),
        (
            {"backend": "tensorrt", "bound": Bound(gpu="sm89", others="ampere-plus")},
            "; runs on GPUs of compute capability sm80 and above alone",
        ),
        (
            {"backend": "tensorrt-rtx", "compute_capabilities": ("sm86", "sm89")},
            "; runs on GPUs of compute capability sm86, sm89 alone",
        ),
        ({"backend": "tensorrt-rtx"}, "; runs on TensorRT-RTX's GPUs but sm75 alone"),
        (
            {"precision": "int8", "bound": Bound(exact_int8=True)},
            "; runs on processors that add int8 products exactly (of x86 those with VNNI) alone",
        ),
        ({"backend": "onnxruntime-cuda"}, "MB of cache at most"),
    ],
)
def test_each_model_says_where_its_engine_runs(changes: dict[str, Any], words: str) -> None:
    (line,) = [line for line in page(model("m", **changes)).splitlines() if line.startswith("- `m`: ")]
    assert line.endswith(words)


def test_a_gpu_is_given_where_any_engine_wants_one() -> None:
    text = page(model("m"), model("n", backend="onnxruntime-cuda"))
    assert "docker run --rm --gpus 1 " in text
