"""The dense model's last hidden states, worked out once: what it teaches, at a thousandth of its logits' size.

128 windows of 2,048 tokens are 2.1 GB for a hidden size of 4,096 and 67 GB as logits of 128k tokens; a copy of the
dense model, which would give both, costs a forward pass at every step and holds its weights all the time.
"""

from __future__ import annotations

import torch

from trsp_deploy.tools.progress import Meter
from trsp_deploy.tools.training.losses import TokenLosses


class DenseStates:
    """States of the windows that this process will train on, in bf16 and in main memory, by window."""

    def __init__(
        self,
        losses: TokenLosses,
        windows: torch.Tensor,
        order: torch.Tensor,
        batch_size: int,
        wanted: torch.Tensor | None = None,
    ) -> None:
        """losses: of the dense model, before anything is done to it; call it under the training's own autocast.

        windows: (windows, sequence) int64. order: (n,) int64, indices of windows, each of them once, which are read
        `batch_size` at a time. wanted: (m,) int64, those whose states are asked for (all): whole batches without any
        are left out, so that a state does not depend, to its last bit, on what else is wanted.
        """
        parts = [part for part in order.split(batch_size) if wanted is None or torch.isin(part, wanted).any()]
        read = torch.cat(parts)
        shape = (len(read), windows.shape[1] - 1, losses.head.weight.shape[1])
        self._states = torch.empty(shape, dtype=torch.bfloat16)
        self._place = torch.full((len(windows),), -1)
        self._place[read] = torch.arange(len(read))
        self.size_bytes = self._states.nbytes
        device = losses.head.weight.device
        description = f"hidden states of the dense model ({self.size_bytes / 1e6:.0f} MB)"
        with torch.no_grad(), Meter(description, len(read)) as meter:
            for part in parts:
                self._states[self._place[part]] = losses.hidden(windows[part].to(device)).to("cpu", torch.bfloat16)
                meter.advance(by=len(part))

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """States (batch, sequence - 1, hidden) bf16 of windows `rows` (batch,)."""
        return self._states[self._place[rows]]
