"""How much of the machine's main memory this process has, and a new one could have, in a container too."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from trsp_deploy.artifacts.control_groups import control_groups, text_of


def available_host_bytes(host: Path = Path("/")) -> int | None:
    """Bytes within every control group's limit; None on systems without /proc. host: where /proc and /sys are."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", text_of(host / "proc/meminfo"))
    return min([int(found[1]) * 1024, *_left_by_groups(host)]) if found else None


def _left_by_groups(host: Path) -> Iterator[int]:
    """What each limit that this process is under leaves; caches that the kernel would drop count as free."""
    for new, folder in control_groups(host, "memory"):
        limit, usage = ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        most, used = text_of(folder / limit).strip(), text_of(folder / usage).strip()
        if most.isdecimal() and used.isdecimal():
            stat = dict(re.findall(r"^(\w+) (\d+)$", text_of(folder / "memory.stat"), re.MULTILINE))
            # Of version 1 the totals, as the usage is one: its other figures leave out the groups within. What was read
            # twice is in active files, and goes as well.
            files = [f"{'' if new else 'total_'}{which}_file" for which in ("active", "inactive")]
            yield int(most) - int(used) + sum(int(stat.get(name, 0)) for name in files)


def resident_bytes() -> int | None:
    """What this process has of main memory now; None on systems without /proc."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that it had since `forget_peak`, or since it began.

    Not getrusage's ru_maxrss, which begins at the size of the process that forked this one.
    """
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak be counted from now on, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", text_of(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
