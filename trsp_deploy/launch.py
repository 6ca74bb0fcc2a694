"""Whether a launcher (`accelerate launch`, `torchrun`) started this process, as the variables that it sets tell."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether this is a process of a launch, be it of one process alone."""
    return "RANK" in os.environ


def launched_as_several() -> bool:
    """Whether this is one of several training processes, which share what is counted for one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
