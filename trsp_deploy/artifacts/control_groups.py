"""The kernel's limits on this process and those beside it, as a container has them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(host: Path = Path("/")) -> int:
    """Cores that this process may keep busy: those that it may run on, or as many as every quota's time is worth.

    A container's limit of 2 on a machine of 64 cores leaves all 64 to be run on, a few milliseconds at a time: threads
    for each of them would wait for one another. host: where /proc and /sys are.
    """
    return min([len(os.sched_getaffinity(0)), *_quotas(host)])


def _quotas(host: Path) -> Iterator[int]:
    """Cores' worth of time that each limit gives, rounded up."""
    for new, folder in control_groups(host, "cpu"):
        if new:
            quota, _, period = text_of(folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = (text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max", or -1, is none
            yield max(1, math.ceil(int(quota) / int(period)))


def control_groups(host: Path, controller: str) -> Iterator[tuple[bool, Path]]:
    """Folders of the groups that this process is in, the innermost first, and whether they are of version 2."""
    for line in text_of(host / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        new = controllers == ""  # version 2 has one tree for all controllers
        if not new and controller not in controllers.split(","):
            continue
        root = host / "sys/fs/cgroup" / ("" if new else controller)
        group = root / path.lstrip("/")
        for folder in [group, *group.parents]:
            yield new, folder
            if folder == root:
                break


def text_of(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
