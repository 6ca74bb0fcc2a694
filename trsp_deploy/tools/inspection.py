"""What a built engine is, for people: its manifest, its operators or layers, and the trtexec line that builds it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

from trsp_deploy.errors import EngineUnavailable, ModelError
from trsp_deploy.recipe import EngineSpec, Strict
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.runners import EngineManifest, read_manifest
from trsp_deploy.tools.runners.manifest import PassOutcome
from trsp_deploy.tools.runners.trt import BUILD_LOG

SHOWN = 15  # operators or layers in the text; --json has all
LAYER = re.compile(r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+)")


class Inspection(Strict):
    """An engine folder's contents."""

    manifest: EngineManifest
    operators: dict[str, int]  # operator or layer type -> how many; empty where neither graph nor log is at hand
    trtexec: str | None  # command line that builds the same engine; None for other backends


def inspect_engine(folder: Path) -> Inspection:
    """Read an engine folder; raises EngineUnavailable when it holds no engine. Nothing is loaded or run."""
    manifest = read_manifest(folder)
    if manifest.spec.backend.startswith("onnxruntime"):
        return Inspection(manifest=manifest, operators=_graph_operators(folder / manifest.file), trtexec=None)
    return Inspection(
        manifest=manifest, operators=_log_layers(folder / BUILD_LOG), trtexec=trtexec(manifest.spec, manifest.inputs)
    )


def _graph_operators(path: Path) -> dict[str, int]:
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as problem:
        raise EngineUnavailable(f"{path}: the manifest names it and it is not there") from problem
    return dict(Counter(node.op_type for node in graph.node).most_common())


def _log_layers(log: Path) -> dict[str, int]:
    """Layer types out of TensorRT's detailed build log."""
    if not log.is_file():
        return {}
    found = Counter(match["kind"] for match in LAYER.finditer(log.read_text(encoding="utf-8")))
    return dict(found.most_common())


def trtexec(spec: EngineSpec, inputs: decoder_io.Bindings) -> str:
    """The trtexec command line that builds the spec's engine from model.onnx: one --profile for each of its own."""
    program = "tensorrt_rtx" if spec.backend == "tensorrt-rtx" else "trtexec"
    parts = [program, "--onnx=model.onnx", "--saveEngine=model.engine", "--stronglyTyped"]
    parts.append("--profilingVerbosity=detailed")
    if spec.workspace_gib is not None:
        parts.append(f"--memPoolSize=workspace:{round(spec.workspace_gib * 1024)}M")
    if spec.precision == "fp32":
        parts.append("--noTF32")
    for index, profile in enumerate(spec.profiles):
        parts += [f"--profile={index}"] if len(spec.profiles) > 1 else []
        for end in ("min", "opt", "max"):
            sizes = {part: getattr(getattr(profile, part), end) for part in ("batch", "sequence", "past")}
            shapes = {name: decoder_io.input_shape(name, shape, **sizes) for name, (_, shape) in inputs.items()}
            text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
            parts.append(f"--{end}Shapes={text}")
    return shlex.join(parts)


def describe(found: Inspection) -> str:
    """The inspection as text."""
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
    for profile in spec.profiles:
        ranges = (f"{part} {r.min}..{r.opt}..{r.max}" for part, r in profile)
        lines.append(f"profile    {', '.join(ranges)}")
    lines += [f"pass       {outcome.name}: {_done(outcome)}" for outcome in manifest.passes]
    shown = list(found.operators.items())[:SHOWN]
    if shown:
        more = f", and {len(found.operators) - SHOWN} more kinds" if len(found.operators) > SHOWN else ""
        lines.append(f"operators  {', '.join(f'{name} {count}' for name, count in shown)}{more}")
    return "\n".join(lines + ([f"trtexec    {found.trtexec}"] if found.trtexec else []))


def _done(outcome: PassOutcome) -> str:
    if outcome.reason is not None or outcome.error is None:
        return f"left out: {outcome.reason}"
    return f"{outcome.changed} places, logits {outcome.error:.1g} standard deviations apart"


def _binding(name: str, bindings: decoder_io.Bindings) -> str:
    dtype, shape = bindings[name]
    return f"{name} {dtype} [{', '.join(map(str, shape))}]"


def tokenizer_folder(engine: Path) -> Path:
    """The Hugging Face folder of an engine in a run: RUN/engines/NAME/ROLE -> RUN/ROLE; raises ModelError elsewhere."""
    role = engine.resolve()
    folder = role.parents[2] / role.name if len(role.parents) > 2 else role
    if not (folder / "tokenizer_config.json").is_file():
        raise ModelError(f"{engine}: no tokenizer in {folder}; give its folder with --tokenizer")
    return folder
