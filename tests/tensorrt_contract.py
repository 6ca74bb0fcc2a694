"""What the modules that use TensorRT ask of its Python bindings, read out of their source, against real ones.

    python tests/tensorrt_contract.py tensorrt       # run where `tensorrt` imports; prints one JSON line

Which object a name in them stands for is in RECEIVERS; every attribute, method and enum member that is used on it has
to exist, and every call to have a signature that takes as many arguments.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trsp_deploy.tools.model_repository.lint import plan as lint_plan
from trsp_deploy.tools.runners import trt, trt_build, trt_log

RECEIVERS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "tensor": "ITensor",
    "config": "IBuilderConfig",
    "config.get_timing_cache()": "ITimingCache",
    "self._runtime_config": "IRuntimeConfig",
    "result": "IOptimizationProfile",
    "runtime": "Runtime",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
MODULES = ("trt", "self._trt", "package")  # names of the bindings themselves
# Asked for behind a hasattr or for that backend alone.
RTX_ONLY = {
    *("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
    *("CudaGraphStrategy", "cuda_graph_strategy", "IRuntimeConfig", "create_runtime_config"),
    *("DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy"),
}
# Asked of a torch tensor and of Triton's config, which have the names of TensorRT's in these modules.
OF_OTHERS = {"ITensor.data_ptr", *(f"IBuilderConfig.{name}" for name in ("input", "output", "max_batch_size"))}


def uses(source: str) -> set[tuple[str, int | None]]:
    """Dotted names below the module, such as `Builder.create_network`, each with its number of arguments if called."""
    found: set[tuple[str, int | None]] = set()
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        base, attribute = ast.unparse(node.value), node.attr
        call = called.get(id(node))
        spread = call is not None and any(isinstance(argument, ast.Starred) for argument in call.args)
        arguments = None if call is None or spread else len(call.args) + len(call.keywords)
        if base in MODULES:
            found.add((attribute, arguments))
        elif of := next((name for name in MODULES if base.startswith(f"{name}.")), None):
            member = f"{base.removeprefix(f'{of}.')}.{attribute}"
            found.add((member, arguments if attribute != "__init__" else None))
        elif base in RECEIVERS:
            found.add((f"{RECEIVERS[base]}.{attribute}", arguments))
    return {(name, count) for name, count in found if name not in OF_OTHERS}


def broken(module: ModuleType, name: str, arguments: int | None, rtx: bool) -> str | None:
    """Why a use does not hold; None where it does."""
    if not rtx and RTX_ONLY & set(name.split(".")):
        return None
    thing: Any = module
    for part in name.split("."):
        if not hasattr(thing, part):
            return f"{name}: no '{part}' in {getattr(thing, '__name__', thing)}"
        thing = getattr(thing, part)
    if arguments is None or not callable(thing):
        return None
    ranges = signatures(thing.__init__ if inspect.isclass(thing) else thing)
    if ranges and not any(low <= arguments <= high for low, high in ranges):
        return f"{name}: called with {arguments} arguments, takes {ranges}"
    return None


def signatures(function: Any) -> list[tuple[int, int]]:
    """(fewest, most) arguments of each overload, without self, as pybind11 writes them into the docstring."""
    found = []
    for parameters in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", inspect.getdoc(function) or "", flags=re.MULTILINE):
        depth, names = 0, [""]
        for letter in parameters:
            depth += (letter in "[(") - (letter in "])")
            if letter == "," and depth == 0:
                names.append("")
            else:
                names[-1] += letter
        own = [name.strip() for name in names if name.strip() and not name.strip().startswith("self")]
        found.append((sum("=" not in name for name in own), len(own)))
    return found


def main() -> int:
    """Check every use; then make what can be made without TensorRT's own libraries."""
    module = importlib.import_module(sys.argv[1])
    sources = (Path(str(part.__file__)).read_text(encoding="utf-8") for part in (trt, trt_build, trt_log, lint_plan))
    wanted = set().union(*(uses(source) for source in sources))
    wanted |= {(f"DataType.{name}", None) for name in {*trt_build.NUMPY_DTYPES, *lint_plan.TYPES}}
    rtx = hasattr(module, "ComputeCapability")
    reasons = [reason for name, count in sorted(wanted, key=str) if (reason := broken(module, name, count, rtx))]
    log = trt_log.logger(module)  # a subclass of the bindings' own logger
    log.log(module.ILogger.ERROR, "as\nsaid")
    print(
        json.dumps(
            {
                "version": module.__version__,
                "uses": sorted({name for name, _ in wanted}),
                "called": sorted({name for name, count in wanted if count is not None}),
                "broken": reasons,
                "logged": log.complaint(),
                "strongly_typed": 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
