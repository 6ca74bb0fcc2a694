"""Engines built for real from Optimum's graphs of two tiny models, compared with PyTorch where they run."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tests.breadth import BREADTH, by_default
from trsp_deploy.errors import EngineUnavailable, RunError
from trsp_deploy.recipe import EngineSpec
from trsp_deploy.stages.build import build_engine, finished
from trsp_deploy.tools import runners
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.quiet import quiet_libraries
from trsp_deploy.tools.runners import EngineManifest, Runner, open_engine, ort_build, ort_session, read_manifest
from trsp_deploy.tools.runners import manifest as manifest_module
from trsp_deploy.tools.runners.graph_files import onnx_sha256, source_files
from trsp_deploy.tools.runners.manifest import Bound
from trsp_deploy.tools.runners.ort import OrtRunner
from trsp_deploy.tools.runners.requirements import CudaDevice, cuda_devices

VOCABULARY = 256
TOLERANCE = 1e-4
Export = Callable[[str, str], Path]  # (architecture, precision) -> model.onnx


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return OPTForCausalLM(config)


ARCHITECTURES = {"llama": llama, "opt": opt}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in ARCHITECTURES.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def export(checkpoints: Path) -> Export:
    from optimum.exporters.onnx import main_export

    def exported(name: str, precision: str) -> Path:
        folder = checkpoints / f"{name}-{precision}"
        if not folder.exists():
            with warnings.catch_warnings(), quiet_libraries():
                warnings.simplefilter("ignore")
                main_export(
                    str(checkpoints / name),  # Optimum takes a Path for a model
                    folder,
                    task="text-generation-with-past",
                    opset=18,
                    dtype=precision,
                    do_validation=False,
                    local_files_only=True,
                    slim=True,
                )
        return folder / "model.onnx"

    return exported


@pytest.fixture(scope="module")
def cpu_engines(export: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    spec = load_engine_spec("ort-cpu-fp32")
    for name in ARCHITECTURES:
        build_engine(export(name, "fp32"), spec, folder / name)
    return {name: folder / name for name in ARCHITECTURES}


def prompt() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (2, 7), the mask of a batch whose first text is 3 tokens shorter, and 3 decode steps (3, 2, 1)."""
    random = np.random.default_rng(0)
    ids = random.integers(4, VOCABULARY, (2, 7))
    mask = np.ones((2, 7), np.int64)
    mask[0, :3] = 0
    return ids, mask, random.integers(4, VOCABULARY, (3, 2, 1))


@torch.no_grad()
def reference(model: PreTrainedModel) -> list[np.ndarray]:
    """PyTorch's logits of the prompt and of every step, without a cache: each step reads the whole text again."""
    ids, mask, steps = prompt()
    logits = []
    for step in (None, *steps):
        if step is not None:
            ids, mask = np.concatenate([ids, step], axis=1), np.concatenate([mask, np.ones_like(step)], axis=1)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        inputs = [torch.from_numpy(array) for array in (ids, mask, positions)]
        out = model(inputs[0], attention_mask=inputs[1], position_ids=inputs[2]).logits.float().numpy()
        logits.append(out if step is None else out[:, -1:])
    return logits


