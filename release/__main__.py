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

from release.audit import audit
from release.licences import page, refused
from release.sbom import bill_of_materials, invalid, missing
from trsp_deploy import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="virtual environment with the wheel in it")
    parser.add_argument("--extras", default="", help="comma-separated: what the wheel was installed with")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument(
        "--require-audit", action="store_true", help="fail where no service for vulnerabilities is reached"
    )
    options = parser.parse_args(arguments)

    bom = bill_of_materials(options.environment, __version__)
    found = audit(bom)
    components = bom["components"]
    problems = [
        *filter(None, [invalid(bom)]),
        *missing(bom, [extra for extra in options.extras.split(",") if extra]),
        *filter(None, map(refused, components)),
        *found.vulnerable,
        *(["vulnerabilities were not audited"] if options.require_audit and found.service is None else []),
    ]
    options.out.mkdir(exist_ok=True)
    written = options.out / f"trsp_deploy-{__version__}.cdx.json"
    written.write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")
    (options.out / "licences.md").write_text("\n".join(page(bom)) + "\n", encoding="utf-8")

    print(found.line(), *problems, sep="\n", file=sys.stderr)
    print(
        json.dumps(
            {"release": __version__, "components": len(components), "audit": found.service, "problems": len(problems)}
        )
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
