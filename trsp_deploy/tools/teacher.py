"""The dense model's last hidden states, worked out once: what it teaches, at a thousandth of its logits' size.

128 windows of 2,048 tokens are 2.1 GB for a hidden size of 4,096 and 67 GB as logits of 128k tokens; a copy of the
dense model, which would give both, costs a forward pass at every step and holds its weights all the time.
"""

from __future__ import annotations

import torch

from trsp_deploy.tools.losses import TokenLosses
from trsp_deploy.tools.progress import Meter


class DenseStates:
    """States of the windows that this process will train on, in bf16 and in main memory, by window."""

    def __init__(self, losses: TokenLosses, windows: torch.Tensor, wanted: torch.Tensor, batch_size: int) -> None:
        """losses: of the dense model, before anything is done to it; call it under the training's own autocast.

        windows: (windows, sequence) int64; wanted: (n,) int64, indices of windows, each of them once.
        """
        shape = (len(wanted), windows.shape[1] - 1, losses.head.weight.shape[1])
        self._states = torch.empty(shape, dtype=torch.bfloat16)
        self._place = torch.full((len(windows),), -1)
        self._place[wanted] = torch.arange(len(wanted))
        self.size_bytes = self._states.nbytes
        device = losses.head.weight.device
        description = f"hidden states of the dense model ({self.size_bytes / 1e6:.0f} MB)"
        with torch.no_grad(), Meter(description, len(wanted)) as meter:
            for start in range(0, len(wanted), batch_size):
                part = windows[wanted[start : start + batch_size]].to(device)
                self._states[start : start + batch_size] = losses.hidden(part)
                meter.advance(by=len(part))

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """States (batch, sequence - 1, hidden) bf16 of windows `rows` (batch,)."""
        return self._states[self._place[rows]]
