"""What is wrong with a Triton model repository, ours or not, that the server would say only at load, or never.

    for finding in lint(Path("model_repository")): print(finding)

Of each model: its versions and backend (here), its config by itself (`config_alone`), and the config beside the models
that it is made of (`ensembles`) or the file that it serves: an ONNX graph (`graph`), a TensorRT plan (`plan`), an
engine of ours (`own_engine`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trsp_deploy.errors import RunError, nearest
from trsp_deploy.tools.model_repository.config import parse_config, schema
from trsp_deploy.tools.model_repository.lint import config_alone
from trsp_deploy.tools.model_repository.lint.ensembles import against_steps
from trsp_deploy.tools.model_repository.lint.finding import Finding, Say
from trsp_deploy.tools.model_repository.lint.graph import against_graph
from trsp_deploy.tools.model_repository.lint.own_engine import against_manifest
from trsp_deploy.tools.model_repository.lint.plan import against_plan
from trsp_deploy.tools.model_repository.lint.versions import VERSION, numbered, served

CONFIG = "config.pbtxt"
# The file that each backend opens where the config names no other; a python model without it hangs the server for good.
# In the order in which the server looks for them where the config names no backend (AutoCompleteBackendFields in
# triton-inference-server/core).
DEFAULT_FILES = {
    "tensorrt": "model.plan",
    "onnxruntime": "model.onnx",
    "openvino": "model.xml",
    "pytorch": "model.pt",
    "python": "model.py",
}
COMPLETED = ("model.onnx", "model.plan", "model.xml")  # of which the server can make up a config itself
PLATFORMS = {
    "tensorrt_plan": "tensorrt",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "ensemble": "ensemble",
}
PLATFORM_FILES = {"torch_aoti": "model.pt2"}  # where a backend opens another file for it
UNFINISHED = re.compile(r"\..+\.(partial|former)")  # names of `artifacts.writing`
# Backends that some container of Triton's has; another one has to lie somewhere as libtriton_<name>.so.
BACKENDS = (*DEFAULT_FILES, "tensorflow", "dali", "fil", "vllm", "tensorrtllm", "identity", "repeat", "square")


def lint(repository: Path) -> list[Finding]:
    """Every finding of a repository; raises RunError when the folder is none, or without Triton's schema."""
    if not repository.is_dir():
        raise RunError(f"{repository}: no such folder")
    folders = sorted(path for path in repository.iterdir() if path.is_dir())
    if not folders:
        raise RunError(f"{repository}: holds no model (a model is a folder with {CONFIG} and numbered versions)")
    schema()  # without it nothing is known of any config, which is no fault of theirs
    configs = {folder.name: _readable_config(folder) for folder in folders}
    return [finding for folder in folders for finding in _lint_model(folder, configs)]


def _readable_config(folder: Path) -> Any:
    """A model's config, or None; what is wrong with it is found where the model is looked at."""
    try:
        return parse_config((folder / CONFIG).read_text(encoding="utf-8"), CONFIG)
    except (RunError, OSError, UnicodeDecodeError):
        return None


def _lint_model(folder: Path, configs: Mapping[str, Any]) -> Iterator[Finding]:
    """configs: of the repository's models, None for one that cannot be read."""

    def error(message: str) -> Finding:
        return Finding(severity="error", model=folder.name, message=message)

    def warning(message: str) -> Finding:
        return Finding(severity="warning", model=folder.name, message=message)

    if UNFINISHED.fullmatch(folder.name):
        what_to_do = "run that command again where it was killed, or remove this"
        yield error(f"`trsp-deploy triton` has not finished it, and no server starts beside it: {what_to_do}")
        return
    path = folder / CONFIG
    try:
        there, versions = path.is_file(), numbered(folder)
    except OSError as problem:  # as of a volume's lost+found, which is root's alone
        yield error(f"{CONFIG} is missing, or this user may not look ({problem.strerror})")
        return
    if not there:
        if path.exists():
            yield error(f"{CONFIG} is {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")
        elif any(map(_completes_itself, versions)):
            yield warning(f"{CONFIG} is missing: the server makes one up, unless it is told not to")
        else:
            hidden = ", and the server takes hidden folders for models too: move it elsewhere"
            yield error(f"{CONFIG} is missing{hidden if folder.name.startswith('.') else ''}")
        return
    try:
        config = parse_config(path.read_text(encoding="utf-8"), CONFIG)
    except RunError as problem:
        yield error(str(problem))
        return
    except UnicodeDecodeError:
        yield error(f"{CONFIG} is not UTF-8 text")
        return
    except OSError as problem:
        yield error(f"{CONFIG} cannot be read ({problem.strerror})")
        return
    if config.name and config.name != folder.name:
        yield error(f"the config's name is '{config.name}', and the folder's is '{folder.name}'")
    backend = _backend(config, versions)
    yield from _version_names(folder, error, warning)
    yield from _versions(config, versions, error)
    yield from config_alone.batching(config, _gets_a_batch_size(config, backend, versions), error, warning)
    yield from config_alone.states(config, folder, error, warning)
    yield from config_alone.instances(config, (folder / "configs" / "cpu.pbtxt").is_file(), warning)
    yield from config_alone.warmup(config, folder, error, warning)
    yield from config_alone.labels(config, folder, error)
    yield from config_alone.tokenizer(config, error, warning)
    yield from against_steps(config, folder, configs, error)
    yield from _known(config, backend, folder, error, warning)
    if backend == "onnxruntime":
        yield from config_alone.onnxruntime(config, error, warning)
    for version in served(config, versions):
        yield from _files(config, backend, version, error, warning)
        yield from against_manifest(version, error)


