"""The README of a model repository: how to serve exactly this one, and how to ask it."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trsp_deploy.tools.model_repository.config import IDLE_S
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel
from trsp_deploy.tools.serving.loop import MOST_WAITING
from trsp_deploy.tools.serving.requests import GenerationRequest

TEMPLATE = "readme.md.jinja"
PORTS = " ".join(f"-p 127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002))  # HTTP, gRPC, metrics

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
    limits = [f"`{model.name}`: {model.limits}" for model in repository.models]
    if any(model.precision == "int8" and model.max_batch > 1 for model in texts):
        limits.append(SHARED_SCALE)
    asked = GenerationRequest.model_fields
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        name=texts[0].name,
        install=f"{INSTALL} {_quoted(repository.packages)}",
        ports=PORTS,
        device="" if all(model.backend == "onnxruntime-cpu" for model in repository.models) else "--gpus 1 ",
        container=CONTAINER,
        limits=limits,
        default={name: _in_words(field.default) for name, field in asked.items() if not field.is_required()},
        most_waiting=MOST_WAITING,
        step=_step(texts, steps) if steps else None,
    )


def dockerfile(repository: RepositoryManifest) -> str:
    """An image of the server with what the models need; they themselves are mounted."""
    return f"""# Triton with the packages that the models of this repository need; README.md has the words to it.
FROM {repository.container}
RUN {INSTALL} --no-cache-dir {_quoted(repository.packages)}
"""


def _quoted(packages: tuple[str, ...]) -> str:
    """For a shell; a `Requirement` has no quote in it."""
    return " ".join(f"'{package}'" for package in packages)


def _in_words(default: object) -> str:
    """What an input is that nobody gives, as JSON has it."""
    return "none" if default == () else f"{default:g}" if isinstance(default, float) else json.dumps(default)


def _step(texts: list[ServedModel], steps: list[ServedModel]) -> dict[str, object]:
    """What is said of step models, where the repository has any; the code asks the first of them."""
    name = steps[0].name
    return {
        "name": name,
        # Each was written beside a model that has its tokenizer.
        "text_model": next((model.name for model in texts if f"{model.name}_step" == name), texts[0].name),
        "max_length": steps[0].max_length,
        "idle_s": IDLE_S,
        "versions": " and ".join(sorted({model.backend_version for model in steps})),
    }
