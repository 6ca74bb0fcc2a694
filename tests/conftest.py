"""Settings for every test, and for the processes that tests start: set before torch is loaded."""

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# Tiny models gain nothing from threads, and threads that spin beside another busy process cost five times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

pytest_plugins = ["tests.exported", "tests.checked_run", "tests.served_engine", "tests.served_run", "tests.untrusted"]


@pytest.fixture(scope="module")
def windows() -> "torch.Tensor":
    """English as windows of 32 tokens, (windows, 32)."""
    import torch

    from tests.tiny import english, tiny_tokenizer

    ids = tiny_tokenizer()(english()[:20_000], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
