"""Build engines with TensorRT 10, TensorRT 11 and TensorRT for RTX, through the calls that all three have.

Networks are strongly typed: 11 and RTX know nothing else, and 10 then runs the same graph in the
same precision. So precision is that of the ONNX file, and no builder flag sets it.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trsp_deploy.artifacts import writing
from trsp_deploy.errors import EngineSpecError, EngineUnavailable, StorageError, nearest, one_line
from trsp_deploy.recipe import EngineSpec, ShapeProfile
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners.building import check_compiled, ready_graph
from trsp_deploy.tools.runners.calibration import longest_text, longest_turned, read_text
from trsp_deploy.tools.runners.manifest import BuiltEngine, PassOutcome, kept_products, left_in_floats
from trsp_deploy.tools.runners.passes import Pass, run_passes
from trsp_deploy.tools.runners.requirements import cuda_devices, load_package
from trsp_deploy.tools.runners.trt_log import BUILD_LOG, logger, made, with_advice
from trsp_deploy.tools.sources.packaged import home

ENGINE = "model.engine"
NUMPY_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
DIGEST_BYTES = hashlib.sha256().digest_size  # in front of a file of timings
FIX_CACHE = "fix-cache"
SCATTERS = (10, 15)  # the first TensorRT with TensorScatter


def check_build(spec: EngineSpec) -> None:
    """Raise EngineUnavailable unless `build` can work here, EngineSpecError for an unknown compute capability.

    TensorRT compiles for the GPU in this machine; TensorRT-RTX compiles ahead of time and needs none.
    """
    trt = load_package(spec.backend)
    compute_capabilities(trt, spec)
    _check_version(trt, spec)
    if spec.backend == "tensorrt":
        cuda_devices()
    try:
        load_package("onnxruntime-cpu")
    except EngineUnavailable as problem:  # which would show after the training
        raise EngineUnavailable(
            f"{spec.name}: its graph is held against the model in ONNX Runtime: {problem}"
        ) from None


def _check_version(trt: ModuleType, spec: EngineSpec) -> None:
    """Raise EngineUnavailable where TensorRT is too old to write a cache in place."""
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if spec.backend == "tensorrt" and spec.cache_length is not None and version < SCATTERS:
        raise EngineUnavailable(
            f"TensorRT {trt.__version__} has no TensorScatter, which {spec.name} writes its cache with: upgrade to "
            f"{'.'.join(map(str, SCATTERS))} or later, or leave `cache_length` out"
        )


def compute_capabilities(trt: ModuleType, spec: EngineSpec) -> list[Any]:
    """The spec's build targets as TensorRT-RTX's enum; empty means every GPU that it supports."""
    wanted = spec.compute_capabilities
    if not wanted:
        return []
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    for name in wanted:
        if name.lower() not in known:
            hint = nearest(name.lower(), known)
            raise EngineSpecError(
                f"engine {spec.name}: no compute capability '{name}'{hint}; valid: {', '.join(sorted(known))}"
            )
    return [known[name.lower()] for name in wanted]


def build(onnx: Path, spec: EngineSpec, folder: Path, calibration: np.ndarray | None) -> BuiltEngine:
    """Run the passes, compile the graph for every profile, and write model.engine and build.log into `folder`.

    Where the passes changed the graph, it stays beside the engine, for `trtexec` and other tools that read ONNX.

    Raises EngineUnavailable with the parser's or the builder's errors as one line.
    """
    _check_length(onnx, spec)
    trt = load_package(spec.backend)
    log = logger(trt)
    with log.into(folder / BUILD_LOG), ready_graph(onnx, spec, folder, calibration, prepare) as ready:
        builder = made(log, "no builder", lambda: trt.Builder(log))
        network, inputs, outputs = _network(trt, builder, log, ready.path, onnx)
        check_compiled(spec, inputs, outputs)
        config = _configure(trt, builder, spec)
        for profile in spec.profiles:
            config.add_optimization_profile(_optimisation_profile(builder, inputs, profile))
        timings = _use_timings(config, spec, log)
        engine = made(log, f"cannot build {onnx}", lambda: builder.build_serialized_network(network, config))
        (folder / ENGINE).write_bytes(memoryview(engine))
        if timings is not None:
            _keep_timings(trt, config, timings, log)
        if ready.path != onnx:
            for file in sorted(ready.path.parent.glob(f"{ready.path.name}*")):  # external data is found by its name
                shutil.move(file, folder / file.name)
    return BuiltEngine(
        ENGINE, (ENGINE,), inputs, outputs, ready.passes, ready.half_range, longest_text(onnx), padding=ready.padding
    )


def _check_length(onnx: Path, spec: EngineSpec) -> None:
    """Raise EngineUnavailable for texts in which the model turns keys otherwise than the graph does (LongRoPE).

    An engine's shapes end where its profiles do, so that one which is built has no longer texts.
    """
    limit = longest_turned(onnx)
    pasts = [profile.past.max + 1 for profile in spec.profiles if profile.past is not None]
    longest = spec.cache_length or max([*pasts, *(profile.sequence.max for profile in spec.profiles)], default=0)
    if limit is not None and longest > limit:
        raise EngineUnavailable(
            f"{onnx}: turns keys as the model does up to {limit} tokens (LongRoPE, dynamic NTK), and {spec.name} is "
            f"for {longest}"
        )


def prepare(
    onnx: Path, spec: EngineSpec, scratch: Path, calibration: np.ndarray | None
) -> tuple[Path, tuple[PassOutcome, ...]]:
    """The graph that TensorRT reads, and what each pass did.

    onnx: stays as it is. scratch: an empty folder for the graphs in between. calibration: (texts, sequence) tokens of
    real text, for int8 and int4; None takes random ones. ONNX Runtime on the CPU proves the passes and reads the text.
    Raises EngineUnavailable when the spec wants a cache of fixed length and the graph does not fit.
    """
    current, outcomes = run_passes(onnx, passes(spec), spec, scratch)
    fixed = next((outcome for outcome in outcomes if outcome.name == FIX_CACHE), None)
    if fixed is not None and not fixed.changed:
        raise EngineUnavailable(
            f"{spec.name}: no cache of fixed length: {fixed.reason}; a spec without `cache_length` lets it grow"
        )
    if spec.is_quantised:
        current, quantised = _quantise(onnx, current, spec, scratch / "quantize" / onnx.name, calibration)
        outcomes += quantised
    if spec.precision == "bf16":
        current = _to_bf16(current, scratch / "bf16" / onnx.name)
    return current, outcomes


def passes(spec: EngineSpec) -> dict[str, Pass]:
    """The passes that leave the logits what they are, in the order in which they run."""
    from trsp_deploy.tools.graphs.logits import cut_logits
    from trsp_deploy.tools.graphs.static_cache import fix_cache

    length = spec.cache_length
    found: dict[str, Pass] = {}
    if length is not None:
        found[FIX_CACHE] = lambda model: fix_cache(model, length)
    if spec.fuse:
        found["cut-logits"] = cut_logits
    return found


def _to_bf16(graph: Path, out: Path) -> Path:
    """Let a proven fp16 graph compute in bf16; what it keeps in fp32 stays there."""
    import onnx_ir as ir

    from trsp_deploy.tools.graphs import half
    from trsp_deploy.tools.graphs.nodes import NoMatch

    out.parent.mkdir()
    model = ir.load(graph)
    try:
        half.infer_types(model)
        half.to_bf16(model)
        ir.save(model, out, external_data=f"{out.name}.data")
    except NoMatch as problem:
        raise EngineUnavailable(f"{graph}: cannot become bf16: {problem}") from problem
    return out


def _quantise(
    onnx: Path, graph: Path, spec: EngineSpec, out: Path, calibration: np.ndarray | None
) -> tuple[Path, tuple[PassOutcome, ...]]:
    import onnx_ir as ir
    from onnxscript import version_converter

    from trsp_deploy.tools.graphs import costs, products
    from trsp_deploy.tools.graphs.forms import open_graph
    from trsp_deploy.tools.graphs.nodes import NoMatch, check_opset, put_down
    from trsp_deploy.tools.graphs.qdq import OPSET, quantize_products

    out.parent.mkdir()
    try:
        model, source = open_graph(graph), open_graph(onnx)
        check_opset(model)
        if model.graph.opset_imports[""] < OPSET:
            version_converter.convert_version(model, OPSET)
        head = products.open_products(model)
        floats = products.in_floats(model)
        products.open_products(source)  # the text is read by the graph as it came, whose cache grows
        source = put_down(source, out.parent / "opened.onnx")
        activations = read_text(source, onnx, onnx, spec, calibration, out.parent, symmetric=True)
        products.check_finite(activations, spec.graph_precision)
    except NoMatch as problem:
        raise EngineUnavailable(f"{spec.name}: cannot be quantised: {problem}") from problem
    products.pack_products(model, head)
    kept = costs.chosen(model, head, activations, spec)
    bits = 8 if spec.precision == "int8" else 4
    quantize_products(model, bits, spec.block_size, head, activations, kept, head_bits=spec.head_bits)
    ir.save(model, out, external_data=f"{out.name}.data")
    return out, (*kept_products(kept), *left_in_floats(floats))


def _network(
    trt: ModuleType, builder: Any, log: Any, graph: Path, onnx: Path
) -> tuple[Any, decoder_io.Bindings, decoder_io.Bindings]:
    """The graph as a network, its inputs and its outputs. Raises EngineUnavailable where TensorRT cannot read it."""
    # Without it 10 would choose precisions itself. The flag is another bit in 10 than in 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        reason = "; ".join(dict.fromkeys(errors))
        raise EngineUnavailable(f"TensorRT cannot read {onnx}: {with_advice(reason) if reason else log.complaint()}")
    inputs = _network_bindings([network.get_input(i) for i in range(network.num_inputs)])
    fed = {"logits", *map(decoder_io.present, decoder_io.cache_inputs(inputs))}
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        if tensor.name not in fed:  # every output needs memory when it runs: hidden states and the like have none
            network.unmark_output(tensor)
    return network, inputs, _network_bindings([network.get_output(i) for i in range(network.num_outputs)])


def _parser_error(error: Any) -> str:
    where = f" in node '{error.node_name()}' ({error.node_operator()})" if error.node_operator() else ""
    return f"{one_line(error.desc())}{where}"


def _network_bindings(tensors: list[Any]) -> decoder_io.Bindings:
    bindings: decoder_io.Bindings = {}
    for tensor in tensors:
        shape = tuple(
            length if length >= 0 else tensor.get_dimension_name(axis) or f"dimension {axis}"
            for axis, length in enumerate(tensor.shape)
        )
        bindings[tensor.name] = (NUMPY_DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), shape)
    return bindings


def _configure(trt: ModuleType, builder: Any, spec: EngineSpec) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers and kernels in the log and the engine
    if spec.precision == "fp32":
        # On by default, it would round fp32 products to 10 bits: the engine could not agree with PyTorch.
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.weight_streaming_gib is not None:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if spec.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(spec.workspace_gib * 2**30))
    if spec.hardware_compatibility == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif spec.hardware_compatibility == "same-compute-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    targets = compute_capabilities(trt, spec)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    return config


def _use_timings(config: Any, spec: EngineSpec, log: Any) -> Path | None:
    """Let the build know how long kernels took in earlier ones; returns the file for what it learns.

    TensorRT-RTX times nothing while it builds. One file serves all models of a GPU and a version; a stale one is
    refused by TensorRT itself, and replaced. None too where it takes not even an empty one.
    """
    if spec.backend != "tensorrt":
        return None
    package, device = load_package(spec.backend), cuda_devices()[0]
    name = f"tensorrt-{package.__version__}-{device.compute_capability}-{device.name.replace(' ', '-')}"
    path = home() / "timing-caches" / f"{name}.bin"
    for known in (_known_timings(package, path, log), b""):
        cache = config.create_timing_cache(known)  # None for what is no cache
        if cache is not None and config.set_timing_cache(cache, False):
            return path
    return None


def _known_timings(trt: ModuleType, path: Path, log: Any) -> bytes:
    """What `_keep_timings` has written; empty where that is not there, or no longer what was written.

    A damaged one is not for TensorRT to find: it can end the process over it.
    """
    try:
        kept = path.read_bytes() if path.is_file() else b""
    except OSError as problem:
        log.log(trt.ILogger.WARNING, f"timings of earlier builds are not used: {problem}")
        return b""
    digest, known = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
    if kept and hashlib.sha256(known).digest() != digest:
        log.log(trt.ILogger.WARNING, f"timings of earlier builds are not used: {path} is damaged, or has no SHA-256")
        return b""
    return known


def _keep_timings(trt: ModuleType, config: Any, path: Path, log: Any) -> None:
    """Write what the build learnt of kernels' times, behind its SHA-256; without it the next build takes longer, and is
    as right."""
    try:
        with writing(path) as partial:
            learnt = bytes(memoryview(config.get_timing_cache().serialize()))
            partial.write_bytes(hashlib.sha256(learnt).digest() + learnt)
    except (OSError, StorageError) as problem:
        log.log(trt.ILogger.WARNING, f"timings are not kept: {problem}")


def _optimisation_profile(builder: Any, inputs: decoder_io.Bindings, profile: ShapeProfile) -> Any:
    result = builder.create_optimization_profile()
    for name, (_, shape) in inputs.items():
        if any(isinstance(length, str) for length in shape):
            low, usual, high = (profile_shape(name, shape, profile, end) for end in ("min", "opt", "max"))
            result.set_shape(name, low, usual, high)
    return result


def profile_shape(name: str, shape: tuple[int | str, ...], profile: ShapeProfile, end: str) -> tuple[int, ...]:
    """The shape of one input at the `min`, `opt` or `max` of a profile. Logits: the last token's, or up to all."""
    sequence = getattr(profile.sequence, end)
    return decoder_io.input_shape(
        name,
        shape,
        batch=getattr(profile.batch, end),
        sequence=sequence,
        past=0 if profile.past is None else getattr(profile.past, end),
        kept=sequence if end == "max" else 1,
    )
