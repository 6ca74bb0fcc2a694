"""What is wrong with a Triton model repository, ours or not, that the server would say only at load, or never.

for finding in lint(Path("model_repository")): print(finding)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import onnx

from trsp_deploy.artifacts import ENGINE_MANIFEST, fingerprint
from trsp_deploy.errors import EngineUnavailable, RunError, nearest
from trsp_deploy.reading import read_json
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.runners.manifest import EngineManifest, read_manifest
from trsp_deploy.tools.runners.requirements import cuda_devices, driver_version, package_version
from trsp_deploy.tools.triton_server.config import parse_config
from trsp_deploy.tools.triton_server.lint_plan import against_plan

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
COMPLETED = ("model.onnx", "model.plan")  # of which the server can make up a config itself
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
TOKENIZER_DIR = "tokenizer_dir"  # the parameter of models that make text into tokens for another (TensorRT-LLM's)
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
PLATFORM_FILES = {"torch_aoti": "model.pt2"}  # where a backend opens another file for it
# Backends that some container of Triton's has; another one has to lie somewhere as libtriton_<name>.so.
BACKENDS = (*DEFAULT_FILES, "tensorflow", "dali", "fil", "vllm", "tensorrtllm", "identity", "repeat", "square")
ONNX_TYPES = {
    1: "TYPE_FP32",
    2: "TYPE_UINT8",
    3: "TYPE_INT8",
    4: "TYPE_UINT16",
    5: "TYPE_INT16",
    6: "TYPE_INT32",
    7: "TYPE_INT64",
    8: "TYPE_STRING",
    9: "TYPE_BOOL",
    10: "TYPE_FP16",
    11: "TYPE_FP64",
    12: "TYPE_UINT32",
    13: "TYPE_UINT64",
    16: "TYPE_BF16",
}


class Finding(Strict):
    """One thing that is wrong, or that may be."""

    severity: Literal["error", "warning"]
    model: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.model}: {self.message}"


Say = Callable[[str], Finding]


def lint(repository: Path) -> list[Finding]:
    """Every finding of a repository; raises RunError when the folder is none."""
    if not repository.is_dir():
        raise RunError(f"{repository}: no such folder")
    folders = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise RunError(f"{repository}: holds no model (a model is a folder with {CONFIG} and numbered versions)")
    names = {folder.name for folder in folders}
    return [finding for folder in folders for finding in _lint_model(folder, names)]


def _lint_model(folder: Path, names: set[str]) -> Iterator[Finding]:
    """names: of the repository's models."""

    def error(message: str) -> Finding:
        return Finding(severity="error", model=folder.name, message=message)

    def warning(message: str) -> Finding:
        return Finding(severity="warning", model=folder.name, message=message)

    path = folder / CONFIG
    if not path.is_file():
        completed = any((version / file).exists() for version in _numbered(folder) for file in COMPLETED)
        if completed:
            yield warning(f"{CONFIG} is missing: the server makes one up, unless it is told not to")
        else:
            yield error(f"{CONFIG} is missing")
        return
    try:
        config = parse_config(path.read_text(encoding="utf-8"), CONFIG)
    except RunError as problem:
        yield error(str(problem))
        return
    except UnicodeDecodeError:
        yield error(f"{CONFIG} is not UTF-8 text")
        return
    if config.name and config.name != folder.name:
        yield error(f"the config's name is '{config.name}', and the folder's is '{folder.name}'")
    versions = _numbered(folder)
    yield from _versions(config, versions, error)
    yield from _batching(config, error, warning)
    yield from _states(config, error, warning)
    yield from _instances(config, (folder / "configs" / "cpu.pbtxt").is_file(), warning)
    yield from _warmup(config, folder, error, warning)
    yield from _tokenizer(config, error, warning)
    for step in config.ensemble_scheduling.step:
        if step.model_name not in names:
            yield error(f"a step of the ensemble is model '{step.model_name}', which is not here")
    backend = _backend(config, versions)
    yield from _known(config, backend, folder, error, warning)
    if backend == "onnxruntime":
        yield from _onnxruntime(config, error, warning)
    for version in _served(config, versions):
        yield from _files(config, backend, version, error, warning)
        yield from _served_engine(version, error)


