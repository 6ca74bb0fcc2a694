"""How many weights a model has, from its config alone, and how many bytes an engine keeps of them.

counts = counts_of(config)
weights_bytes(spec, counts)
"""

from __future__ import annotations

from typing import Any

from trsp_deploy.decoder import WeightCounts, count_config
from trsp_deploy.recipe import FLOAT_BYTES, EngineSpec
from trsp_deploy.tools.graphs.stored import stored_by, table_bytes

_COUNTED: dict[str, WeightCounts] = {}


def counts_of(config: Any) -> WeightCounts:
    """Weights of what a config describes; asked again for every piece of advice, so it is kept."""
    text = f"{type(config).__name__} {config.to_json_string()}"
    if text not in _COUNTED:
        _COUNTED[text] = count_config(config)
    return _COUNTED[text]


def tied(counts: WeightCounts) -> bool:
    """Whether the LM head is the embedding."""
    return counts.total < sum(counts.layers) + counts.lm_head + counts.embeddings


def weights_bytes(spec: EngineSpec, counts: WeightCounts) -> int:
    """Weights of an engine, as it keeps them in its file and in memory."""
    if not spec.is_quantised:
        # A tied head is stored a second time, the way its product wants it.
        return FLOAT_BYTES[spec.graph_precision] * (counts.total + (counts.lm_head if tied(counts) else 0))
    kept = stored_by(spec)
    return round(kept.layers * sum(counts.layers) + kept.head * counts.lm_head + table_bytes(spec) * counts.embeddings)
