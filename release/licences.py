"""Which licences may come along with an installation, and the page that lists them.

The policy is the three tables below. A licence that is in none of them stops `make release` and CI: read it, then
either put it into a table with the reason, or do without the package.

Licences are what packages say of themselves. What a wheel carries of other people's binaries (scipy's Fortran runtime,
for one) is in the licence files inside that wheel, and not judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from license_expression import ExpressionError, LicenseExpression, Licensing

OSI = "License :: OSI Approved ::"  # how classifiers begin

# Permissive ones: keep the notice, do as you like. SPDX names, and classifiers that do not say which version they mean.
ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "HPND",
        "ISC",
        f"{OSI} Apache Software License",
        f"{OSI} BSD License",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "PSF-2.0",
        "Python-2.0",
        "Unlicense",
        "Zlib",
    }
)

# Others, each for the packages (lower case, * is anything) that were looked at.
MPL = "file-level copyleft: the package is used as it comes, and none of its files is in ours"
LGPL = "of the extra `eval` alone, for lm-eval's tables: imported as it comes, and none of it is in ours"
NVIDIA = "proprietary: whoever installs the extra accepts NVIDIA's terms; nothing of it is in ours"
PROPRIETARY = "License :: Other/Proprietary License"
ACCEPTED: dict[str, tuple[set[str], str]] = {
    "certifi": ({"MPL-2.0", f"{OSI} Mozilla Public License 2.0 (MPL 2.0)"}, MPL),
    "tqdm": ({"MPL-2.0"}, MPL),
    "chardet": ({"LGPL-2.1-or-later", f"{OSI} GNU Lesser General Public License v2 or later (LGPLv2+)"}, LGPL),
    "tensorrt*": ({PROPRIETARY}, NVIDIA),
    "nvidia-*": ({PROPRIETARY, "LicenseRef-NVIDIA-Proprietary"}, NVIDIA),
    "cuda-toolkit": ({"LicenseRef-NVIDIA-Proprietary"}, NVIDIA),
}

# Packages whose metadata names no licence in a form that SPDX knows: what their licence file, or that field, says.
CONCLUDED = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",  # a list of NVIDIA's packages, without a file of its own
    "nvidia-cusparselt-cu13": "LicenseRef-NVIDIA-Proprietary",
    "protobuf": "BSD-3-Clause",
    "sigstore-models": "MIT",
    "word2number": "MIT",
}

EXPRESSIONS = Licensing()


def stated(component: dict[str, Any]) -> list[str]:
    """A component's licences, all of which hold: SPDX expressions, SPDX ids, or names."""
    entries = component.get("licenses", [])
    return [entry.get("expression") or entry["license"].get("id") or entry["license"]["name"] for entry in entries]


def refused(component: dict[str, Any]) -> str | None:
    """Why a component may not come along, in one line, or None."""
    name = component["name"]
    licences = stated(component)
    place = f"{name} {component['version']}"
    if not licences:
        return f"{place}: names no licence; put what its licence file says into CONCLUDED of release/licences.py"
    allowed = ALLOWED | {
        one for pattern, (more, _) in ACCEPTED.items() if fnmatch(name.lower(), pattern) for one in more
    }
    bad = [licence for licence in licences if not _is_allowed(licence, allowed)]
    if not bad:
        return None
    return f"{place}: {', '.join(bad)} is not in the policy, release/licences.py"


def _is_allowed(licence: str, allowed: frozenset[str]) -> bool:
    if licence in allowed:
        return True
    try:
        return _holds(EXPRESSIONS.parse(licence), allowed)
    except ExpressionError:  # a name, not an expression
        return False


def _holds(expression: LicenseExpression, allowed: frozenset[str]) -> bool:
    """Of `A OR B` one is enough, of `A AND B` both are needed."""
    if isinstance(expression, EXPRESSIONS.OR):
        return any(_holds(part, allowed) for part in expression.args)
    if isinstance(expression, EXPRESSIONS.AND):
        return all(_holds(part, allowed) for part in expression.args)
    return expression.render() in allowed


def page(bom: dict[str, Any]) -> Iterator[str]:
    """Lines of a Markdown page: every component with version, licence, and where it comes from."""
    root = bom["metadata"]["component"]
    yield f"# What an installation of {root['name']} {root['version']} brings"
    yield ""
    yield "| package | version | licence | home |"
    yield "|---|---|---|---|"
    for component in sorted(bom["components"], key=lambda one: one["name"].lower()):
        licences = ", ".join(licence.removeprefix(f"{OSI} ") for licence in stated(component))
        yield f"| {component['name']} | {component['version']} | {licences} | {_home(component)} |"


def _home(component: dict[str, Any]) -> str:
    addresses = {one["type"]: one["url"] for one in reversed(component.get("externalReferences", []))}
    return next((addresses[kind] for kind in ("website", "vcs", "documentation") if kind in addresses), "")
