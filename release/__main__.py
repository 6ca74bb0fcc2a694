"""Check what an installation of the wheel brings, and write it down beside the wheel: `make release`.

    python -m release .venv-release --extras optimum,cpu
    python -m release .venv-release --extras optimum,cpu --require-audit    # no service for vulnerabilities: an error

Writes dist/trsp_deploy-VERSION.cdx.json (CycloneDX) and dist/licences.md, says what is wrong in a line each, and ends
with one JSON line. Exit code 1 when something declared is missing, a licence is not in the policy of
release/licences.py, or a vulnerability is known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from release.audit import Audit, audit
from release.licences import page, refused
from release.sbom import bill_of_materials, invalid, missing
from trsp_deploy import __version__
from trsp_deploy.artifacts import write_json, writing
from trsp_deploy.errors import TrspError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, print; 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="virtual environment with the wheel in it")
    parser.add_argument("--extras", default="", help="comma-separated: what the wheel was installed with")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--require-audit", action="store_true", help="fail where a package is not audited")
    options = parser.parse_args(arguments)
    try:
        bom = bill_of_materials(options.environment, __version__)
        found = audit(bom)
        problems = wrong(bom, options.extras, found, options.require_audit)
        write(bom, options.out)
    except TrspError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    print(found.line(), *problems, sep="\n", file=sys.stderr)
    counts = {"components": len(bom["components"]), "audit": found.service, "problems": len(problems)}
    print(json.dumps({"release": __version__, **counts}))
    return 1 if problems else 0


def wrong(bom: dict[str, Any], extras: str, found: Audit, require_audit: bool) -> list[str]:
    """Everything that stops a release, in a line each."""
    return [
        *filter(None, [invalid(bom)]),
        *missing(bom, [extra for extra in extras.split(",") if extra]),
        *filter(None, map(refused, bom["components"])),
        *found.vulnerable,
        *(["vulnerabilities were not audited"] if require_audit and found.service is None else []),
        *(f"{name}: {found.service} was asked and did not audit it" for name in found.not_audited if require_audit),
    ]


def write(bom: dict[str, Any], folder: Path) -> None:
    """The bill of materials and the page of licences."""
    write_json(folder / f"trsp_deploy-{__version__}.cdx.json", bom)
    with writing(folder / "licences.md") as partial:
        partial.write_text("\n".join(page(bom)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
