"""Weights in pages of 2 MB, which a processor finds in its tables more quickly than 512 times as many of 4 kB.

A decoding step reads every weight once, so what it waits for is memory. Allocators get small pages unless a process was
started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, and a library's caller has started already: the kernel is asked to
move what was allocated instead. Linux 6.1 and later can (madvise(2), MADV_COLLAPSE); elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

MADV_COLLAPSE = 25
SIZE = 2 << 20  # bytes, on x86-64 and on 64-bit ARM with pages of 4 kB
# Writable, private and not a file's: "7f0c1c000000-7f0c3d400000 rw-p 00000000 00:00 0"
ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(?:\[heap\])?$", re.MULTILINE)


@contextlib.contextmanager
def in_huge_pages() -> Iterator[None]:
    """Move what is allocated inside into pages of 2 MB at the end, as far as the kernel has them.

    It takes 0.6 ms per page, or 20 ms in a virtual machine whose host has taken its free memory back (docs/engines.md).
    Memory that another thread allocates inside may move too, which it does not notice.
    """
    before = set(_anonymous())
    yield
    with contextlib.suppress(OSError, AttributeError):  # no Linux, no glibc
        advise = ctypes.CDLL(None).madvise
        for start, end in _anonymous():
            if (start, end) not in before:
                first, last = -(-start // SIZE) * SIZE, end // SIZE * SIZE
                if first < last:  # an error means that these pages stay as they are
                    advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_COLLAPSE)


def _anonymous() -> list[tuple[int, int]]:
    """First and last address of every region of this process that belongs to no file."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [(int(start, 16), int(end, 16)) for start, end in ANONYMOUS.findall(maps)]
