"""What a built engine is, for people: its manifest, its operators or layers, and the trtexec line that builds it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trsp_deploy.artifacts import model_of_engine
from trsp_deploy.errors import ModelError, one_line
from trsp_deploy.model_code import TOKENIZER_FILES
from trsp_deploy.recipe import EngineSpec, Strict
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.graphs.fp16_range import HalfRange
from trsp_deploy.tools.runners import EngineManifest, read_manifest
from trsp_deploy.tools.runners.manifest import Agreement, PassOutcome, check_files
from trsp_deploy.tools.runners.trt_build import profile_shape
from trsp_deploy.tools.runners.trt_log import BUILD_LOG, BuildLog, Layer, read_log

if TYPE_CHECKING:
    import onnx_ir as ir

HARDWARE = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}  # trtexec's words
TRTEXEC_ENGINE = "-trtexec.engine"  # behind the name of the engine's folder
COSTLIEST = 5  # layers shown
SHOWN = 15  # operators or layers in the text; --json has all


class Inspection(Strict):
    """An engine folder's contents."""

    manifest: EngineManifest
    operators: dict[str, int]  # operator or layer type -> how many; empty where neither graph nor log is at hand
    nodes: tuple[Layer, ...] = ()  # of ONNX Runtime engines, which choose kernels when they are opened
    build: BuildLog | None = None  # of TensorRT engines: layers, kernels, precisions, memory
    trtexec: str | None  # command line, in the folder, that builds the same engine; None for other backends

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every node or compiled layer, of these profile after profile."""
        return self.nodes if self.build is None else self.build.layers


def inspect_engine(folder: Path) -> Inspection:
    """Read an engine folder; raises EngineUnavailable when it holds none, or other files than were built.

    Nothing is loaded or run.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if not manifest.spec.on_tensorrt:
        nodes = _graph_nodes(folder / manifest.file)
        return Inspection(manifest=manifest, operators=_kinds(nodes), nodes=nodes, trtexec=None)
    build, graph = read_log(folder / BUILD_LOG), compiled_graph(manifest.beside, manifest.source)
    return Inspection(
        manifest=manifest,
        operators=_kinds(build.layers),
        build=build,
        trtexec=trtexec(manifest.spec, manifest.inputs, graph, folder.resolve().name),
    )


def _kinds(layers: Sequence[Layer]) -> dict[str, int]:
    return dict(Counter(layer.kind for layer in layers).most_common())


def _graph_nodes(path: Path) -> tuple[Layer, ...]:
    import onnx_ir as ir

    return tuple(_node(node) for node in ir.load(path).graph)  # weights stay in their files


def _node(node: ir.Node) -> Layer:
    """A node of a graph as a layer, with the types that the graph knows."""
    read = [value for value in node.inputs if value is not None]
    fed = [value for value in read if value.const_value is None]
    weights = [value.const_value for value in read if value.const_value is not None]
    types = [value.dtype for value in fed if value.dtype is not None] + [weight.dtype for weight in weights]
    return Layer(
        name=node.name or "",
        kind=node.op_type,
        profile=0,
        kernel="",
        precisions=tuple(dict.fromkeys(dtype.name.lower() for dtype in types)),
        reads=tuple(value.name or "" for value in fed),
        writes=tuple(value.name or "" for value in node.outputs),
        weight_bytes=sum(weight.nbytes for weight in weights),
    )


def compiled_graph(beside: Iterable[str], source: str | None) -> str:
    """The graph that TensorRT compiled, as a path from the engine's folder: what the passes left there, or the source.

    beside: files there that the engine does not need. source: its ONNX file; an engine of an earlier version does not
    know it, "model.onnx" then.
    """
    return next((name for name in beside if name.endswith(".onnx")), source or "model.onnx")


