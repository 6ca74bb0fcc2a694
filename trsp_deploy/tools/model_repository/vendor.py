"""The part of trsp_deploy that a model repository carries, so that its server needs no trsp_deploy."""

from __future__ import annotations

import shutil
from pathlib import Path

import trsp_deploy

# What serving imports; `tests/integration/test_serving_loop.py` runs a copy of it alone.
PACKAGES = ("artifacts", "recipe")  # whole
# Of other packages these modules, and an empty __init__: their real ones import what only building needs.
MODULES = (
    "errors.py",
    "launch.py",
    "reading.py",
    "tools/graphs/decoder_io.py",
    "tools/graphs/fp16_range.py",
    "tools/runners/base.py",
    "tools/runners/denormals.py",
    "tools/runners/generation.py",
    "tools/runners/huge_pages.py",
    "tools/runners/manifest.py",
    "tools/runners/ort.py",
    "tools/runners/ort_session.py",
    "tools/runners/requirements.py",
    "tools/runners/running_batch.py",
    "tools/runners/trt.py",
    "tools/runners/trt_log.py",
    "tools/serving/engine.py",
    "tools/serving/loop.py",
    "tools/serving/requests.py",
    "tools/serving/text.py",
)
MODEL = "tools/serving/triton_model.py"


def vendor(target: Path) -> None:
    """Copy packages and modules to `target/trsp_deploy`."""
    source, root = Path(trsp_deploy.__file__).parent, target / "trsp_deploy"
    for package in PACKAGES:
        shutil.copytree(source / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for module in MODULES:
        place = root / module
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / module, place)
    for folder in {folder for module in MODULES for folder in Path(module).parents}:
        (root / folder / "__init__.py").touch()
    shutil.copy2(source / "__init__.py", root)


def model_file() -> Path:
    """Path of the `model.py` that the python backend loads."""
    return Path(trsp_deploy.__file__).parent / MODEL
