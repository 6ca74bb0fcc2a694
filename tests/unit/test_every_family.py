"""Every decoder-only family, tiny: found, gated, cut, saved and reloaded, or refused before anything is trained."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.families import DROPPED, FAMILIES, GEMMA, GROUPED, LAYERS, MLP, family_config, family_model, layer_types
from tests.tiny import logits, next_token_loss, random_model, tokens
from trsp_deploy.decoder import (
    cache_per_token,
    check_prunable,
    check_removal,
    decoder_layers,
    decoder_size,
    fixed_ends,
    load_model,
    load_widened,
    meta_model,
    remove_layers,
)
from trsp_deploy.errors import ModelError
from trsp_deploy.tools.closed_form.layers import refit_kept_layers
from trsp_deploy.tools.closed_form.span import output_projection
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.training.losses import TokenLosses

KEPT = [index for index in range(LAYERS) if index not in DROPPED]
# Families whose config class computes a list by itself where none is given.
PATTERNS = ["qwen2-sliding", "qwen3", "gemma2", "gemma3", "smollm3"]


def lists_of(config, family: str) -> dict:
    return {name: list(getattr(config, name)) for name in FAMILIES[family].lists}


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_and_removal(family):
    model = family_model(family)
    layers = list(decoder_layers(model))
    check_prunable(model)
    assert list(decoder_layers(model)) == layers and len(layers) == LAYERS
    dense = logits(model)
    with LayerGates(model, "output"):
        assert torch.equal(logits(model), dense)
    with LayerGates(model, "branch") as gates, torch.no_grad():
        assert torch.equal(logits(model), dense)
        gates.values[list(DROPPED)] = 0.0
        gated = logits(model)
        gates.closed.update(DROPPED)
        assert torch.equal(logits(model), gated)
        assert torch.equal(logits(model), gated)  # this time without computing the closed layers
    remove_layers(model, DROPPED)
    assert torch.equal(logits(model), gated)
    assert not torch.allclose(gated, dense, atol=0.1)  # the layers mattered
    assert list(decoder_layers(model)) == [layers[index] for index in KEPT]
    for index, layer in enumerate(decoder_layers(model)):
        assert {vars(m)[name] for m in layer.modules() for name in ("layer_idx", "layer_id") if name in vars(m)} == {
            index
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_is_saved_reloaded_and_generates(family, tmp_path):
    model = family_model(family)
    remove_layers(model, DROPPED)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(logits(again), logits(model))
    for each in (model, again):
        assert each.config.num_hidden_layers == len(KEPT)
        assert lists_of(each.config, family) == FAMILIES[family].lists
        check_cached_generation(each)
    keys = again(input_ids=tokens()).past_key_values.layers[0].keys  # (batch, heads, sequence, head_dim)
    assert decoder_size(tmp_path).cache_per_token == 2 * keys.shape[1] * keys.shape[3]


@torch.no_grad()
def check_cached_generation(model) -> None:
    """Logits of greedy generation with a KV cache are those of one pass over what was generated."""
    prompt = tokens(1, 10)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=5,
        max_new_tokens=5,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cached = torch.stack(out.logits, dim=1)  # (1, 5, vocabulary)
    uncached = model(input_ids=out.sequences[:, :-1], use_cache=False).logits[:, -5:]
    assert (cached - uncached).abs().max() < 1e-4 * uncached.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_widened_weights_compute_what_loading_in_fp32_computes(family, tmp_path):
    family_model(family).to(torch.float16).save_pretrained(tmp_path)
    expected = logits(load_model(tmp_path, dtype=torch.float32))
    model = load_widened(tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)  # the weights are given up and read anew
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("family", PATTERNS)
def test_computed_anew_the_pattern_would_be_another(family):
    """What the tests above are worth: without its lists in the config, a cut model would reload as another."""
    assert lists_of(family_config(family, num_hidden_layers=len(KEPT)), family) != FAMILIES[family].lists


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_finds_the_projection_or_says_that_there_is_none(family):
    model, scale = family_model(family), FAMILIES[family].folds
    if scale is not None:
        assert output_projection(model, 1, tokens(2, 8)).scale == scale
        return
    with pytest.raises(ModelError, match=r"cannot be folded: layer 1 .* the other methods work") as refusal:
        output_projection(model, 1, tokens(2, 8))
    assert "\n" not in str(refusal.value)


def test_a_small_norm_behind_a_projection_is_no_scale_in_bf16():
    """What it lets out is below the rounding of the stream, so that nothing seemed to be wrong with any scale."""
    model = family_model("gemma2").bfloat16()
    with torch.no_grad():
        decoder_layers(model)[1].post_feedforward_layernorm.weight.fill_(-0.98)
    with pytest.raises(ModelError, match="cannot be folded"):
        output_projection(model, 1, tokens(2, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_in_slices_is_the_models_own_and_kept_layers_can_be_refitted(family):
    model, ids = family_model(family), tokens()
    assert TokenLosses(model)(ids).lm.item() == pytest.approx(next_token_loss(model, ids).item(), rel=1e-4)
    refit_kept_layers(model, DROPPED, ids.repeat(8, 1), 4)
    remove_layers(model, DROPPED)
    assert next_token_loss(model, ids).isfinite()


def test_attention_types_stay_with_their_layers():
    model = family_model("gemma3")

    def attention() -> list[tuple[str, int | None]]:
        return list(
            zip(
                model.config.layer_types,
                (layer.self_attn.sliding_window for layer in decoder_layers(model)),
                strict=True,
            )
        )

    before = attention()
    assert len(set(before)) == 2
    remove_layers(model, DROPPED)
    assert attention() == [before[index] for index in KEPT]


def test_a_mixture_of_experts_keeps_its_router_loss():
    model = family_model("mixtral")
    remove_layers(model, DROPPED)
    out = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    assert len(out.router_logits) == len(KEPT)
    assert out.aux_loss.isfinite() and out.aux_loss > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_half_precision_is_checked_too(family, dtype):
    """A model cast as a whole has rounded rotary frequencies, which a reload has not."""
    check_removal(family_model(family).to(dtype), DROPPED)


# -- refusals --------------------------------------------------------------------------------------------------------


def gemma3n(**changes):
    values = {"num_kv_shared_layers": 2, **layer_types("sfsfsf"), "activation_sparsity_pattern": [0.0] * LAYERS}
    sizes = {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    del (gemma := dict(GEMMA))["query_pre_attn_scalar"]
    return transformers.Gemma3nTextConfig(**{**gemma, **values, **sizes, **changes})


def every_second_is_a_mixture():
    values = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
    return transformers.Qwen3MoeConfig(**GROUPED, **values)


REFUSED = {
    "constant by layer number": (
        transformers.DiffLlamaConfig(**GROUPED),
        r"DiffLlamaForCausalLM without layers 0: layer 1, as layer 0 of the rest, would have self_attn\.lambda_init",
    ),
    "attention scaled by layer number": (
        family_config("gpt2", scale_attn_by_inverse_layer_idx=True),
        r"GPT2LMHeadModel without layers 0: (a kept layer computes something else under|layer 1, as .* attn\.scaling)",
    ),
    "weights that hold a part for each layer": (
        gemma3n(),
        r"layers 0: model\.embed_tokens_per_layer\.weight is \(384, 48\) and by the config would be \(384, 40\)",
    ),
    "experts in every second layer": (
        every_second_is_a_mixture(),
        r"without layers 0: model\.layers\.0\.mlp\.down_proj\.weight is absent and by the config would be \(32, 64\)",
    ),
    "no KV cache": (
        transformers.OpenAIGPTConfig(vocab_size=384, n_embd=32, n_layer=LAYERS, n_head=4),
        r"OpenAIGPTLMHeadModel cannot run on token ids alone, or not from a KV cache \(",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_before_anything_is_trained(reason):
    config, message = REFUSED[reason]
    model = random_model(config)
    before = config.to_dict()
    with pytest.raises(ModelError, match=message) as refusal:
        check_prunable(model)
    assert "\n" not in str(refusal.value)
    assert len(decoder_layers(model)) == LAYERS and model.config.to_dict() == before


def test_shared_keys_and_values_survive_or_the_plan_is_refused():
    """Layers 4 and 5 of this one use the keys and values of layers 2 and 3."""
    config = gemma3n(hidden_size_per_layer_input=0)  # or its per-layer embedding would be refused first
    for layer in (2, 3):
        with pytest.raises(
            ModelError, match=rf"layers {layer}: layer .* self_attn\.store_full_length_kv True, not False"
        ):
            check_removal(random_model(config), [layer])
    model = random_model(config)
    remove_layers(model, [0, 4])
    assert model.config.num_kv_shared_layers == 1
    assert [layer.self_attn.is_kv_shared_layer for layer in decoder_layers(model)] == [False, False, False, True]
    assert getattr(decoder_layers(model)[3].self_attn, "kv_shared_layer_index", 2) == 2  # layer 3 of old


def test_a_pattern_that_a_cut_of_whole_periods_leaves_alone():
    model = random_model(every_second_is_a_mixture())
    remove_layers(model, [2, 3])
    assert ["experts" in dict(layer.mlp.named_children()) for layer in decoder_layers(model)] == [False, True] * 2


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
ERNIE = {"moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": [1, 3, 5], "no_rope_layers": [1, 1, 1, 0, 1, 0]}
NUMBERED = {
    "mixtures by index": transformers.Llama4TextConfig(**GROUPED, **EXPERTS, **LLAMA4),
    "mixtures from a layer on": transformers.Ernie4_5_MoeConfig(**GROUPED, **ERNIE, moe_layer_start_index=2),
    "attention by index": transformers.BambaConfig(
        **GROUPED, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[2, 4]
    ),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_layers_of_another_kind_that_the_config_numbers(name):
    model = random_model(NUMBERED[name])
    kinds = [sorted(name for name, _ in layer.named_parameters()) for layer in decoder_layers(model)]
    remove_layers(model, DROPPED)
    again = meta_model(model.config)
    left = [sorted(name for name, _ in layer.named_parameters()) for layer in decoder_layers(again)]
    assert left == [kinds[index] for index in KEPT]


def test_a_layer_that_is_one_of_a_kind_stays_and_others_may_go(tmp_path):
    """ModernBERT's first layer has no norm of its own."""
    special = {"cls_token_id": 0, "sep_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 3}
    random_model(transformers.ModernBertDecoderConfig(**MLP, **special)).save_pretrained(tmp_path)
    model = load_model(tmp_path)  # whose window is half of what a config is made with
    check_prunable(model)
    assert fixed_ends(model) == {0}
    with pytest.raises(ModelError, match=r"without layers 0: .*; name other layers in a plan \(--plan\), or take"):
        check_removal(model, [0])
    check_removal(model, [3, 4])
    assert fixed_ends(family_model("llama")) == frozenset()


@pytest.mark.parametrize(
    "config",
    [
        transformers.StableLmConfig(**GROUPED, qk_layernorm=True),
        transformers.BambaConfig(**GROUPED, mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[2, 4]),
    ],
    ids=["norms without a bias", "weights that are set"],
)
def test_a_model_whose_initialisation_needs_values_is_built_without_weights(config):
    model = meta_model(config)
    assert len(decoder_layers(model)) == LAYERS and all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize(
    "config",
    [transformers.BertConfig(**MLP, is_decoder=True), transformers.RobertaConfig(**MLP, is_decoder=True)],
    ids=["bert", "roberta"],
)
def test_an_encoder_that_is_built_as_a_decoder(config):
    model, ids = random_model(config), tokens(2, 8)
    check_prunable(model)
    losses = TokenLosses(model)
    assert not losses.linear_head and losses(ids).lm.item() == pytest.approx(next_token_loss(model, ids).item(), 1e-4)


def test_a_model_that_reads_weights_beside_its_modules_is_widened_whole(tmp_path):
    config = transformers.JetMoeConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=64
    )
    random_model(config).to(torch.float16).save_pretrained(tmp_path)
    assert torch.equal(logits(load_widened(tmp_path)), logits(load_model(tmp_path, dtype=torch.float32)))


