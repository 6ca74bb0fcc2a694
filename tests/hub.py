"""The Hugging Face hub's client, as tests need it."""

from __future__ import annotations

import huggingface_hub


def forget_sessions() -> None:
    """Make the client read its settings again: sessions made before keep the network."""
    utils = huggingface_hub.utils
    getattr(utils, "reset_sessions", None) is None or utils.reset_sessions()
    getattr(utils, "close_session", None) is None or utils.close_session()  # from 1.0 on