def _gets_a_batch_size(config: Any, backend: str, versions: list[Path]) -> bool:
    """Whether the server may find a max_batch_size where the config says none (AutoCompleteConfig of its backends)."""
    if backend in ("onnxruntime", "openvino"):  # which look into the file where inputs or outputs are wanting
        return not (config.input and config.output)
    return backend == "tensorrt" or (backend == "python" and any(map(_python_completes, versions)))


def _completes_itself(version: Path) -> bool:
    """Whether the server makes up a config itself, of a graph or with what a Python model says."""
    return any((version / file).exists() for file in COMPLETED) or _python_completes(version)


def _python_completes(version: Path) -> bool:
    try:
        return b"auto_complete_config" in (version / DEFAULT_FILES["python"]).read_bytes()
    except OSError:
        return False


def _version_names(folder: Path, error: Say, warning: Say) -> Iterator[Finding]:
    """Folders that look like versions: the server reads a name up to its first other character (std::stoll), and skips
    those that begin with 0 (VersionsToLoad in triton-inference-server/core)."""
    for name in sorted(each.name for each in folder.iterdir() if each.is_dir()):
        begins = VERSION.match(name)
        if name[:1] == "0" and len(name) > 1:
            yield warning(f"folder {name} is no version to the server: its name begins with 0")
        elif begins is not None and begins[0] != name:
            yield error(f"the server takes folder {name} for version {begins[0]}: give it another name")


def _versions(config: Any, versions: list[Path], error: Say) -> Iterator[Finding]:
    if not versions:
        yield error("has no version: a folder with a number above 0, such as 1")
    numbers = {int(version.name) for version in versions}
    for wanted in config.version_policy.specific.versions:
        if wanted not in numbers:
            yield error(f"version_policy wants version {wanted}, and there is {sorted(numbers) or 'none'}")
    if versions and not config.version_policy.specific.versions and not served(config, versions):
        chosen = config.version_policy.WhichOneof("policy_choice")
        wanted = "num_versions, 1 or more" if chosen == "latest" else "the versions' numbers"
        yield error(f"version_policy {chosen} serves no version: give it {wanted}")


def _backend(config: Any, versions: list[Path]) -> str:
    """The backend's name, found as the server finds it; empty where it would not know."""
    if config.backend or config.platform:
        return str(config.backend or PLATFORMS.get(config.platform, ""))
    first = min(versions, key=lambda version: version.name, default=None)  # by its text, as the server sorts them
    there = {path.name for path in first.iterdir()} if first is not None else set()
    files = {config.default_model_filename} if config.default_model_filename else there
    return next((backend for backend, file in DEFAULT_FILES.items() if file in files), "")


def _known(config: Any, backend: str, folder: Path, error: Say, warning: Say) -> Iterator[Finding]:
    """Whether the server would find the backend. A model without any word of it may be called model.<backend>."""
    if not backend and config.platform:
        yield error(f"platform '{config.platform}' is none of Triton's{nearest(config.platform, PLATFORMS)}")
    elif not backend and (config.default_model_filename or "." not in folder.name):
        yield error("has neither backend nor platform, and no file that tells")
    elif config.backend and backend not in BACKENDS and not any(folder.rglob(f"libtriton_{backend}.so")):
        hint = nearest(backend, BACKENDS)
        yield warning(f"backend '{backend}' is none of Triton's own: the server needs libtriton_{backend}.so{hint}")


def _files(config: Any, backend: str, version: Path, error: Say, warning: Say) -> Iterator[Finding]:
    default = PLATFORM_FILES.get(config.platform, DEFAULT_FILES.get(backend))
    file = config.default_model_filename or default
    if file is None or config.runtime:  # a backend written in Python has files of its own
        return
    for capability, other in sorted(config.cc_model_filenames.items()):
        if not (version / other).exists():
            yield error(f"{version.name}/{other} is missing, which is for GPUs of compute capability {capability}")
    path = version / file
    if not path.exists():
        if config.cc_model_filenames:
            others = ", ".join(sorted(config.cc_model_filenames))
            yield warning(f"{version.name}/{file} is missing: only GPUs of compute capability {others} have a file")
            return
        hangs = ", and the server would wait for it for good" if backend == "python" else ""
        yield error(f"{version.name}/{file} is missing{hangs}")
    elif backend == "onnxruntime":
        # A model of several files may be a folder of that name.
        yield from against_graph(config, path / file if path.is_dir() else path, error)
    elif backend == "tensorrt":
        yield from against_plan(config, path, error, warning)
