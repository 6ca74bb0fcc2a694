"""Keep libraries' own chatter off the terminal while they work."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator

# Stdout, warnings and logging are the whole process's: of several threads within, and of calls within each other, the
# first changes them and the last restores them.
_LOCK = threading.Lock()
_within = 0
_changed = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars, warnings and log lines below the level of errors, and send stray prints to stderr.

    What a library makes of the root logger when it is imported within is undone. Threads may enter it side by side.
    """
    global _within
    with _LOCK:
        if _within == 0:
            _changed.enter_context(_silence())
        _within += 1
    try:
        yield
    finally:
        with _LOCK:
            _within -= 1
            if _within == 0:
                _changed.close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    root, before = logging.root, logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)  # Optimum warns through the root logger, so no logger of its own could be set
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers
        root.setLevel(level)