def test_the_cache_of_latent_attention():
    parts = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 24}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    config = transformers.DeepseekV3Config(
        **{**MLP, "num_key_value_heads": 4}, **parts, **experts, topk_group=1, first_k_dense_replace=LAYERS
    )
    layer = random_model(config)(input_ids=tokens(1, 3)).past_key_values.layers[0]
    assert cache_per_token(config) == sum(part.shape[1] * part.shape[3] for part in (layer.keys, layer.values))


def test_layers_that_share_a_module_are_refused():
    model = family_model("llama")
    decoder_layers(model)[3] = decoder_layers(model)[2]
    with pytest.raises(ModelError, match="do not each run once, in order"):
        check_prunable(model)


def test_a_multimodal_model_is_refused():
    model = family_model("llama")
    model.config = transformers.PretrainedConfig()
    with pytest.raises(ModelError, match="its config has no num_hidden_layers"):
        check_prunable(model)


def test_checks_leave_the_model_as_it_is():
    model = family_model("smollm3")
    weights = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    config = model.config.to_dict()
    check_prunable(model)
    check_removal(model, DROPPED)
    assert model.config.to_dict() == config
    assert all(weight is weights[name][0] for name, weight in model.named_parameters())
    assert all(torch.equal(weight, copy) for weight, copy in weights.values())
    assert not any(module._forward_hooks for module in model.modules())
