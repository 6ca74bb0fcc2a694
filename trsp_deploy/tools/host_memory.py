"""How much of the machine's main memory a new process could have, in a container too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def available_host_bytes(host: Path = Path("/")) -> int | None:
    """Bytes within every control group's limit; None on systems without /proc. host: where /proc and /sys are."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(host / "proc/meminfo"))
    return min([int(found[1]) * 1024, *_control_groups(host)]) if found else None


def _control_groups(host: Path) -> Iterator[int]:
    """What each limit that this process is under leaves; caches that the kernel would drop count as free."""
    for line in _text(host / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        new = controllers == ""  # version 2 has one tree for all controllers
        root = host / "sys/fs/cgroup" / ("" if new else "memory")
        limit, usage = ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdecimal() and used.isdecimal():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(most) - int(used) + (int(cached[1]) if cached else 0)
            if folder == root:
                break


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
