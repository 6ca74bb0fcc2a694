"""What a machine is called, and so whether the times of one count on another."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

# By its name, for the package has a function that is called the same.
module = importlib.import_module("trsp_deploy.artifacts.provenance")

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model\t\t: 17
model name\t: AMD EPYC 9V74 80-Core Processor

processor\t: 1
model name\t: AMD EPYC 9V74 80-Core Processor
"""


def core(number: int, part: str, variant: str = "0x1", revision: int = 1) -> str:
    """A core's paragraph of an ARM processor."""
    return f"""processor\t: {number}
BogoMIPS\t: 243.75
Features\t: fp asimd aes crc32 atomics
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: {variant}
CPU part\t: {part}
CPU revision\t: {revision}

"""


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "AMD EPYC 9V74 80-Core Processor"),
        (core(0, "0xd40") + core(1, "0xd40"), "aarch64 implementer 0x41, part 0xd40, variant 0x1, revision 1"),
        (core(0, "0xd0c", "0x3"), "aarch64 implementer 0x41, part 0xd0c, variant 0x3, revision 1"),
        (
            core(0, "0xd05") + core(1, "0xd05") + core(2, "0xd0b", "0x0", 0),
            "aarch64 implementer 0x41, part 0xd05, variant 0x1, revision 1 "
            "and implementer 0x41, part 0xd0b, variant 0x0, revision 0",
        ),
        ("processor\t: 0\nmmu\t: sv39\n", "aarch64"),  # neither names nor ARM's numbers
        (None, "aarch64"),
    ],
)
def test_a_processor_has_a_name_of_its_own(
    cpuinfo: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ARM all were called aarch64, and a baseline's times of one passed for another's."""
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    assert module._cpu_name() == name
