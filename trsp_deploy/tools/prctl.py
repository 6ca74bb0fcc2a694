"""What Linux offers to processes that belong together, so that none is left when one of them is killed."""

from __future__ import annotations

import contextlib
import signal

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, in whatever way."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    # Not above: newer libffi opens a file of its own, which would get the number of a stream that the process began
    # without, before `cli.main` fills the gap.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(option, value)
