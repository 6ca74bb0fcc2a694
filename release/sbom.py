"""A CycloneDX bill of materials of an installation, made by cyclonedx-py and completed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.licences import CONCLUDED, stated
from trsp_deploy.errors import RunError

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
SCHEMA = SchemaVersion.V1_6


def bill_of_materials(environment: Path, version: str) -> dict[str, Any]:
    """The packages installed in an environment, as CycloneDX JSON; the project itself is its `metadata.component`.

    Not validated: see `invalid`.

    environment: a virtual environment's folder, or a Python.
    version: the project's, which pyproject.toml leaves to the build.
    Raises RunError when there is no such environment.
    """
    options = ["--pyproject", str(PYPROJECT), "--output-reproducible", "--no-validate"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cyclonedx_py",
            "environment",
            *options,
            "--spec-version",
            SCHEMA.to_version(),
            str(environment),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"cyclonedx-py ended with {done.returncode} and said nothing"]
        raise RunError(f"{environment}: no bill of materials: {said[-1]}")
    bom: dict[str, Any] = json.loads(done.stdout)
    bom["metadata"]["component"]["version"] = version
    for component in bom["components"]:
        concluded = CONCLUDED.get(canonicalize_name(component["name"]))
        if concluded and not stated(component):
            component["licenses"] = [{"expression": concluded, "acknowledgement": "concluded"}]
    return bom


def invalid(bom: dict[str, Any]) -> str | None:
    """What the schema of CycloneDX has against a bill of materials, or None."""
    error = JsonStrictValidator(SCHEMA).validate_str(json.dumps(bom))
    return None if error is None else f"not valid CycloneDX: {error}"


def missing(bom: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """Declared dependencies, of these extras too, that the bill of materials does not have with a version."""
    there = {canonicalize_name(component["name"]) for component in bom["components"] if component.get("version")}
    return [f"{name}: declared in pyproject.toml and not installed" for name in sorted(declared(extras) - there)]


def declared(extras: Sequence[str]) -> set[str]:
    """Canonical names of what pyproject.toml asks for here, without and with these extras.

    Raises RunError for an extra that it does not have.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    unknown = sorted(set(extras) - set(project["optional-dependencies"]))
    if unknown:
        known = ", ".join(project["optional-dependencies"])
        raise RunError(f"--extras {', '.join(unknown)}: no such extra in pyproject.toml, which has {known}")
    return set(_declared(project, extras)) - {canonicalize_name(project["name"])}


def _declared(project: dict[str, Any], extras: Sequence[str]) -> Iterator[str]:
    asked = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate():
            yield canonicalize_name(requirement.name)
