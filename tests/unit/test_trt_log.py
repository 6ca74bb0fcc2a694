"""Build logs as TensorRT 10 and TensorRT-RTX write them: the forms of public logs, with shapes of their own."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.made_run import SPEC, made_run
from trsp_deploy.artifacts import writing
from trsp_deploy.errors import EngineUnavailable
from trsp_deploy.stages.build import _log_of_failure
from trsp_deploy.tools.runners.inspection import Inspection, layer_table
from trsp_deploy.tools.runners.manifest import read_manifest
from trsp_deploy.tools.runners.trt_log import ADVICE, deserialized, read_log, with_advice

TENSORRT_10 = """
[VERBOSE] Engine Layer Information:
[VERBOSE] Name: /model/embed_tokens/Gather, LayerType: Gather, Inputs: [ { Name: input_ids, Location: Device, \
Dimensions: [1,-1], Format/Datatype: Row major linear INT64 format }, { Name: table_constantHalf, Location: Device, \
Dimensions: [384,64], Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: embedded, Location: Device, \
Dimensions: [1,-1,64], Format/Datatype: Half }], ParameterType: Gather, Axis: 0, TacticValue: 0x0, StreamId: 0, \
Metadata: [ONNX Layer: /model/embed_tokens/Gather]
[VERBOSE] Name: /layers.0/q/MatMul_myl9_1, LayerType: gemm, Inputs: [ { Name: embedded, Dimensions: [1,-1,64], \
Format/Datatype: Half }, { Name: __mye116_dconst, Dimensions: [64,96], Format/Datatype: Half }], Outputs: [ { \
Name: queries, Dimensions: [1,-1,96], Format/Datatype: Half }], TacticName: sm80_xmma_gemm_f16f16_f16f16_f16, \
StreamId: 0, Metadata: [ONNX Layer: /layers.0/q/MatMul]
[VERBOSE] Name: _gemm_mha_v2_myl9_2, LayerType: kgen, Inputs: [ { Name: queries, Dimensions: [1,-1,96], \
Format/Datatype: Half }, { Name: past_key_values.0.key, Dimensions: [1,2,-1,16], Format/Datatype: Half }], Outputs: [ \
{ Name: mixed, Dimensions: [1,-1,64], Format/Datatype: Half }], TacticName: _gemm_mha_v2_0xdd5e, StreamId: 0, Metadata: 
[VERBOSE] Name: /head/Conv, LayerType: CaskConvolution, Inputs: [ { Name: mixed, Location: Device, Dimensions: \
[1,-1,64], Format/Datatype: Half }], Outputs: [ { Name: logits, Location: Device, Dimensions: [1,-1,384], \
Format/Datatype: Half }], ParameterType: Convolution, Kernel: [1,1], Weights: {"Type": "Half", "Count": 24576}, \
Bias: {"Type": "Float", "Count": 384}, HasBias: 1, TacticName: sm80_xmma_fprop, TacticValue: 0x28, StreamId: 0
[VERBOSE] Name: /layers.0/q/MatMul_myl12_1, LayerType: gemm, Inputs: [ { Name: input_ids [profile 1], Dimensions: \
[1,-1], Format/Datatype: Int64 }, { Name: __mye7_dconst, Dimensions: [10,10], Format/Datatype: Float }], Outputs: [ { \
Name: logits [profile 1], Dimensions: [1,-1,384], Format/Datatype: Half }], TacticName: , StreamId: 0, Metadata: 
"""
RTX = """
[VERBOSE] Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: a, Location: \
Device, Dimensions: [], Datatype: Int64, Format: none }], ParameterType: ShapeH2D, TacticValue: 0x0, StreamId: 0
[VERBOSE] Name: __mye1_0_myl3_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , \
StreamId: 0
[VERBOSE] Name: __myl_Repl_myl3_1, LayerType: kgen, Inputs: [], Constants: [ { Name: f_constantFloat, Dimensions: \
[1,32], Strides: [32,1], Datatype: Float, Format: (Linear) Row major }], Outputs: [ { Name: b, Dimensions: [-1,32], \
Datatype: Float, Format: (Linear) Row major }], TacticName: __myl_Repl_0xbe, StreamId: 0, Metadata: 
[VERBOSE] Name: gemm_myl5_1, LayerType: gemm, Inputs: [ { Name: x [profile 1], Dimensions: [1,-1], Strides: [-1,1], \
Datatype: Half, Format: (Linear) Row major }], Constants: [ { Name: w_constantInt8, Dimensions: [64,32], Strides: \
[32,1], Datatype: Int8, Format: (Linear) Row major }], Outputs: [ { Name: y, Dimensions: [1,-1], Datatype: Half, \
Format: (Linear) Row major }], TacticName: , StreamId: 0, Metadata: 
"""


def test_layers_of_tensorrt_10(tmp_path: Path) -> None:
    (tmp_path / "build.log").write_text(TENSORRT_10)
    build = read_log(tmp_path / "build.log")
    lookup, product, attention, head = build.of(0)
    assert (lookup.kind, lookup.reads, lookup.weight_bytes) == ("Gather", ("input_ids",), 384 * 64 * 2)
    assert lookup.precisions == ("Int64", "Half") and lookup.kernel == ""
    assert (product.kind, product.reads, product.writes) == ("gemm", ("embedded",), ("queries",))
    assert (product.weight_bytes, product.kernel) == (64 * 96 * 2, "sm80_xmma_gemm_f16f16_f16f16_f16")
    assert attention.reads == ("queries", "past_key_values.0.key") and attention.weight_bytes == 0
    assert (head.weight_bytes, head.precisions) == (24576 * 2 + 384 * 4, ("Half", "Float"))
    assert build.attention_kernels(0) == 1
    (other,) = build.of(1)
    assert other.weight_bytes == 400 and other.writes == ("logits",)


def test_layers_of_tensorrt_rtx(tmp_path: Path) -> None:
    (tmp_path / "build.log").write_text(RTX)
    first, repeated, second = read_log(tmp_path / "build.log").layers
    assert (repeated.profile, repeated.reads, repeated.writes, repeated.weight_bytes) == (0, (), ("b",), 128)
    assert (first.profile, first.kind, first.weight_bytes) == (0, "shape_call", 0)
    assert (second.profile, second.reads, second.weight_bytes) == (1, ("x",), 64 * 32)


def table_of(log: str, folder: Path) -> list[str]:
    (folder / "build.log").write_text(log)
    manifest = read_manifest(made_run(folder / "run") / "engines" / SPEC.name / "dense")
    build = read_log(folder / "build.log")
    return layer_table(Inspection(manifest=manifest, operators={}, build=build, trtexec=None)).splitlines()


def test_every_layer_of_each_profile_has_a_line_with_its_kernel(tmp_path: Path) -> None:
    """They were in `inspect --json` alone."""
    head, *lines = table_of(TENSORRT_10, tmp_path)
    assert head.split() == ["profile", "kind", "kernel", "precisions", "weights", "MB", "layer"]
    product = "sm80_xmma_gemm_f16f16_f16f16_f16"
    assert [line.split() for line in lines] == [
        ["0", "Gather", "-", "Int64/Half", "0.049", "/model/embed_tokens/Gather"],
        ["0", "gemm", product, "Half", "0.012", "/layers.0/q/MatMul_myl9_1"],
        ["0", "kgen", "_gemm_mha_v2_0xdd5e", "Half", "-", "_gemm_mha_v2_myl9_2"],
        ["0", "CaskConvolution", "sm80_xmma_fprop", "Half/Float", "0.051", "/head/Conv"],
        ["1", "gemm", "-", "Int64/Float", "0.000", "/layers.0/q/MatMul_myl12_1"],
    ]
    assert {line[head.index("layer") - 1] for line in lines} == {" "}, "names begin below their heading"


def test_a_long_name_of_a_layer_stays_whole(tmp_path: Path) -> None:
    name = "/".join(f"layers.{place}" for place in range(60))
    head, line = table_of(TENSORRT_10.splitlines()[3].replace("/layers.0/q/MatMul", name), tmp_path)
    assert line.endswith(f"  {name}_myl9_1") and not head.startswith("profile"), "of one there is no column"


# What TensorRT-RTX 1.7 said of a graph, a profile or a file that was at fault; "out of memory" and "live inputs" are
# TensorRT's, the latter as it is reported by others.
SAID = {
    "Attention operation was not supported by a dedicated kernel": "IBuilder::buildSerializedNetwork: Error Code 1: "
    "Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] MyelinCheckException: decompose_composite_ops.cpp:59: "
    "CHECK(composite_op->is_decomposable()) failed. Attention operation was not supported by a dedicated kernel.  (See",
    "live inputs": "MyelinCheckException: wrap_attention_op_in_kgen.cpp:1897: Expected 3 live inputs, got 4",
    "Cannot compile for target(s)": "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: "
    "run_passes] Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: int4.",
    "FP32 GEMM is not supported": "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: "
    "check_turing_op_compatibility] Cannot compile operation '/model/rotary_emb/MatMul' for Turing (SM75): FP32 GEMM "
    "is not supported. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
    "only supports Attention nodes with one output": "Assertion failed: node.output().size() == 1: TensorRT only "
    "supports Attention nodes with one output.",
    "GroupQueryAttention plugin": "Assertion failed: creator && getPluginCreatorVersion(creator) == "
    "CreatorVersion::kV3ONE: failed to load GroupQueryAttention plugin.",
    "Plugin not found": 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
    "Failed to open file": "WeightsContext.cpp:203: Failed to open file: /models/model.onnx.data",
    "Failed to import initializer": "Failed to import initializer: In node -1 with name:  and operator:  "
    "(importInitializers): UNSUPPORTED_NODE: Assertion failed: ctx->getWeightsContext().convertOnnxWeights("
    "initializer, &weights): Failed to import initializer: w",
    "violate shape constraints": "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for "
    "profile 0 violate shape constraints: IShuffleLayer node_of_z: reshaping failed for tensor: y reshape would change "
    "volume 512 to 256 In executeReshape at /_src/runtime/core/shapeMachine.cpp:348",
    "Dimensions with name": "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (Profile kOPT values are "
    "not self-consistent. Dimensions with name sequence_length must be equal. Condition '==' violated: 1 != 257. In "
    "operator() at /_src/runtime/core/shapeMachine.cpp:640",
    "out of memory": "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
}


@pytest.mark.parametrize("words", ADVICE)
def test_each_failure_that_is_known_comes_with_its_advice(words: str) -> None:
    assert with_advice(SAID[words]) == f"{SAID[words]}; {ADVICE[words]}"


def test_another_failure_comes_as_it_is() -> None:
    assert with_advice("Error Code 9: Skipping tactic") == "Error Code 9: Skipping tactic"


# -- the log of a build that failed ------------------------------------------------------------------------------------

LOG = "[VERBOSE] Trying to load\n[ERROR] Failed to parse\n"


def build(folder: Path, backend: str = "tensorrt", fails: bool = True) -> str:
    """A build as `build_engine` does one; what it says where it fails."""
    spec = SPEC.model_copy(update={"backend": backend})
    try:
        with writing(folder) as partial, _log_of_failure(spec, partial, folder):
            partial.mkdir()
            (partial / "build.log").write_text(LOG)
            if fails:
                raise EngineUnavailable("no")
    except EngineUnavailable as problem:
        return str(problem)
    return ""


def test_a_log_of_a_failed_build_is_replaced_and_goes(tmp_path: Path) -> None:
    kept = tmp_path / "engine-failed.log"
    for before in (None, "", "[INTERNAL_ERROR] of another build\n"):
        if before is not None:
            kept.write_text(before)
        assert build(tmp_path / "engine") == f"no (log: {kept})" and kept.read_text() == LOG
    assert not build(tmp_path / "engine", fails=False) and not kept.exists()


@pytest.mark.parametrize("theirs", ["file", "folder", "link"])
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime-cpu"])
def test_what_a_user_has_beside_an_engine_stays(tmp_path: Path, theirs: str, backend: str) -> None:
    """`build --onnx --out DIR` removed or wrote over DIR-failed.log, and dropped the engine where it was a folder."""
    kept = tmp_path / "engine-failed.log"
    (tmp_path / "mine").write_text(LOG)
    if theirs == "file":
        kept.write_text("notes of mine")
    elif theirs == "folder":
        kept.mkdir()
    else:
        kept.symlink_to("mine")
    if backend == "tensorrt":
        assert build(tmp_path / "engine") == f"no (log: {tmp_path / 'engine-2-failed.log'})"
        assert (tmp_path / "engine-2-failed.log").read_text() == LOG
    assert not build(tmp_path / "engine", backend, fails=False) and (tmp_path / "engine" / "build.log").exists()
    assert not (tmp_path / "engine-2-failed.log").exists()
    assert (tmp_path / "mine").read_text() == LOG
    assert kept.is_dir() if theirs == "folder" else kept.read_text() in ("notes of mine", LOG)


def test_an_engine_is_mapped_while_it_is_loaded_and_not_read_into_memory(tmp_path: Path) -> None:
    given: list[mmap.mmap] = []

    def load(content: mmap.mmap) -> bytes:
        assert isinstance(content, mmap.mmap)
        given.append(content)
        return content[:]

    (tmp_path / "model.engine").write_bytes(b"an engine")
    runtime, log = SimpleNamespace(deserialize_cuda_engine=load), SimpleNamespace(complaint=lambda otherwise="": "")
    assert deserialized(log, "cannot load it", runtime, tmp_path / "model.engine") == b"an engine"
    assert given[0].closed, "while the engine runs, its file is nobody's memory"
    (tmp_path / "model.engine").write_bytes(b"")
    with pytest.raises(EngineUnavailable, match=r"^TensorRT: cannot load it: the file is empty$"):
        deserialized(log, "cannot load it", runtime, tmp_path / "model.engine")
