"""The only package that knows how a decoder-only model is put together.

It finds the layer list by shape instead of by name and cuts every per-layer list in the config, so that a new
architecture needs no entry here. In exchange `removal` checks what it made.
"""

from trsp_deploy.decoder.config import cut_config
from trsp_deploy.decoder.endings import end_tokens
from trsp_deploy.decoder.forwards import forward_replaced
from trsp_deploy.decoder.layers import (
    body,
    decoder_layers,
    kept_layers,
    layer_input,
    layer_output,
    next_token_logits,
    with_layer_output,
)
from trsp_deploy.decoder.loading import (
    build_model,
    cast_for_storage,
    load_config,
    load_model,
    load_tokenizer,
    load_widened,
    make_storable,
    meta_model,
    stored_dtype,
    without_weights,
)
from trsp_deploy.decoder.removal import check_prunable, check_removal, fixed_ends, remove_layers
from trsp_deploy.decoder.sizes import (
    DecoderSize,
    WeightCounts,
    cache_per_token,
    count_config,
    count_weights,
    decoder_size,
    graph_positions,
    known_positions,
    max_positions,
)

__all__ = [
    "DecoderSize",
    "WeightCounts",
    "body",
    "build_model",
    "cache_per_token",
    "cast_for_storage",
    "check_prunable",
    "check_removal",
    "count_config",
    "count_weights",
    "cut_config",
    "decoder_layers",
    "decoder_size",
    "end_tokens",
    "fixed_ends",
    "forward_replaced",
    "graph_positions",
    "kept_layers",
    "known_positions",
    "layer_input",
    "layer_output",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_widened",
    "make_storable",
    "max_positions",
    "meta_model",
    "next_token_logits",
    "remove_layers",
    "stored_dtype",
    "with_layer_output",
    "without_weights",
]