def trtexec(spec: EngineSpec, inputs: decoder_io.Bindings, graph: str, name: str) -> str:
    """The trtexec command line that builds the spec's engine from `graph`: one --profile for each of its own.

    To be run in the engine's folder, called `name`. What it builds goes beside that folder: within it, it would
    overwrite the engine, or change what the folder's fingerprint is of.
    """
    program = "tensorrt_rtx" if spec.backend == "tensorrt-rtx" else "trtexec"
    parts = [program, f"--onnx={graph}", f"--saveEngine=../{name}{TRTEXEC_ENGINE}", "--stronglyTyped"]
    parts += ["--profilingVerbosity=detailed", "--skipInference"]
    if spec.workspace_gib is not None:
        parts.append(f"--memPoolSize=workspace:{round(spec.workspace_gib * 1024)}M")
    if spec.precision == "fp32":
        parts.append("--noTF32")
    if spec.weight_streaming_gib is not None:
        parts.append("--allowWeightStreaming")
    if spec.hardware_compatibility != "none":
        parts.append(f"--hardwareCompatibilityLevel={HARDWARE[spec.hardware_compatibility]}")
    if spec.compute_capabilities:
        wanted = (name.lower().removeprefix("sm") for name in spec.compute_capabilities)
        parts.append(f"--computeCapabilities={','.join(wanted)}")
    for index, profile in enumerate(spec.profiles):
        parts += [f"--profile={index}"] if len(spec.profiles) > 1 else []
        for end in ("min", "opt", "max"):
            shapes = {
                name: profile_shape(name, shape, profile, end)
                for name, (_, shape) in inputs.items()
                if any(isinstance(length, str) for length in shape)
            }
            text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            parts.append(f"--{end}Shapes={text}")
    return shlex.join(parts)


def describe(found: Inspection) -> str:
    """An inspection as text for people."""
    manifest, spec = found.manifest, found.manifest.spec
    cache, gpus = decoder_io.cache_inputs(manifest.inputs), ", ".join(map(str, manifest.built_on.gpus))
    lines = [
        f"engine     {manifest.name}: {spec.backend} {manifest.backend_version}, {spec.precision}",
        f"size       {manifest.size_bytes / 1e6:.0f} MB in {', '.join(manifest.files)}",
        f"built on   {manifest.built_on.cpu}, {gpus or 'no GPU'}, in {manifest.build_s:.0f} s",
        f"graph      ONNX {manifest.onnx_sha256[:12]}, spec {manifest.spec_sha256[:12]}",
        f"inputs     {', '.join(_binding(name, manifest.inputs) for name in manifest.inputs if name not in cache)}",
        f"cache      {len(cache)} x {_binding(cache[0], manifest.inputs)}",
        f"outputs    {_binding('logits', manifest.outputs)}",
    ]
    for index, profile in enumerate(spec.profiles):
        ranges = (f"{part} {r.min}..{r.opt}..{r.max}" for part, r in profile if r is not None)
        lines.append(f"profile    {', '.join(ranges)}{_compiled(found.build, index)}")
    if manifest.half_range is not None:
        lines.append(f"fp16       {_range(manifest.half_range)}")
    if manifest.text is not None:
        lines.append(f"choices    on {manifest.text.name}")
    if not manifest.padding:
        lines.append("padding    is not hidden by the graph: one text at a time, or texts of one length")
    lines += [f"pass       {outcome.name}: {_done(outcome)}" for outcome in manifest.passes]
    if manifest.doubt is not None:
        lines.append(f"doubt      {manifest.doubt}")
    elif manifest.agreement is not None:
        lines.append(f"agrees     {_agrees(manifest.agreement)}")
    shown = list(found.operators.items())[:SHOWN]
    if shown:
        more = f", and {len(found.operators) - SHOWN} more kinds" if len(found.operators) > SHOWN else ""
        lines.append(f"operators  {', '.join(f'{name} {count}' for name, count in shown)}{more}")
    if found.build is not None and not found.build.layers:
        lines.append(f"layers     not known: {BUILD_LOG} has none in a form that this version reads")
    elif found.build is not None:
        lines += _memory(found.build)
    return "\n".join(lines + ([f"trtexec    in its folder: {found.trtexec}"] if found.trtexec else []))


def _compiled(build: BuildLog | None, profile: int) -> str:
    """Lines about what one profile was compiled to."""
    if build is None or not build.of(profile):
        return ""
    layers, attention, in_place = build.of(profile), build.attention_kernels(profile), build.written_in_place(profile)
    cache = f"{len(in_place)} parts of the cache written in place" if in_place else "a new cache at every step"
    return f": {len(layers)} layers, {attention} of them fused attention, {cache}"


