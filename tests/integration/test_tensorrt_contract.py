"""The trt modules against the real Python bindings of TensorRT 10 and 11, over libraries of nothing but symbols.

TensorRT's own libraries cannot be installed from a package index; its bindings can (`make` puts them beside the
environment's packages), and know every class, method and enum. So a change of the interface breaks a test here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tensorrt_contract
from tests.tensorrt_contract import signatures, uses

BINDINGS = Path(sys.prefix) / "tensorrt-bindings"
REPOSITORY = Path(__file__).parents[2]
# library -> symbols that the bindings want of it
SYMBOLS = {
    "nvinfer": (
        *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
        *("getBuilderPluginRegistry", "getPluginRegistry"),
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    ),
}


@pytest.fixture(scope="module", params=["10", "11"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the contract's own program finds with one set of bindings."""
    version = request.param
    folder = BINDINGS / version
    if not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(f"TensorRT {version}'s bindings are not in {folder}: `make test` downloads them")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    place = tmp_path_factory.mktemp(f"tensorrt-{version}")
    for library, symbols in SYMBOLS.items():
        source = place / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        name = f"lib{library}.so.{version}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(place / name), str(source)]
        subprocess.run(command, check=True)
    (place / "tensorrt").mkdir()  # NVIDIA's `tensorrt` is as much as this around the bindings
    (place / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    paths = os.pathsep.join([str(place), str(folder), str(REPOSITORY)])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(place), "PYTHONPATH": paths}
    program = [sys.executable, tensorrt_contract.__file__, "tensorrt"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert str(result["version"]).startswith(f"{version}.")
    return result


def test_everything_that_is_used_is_there(found: dict[str, object]) -> None:
    assert found["broken"] == []
    assert found["logged"] == "as said"


def test_the_same_uses_hold_for_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'trsp_deploy[rtx]'")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    program = [sys.executable, tensorrt_contract.__file__, "tensorrt_rtx"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == []
    assert len(found["uses"]) > 40 and "IBuilderConfig.set_compute_capability" in found["uses"]
    # What an alias, a spread or a call of a call would hide.
    called = {
        "Builder",
        "OnnxParser",
        "Runtime",
        "ICudaEngine.get_tensor_profile_shape",
        "IOptimizationProfile.set_shape",
        # By the linter of plans alone.
        "ICudaEngine.is_shape_inference_io",
        "ICudaEngine.get_tensor_dtype",
        "Runtime.deserialize_cuda_engine",
    }
    assert called | {"ITimingCache.serialize"} <= set(found["called"])
    assert {"ILogger.WARNING", "DataType.BF16", "DataType.UINT8"} <= set(found["uses"])


def test_the_flag_is_another_bit_in_each_version(found: dict[str, object]) -> None:
    expected = {"10": 2, "11": 1}[str(found["version"]).partition(".")[0]]
    assert found["strongly_typed"] == expected


def test_uses_are_read_out_of_the_source() -> None:
    source = (
        "builder.create_network(1)\nx = trt.BuilderFlag.TF32\nself._context.set_input_shape(name, shape)\n"
        "trt.OnnxParser(network, log)\npackage.ILogger.WARNING\nconfig.get_timing_cache().serialize()\n"
    )
    assert uses(source) == {
        ("OnnxParser", 2),
        ("ILogger", None),
        ("ILogger.WARNING", None),
        ("IBuilderConfig.get_timing_cache", 0),
        ("ITimingCache.serialize", 0),
        ("Builder.create_network", 1),
        ("BuilderFlag", None),
        ("BuilderFlag.TF32", None),
        ("IExecutionContext.set_input_shape", 2),
    }


def test_a_missing_method_and_a_wrong_call_are_found() -> None:
    import types

    class Builder:
        def __init__(self) -> None:
            """__init__(self: Builder, logger: ILogger) -> None"""

        def create_network(self) -> None:
            """create_network(self: Builder, flags: int = 0, more: Sequence[int, int]) -> INetworkDefinition"""

    module = types.ModuleType("fake")
    module.Builder = Builder  # type: ignore[attr-defined]
    assert signatures(Builder.create_network) == [(1, 2)]
    assert tensorrt_contract.broken(module, "Builder.create_network", 2, False) is None
    assert tensorrt_contract.broken(module, "Builder", 1, False) is None
    assert "Builder: called with 2" in str(tensorrt_contract.broken(module, "Builder", 2, False))
    assert "called with 3" in str(tensorrt_contract.broken(module, "Builder.create_network", 3, False))
    assert "no 'build'" in str(tensorrt_contract.broken(module, "Builder.build", 0, False))
