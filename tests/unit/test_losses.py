"""The sliced loss against the plain one, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from tests.breadth import BREADTH
from tests.families import family_model
from tests.tiny import FAMILIES, VOCABULARY, gradients, tiny_model, tokens
from trsp_deploy.errors import ModelError
from trsp_deploy.tools.training import losses
from trsp_deploy.tools.training.losses import TokenLosses

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCALED = {
    "gemma2": Gemma2Config(**SMALL, head_dim=12, final_logit_softcapping=2.0, query_pre_attn_scalar=12),
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(losses, "SLICE_BYTES", {"cpu": 4 * VOCABULARY * 7})  # 7 tokens; 38 do not divide by it


def plain(model, input_ids, dense_logits, ce_weight, kl_weight):
    """Loss and gradients by way of the logits of the whole batch."""
    model.zero_grad()
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    lm = cross_entropy(logits, input_ids[:, 1:].flatten())
    divergence = kl_div(logits.log_softmax(-1), dense_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    (ce_weight * lm + kl_weight * divergence).backward()
    return lm.item(), divergence.item(), gradients(model)


def sliced(model, input_ids, dense_hidden, ce_weight, kl_weight):
    model.zero_grad()
    found = TokenLosses(model, ce_weight, kl_weight)(input_ids, dense_hidden)
    found.total.backward()
    return found.lm.item(), found.divergence.item(), gradients(model)


def both(model, train_head):
    """The plain and the sliced result on one batch; the dense model's logits are those of other tokens."""
    model.get_output_embeddings().requires_grad_(train_head)
    model.get_input_embeddings().requires_grad_(train_head)
    input_ids, other = tokens(), tokens(seed=1)
    with torch.no_grad():
        dense_hidden = TokenLosses(model).hidden(other)
        dense_logits = model(input_ids=other).logits[:, :-1].flatten(0, 1)
    return plain(model, input_ids, dense_logits, 0.7, 1.3), sliced(model, input_ids, dense_hidden, 0.7, 1.3)


def check_same(wanted, found):
    assert found[:2] == pytest.approx(wanted[:2], rel=1e-5, abs=1e-6)
    assert found[2].keys() == wanted[2].keys()
    largest = max(gradient.abs().max().item() for gradient in wanted[2].values())
    for name, gradient in wanted[2].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


@BREADTH
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_of_the_plain_loss(family, train_head):
    model = tiny_model(family)
    assert TokenLosses(model).linear_head
    check_same(*both(model, train_head))


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("family", SCALED)
def test_capped_and_scaled_logits_go_through_the_models_own_code(family, train_head):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    assert not TokenLosses(model).linear_head
    check_same(*both(model, train_head))


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_are_told_apart_in_bf16(autocast):
    """Where logits are small a cap of 30 is less than bf16 rounds off; GPT-J makes fp32 logits of a product in bf16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=12, query_pre_attn_scalar=12)).eval()
    assert capped.config.final_logit_softcapping == 30
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert not TokenLosses(capped.to(dtype)).linear_head
        for family in ("gptj", "llama"):
            losses = TokenLosses(family_model(family).to(dtype))
            assert torch.isfinite(losses(tokens(2, 8)).total)
            assert losses.linear_head or family == "gptj"


def test_narrow_head_behind_a_projection():
    model = tiny_model("opt", word_embed_proj_dim=24)  # as OPT-350m
    assert TokenLosses(model).linear_head
    check_same(*both(model, True))


def test_logits_from_elsewhere_are_refused():
    model = tiny_model("llama")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits + kwargs["input_ids"][..., None]
        return output

    model.forward = forward
    with pytest.raises(ModelError, match="do not follow from its last hidden states"):
        TokenLosses(model)


def test_a_hopeless_token_costs_a_finite_loss():
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000)
    found = TokenLosses(model)(tokens())
    wanted = cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert found.lm.item() > 200 and found.lm.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_autocast_agrees_with_fp32_as_far_as_bf16_goes():
    model = tiny_model("llama")
    exact = sliced(model, tokens(), None, 1.0, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sliced(model, tokens(), None, 1.0, 0.0)
    assert rounded[0] == pytest.approx(exact[0], abs=0.02)
    for name, gradient in exact[2].items():
        assert torch.cosine_similarity(rounded[2][name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_the_dense_models_head_stays_when_the_head_learns():
    model = tiny_model("llama")
    module = TokenLosses(model, kl_weight=1.0)
    with torch.no_grad():
        dense = module.hidden(tokens())
        assert module(tokens(), dense).divergence.item() == pytest.approx(0, abs=1e-5)
        model.get_output_embeddings().weight.mul_(1.5)
        assert module(tokens(), dense).divergence.item() > 0.01


def test_frozen_weights_get_no_gradients():
    model = tiny_model("llama").requires_grad_(False)
    scale = torch.nn.Parameter(torch.ones(()))
    model.base_model.norm.register_forward_hook(lambda module, args, output: output * scale)
    TokenLosses(model)(tokens()).total.backward()
    assert scale.grad.item() != 0 and all(parameter.grad is None for parameter in model.parameters())
