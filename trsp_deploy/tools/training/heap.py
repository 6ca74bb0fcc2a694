"""Main memory while a process computes the same shapes again and again: kept for the next step, or given back at once.

glibc takes whatever is larger than some MB from the kernel and gives it back when it is freed, so that every step of a
training begins by having hundreds of MB zeroed, page by page. Kept, the next step finds it. The field's other way is
another allocator under the process (jemalloc, tcmalloc, with LD_PRELOAD), which only whoever starts it can choose.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
NEVER = -1
# What glibc comes to by itself, whose own rule is off once these are set.
USUAL_TRIM_THRESHOLD = 64 << 20  # bytes
USUAL_MMAP_THRESHOLD = 32 << 20  # bytes
USUAL_MMAP_MAX = 65536
EXACT_THRESHOLD = 4 << 20  # bytes

_depth = 0


@contextlib.contextmanager
def kept_heap() -> Iterator[None]:
    """Keep what is freed inside for what is allocated next, and give it back at the end; of the whole process.

    Without glibc nothing changes, nor where the user has set its allocator (MALLOC_..._ and GLIBC_TUNABLES).
    """
    global _depth
    if _is_the_users():
        yield
        return
    _depth += 1
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _set(M_MMAP_MAX, USUAL_MMAP_MAX)
            _set(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def exact_heap() -> Iterator[None]:
    """Give back at once whatever larger block is freed inside; of the whole process.

    By itself glibc keeps freed blocks below 32 MB, and fills them again only where a new one fits: between a tenth and
    a half of a training's memory, another share each time. Nothing changes where `kept_heap` changes nothing.
    """
    if _is_the_users():
        yield
        return
    _set(M_MMAP_THRESHOLD, EXACT_THRESHOLD)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD)


def _is_the_users() -> bool:
    """Whether the user has set the allocator."""
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _set(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)
