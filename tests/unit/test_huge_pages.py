"""Memory that moves into huge pages keeps what it held; memory from before stays where it was."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trsp_deploy.tools.runners.huge_pages import MADV_COLLAPSE, SIZE, in_huge_pages

LENGTH = 8 * SIZE
PATTERN = bytes(range(256)) * (LENGTH // 256)


def region() -> mmap.mmap:
    made = mmap.mmap(-1, LENGTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.write(PATTERN)
    return made


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def huge_bytes(memory: mmap.mmap) -> int:
    """Bytes in huge pages of the regions that this memory touches."""
    first, total = address(memory), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) < first + LENGTH and first < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


def collapses() -> bool:
    """Whether this kernel moves memory when it is asked to."""
    if sys.platform != "linux":
        return False
    memory = region()
    start = -(-address(memory) // SIZE) * SIZE
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(SIZE), MADV_COLLAPSE) == 0


@pytest.mark.skipif(not collapses(), reason="the kernel does not collapse pages on request")
def test_what_is_allocated_inside_moves_and_keeps_its_bytes():
    with in_huge_pages():
        memory = region()
        before = huge_bytes(memory)  # of a neighbour that the kernel joined it to: an earlier test's
    assert huge_bytes(memory) >= before + LENGTH - 2 * SIZE  # its ends need not lie on a boundary
    assert memory[:] == PATTERN


@pytest.mark.skipif(not collapses(), reason="the kernel does not collapse pages on request")
def test_what_was_there_before_stays():
    memory = region()
    guard = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ)  # so that nothing new joins its region
    before = huge_bytes(memory)
    with in_huge_pages():
        pass
    assert huge_bytes(memory) == before
    guard.close()


def test_a_kernel_that_refuses_is_no_error():
    script = (
        "import ctypes, mmap; from trsp_deploy.tools.runners.huge_pages import in_huge_pages\n"
        "assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0\n"  # PR_SET_THP_DISABLE
        "with in_huge_pages(): memory = mmap.mmap(-1, 1 << 23, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "memory.write(b'x' * (1 << 23)); print(len(memory))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(1 << 23)] and not done.stderr
