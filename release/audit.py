"""Known vulnerabilities of a bill of materials: pip-audit, and whether the service that it asked can be believed.

pip-audit takes a service that says nothing for one that knows of nothing: a mirror that leaves vulnerabilities out
passes every package. So a service is asked about CANARY first, a release whose vulnerabilities have been public since
2020. One that does not report them has not audited anything, whatever it says of the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

CANARY = "django==3.0"
SERVICES = ("pypi", "osv")
TIMEOUT_S = 15  # of each request

# Vulnerabilities that do not touch us, each with the reason; what is here does not stop a release. By their CVE, which
# services have beside names of their own. Optimum's exporter holds transformers below 4.58, which has all of these.
ACCEPTED: dict[str, str] = {
    "CVE-2025-14929": "transformers: a conversion of X-CLIP checkpoints, which nothing of ours calls",
    "CVE-2026-1839": "transformers: checkpoints of its Trainer, which nothing of the wheel uses",
    "CVE-2026-4372": "transformers: attention that a config.json names; model_code.py refuses such a config",
    "CVE-2026-5241": "transformers: what a LightGlue config names; model_code.py refuses it likewise",
    "CVE-2026-9856": "transformers: chat templates saved to paths; decoder/loading.py refuses such a tokenizer",
    "CVE-2026-80047": "transformers: custom_generate of the hub; models are loaded from folders without one",
}


class Audit(NamedTuple):
    """What was found out. `service` is None where no service could be asked, and `why` says so."""

    service: str | None
    why: str
    audited: int
    not_audited: list[str]
    vulnerable: list[str]

    def line(self) -> str:
        """For people."""
        if self.service is None:
            return f"vulnerabilities: NOT AUDITED, no service could be asked: {self.why}"
        rest = f"; not audited: {', '.join(self.not_audited)}" if self.not_audited else ""
        known = f"{len(self.vulnerable)} known" if self.vulnerable else "none known"
        return f"vulnerabilities: {known} in {self.audited} packages ({self.service}){rest}"


def audit(bom: dict[str, Any], services: Sequence[str] = SERVICES) -> Audit:
    """Ask the first service that knows of vulnerabilities about every component; the project itself is not one."""
    reasons = []
    for service in services:
        canary, reason = _ask(service, [CANARY])
        if canary and canary[0].get("vulns"):
            # A local version (2.13.0+cpu) is in no registry: the release that it was built from is asked about.
            pins = [f"{one['name']}=={Version(one['version']).public}" for one in bom["components"]]
            answers, reason = _ask(service, pins)
            if answers:
                return _summary(service, answers)
        reasons.append(f"{service}: {reason or f'does not know of the vulnerabilities of {CANARY}'}")
    return Audit(None, "; ".join(reasons), 0, [], [])


def _ask(service: str, pins: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's entries, one a package; where there are none, its last words."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "requirements.txt"), Path(folder, "answers.json")
        asked.write_text("\n".join(pins), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", str(TIMEOUT_S)]
        options += [option for name in ACCEPTED for option in ("--ignore-vuln", name)]
        files = ["--requirement", str(asked), "--format", "json", "--output", str(answered)]
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service, *options, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answered.is_file():
            said = done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode} and said nothing"]
            return [], said[-1].partition(" (Caused by")[0][:200]
        entries: list[dict[str, Any]] = json.loads(answered.read_text(encoding="utf-8"))["dependencies"]
        return entries, ""


def _summary(service: str, entries: Sequence[dict[str, Any]]) -> Audit:
    skipped = [one["name"] for one in entries if "skip_reason" in one]
    vulnerable = [
        f"{one['name']} {one['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no release yet'}"
        for one in entries
        for each in one.get("vulns", [])
    ]
    return Audit(service, "", len(entries) - len(skipped), skipped, vulnerable)
