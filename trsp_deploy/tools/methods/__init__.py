"""Depth-pruning methods, each a small file of its own behind one interface (`base.py`)."""

from __future__ import annotations

from trsp_deploy.tools.methods.base import Method
from trsp_deploy.tools.methods.fold import select_span_by_folded_loss
from trsp_deploy.tools.methods.shortgpt import select_by_block_influence
from trsp_deploy.tools.methods.sleb import select_by_removal_loss
from trsp_deploy.tools.methods.uidl import select_span_by_angle

METHODS: dict[str, Method] = {
    "shortgpt": Method(
        name="shortgpt",
        description="the layers that turn their input least, scored once",
        source="ShortGPT, arXiv 2403.03853; icip-cas/ShortGPT",
        select=select_by_block_influence,
    ),
    "sleb": Method(
        name="sleb",
        description="one layer at a time, the one whose removal costs least; every layer is tried",
        source="SLEB, arXiv 2402.09025; jiwonsong-dev/SLEB",
        select=select_by_removal_loss,
        go_on=select_by_removal_loss,
        mixed_precision=True,
    ),
    "uidl": Method(
        name="uidl",
        description="the span of consecutive layers that turns the last token's state least",
        source="The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887; arcee-ai/PruneMe",
        select=select_span_by_angle,
    ),
    "fold": Method(
        name="fold",
        description="the span of consecutive layers that costs least once it is folded into the layer before it",
        source="ReplaceMe, arXiv 2505.02819; mts-ai/ReplaceMe; with the attention sink treated apart",
        select=select_span_by_folded_loss,
    ),
}
