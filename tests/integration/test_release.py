"""What goes beside a wheel: the bill of materials, its licences, and what is known of its vulnerabilities."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trsp_deploy
from release.__main__ import main, wrong
from release.audit import CANARY, Audit, audit
from release.licences import ACCEPTED, ALLOWED, page, refused, stated
from release.sbom import bill_of_materials, declared, invalid, missing
from tests.breadth import BREADTH

EXTRAS = ("optimum", "cpu")
NOWHERE = "http://127.0.0.1:9"  # the port of `discard`: refused at once


@pytest.fixture(scope="module")
def bom() -> dict[str, Any]:
    """Of the environment that the tests run in: what `make release` installs, and the developers' tools."""
    return bill_of_materials(Path(sys.executable), trsp_deploy.__version__)


def as_validated(bom: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it and holding it against the schema takes half a minute: one test does both."""
    monkeypatch.setattr("release.__main__.bill_of_materials", lambda *_: bom)
    monkeypatch.setattr("release.__main__.invalid", lambda _: None)


def installation(requirement: str, seen: set[str]) -> set[str]:
    """Canonical names of what comes along with a requirement, by the metadata of what is installed."""
    asked = Requirement(requirement)
    for extra in ("", *asked.extras):
        key = f"{canonicalize_name(asked.name)}[{extra}]"
        if key in seen:
            continue
        seen.add(key)
        for more in importlib.metadata.requires(asked.name) or []:
            marker = Requirement(more).marker
            if marker is None or marker.evaluate({"extra": extra}):
                installation(more.partition(";")[0], seen)
    return {key.partition("[")[0] for key in seen}


@pytest.fixture(scope="module")
def brought(bom) -> list[dict[str, Any]]:
    """The components that a user gets, too."""
    theirs = installation(f"trsp_deploy[{','.join(EXTRAS)}]", set()) - {"trsp-deploy"}
    found = [one for one in bom["components"] if canonicalize_name(one["name"]) in theirs]
    assert len(found) == len(theirs) > 50
    return found


def component(*licences: dict[str, Any], name: str = "somebody") -> dict[str, Any]:
    return {"name": name, "version": "1.0", "licenses": list(licences)}


def named(name: str, package: str = "somebody") -> dict[str, Any]:
    return component({"license": {"name": name}}, name=package)


def expression(text: str, package: str = "somebody") -> dict[str, Any]:
    return component({"expression": text}, name=package)


@BREADTH
def test_bill_of_materials_is_valid_and_is_of_this_version(bom):
    assert invalid(bom) is None
    root = bom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("trsp_deploy", trsp_deploy.__version__)
    assert [one["expression"] if "expression" in one else one["license"]["id"] for one in root["licenses"]] == [
        "Apache-2.0"
    ]
    assert "bomFormat" in str(invalid({"bomFormat": "other", "specVersion": "1.6"}))


def test_every_declared_dependency_is_in_it_with_version_and_licence(bom):
    there = {canonicalize_name(one["name"]): one for one in bom["components"]}
    names = declared(EXTRAS)
    assert {"torch", "onnxruntime", "optimum-onnx"} < names
    for name in names:
        assert there[name]["version"] == importlib.metadata.version(name)
        assert stated(there[name]), name
    assert missing(bom, EXTRAS) == []


def test_a_dependency_that_is_not_installed_is_named(bom):
    without = {**bom, "components": [one for one in bom["components"] if one["name"] != "torch"]}
    assert missing(without, EXTRAS) == ["torch: declared in pyproject.toml and not installed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no bill of materials"),
        ([sys.executable, "--extras", "cpu,tpu"], "--extras tpu: no such"),
    ],
)
def test_a_mistake_has_its_line(arguments, said, bom, monkeypatch, tmp_path, capsys):
    if arguments[0] == sys.executable:
        as_validated(bom, monkeypatch)
    monkeypatch.setattr("release.__main__.audit", lambda _: Audit("none", "", 0, [], []))
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {said}") and printed.out == ""


def test_files_that_cannot_be_written_have_their_line(bom, monkeypatch, tmp_path, capsys):
    as_validated(bom, monkeypatch)
    monkeypatch.setattr("release.__main__.audit", lambda _: Audit(None, "", 0, [], []))
    (tmp_path / "dist").write_text("")
    assert main(["somewhere", "--out", str(tmp_path / "dist")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and "its folder cannot be made" in said


def test_every_licence_that_comes_along_is_in_the_policy(brought):
    assert [line for line in map(refused, brought) if line] == []


@pytest.mark.parametrize(
    "stranger",
    [
        named("License :: OSI Approved :: GNU General Public License v3 (GPLv3)"),
        expression("GPL-3.0-or-later"),
        expression("MIT AND LGPL-2.1-only"),
        expression("(MIT OR Apache-2.0) AND AGPL-3.0-only"),
        expression("GPL-2.0-only WITH Classpath-exception-2.0"),
        expression("MPL-2.0"),
        named("the author's own (ask)"),
        component({"license": {"id": "MIT"}}, {"license": {"id": "SSPL-1.0"}}),
        component(),
    ],
    ids=lambda one: " + ".join(stated(one)) or "none",
)
def test_what_nobody_has_looked_at_is_refused(stranger):
    line = refused(stranger)
    assert line and line.startswith("somebody 1.0: ") and "release/licences.py" in line


@pytest.mark.parametrize(
    "known",
    [
        expression("GPL-2.0-only OR BSD-3-Clause"),
        expression("Apache-2.0 AND Apache-2.0 WITH LLVM-exception"),
        named("License :: OSI Approved :: BSD License"),
        expression("MPL-2.0 AND MIT", "tqdm"),
        named("License :: Other/Proprietary License", "tensorrt_rtx"),
    ],
    ids=lambda one: " + ".join(stated(one)),
)
def test_what_the_policy_has_passes(known):
    assert refused(known) is None


def test_copyleft_is_for_named_packages_only():
    assert not any("GPL" in name or "MPL" in name for name in ALLOWED)
    assert all(reason for _, reason in ACCEPTED.values())


def test_the_page_lists_every_package(bom):
    lines = list(page(bom))
    assert lines[0].endswith(f"trsp_deploy {trsp_deploy.__version__} brings")
    assert len([line for line in lines if line.startswith("| ")]) == len(bom["components"]) + 1
    assert any(line.startswith("| protobuf |") and "BSD-3-Clause" in line for line in lines)


def of(*packages: tuple[str, str]) -> dict[str, Any]:
    return {"components": [{"name": name, "version": version} for name, version in packages]}


class Vulnerabilities(http.server.BaseHTTPRequestHandler):
    """A service in OSV's form that knows of these alone."""

    known: ClassVar[dict[tuple[str, ...], str]] = {}
    aliases: ClassVar[dict[str, str]] = {"GHSA-29pf-2h5f-8g72": "CVE-2026-4372"}
    asked: ClassVar[list[tuple[str, ...]]] = []

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package = (question["package"]["name"], question["version"])
        self.asked.append(package)
        answer = {}
        if package in self.known:
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.9"}]}]
            affected = [{"package": {"name": package[0], "ecosystem": "PyPI"}, "ranges": ranges}]
            known = self.known[package]
            aliases = [self.aliases[known]] if known in self.aliases else []
            answer = {"vulns": [{"id": known, "aliases": aliases, "affected": affected, "summary": "bad"}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch) -> Iterator[type[Vulnerabilities]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vulnerabilities)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Vulnerabilities, "known", {tuple(CANARY.split("==")): "CVE-2020-9402"})
    monkeypatch.setattr(Vulnerabilities, "asked", [])
    yield Vulnerabilities
    server.shutdown()
    server.server_close()


@BREADTH
def test_vulnerabilities_are_named_with_what_fixes_them(service):
    service.known[("jinja2", "3.1.6")] = "PYSEC-2099-1"
    found = audit(of(("Jinja2", "3.1.6"), ("torch", "2.13.0+cpu")), ["osv"])
    assert found.vulnerable == ["jinja2 3.1.6: PYSEC-2099-1, fixed in 9.9"]
    assert found.line() == "vulnerabilities: 1 known in 2 packages (osv)"
    assert ("torch", "2.13.0") in service.asked  # the release that the local version was built from


@BREADTH
def test_what_is_accepted_by_its_cve_stops_nothing(service):
    service.known |= {("transformers", "4.57.6"): "GHSA-29pf-2h5f-8g72", ("jinja2", "3.1.6"): "PYSEC-2099-1"}
    found = audit(of(("transformers", "4.57.6"), ("jinja2", "3.1.6")), ["osv"])
    assert found.vulnerable == ["jinja2 3.1.6: PYSEC-2099-1, fixed in 9.9"]


def test_a_package_that_was_not_audited_stops_a_release_that_wants_it():
    found = Audit("osv", "", 1, ["tensorrt-rtx"], [])
    line = "tensorrt-rtx: osv was asked and did not audit it"
    packages = of(("jinja2", "3.1.6"))
    assert line in wrong(packages, "", found, require_audit=True)
    assert line not in wrong(packages, "", found, require_audit=False)


def test_a_service_that_knows_of_nothing_has_not_audited(service):
    service.known.clear()
    found = audit(of(("jinja2", "3.1.6")), ["osv"])
    assert found.line().startswith("vulnerabilities: NOT AUDITED")
    assert CANARY in found.line()
    assert service.asked == [tuple(CANARY.split("=="))]


@BREADTH
def test_without_a_service_the_release_says_so_in_one_line(bom, monkeypatch, tmp_path, capsys):
    as_validated(bom, monkeypatch)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, NOWHERE)
    arguments = [sys.executable, "--extras", ",".join(EXTRAS), "--out", str(tmp_path), "--require-audit"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "NOT AUDITED" in line]
    assert "pypi: " in line and "osv: " in line
    assert "vulnerabilities were not audited" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["audit"] is None
    written = tmp_path / f"trsp_deploy-{trsp_deploy.__version__}.cdx.json"
    assert json.loads(written.read_text())["bomFormat"] == "CycloneDX"
    assert (tmp_path / "licences.md").is_file()
