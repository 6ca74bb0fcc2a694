"""Whether a launcher (`accelerate launch`, `torchrun`) started this process, as the variables that it sets tell."""

from __future__ import annotations

import os
import re
import sys

from trsp_deploy.errors import UserError, first_line

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
TOLD = (RANK, WORLD_SIZE, "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells each of its processes
PEER_GONE = re.compile("Connection (closed|reset) by peer|Broken pipe")  # by gloo, in no class of its own


def launched() -> bool:
    """Whether this is a process of a launch, be it of one process alone."""
    return RANK in os.environ


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get(RANK, "0") == "0"


def launched_as_several() -> bool:
    """Whether this is one of several training processes, which share what is counted for one."""
    return launched() and int(os.environ.get(WORLD_SIZE, "1")) > 1


def in_a_group() -> bool:
    """Whether this process has joined the others of its launch and not left them yet."""
    joined = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)  # not imported: then it has not
    return joined is not None and bool(joined())


def lost_peer(problem: BaseException) -> str | None:
    """The line for torch's error that another process of this launch is not there any more; None for all others."""
    of_torch = getattr(sys.modules.get("torch.distributed"), "DistError", ())  # not imported: then it raised nothing
    gone = isinstance(problem, of_torch) or (isinstance(problem, RuntimeError) and PEER_GONE.search(str(problem)))
    if not (gone and launched_as_several()):
        return None
    return (
        f"another process of this launch ended, or cannot be reached ({first_line(problem)}); its own line says why, "
        "and the same command goes on from the last checkpoint"
    )


def check_launch() -> None:
    """Raise UserError where RANK is set and the rest of a launch is not: left over, or set for something else."""
    if not launched():
        return
    missing = [name for name in TOLD if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"RANK is '{os.environ[RANK]}', as in a process of a launch, and {', '.join(missing)} is not set: "
            "`unset RANK`, or start with `accelerate launch`"
        )
    for name in (RANK, WORLD_SIZE):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name} is '{os.environ[name]}': expected a whole number, as `accelerate launch` sets it")
