"""Engine specs, the graph's contract, and what a spec asks of TensorRT; nothing is built."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

from trsp_deploy.errors import EngineSpecError, EngineUnavailable, RecipeError
from trsp_deploy.pipeline.engines import _check_names
from trsp_deploy.recipe import Backend, EngineSpec, Range, ShapeProfile, read_engine_spec
from trsp_deploy.tools.graphs import decoder_io
from trsp_deploy.tools.library import engine_names, load_engine_spec
from trsp_deploy.tools.runners import BACKENDS, check_can_build, check_can_run, ort, requirements, trt, trt_build
from trsp_deploy.tools.runners.manifest import spec_sha256
from trsp_deploy.tools.runners.requirements import load_package

PROFILE = ShapeProfile(
    batch=Range(min=1, opt=1, max=2), sequence=Range(min=1, opt=1, max=8), past=Range(min=0, opt=64, max=128)
)
CACHE = ("float16", ("batch_size", 2, "past_sequence_length", 16))
INPUTS: decoder_io.Bindings = {
    "input_ids": ("int64", ("batch_size", "sequence_length")),
    "attention_mask": ("int64", ("batch_size", "past_sequence_length + sequence_length")),
    "past_key_values.0.key": CACHE,
    "past_key_values.0.value": CACHE,
}
OUTPUTS: decoder_io.Bindings = {
    "logits": ("float16", ("batch_size", "sequence_length", 256)),
    "present.0.key": CACHE,
    "present.0.value": CACHE,
}


def spec(backend: Backend, **settings: object) -> EngineSpec:
    profiles = (PROFILE,) if backend.startswith("tensorrt") else ()
    values = {"name": "e", "description": "d", "backend": backend, "precision": "fp16", "profiles": profiles}
    return EngineSpec.model_validate({**values, **settings})


@pytest.mark.parametrize("name", engine_names())
def test_shipped_spec(name: str) -> None:
    engine = load_engine_spec(name)
    assert engine.backend in BACKENDS
    assert engine.precision in name
    # A step of a batch, its prompt, and one long text for perplexity each have a profile.
    if engine.profiles:
        most = min(8, max(profile.batch.max for profile in engine.profiles))  # of a small GPU's memory 4
        assert most >= 4
        for batch, sequence, past in ((most, 1, 2047), (most, 128, 0), (1, 2048, 0)):
            assert engine.cache_length is None or past + sequence <= engine.cache_length
            assert any(
                p.batch.min <= batch <= p.batch.max
                and p.sequence.min <= sequence <= p.sequence.max
                and (p.past is None or p.past.min <= past <= p.past.max)
                for p in engine.profiles
            )


def test_every_backend_is_in_the_registry() -> None:
    assert list(BACKENDS) == list(Backend.__args__)
    assert all("trsp_deploy[" in support.package.install for support in BACKENDS.values())


def test_profiles_belong_to_tensorrt() -> None:
    with pytest.raises(EngineSpecError, match="needs at least one entry under `profiles`"):
        read_engine_spec({"name": "e", "description": "", "backend": "tensorrt", "precision": "fp16"}, "e.yaml")


NO_PAST = {"batch": PROFILE.batch, "sequence": PROFILE.sequence}


@pytest.mark.parametrize(
    ("backend", "settings", "words"),
    [
        ("onnxruntime-cpu", {"profiles": [PROFILE]}, "takes no `profiles`"),
        ("onnxruntime-cpu", {"cache_length": 64}, "takes no `cache_length`"),
        ("onnxruntime-cuda", {"weight_streaming_gib": 1.0}, "takes no `weight_streaming_gib`"),
        ("tensorrt-rtx", {"hardware_compatibility": "ampere-plus"}, "is for backend tensorrt"),
        ("onnxruntime-cuda", {"precision": "int8"}, "precision int8 is not for"),
        (
            "onnxruntime-cpu",
            {"precision": "bf16"},
            "bf16 is not for backend onnxruntime-cpu.*bf16 for tensorrt",
        ),
        ("onnxruntime-cuda", {"precision": "bf16"}, "bf16 is not for backend onnxruntime-cuda"),
        ("tensorrt", {"keep_high_precision": 4}, "`keep_high_precision` is for precision int8 and int4, got fp16"),
        ("tensorrt", {"precision": "int4"}, "`block_size` of 64 or 128"),
        ("tensorrt", {"precision": "int8", "block_size": 64}, "`block_size` is for precision int4, and int8 on ONNX"),
        ("onnxruntime-cuda", {"block_size": 64}, "`block_size` is for precision int4.*got fp16, onnxruntime-cuda"),
        ("onnxruntime-cuda", {"threads": 2}, "`threads` is for backend onnxruntime-cpu, got onnxruntime-cuda"),
        ("tensorrt", {"cache_length": 64}, "`cache_length` and `past` in none"),
        ("tensorrt", {"profiles": [NO_PAST]}, "give `past` in every profile"),
        (
            "tensorrt",
            {"profiles": [NO_PAST], "cache_length": 2},
            "a profile reads 8 tokens, and `cache_length` is less",
        ),
    ],
)
def test_settings_that_do_not_go_together(backend: Backend, settings: dict[str, object], words: str) -> None:
    values = {**spec(backend).model_dump(), **settings}
    with pytest.raises(EngineSpecError, match=words):
        read_engine_spec(values, "e.yaml")


def test_a_prompt_may_be_as_long_as_profiles_read_one_text_into_an_empty_cache() -> None:
    one, many = {"min": 1, "opt": 1, "max": 1}, {"min": 8, "opt": 8, "max": 8}
    short, long = {"min": 1, "opt": 128, "max": 256}, {"min": 1, "opt": 512, "max": 2048}
    empty, filled = {"min": 0, "opt": 256, "max": 4095}, {"min": 16, "opt": 256, "max": 4095}
    profiles = [
        {"batch": one, "sequence": short, "past": empty},
        {"batch": many, "sequence": long, "past": empty},
        {"batch": one, "sequence": long, "past": filled},
    ]
    values = {**spec("tensorrt").model_dump(), "profiles": profiles}
    assert read_engine_spec(values, "e.yaml").longest_prompt == 256
    assert read_engine_spec({**values, "profiles": profiles[1:2]}, "e.yaml").longest_prompt == 2048


def test_a_text_may_be_as_long_as_profiles_hold_one_text() -> None:
    """What a batch of eight has room for promised more than one text alone could have."""
    one, many = {"min": 1, "opt": 1, "max": 1}, {"min": 8, "opt": 8, "max": 8}
    sequence, short, long = ({"min": 0, "opt": 1, "max": most} for most in (128, 1023, 4095))
    profiles = [
        {"batch": one, "sequence": sequence, "past": short},
        {"batch": many, "sequence": sequence, "past": long},
    ]
    values = {**spec("tensorrt").model_dump(), "profiles": profiles}
    assert read_engine_spec(values, "e.yaml").longest_text == 1024
    assert read_engine_spec({**values, "profiles": profiles[1:]}, "e.yaml").longest_text == 4096, "none holds one"


def test_spec_fingerprint_follows_the_spec() -> None:
    assert spec_sha256(spec("tensorrt")) == spec_sha256(spec("tensorrt"))
    assert spec_sha256(spec("tensorrt")) != spec_sha256(spec("tensorrt", workspace_gib=2.0))


def test_shapes_of_a_step() -> None:
    shapes = {
        name: decoder_io.input_shape(name, shape, batch=2, sequence=3, past=5) for name, (_, shape) in INPUTS.items()
    }
    assert shapes["input_ids"] == (2, 3)
    assert shapes["attention_mask"] == (2, 8)
    assert shapes["past_key_values.0.key"] == (2, 2, 5, 16)


def test_unknown_dynamic_dimension_is_named() -> None:
    inputs = {**INPUTS, "position_ids": ("int64", (1, 4, "width"))}
    with pytest.raises(EngineUnavailable, match=r"'position_ids': dimension 2 \('width'\)"):
        decoder_io.check_decoder(inputs, OUTPUTS)


def test_graph_without_cache_is_refused() -> None:
    without = {name: binding for name, binding in INPUTS.items() if not name.startswith("past")}
    with pytest.raises(EngineUnavailable, match="not a decoder with past key values"):
        decoder_io.check_decoder(without, OUTPUTS)
    with pytest.raises(EngineUnavailable, match=r"no present\.0\.key"):
        decoder_io.check_decoder(INPUTS, {name: b for name, b in OUTPUTS.items() if name != "present.0.key"})


def test_precision_is_the_graphs() -> None:
    decoder_io.check_precision(INPUTS, "fp16")
    with pytest.raises(EngineUnavailable, match="asks for fp32, but the ONNX graph's cache is float16"):
        decoder_io.check_precision(INPUTS, "fp32")


def test_position_ids_skip_left_padding() -> None:
    inputs = {**INPUTS, "position_ids": ("int64", ("batch_size", "sequence_length"))}
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    prefill = decoder_io.token_inputs(inputs, np.zeros((2, 4), np.int64), mask)
    assert prefill["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    token = np.zeros((2, 1), np.int64)
    decode = decoder_io.token_inputs(inputs, token, decoder_io.extended(mask, token))
    assert decode["position_ids"].tolist() == [[2], [4]]
    assert "position_ids" not in decoder_io.token_inputs(INPUTS, token, decoder_io.extended(mask, token))


def test_onnxruntime_cuda_names_the_command_or_the_gpu() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here; the message is for machines without it")
    for check in (check_can_build, check_can_run):
        with pytest.raises(EngineUnavailable, match=r"onnxruntime-gpu is not installed.*trsp_deploy\[gpu\]"):
            check(spec("onnxruntime-cuda"))


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # what Python keeps for a module that cannot be imported
    for check in (check_can_build, check_can_run):
        with pytest.raises(
            EngineUnavailable, match=r"tensorrt is not installed: pip install 'trsp_deploy\[tensorrt\]'"
        ):
            check(spec("tensorrt"))


def test_half_uninstalled_package_is_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    # trsp_deploy is not asked of an index, where it may not be: the damaged package alone goes and comes again.
    with pytest.raises(
        EngineUnavailable, match=r"damaged.* pip uninstall -y onnxruntime && pip install 'trsp_deploy\[cpu\]'"
    ):
        load_package("onnxruntime-cpu")


def test_no_cuda_device_is_said_before_anything_of_tensorrt_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(requirements.ctypes, "CDLL", no_driver)
    # An empty module: the check would fail on the first attribute of TensorRT that it touched.
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for check in (check_can_build, check_can_run):
        with pytest.raises(EngineUnavailable, match="no CUDA device: the NVIDIA driver is not installed"):
            check(spec("tensorrt"))


def test_compute_capabilities_are_checked_before_the_build() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    check_can_build(spec("tensorrt-rtx", compute_capabilities=["sm89", "SM120"]))
    with pytest.raises(EngineSpecError, match="no compute capability 'sm88'; did you mean 'sm8"):
        check_can_build(spec("tensorrt-rtx", compute_capabilities=["sm88"]))


def test_profile_covers_shapes() -> None:
    limits = {"input_ids": [(1, 1), (1, 1), (2, 8)]}
    assert trt._covers(limits, {"input_ids": (2, 8)})
    assert not trt._covers(limits, {"input_ids": (2, 9)})
    assert not trt._covers(limits, {"input_ids": (3, 1)})


def test_runners_import_no_torch() -> None:
    modules = ", ".join((ort.__name__, trt.__name__, "trsp_deploy.tools.runners"))
    heavy = "{'torch', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'}"
    code = f"import sys, {modules}; sys.exit(', '.join({heavy} & sys.modules.keys()) or None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("backend", "settings", "words"),
    [
        ("onnxruntime-cpu", {"precision": "int4", "head_bits": 32, "embedding_bits": 8}, None),
        ("onnxruntime-cpu", {"precision": "int8", "head_bits": 32}, None),
        ("tensorrt", {"precision": "int4", "head_bits": 16, "block_size": 64}, None),
        ("tensorrt", {"precision": "int4", "head_bits": 4, "block_size": 64}, "int4 on tensorrt takes 8, 16"),
        ("onnxruntime-cpu", {"precision": "int4", "head_bits": 16}, "int4 on onnxruntime-cpu takes 4, 8, 32"),
        ("onnxruntime-cpu", {"precision": "int8", "head_bits": 4}, "int8 on onnxruntime-cpu takes 8, 32"),
        ("tensorrt-rtx", {"precision": "fp16", "head_bits": 4}, "fp16 on tensorrt-rtx has none"),
        (
            "tensorrt",
            {"precision": "int8", "embedding_bits": 8},
            "`embedding_bits` is for precision int4 on ONNX Runtime",
        ),
    ],
)
def test_heads_and_embeddings_have_the_bits_that_a_backend_can_hold(
    backend: Backend, settings: dict[str, object], words: str | None
) -> None:
    if words is None:
        spec(backend, **settings)
        return
    with pytest.raises(ValueError, match=words):
        spec(backend, **settings)


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("tensorrt-fp16-static", "10.14.1.48", True),
        ("tensorrt-fp16-static", "10.15.1.29", False),
        ("tensorrt-fp16-static", "11.0.0.1", False),
        ("tensorrt-fp16", "10.9.0.34", False),
        ("tensorrt-rtx-fp16-static", "1.7.1.116", False),
    ],
)
def test_a_fixed_cache_wants_a_tensorrt_that_can_write_it(
    name: str, version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_build, "load_package", lambda backend: types.SimpleNamespace(__version__=version))
    monkeypatch.setattr(trt_build, "cuda_devices", list)
    if not refused:
        check_can_build(load_engine_spec(name))
        return
    words = r"TensorRT 10\.14\.1\.48 has no TensorScatter.*upgrade to 10\.15 or later, or leave `cache_length` out"
    with pytest.raises(EngineUnavailable, match=words):
        check_can_build(load_engine_spec(name))


@pytest.mark.parametrize("name", ["tensorrt-fp16", "tensorrt-rtx-fp16"])
def test_an_engine_of_tensorrt_wants_onnx_runtime_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph's parity and passes are computed there: that it is not installed showed after the training."""

    def package(backend: Backend) -> types.SimpleNamespace:
        return types.SimpleNamespace(__version__="11.0") if backend.startswith("tensorrt") else load_package(backend)

    monkeypatch.setattr(trt_build, "load_package", package)
    monkeypatch.setattr(trt_build, "cuda_devices", list)
    check_can_build(load_engine_spec(name))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = rf"{name}: its graph is held against the model in ONNX Runtime: onnxruntime is not installed: pip install"
    with pytest.raises(EngineUnavailable, match=words):
        check_can_build(load_engine_spec(name))


def test_no_two_measurements_are_steps_of_one_name() -> None:
    """Each would take the other's record away, so that every command measured both anew, for ever."""
    _check_names(["ort-cpu-fp32", "ort-cpu-fp32-q", "onnx-q"], ["own", "onnx", "other"])
    words = "evaluation 'q-own' through ort-cpu-fp32: is what engine ort-cpu-fp32-q on text 'own' is called"
    with pytest.raises(RecipeError, match=words):
        _check_names(["ort-cpu-fp32", "ort-cpu-fp32-q"], ["own", "q-own"])
    with pytest.raises(EngineSpecError, match="engine 'onnx': is what the exported graph is called"):
        _check_names(["onnx"], [])
