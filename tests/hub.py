"""The Hugging Face hub's client, as tests need it."""

from __future__ import annotations

import huggingface_hub


def forget_sessions() -> None:
    """Make the client read its settings again: sessions made before keep the network."""
    for name in ("reset_sessions", "close_session"):  # the second from 1.0 on
        if hasattr(huggingface_hub.utils, name):
            getattr(huggingface_hub.utils, name)()
