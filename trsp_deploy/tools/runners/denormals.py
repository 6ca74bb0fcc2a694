"""Numbers too small for their format as zero, while an engine runs and no longer.

Attention's softmax makes e^-88 of every score that it masks, half of a prompt's. That is a denormal number, with which
a processor takes many times as long. ONNX Runtime can have them as zero: in threads of its own, and in the thread that
makes a process's first session, there for good. What that thread computes afterwards (a training's squares of small
gradients) would depend on whether an engine ran before it, so here a thread has the state of a run for the run alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

OPTION = "session.set_denormal_as_zero"
ROOM = 256  # bytes, several times what a fenv_t has
HALF = float("0.5")  # at run time, as a product of constants is computed where the module is compiled
State = ctypes.Array[ctypes.c_char]  # how a thread computes with floats: C99's fenv_t
_of_a_run: State | None = None  # in which ONNX Runtime left the thread of the first session


@contextlib.contextmanager
def kept_from_a_session() -> Iterator[None]:
    """Make a session with OPTION inside; what it does to this thread is remembered for `as_zero` and taken back."""
    global _of_a_run
    before = _state()
    try:
        yield
    finally:
        if before is not None:
            if _of_a_run is None and sys.float_info.min * HALF == 0:
                _of_a_run = _state()
            _go_to(before)


@contextlib.contextmanager
def as_zero() -> Iterator[None]:
    """Run an engine inside: denormal numbers are zero in this thread too, once a session has shown how."""
    before = None if _of_a_run is None else _state()
    if _of_a_run is None or before is None:
        yield
        return
    _go_to(_of_a_run)
    try:
        yield
    finally:
        _go_to(before)


def _state() -> State | None:
    """This thread's; None where the C library does not tell."""
    library, held = _library(), ctypes.create_string_buffer(ROOM)
    return held if library is not None and library.fegetenv(held) == 0 else None


def _go_to(state: State) -> None:
    library = _library()
    if library is not None:
        library.fesetenv(state)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "fegetenv") and hasattr(library, "fesetenv") else None
