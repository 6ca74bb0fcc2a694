"""What is freed inside `kept_heap` is there for what is allocated next, inside `exact_heap` the kernel's at once."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

from tests.breadth import BREADTH

pytestmark = [BREADTH, pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")]
SIZE = 64 << 20  # bytes; mapped anew each time by glibc's own rule
FRESH = """
import contextlib, resource, sys
import torch
from trsp_deploy.tools.training.heap import kept_heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def times(count):
    for _ in range(count):
        torch.ones({size} // 4)

before = resident()
with kept_heap() if sys.argv[1] == "kept" else contextlib.nullcontext():
    times(1)
    began = faults()
    times(10)
    print(faults() - began)
    with kept_heap():
        pass
    began = faults()
    times(10)
    print(faults() - began)
print(resident() - before)
"""


HOLED = """
import contextlib, resource, sys
import torch
from trsp_deploy.tools.training.heap import exact_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def some():
    return [torch.ones({size} // 4) for _ in range(8)]

some()
before = resident()
with exact_heap() if sys.argv[1] == "exact" else contextlib.nullcontext():
    last = some()[-1]
    print(resident() - before)
"""


def measured(how: str, **settings: str) -> tuple[int, int, int]:
    """Page faults of ten tensors, of ten more after an inner block has ended, and bytes held at the end."""
    command = [sys.executable, "-c", FRESH.replace("{size}", str(SIZE)), how]
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | settings)
    first, second, held = map(int, done.stdout.split())
    return first, second, held


def test_what_was_freed_is_used_again_and_given_back_at_the_end() -> None:
    pages = 10 * SIZE // resource.getpagesize()
    plain, _, _ = measured("plain")
    first, second, held = measured("kept")
    if plain < pages // 20:  # huge pages: 16 of them in place of 32,768
        pytest.skip("this allocator gets its memory back without the kernel's pages")
    assert first < plain / 10 and second < plain / 10
    assert held < SIZE / 2


@pytest.mark.parametrize(("how", "tensors"), [("plain", 7), ("exact", 1)])
def test_holes_are_given_back_at_once(how: str, tensors: int) -> None:
    """Seven of eight tensors are freed, behind the last; what is below 32 MB glibc would keep."""
    size = 16 << 20
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    command = [sys.executable, "-c", HOLED.replace("{size}", str(size)), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    held = int(done.stdout) / size
    assert held > 4 if tensors > 1 else held < 2


def test_an_allocator_that_the_user_has_set_stays_as_it_is() -> None:
    first, _, _ = measured("kept", MALLOC_MMAP_THRESHOLD_="1048576")
    assert first > 10 * SIZE // resource.getpagesize() // 20