def _memory(build: BuildLog) -> list[str]:
    """Weights, activations, and what a decoding step reads most of."""
    lines = []
    if build.weight_bytes is not None:
        scratch = ", ".join(f"{size / 1e6:.0f}" for size in build.activation_bytes)
        lines.append(f"memory     weights {build.weight_bytes / 1e6:.0f} MB, activations {scratch} MB by profile")
    for layer in sorted(build.of(0), key=lambda layer: -layer.weight_bytes)[:COSTLIEST]:
        if layer.weight_bytes:
            size, kinds = layer.weight_bytes / 1e6, "/".join(layer.precisions)
            lines.append(f"reads      {size:.1f} MB of weights, {layer.kind} {kinds}: {layer.name[:70]}")
    return lines


def layer_table(found: Inspection) -> str:
    """Every layer as a line under headings, without the columns that nothing is known for.

    Its name stands last, for it is as long as it is.
    """
    layers = found.layers
    several = len({layer.profile for layer in layers}) > 1
    columns = {
        "profile": [str(layer.profile) if several else "" for layer in layers],
        "kind": [layer.kind for layer in layers],
        "kernel": [layer.kernel for layer in layers],
        "precisions": ["/".join(layer.precisions) for layer in layers],
        "weights MB": [f"{layer.weight_bytes / 1e6:.3f}" if layer.weight_bytes else "" for layer in layers],
        "layer": [one_line(layer.name) for layer in layers],
    }
    told = [[head, *(cell or "-" for cell in cells)] for head, cells in columns.items() if any(cells)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in told]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _done(outcome: PassOutcome) -> str:
    if outcome.kept:
        listed = ", ".join(f"{name} ({cost:.1%})" for name, cost in list(outcome.kept.items())[:SHOWN])
        more = f", and {len(outcome.kept) - SHOWN} more" if len(outcome.kept) > SHOWN else ""
        return f"{outcome.changed} products, by what rounding would cost their output: {listed}{more}"
    if outcome.reason is not None or outcome.error is None:
        return f"left out: {outcome.reason}"
    return f"{outcome.changed} places, logits {outcome.error:.1g} standard deviations apart"


def _agrees(found: Agreement) -> str:
    apart = f"logits {found.max_error:.1g} standard deviations apart (at most {found.tolerance:g})"
    return f"with its graph: {apart}, {found.tokens_equal} of {found.tokens_compared} greedy tokens equal"


def _range(found: HalfRange) -> str:
    """What of an fp16 graph computes in fp32, and why."""
    if found.reason is not None:
        return f"range not looked at: {found.reason}"
    if not found.kept:
        return f"no value of {found.tokens} tokens is beyond {found.largest:.0f} ({found.limit:.0f} would become fp32)"
    listed = ", ".join(f"{kept.name} ({kept.operator}, {kept.largest:.3g})" for kept in found.kept[:SHOWN])
    more = f", and {len(found.kept) - SHOWN} more" if len(found.kept) > SHOWN else ""
    count = f"{len(found.kept)} nodes in fp32, whose values pass {found.limit:.0f} on {found.tokens} tokens"
    return f"{count}: {listed}{more}; logits {found.error:.1g} standard deviations from fp32's"


def _binding(name: str, bindings: decoder_io.Bindings) -> str:
    dtype, shape = bindings[name]
    return f"{name} {dtype} [{', '.join(map(str, shape))}]"


def tokenizer_folder(engine: Path) -> Path:
    """The Hugging Face folder of an engine in a run; raises ModelError for any other engine."""
    folder = model_of_engine(engine)
    if folder is None:
        raise ModelError(
            f"{engine}: is in no run's engines, so its tokenizer is not known; give its folder with --tokenizer"
        )
    if not has_tokenizer(folder):
        raise ModelError(f"{engine}: no tokenizer in {folder}; give its folder with --tokenizer")
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer is read from; tokenizer_config.json is none, nor is it needed."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