def _numbered(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.is_dir() and each.name.isdecimal() and each.name != "0"]


def _versions(config: Any, versions: list[Path], error: Say) -> Iterator[Finding]:
    if not versions:
        yield error("has no version: a folder with a number above 0, such as 1")
    numbers = {int(version.name) for version in versions}
    for wanted in config.version_policy.specific.versions:
        if wanted not in numbers:
            yield error(f"version_policy wants version {wanted}, and there is {sorted(numbers) or 'none'}")


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


def _onnxruntime(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    """What the onnxruntime backend does not take, whatever the graph."""
    for each in (*config.input, *config.output):
        if each.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[each.data_type].name == "TYPE_BF16":
            yield warning(
                f"'{each.name}': TYPE_BF16 is refused by onnxruntime backends from before March 2026 (their pull "
                "request 335)"
            )
    for each in config.input:
        if each.optional and config.max_batch_size:
            yield error(f"optional input '{each.name}': the onnxruntime backend takes none where max_batch_size is set")


def _served(config: Any, versions: list[Path]) -> list[Path]:
    """Of the versions those that the server loads: the latest one where the config does not say."""
    policy = config.version_policy
    if policy.HasField("all"):
        return versions
    if policy.HasField("specific"):
        return [version for version in versions if int(version.name) in policy.specific.versions]
    return sorted(versions, key=lambda version: int(version.name))[-(policy.latest.num_versions or 1) :]


def _batching(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    if config.HasField("dynamic_batching") and config.max_batch_size == 0:
        yield error("dynamic_batching with max_batch_size 0 loads, and never batches")
    for size in config.dynamic_batching.preferred_batch_size:
        if size > config.max_batch_size:
            yield error(f"preferred_batch_size {size} is above max_batch_size {config.max_batch_size}")
    if config.model_transaction_policy.decoupled and config.HasField("dynamic_batching"):
        yield warning("dynamic batching of a decoupled model: requests are handed over together, answers are not")


def _states(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    states = config.sequence_batching.state
    pairs = [(state.input_name, state.output_name) for state in states]
    by_input = [output for _, output in sorted(pairs)]
    if by_input != sorted(by_input):
        yield error("states: sorted by input name, their outputs are out of order; pad numbers with zeros (kv_in_00)")
    for title, names in (("input_name", [one for one, _ in pairs]), ("output_name", [other for _, other in pairs])):
        for name, count in Counter(names).items():
            if count > 1:
                yield error(f"{count} states have the {title} '{name}'; the server takes the first alone")
    for state in states:
        for initial in state.initial_state:
            if (initial.data_type, list(initial.dims)) != (state.data_type, list(state.dims)):
                yield error(f"state '{state.input_name}': its initial_state is of another type or other dims")
        if -1 in state.dims:
            yield warning(
                f"state '{state.input_name}': a dimension of -1 begins as 1 and holds what was there; fix its length"
            )
        elif not state.initial_state:
            yield warning(f"state '{state.input_name}': has no initial_state, so a sequence begins with what was there")


def _instances(config: Any, on_cpu: bool, warning: Say) -> Iterator[Finding]:
    """Findings about instance groups. on_cpu: whether there is another config for a machine without a GPU."""
    kinds = {group.Kind.Name(group.kind) for group in config.instance_group}
    if "KIND_GPU" in kinds:
        try:
            cuda_devices()
        except EngineUnavailable as problem:
            other = "; `--model-config-name=cpu` takes configs/cpu.pbtxt" if on_cpu else ""
            yield warning(f"KIND_GPU does not load here ({problem}){other}")


def _warmup(config: Any, folder: Path, error: Say, warning: Say) -> Iterator[Finding]:
    for sample in config.model_warmup:
        if sample.batch_size == 0:
            yield warning(
                f"warm-up '{sample.name}': is skipped, its batch_size is 0; 1 also where requests are not batched"
            )
        for name, value in sample.inputs.items():
            if value.input_data_file and not (folder / "warmup" / value.input_data_file).is_file():
                yield error(f"warm-up '{sample.name}': warmup/{value.input_data_file} of input '{name}' is missing")


def _tokenizer(config: Any, error: Say, warning: Say) -> Iterator[Finding]:
    """Where a model looks for its tokenizer; a path that is relative may be a name on the hub, or the server's own."""
    if TOKENIZER_DIR not in config.parameters:
        return
    named = config.parameters[TOKENIZER_DIR].string_value
    folder = Path(named)
    if "${" in named or not named:
        yield error(f"parameter {TOKENIZER_DIR} is '{named}': the place of a tokenizer was never filled in")
    elif folder.is_dir():
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
            yield error(f"parameter {TOKENIZER_DIR}: {named} holds no tokenizer (such as tokenizer.json)")
    elif folder.is_absolute():
        yield warning(f"parameter {TOKENIZER_DIR}: there is no folder {named} here; the server needs it")


def _files(config: Any, backend: str, version: Path, error: Say, warning: Say) -> Iterator[Finding]:
    default = PLATFORM_FILES.get(config.platform, DEFAULT_FILES.get(backend))
    file = config.default_model_filename or default
    if file is None or config.runtime:  # a backend written in Python has files of its own
        return
    path = version / file
    if not path.exists():
        hangs = ", and the server would wait for it for good" if backend == "python" else ""
        yield error(f"{version.name}/{file} is missing{hangs}")
    elif backend == "onnxruntime":
        # A model of several files may be a folder of that name.
        yield from _against_graph(config, path / file if path.is_dir() else path, error)
    elif backend == "tensorrt":
        yield from against_plan(config, path, error, warning)


def _against_graph(config: Any, path: Path, error: Say) -> Iterator[Finding]:
    """Names, types and dimensions of the config beside the graph's; the server itself does not look at states.

    The backend's own rules: ValidateInputs in triton-inference-server/onnxruntime_backend.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as problem:  # protobuf's own error, which is no OSError
        yield error(f"{path.parent.name}/{path.name}: not an ONNX file ({type(problem).__name__})")
        return
    graph = model.graph
    if any(isinstance(value.name, bytes) for value in (*graph.input, *graph.output)):  # protobuf's form of no UTF-8
        yield error(f"{path.parent.name}/{path.name}: has a name that is not UTF-8")
        return
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = {node.name: node for node in graph.input if node.name not in initialisers}
    # A request may bring another value for these, where the config has them as optional inputs.
    optional = {node.name: node for node in graph.input if node.name in initialisers and model.ir_version >= 4}
    outputs = {node.name: node for node in graph.output}
    states = config.sequence_batching.state
    batches = bool(config.max_batch_size)
    shaped_by_the_batch = {name for each in config.batch_output for name in each.target_name}
    for title, wanted, found, fits in (
        ("input", [(each.name, each) for each in config.input if not each.optional], inputs, _takes),
        ("optional input", [(each.name, each) for each in config.input if each.optional], optional, _takes),
        ("output", [(each.name, each) for each in config.output], outputs, _gives),
        ("state input", [(each.input_name, each) for each in states], inputs, _may_be),
        ("state output", [(each.output_name, each) for each in states], outputs, _may_be),
    ):
        for name, each in wanted:
            if name not in found:
                yield error(f"{title} '{name}': the graph has {', '.join(found) or 'none'}")
            elif name not in shaped_by_the_batch:
                tensor = found[name].type.tensor_type
                yield from _against_tensor(each, f"{title} '{name}'", tensor, batches, fits, error)
    named = {each.name for each in config.input} | {state.input_name for state in states}
    named |= {control.name for control in config.sequence_batching.control_input}
    named |= {name for each in config.batch_input for name in each.target_name}
    missing = [name for name in inputs if name not in named]
    if config.input and missing:
        yield error(f"inputs of the graph that the config does not have: {', '.join(missing)}")
    yield from _weights(graph, path, error)


def _takes(wanted: int, graph: int) -> bool:
    """Whether the server lets an input through: what the graph leaves open may be anything."""
    return graph in (-1, wanted)


def _gives(wanted: int, graph: int) -> bool:
    """Whether an output is as the graph says."""
    return graph == wanted


def _may_be(wanted: int, graph: int) -> bool:
    """Whether a state, which the server does not check, agrees with the graph or is open."""
    return wanted == graph or -1 in (wanted, graph)


def _against_tensor(
    each: Any, title: str, tensor: Any, batches: bool, fits: Callable[[int, int], bool], error: Say
) -> Iterator[Finding]:
    """Type and dimensions of an input, output or state beside the graph's.

    The backend's own rules: CompareDimsSupported in triton-inference-server/onnxruntime_backend.
    """
    dtype = each.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[each.data_type].name
    if ONNX_TYPES.get(tensor.elem_type) != dtype:
        yield error(f"{title}: {dtype} in the config, {ONNX_TYPES.get(tensor.elem_type)} in the graph")
    graph_dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    reshaped = "reshape" in each.DESCRIPTOR.fields_by_name and each.HasField("reshape")
    dims = ([-1] if batches else []) + list(each.reshape.shape if reshaped else each.dims)
    if not graph_dims and all(dim == 1 for dim in each.dims):
        return  # a scalar
    if getattr(each, "allow_ragged_batch", False):
        dims = [-1]  # texts of a batch after each other
    if len(dims) != len(graph_dims) or not all(fits(one, other) for one, other in zip(dims, graph_dims, strict=True)):
        yield error(f"{title}: dims {dims} with the batch, {graph_dims} in the graph")


def _weights(graph: Any, path: Path, error: Say) -> Iterator[Finding]:
    """The files that hold the graph's weights."""
    places = (entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location")
    for file in sorted({entry.value for entry in places}):
        if not (path.parent / file).is_file():
            yield error(f"{path.parent.name}/{file} is missing: it holds weights of {path.name}")


def _served_engine(version: Path, error: Say) -> Iterator[Finding]:
    """Findings about a model that `trsp-deploy triton` wrote: its engine and what belongs to it."""
    settings, engine = version / "serving.json", version / "engine"
    if not settings.is_file():
        return
    if not (version / "tokenizer.json").is_file():
        yield error(f"{version.name}/tokenizer.json is missing")
    if not (engine / ENGINE_MANIFEST).is_file():
        yield error(f"{version.name}/engine/{ENGINE_MANIFEST} is missing")
        return
    try:
        manifest = read_manifest(engine)
    except EngineUnavailable as problem:
        yield error(str(problem))
        return
    for file, expected in manifest.files.items():
        if not (engine / file).is_file():
            yield error(f"{version.name}/engine/{file} is missing")
        elif fingerprint(engine / file) != expected:
            yield error(f"{version.name}/engine/{file} is not the file that was built (SHA-256)")
    yield from _machine(manifest, error)
    try:
        max_batch = read_json(settings, RunError, f"{version.name}/serving.json").get("max_batch")
    except RunError as problem:
        yield error(str(problem))
        return
    if not isinstance(max_batch, int):
        yield error(f"{version.name}/serving.json says no `max_batch`")
        return
    most = max((profile.batch.max for profile in manifest.spec.profiles), default=None)
    if most is not None and max_batch > most:
        yield error(f"{max_batch} texts at once, and the engine's profiles end at a batch of {most}")


def _machine(manifest: EngineManifest, error: Say) -> Iterator[Finding]:
    """Whether the engine is for the package, the GPU and its driver that are here, where there are any."""
    try:
        version = package_version(manifest.spec.backend)
    except EngineUnavailable:
        version = manifest.backend_version  # nothing to compare with: the server is elsewhere
    if version != manifest.backend_version:
        yield error(f"the engine was built with {manifest.spec.backend} {manifest.backend_version}, here is {version}")
    try:
        gpu = cuda_devices()[0].compute_capability
    except EngineUnavailable:
        return
    misfit = manifest.bound.misfit(manifest.bound.model_copy(update={"gpu": gpu, "driver": driver_version()}))
    if misfit is not None:
        yield error(f"the engine was built {misfit}")
    wanted = manifest.spec.compute_capabilities
    if wanted and gpu not in [name.lower() for name in wanted]:
        yield error(f"the engine was built for GPUs of compute capability {', '.join(wanted)}, here is {gpu}")
