"""A config cut to the layers that stay: whatever it says of each layer, by list, index or count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Lists in a config that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens"})
# Lists in a config that hold layer indices instead of one entry per layer.
LAYER_INDEX_LISTS = frozenset({"mlp_only_layers", "moe_layers", "attn_layer_indices"})
# Numbers in a config that count the first layers, and the last ones.
FIRST_LAYERS = frozenset({"max_window_layers", "first_k_dense_replace", "moe_layer_start_index"})
LAST_LAYERS = frozenset({"num_kv_shared_layers"})


def cut_config(config: Any, kept: Sequence[int], num_layers: int) -> None:
    """Cut a transformers config in place; kept: indices of its `num_layers` layers, sorted."""
    new_index = {old: new for new, old in enumerate(kept)}
    for key, value in config.to_dict().items():
        if key in LAYER_INDEX_LISTS and value:
            setattr(config, key, [new_index[i] for i in value if i in new_index])
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and key not in NOT_PER_LAYER:
            setattr(config, key, [value[i] for i in kept])
        elif key in FIRST_LAYERS and value is not None and value < num_layers:
            setattr(config, key, sum(i < value for i in kept))
        elif key in LAST_LAYERS and value is not None and value < num_layers:
            setattr(config, key, sum(i >= num_layers - value for i in kept))
    if getattr(config, "attention_types", None):  # GPT-Neo's pattern, from which it computes the list just cut
        config.attention_types = [[config.attention_layers, 1]]
    config.num_hidden_layers = len(kept)