def generated(runner: Runner) -> list[np.ndarray]:
    ids, mask, steps = prompt()
    return [runner.prefill(ids, mask), *(runner.decode(step) for step in steps)]


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Over prompt and steps, padding left out: what stands there depends on nothing."""
    prefill = prompt()[1].astype(bool)
    differences = [np.abs(found[0] - expected[0])[prefill].max()]
    differences += [np.abs(a - b).max() for a, b in zip(found[1:], expected[1:], strict=True)]
    assert all(array.dtype == np.float32 for array in found)
    return float(max(differences))


def without_cuda() -> None:
    try:
        cuda_devices()
    except EngineUnavailable:
        return
    pytest.skip("this machine has a CUDA device; the refusal is for machines without one")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cpu_engine_agrees_with_pytorch(name: str, cpu_engines: dict[str, Path], checkpoints: Path) -> None:
    model = ARCHITECTURES[name]().from_pretrained(checkpoints / name).eval()
    with open_engine(cpu_engines[name]) as runner:
        assert largest_difference(generated(runner), reference(model)) < TOLERANCE
        # A second prefill starts over.
        assert largest_difference(generated(runner), reference(model)) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bare_onnx_file_agrees_with_the_engine(name: str, cpu_engines: dict[str, Path], export: Export) -> None:
    with OrtRunner(export(name, "fp32"), threads=1) as bare, open_engine(cpu_engines[name]) as engine:
        assert largest_difference(generated(bare), generated(engine)) < 1e-6


@BREADTH
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp16_graph_gives_float32_logits(name: str, export: Export, checkpoints: Path) -> None:
    model = ARCHITECTURES[name]().from_pretrained(checkpoints / name).eval()
    with OrtRunner(export(name, "fp16")) as runner:
        assert largest_difference(generated(runner), reference(model)) < 2e-2


def test_cache_of_a_graph_without_passes_stays_in_onnxruntime(export: Export) -> None:
    ids, mask, steps = prompt()
    with OrtRunner(export("llama", "fp32")) as runner:
        runner.prefill(ids, mask)
        for past, step in enumerate(steps, start=ids.shape[1]):
            assert {tuple(value.shape()) for value in runner._cache.values()} == {(2, 2, past, 16)}
            runner.decode(step)
        runner.prefill(ids[:1], mask[:1])
        assert {tuple(value.shape()) for value in runner._cache.values()} == {(1, 2, 7, 16)}


def test_decode_before_prefill_is_a_bug(cpu_engines: dict[str, Path]) -> None:
    with open_engine(cpu_engines["opt"]) as runner, pytest.raises(RuntimeError, match="after prefill"):
        runner.decode(np.ones((1, 1), np.int64))


def test_manifest_says_what_was_built(cpu_engines: dict[str, Path], export: Export) -> None:
    folder = cpu_engines["llama"]
    manifest = read_manifest(folder)
    assert manifest == EngineManifest.model_validate_json((folder / "manifest.json").read_text())
    assert manifest.name == "ort-cpu-fp32"
    assert manifest.file == "model.onnx"
    assert set(manifest.files) == {"model.onnx", "model.onnx.data"}
    assert manifest.size_bytes == sum((folder / name).stat().st_size for name in manifest.files)
    assert manifest.onnx_sha256 == onnx_sha256(source_files(export("llama", "fp32")))
    assert manifest.inputs["past_key_values.2.value"] == ("float32", ("batch_size", 2, "past_sequence_length", 16))
    assert manifest.outputs["logits"][1][-1] == VOCABULARY
    assert manifest.build_s > 0
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.onnx", "model.onnx.data"]


def test_an_engine_is_of_the_config_beside_its_graph(export: Export, tmp_path: Path) -> None:
    """It says how long a text may be, on which passes rely."""
    shutil.copytree(export("llama", "fp32").parent, tmp_path / "onnx")
    graph, spec = tmp_path / "onnx" / "model.onnx", load_engine_spec("ort-cpu-fp32")
    build_engine(graph, spec, tmp_path / "engine")
    assert finished(graph, spec, tmp_path / "engine") is not None
    config = json.loads(graph.with_name("config.json").read_text())
    graph.with_name("config.json").write_text(json.dumps({**config, "max_position_embeddings": 99}))
    assert finished(graph, spec, tmp_path / "engine") is None
    with pytest.raises(EngineUnavailable, match=r"config.json has SHA-256 .* by now"):
        open_engine(tmp_path / "engine")


def test_a_cuda_engine_holds_its_weights_whatever_their_file_is_called(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is a CPU's, for what is copied is the same."""
    import onnx

    def on_a_cpu(graph: Path, backend: str, threads: int | None, save_to: Path | None = None) -> Any:
        return ort_session.create_session(graph, "onnxruntime-cpu", threads, save_to=save_to)

    monkeypatch.setattr(ort_build, "create_session", on_a_cpu)
    source, engine = tmp_path / "decoder.onnx", tmp_path / "engine"
    onnx.save(onnx.load(export("opt", "fp32")), source, save_as_external_data=True, location="weights.bin")
    (tmp_path / "decoder.onnx.bak").write_text("of no use")
    engine.mkdir()
    spec = EngineSpec(name="e", description="", backend="onnxruntime-cuda", precision="fp32", fuse=False)
    built = ort_build.build_cuda(source, spec, engine, None)
    assert built.files == ("decoder.onnx", "weights.bin") == tuple(sorted(path.name for path in engine.iterdir()))


