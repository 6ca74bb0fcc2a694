"""The packages that trsp_deploy's own metadata asks for, and the line for one that is not there.

Imports nothing but the standard library: it is asked where something is missing, which may be any of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import defaultdict

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?(?P<range>[^;\s]*)(; extra == '(?P<extra>[\w-]+)')?")
DISTRIBUTIONS = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py"}  # of modules that are called otherwise
MODULES = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
HALF_REMOVED = "half removed: pip has it for installed, and its module is not there"


def installed(distribution: str) -> str | None:
    """Version of an installed distribution; None where there is none of that name."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def half_removed(distribution: str) -> bool:
    """Whether pip has a distribution for installed whose module is gone, as a removal leaves it that was cut short.

    Of one with a top-level module of its own, as `requirements` without an extra have; the module is not imported.
    """
    module = importlib.util.find_spec(MODULES.get(distribution, distribution.replace("-", "_")))
    # A folder that some file was left in is found as a namespace package, which has no origin.
    return installed(distribution) is not None and (module is None or module.origin is None)


def requirements(extra: str | None = None) -> dict[str, str]:
    """Distributions that trsp_deploy cannot do without, with an extra those of it too, and the versions that it takes.

    A range is written as pip reads it, such as ">=2.2,<3". Empty where trsp_deploy itself is not installed.
    """
    try:
        stated = importlib.metadata.requires("trsp_deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    ranges: dict[str, set[str]] = defaultdict(set)
    for text in stated:
        asked = REQUIREMENT.fullmatch(text)
        if asked and asked["extra"] in (None, extra):
            ranges[asked["name"]] |= set(filter(None, asked["range"].split(",")))
    return {name: ",".join(sorted(parts, reverse=True)) for name, parts in ranges.items()}  # >= before <


def install_command(distribution: str, versions: str) -> str:
    """The command that installs one of `requirements`."""
    return f"pip install '{distribution}{versions}'"


def reinstall_command(distribution: str, versions: str) -> str:
    """The same of one that pip has for installed: it would leave it as it is."""
    return f"pip install --force-reinstall --no-deps '{distribution}{versions}'"


def missing_package(problem: BaseException) -> str | None:
    """The line for an import that failed because one of `requirements` is not here; None for all other errors.

    Libraries wrap such errors in their own, so what led to `problem` counts too.
    """
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            module = cause.name.partition(".")[0]
            distribution = DISTRIBUTIONS.get(module, module.replace("_", "-"))
            versions = requirements().get(distribution)
            if versions is not None and installed(distribution) is None:
                return _unusable(distribution, "not installed", install_command(distribution, versions))
            if versions is not None and half_removed(distribution):
                return _unusable(distribution, HALF_REMOVED, reinstall_command(distribution, versions))
        cause = cause.__cause__ or cause.__context__
    return None


def _unusable(distribution: str, reason: str, remedy: str) -> str:
    return f"the package {distribution} is {reason}, without which this command does not work: {remedy}"