def test_external_weights_are_followed(export: Export, checkpoints: Path, tmp_path: Path) -> None:
    import onnx

    source = tmp_path / "model.onnx"
    # What exporters do above 2 GB.
    onnx.save(onnx.load(export("opt", "fp32")), source, save_as_external_data=True, location="model.onnx_data")
    assert onnx_sha256(source_files(source)) != onnx_sha256(source_files(export("opt", "fp32")))
    before = onnx_sha256(source_files(source))
    build_engine(source, load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    (tmp_path / "model.onnx_data").write_bytes(b"")
    assert onnx_sha256(source_files(source)) != before
    onnx.save(onnx.load(export("opt", "fp32")), source, save_as_external_data=True, location="weights.bin")
    before = onnx_sha256(source_files(source))
    (tmp_path / "weights.bin").write_bytes(b"")
    assert onnx_sha256(source_files(source)) != before, "of a file with another name than the graph's"
    source.write_bytes(b"no graph")
    assert onnx_sha256(source_files(source))
    source.unlink()
    model = opt().from_pretrained(checkpoints / "opt").eval()
    with open_engine(tmp_path / "engine") as runner:
        assert largest_difference(generated(runner), reference(model)) < TOLERANCE


@pytest.mark.parametrize("change", ["content", "missing"])
def test_corrupted_engine_is_refused(change: str, export: Export, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    build_engine(export("opt", "fp32"), load_engine_spec("ort-cpu-fp32"), folder)
    weights = folder / "model.onnx.data"
    if change == "content":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    else:
        weights.unlink()
    with pytest.raises(EngineUnavailable, match=r"model\.onnx\.data .* build --onnx \S+ --engine ort-cpu-fp32"):
        open_engine(folder)


def test_engine_of_another_version_is_refused(export: Export, tmp_path: Path) -> None:
    manifest = build_engine(export("opt", "fp32"), load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    older = manifest.model_copy(update={"backend_version": "1.0.0"})
    (tmp_path / "engine" / "manifest.json").write_text(older.model_dump_json())
    with pytest.raises(EngineUnavailable, match=r"was built with onnxruntime-cpu 1\.0\.0, here is .*; build it again"):
        open_engine(tmp_path / "engine")


@pytest.mark.parametrize(
    ("built", "here", "words"),
    [
        ({"gpu": "sm90"}, {"gpu": "sm89"}, "for a GPU of compute capability sm90, here is sm89"),
        ({"gpu": "sm86", "others": "same-compute-capability"}, {"gpu": "sm89"}, "capability sm86, here is sm89"),
        ({"gpu": "sm80", "others": "ampere-plus"}, {"gpu": "sm75"}, "capability sm80, here is sm75"),
        ({"gpu": "sm89", "driver": "570.1"}, {"gpu": "sm89", "driver": "580.2"}, "driver 570.1, here is 580.2"),
        (
            {"gpu": "sm90", "device": "NVIDIA H100 80GB HBM3"},
            {"gpu": "sm90", "device": "NVIDIA H200"},
            "for NVIDIA H100 80GB HBM3, here is NVIDIA H200 (`hardware_compatibility: same-compute-capability` in its "
            "spec allows both)",
        ),
        ({"exact_int8": True}, {}, "for a processor with VNNI; on this one, without, its int8 products would overflow"),
        ({"exact_int8": True}, {"exact_int8": True}, None),
        ({}, {"exact_int8": True}, None),
        ({"gpu": "sm80", "others": "ampere-plus"}, {"gpu": "sm90"}, None),
        ({"gpu": "sm89", "driver": "580.2"}, {"gpu": "sm89", "driver": "580.2"}, None),
        ({"gpu": "sm90"}, {"gpu": "sm90", "device": "NVIDIA H200"}, None),  # of an older version
        ({"gpu": "sm90", "device": "NVIDIA H200"}, {"gpu": "sm90", "device": "NVIDIA H200"}, None),
        ({"gpu": "sm89", "driver": "580.2"}, {}, None),  # no GPU here: opening says so
    ],
)
def test_engine_of_another_machine_is_refused(
    built: dict[str, Any],
    here: dict[str, Any],
    words: str | None,
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = build_engine(export("opt", "fp32"), load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")
    assert manifest.bound == Bound(), "an engine for a CPU is bound to no GPU"
    changed = manifest.model_copy(update={"bound": Bound.model_validate(built)})
    (tmp_path / "engine" / "manifest.json").write_text(changed.model_dump_json())
    monkeypatch.setattr(runners, "bound_to", lambda spec: Bound.model_validate(here))
    if words is None:
        open_engine(tmp_path / "engine")
        return
    with pytest.raises(EngineUnavailable, match=f"{re.escape(words)}; build it again: trsp-deploy build --onnx"):
        open_engine(tmp_path / "engine")


@pytest.mark.parametrize(
    ("compatibility", "device"), [("none", "NVIDIA H200"), ("same-compute-capability", None), ("ampere-plus", None)]
)
def test_a_tensorrt_engine_is_bound_to_the_gpu_at_hand_where_its_spec_asks_for_no_others(
    compatibility: str, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "cuda_devices", lambda: [CudaDevice("NVIDIA H200", "sm90", 2**37)])
    monkeypatch.setattr(manifest_module, "driver_version", lambda: "580.2")
    spec = load_engine_spec("tensorrt-fp16").model_copy(update={"hardware_compatibility": compatibility})
    bound = manifest_module.bound_to(spec)
    assert (bound.gpu, bound.device, bound.driver, bound.others) == ("sm90", device, "580.2", compatibility)
    assert ('"device":"NVIDIA H200"' in bound.told()) == (device is not None)


def test_what_is_bound_to_no_gpu_is_told_as_before_there_were_devices() -> None:
    """Else every int8 engine of a run would be built anew."""
    assert Bound(exact_int8=True).told() == '{"gpu":null,"driver":null,"others":"none","exact_int8":true}'


def test_folder_without_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="no engine here; build it again"):
        open_engine(tmp_path / "tensorrt-fp16")
    (tmp_path / "manifest.json").write_text('{"name": "x"}')
    with pytest.raises(EngineUnavailable, match=r"damaged \(key 'spec' is missing\); build it again"):
        open_engine(tmp_path)


def test_silent_fallback_to_the_cpu_is_an_error(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda()
    with (
        pytest.raises(EngineUnavailable, match=r"pip install|no CUDA device"),
        OrtRunner(export("opt", "fp32"), backend="onnxruntime-cuda"),
    ):
        raise AssertionError("a CUDA session without CUDA")
    # Past the first check, ONNX Runtime itself warns at most, and gives a session on the CPU.
    monkeypatch.setattr(ort_session, "_check_cuda", lambda: None)
    with (
        pytest.raises(EngineUnavailable, match=r"fell back to CPUExecutionProvider.*pip install"),
        OrtRunner(export("opt", "fp32"), backend="onnxruntime-cuda"),
    ):
        raise AssertionError("a CUDA session without CUDA")


def test_cuda_engine_is_refused_without_cuda(export: Export, tmp_path: Path) -> None:
    without_cuda()
    with pytest.raises(EngineUnavailable, match=r"pip install 'trsp_deploy\[gpu\]'|no CUDA device"):
        build_engine(export("opt", "fp16"), load_engine_spec("ort-cuda-fp16"), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def broken(spec: EngineSpec, onnx: Path, folder: Path) -> str:
    with pytest.raises(EngineUnavailable) as caught:
        build_engine(onnx, spec, folder)
    assert not folder.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_broken_onnx_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protobuf\n" * 40)
    message = broken(load_engine_spec("ort-cpu-fp32"), tmp_path / "model.onnx", tmp_path / "engine")
    assert "cannot load" in message
    assert "Protobuf parsing failed" in message


def test_missing_onnx_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"model\.onnx: no ONNX file to build engine ort-cpu-fp32 from"):
        build_engine(tmp_path / "model.onnx", load_engine_spec("ort-cpu-fp32"), tmp_path / "engine")


def test_wrong_precision_is_one_line(export: Export, tmp_path: Path) -> None:
    message = broken(load_engine_spec("ort-cpu-fp32"), export("opt", "fp16"), tmp_path / "engine")
    assert message == "the spec asks for fp32, but the ONNX graph's cache is float16"


def test_failed_build_keeps_the_engine_before_it(export: Export, tmp_path: Path) -> None:
    spec = load_engine_spec("ort-cpu-fp32")
    build_engine(export("opt", "fp32"), spec, tmp_path / "engine")
    with pytest.raises(EngineUnavailable):
        build_engine(export("opt", "fp16"), spec, tmp_path / "engine")
    with open_engine(tmp_path / "engine") as runner:
        assert runner.prefill(*prompt()[:2]).shape == (2, 7, VOCABULARY)


class TestTensorRtRtx:
    """TensorRT-RTX compiles ahead of time, so that TensorRT's module is exercised on machines without a GPU."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")

    @pytest.mark.parametrize("name", by_default(["llama"], ARCHITECTURES))
    def test_builds_in_fp16(self, name: str, export: Export, tmp_path: Path) -> None:
        spec = load_engine_spec("tensorrt-rtx-fp16")
        manifest = build_engine(export(name, "fp16"), spec, tmp_path / "engine")
        assert manifest.files.keys() == {"model.engine"}
        assert manifest.size_bytes == (tmp_path / "engine" / "model.engine").stat().st_size > 100_000
        assert manifest.inputs["past_key_values.0.key"][0] == manifest.outputs["logits"][0] == "float16"
        assert manifest.inputs["attention_mask"] == ("int64", ("batch_size", "past_sequence_length + sequence_length"))
        log = (tmp_path / "engine" / "build.log").read_text()
        assert "[VERBOSE]" in log
        assert "present.2.value" in log
        without_cuda()
        with pytest.raises(EngineUnavailable, match="no CUDA device"), open_engine(tmp_path / "engine"):
            raise AssertionError("an engine open without a GPU")

    @BREADTH
    def test_builds_in_fp32_for_one_gpu(self, export: Export, tmp_path: Path) -> None:
        settings = {"precision": "fp32", "compute_capabilities": ("sm89",), "workspace_gib": 1.0}
        spec = load_engine_spec("tensorrt-rtx-fp16").model_copy(update=settings)
        manifest = build_engine(export("llama", "fp32"), spec, tmp_path / "engine")
        assert manifest.outputs["logits"][0] == "float32"

    def test_broken_onnx_is_one_line_and_its_log_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"no protobuf\n" * 40)
        message = broken(load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "model.onnx", tmp_path / "engine")
        assert "Failed to parse the ONNX model" in message
        assert str(tmp_path / "engine-failed.log") in message
        assert "Failed to parse" in (tmp_path / "engine-failed.log").read_text()

    def test_unknown_operator_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import onnx
        from onnx import TensorProto, helper

        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        node = helper.make_node("Unheard", ["x"], ["y"], name="strange", domain="example")
        graph = helper.make_graph([node], "g", ends[:1], ends[1:])
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
        monkeypatch.setattr("trsp_deploy.stages.build.check_source", lambda *_: None)  # it is no decoder
        message = broken(load_engine_spec("tensorrt-rtx-fp16"), tmp_path / "model.onnx", tmp_path / "engine")
        assert "'strange' (Unheard)" in message
