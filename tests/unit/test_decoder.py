"""Removing layers leaves a model that plain transformers understands."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from tests.tiny import LAYERS, next_token_loss, random_model, save_tiny, tiny_model, tokens
from trsp_deploy.decoder import (
    check_prunable,
    check_removal,
    count_weights,
    decoder_layers,
    decoder_size,
    graph_positions,
    known_positions,
    load_model,
    remove_layers,
)
from trsp_deploy.errors import ModelError

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
logits = model(input_ids=torch.load(sys.argv[2]), use_cache=False).logits
assert "trsp_deploy" not in sys.modules
assert torch.equal(logits, torch.load(sys.argv[3])), "reloaded logits differ"
out = model.generate(torch.load(sys.argv[2])[:1], max_new_tokens=4, do_sample=False)
assert out.shape[1] == 24, out.shape
"""


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 4's cache of such a model needs attention")
def test_a_model_that_does_not_run_without_its_only_attention_is_refused():
    config = transformers.Lfm2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    model = random_model(config)
    check_removal(model, [0])
    with pytest.raises(ModelError, match="without layers 1: what is left does not run"):
        check_removal(model, [1])


@pytest.mark.parametrize(
    ("asks", "passes"),  # after so many of the dense model's
    [(check_prunable, 0), (lambda model: check_removal(model, [1]), 3)],
    ids=["dense", "cut"],
)
def test_a_full_gpu_is_no_reason_against_an_architecture(asks, passes, monkeypatch):
    model, forward, calls = tiny_model("llama"), transformers.LlamaForCausalLM.forward, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) <= passes:
            return forward(*args, **kwargs)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        asks(model)


def test_per_layer_config_lists_are_cut():
    kinds = ["full_attention", "sliding_attention"] * 3
    model = tiny_model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    model.config.eos_token_id = [0, 1, 2, 3, 4, 5]  # as long as the layer list, and none of its business
    remove_layers(model, [0, 2])
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert model.config.eos_token_id == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("opt", "gpt2"))])
def test_saved_folder_reloads_in_a_fresh_process_without_our_code(family, tmp_path):
    model = tiny_model(family)
    remove_layers(model, [1, 2])
    model.save_pretrained(tmp_path / "pruned")
    torch.save(tokens(), tmp_path / "ids.pt")
    with torch.no_grad():
        torch.save(model(input_ids=tokens(), use_cache=False).logits, tmp_path / "logits.pt")
    files = [str(tmp_path / name) for name in ("pruned", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *files], check=True, timeout=120)


def test_tied_weights_stay_tied(tmp_path):
    model = tiny_model("llama")
    remove_layers(model, [5])
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_attention_that_depends_on_the_layer_number_is_refused_untouched():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        ModelError,
        match=r"layers 1: (a kept layer computes something else under its new number|layer 2, as .* attn\.scaling)",
    ):
        remove_layers(model, [1])
    assert len(decoder_layers(model)) == LAYERS


def test_a_config_that_no_longer_describes_the_weights_is_refused():
    model = tiny_model("llama")
    decoder_layers(model)[4].mlp.down_proj = nn.Linear(96, 48, bias=True)  # unlike what the config says
    with pytest.raises(
        ModelError, match=r"layers\.4\.mlp\.down_proj\.bias is \(48,\) and by the config would be absent"
    ):
        remove_layers(model, [0])


def test_two_candidate_lists_are_refused():
    model = tiny_model("llama")
    model.model.twin = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    with pytest.raises(ModelError, match="found 2"):
        decoder_layers(model)


def test_weights_are_counted_once(tmp_path):
    model = tiny_model("llama")  # tied
    counts = count_weights(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.lm_head == counts.embeddings == 384 * 48
    assert counts.total == sum(counts.layers) + counts.lm_head + 48  # and the final norm


def test_size_comes_from_the_config_alone(tmp_path):
    folder = save_tiny("llama", tmp_path)
    weights = count_weights(load_model(folder))
    (folder / "model.safetensors").unlink()
    size = decoder_size(folder)
    assert size.weights == weights
    assert size.cache_per_token == 2 * 2 * 12  # keys and values, 2 heads of 12
    assert size.attention_width == 48


def test_loss_of_a_uniform_model_is_the_log_of_the_vocabulary():
    model = tiny_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert next_token_loss(model, tokens()).item() == pytest.approx(torch.tensor(384.0).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 64),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 64),  # as transformers 5 writes it
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 32}, 32),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        ({"rope_scaling": {"type": "longrope"}}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
        ({}, None),
    ],
)
def test_how_long_a_text_a_traced_graph_holds_for(values, limit):
    assert graph_positions(SimpleNamespace(max_position_embeddings=64, **values)) == limit


def test_a_config_that_says_no_positions_has_none(tmp_path):
    transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16).save_pretrained(tmp_path)
    assert transformers.XLNetConfig.from_pretrained(tmp_path).max_position_embeddings == -1
    assert known_positions(tmp_path) is None
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "seq_length": 128}))
    assert known_positions(tmp_path) == 128


@pytest.mark.skipif(transformers.__version__ >= "5", reason="looked at with transformers 4 alone")
def test_a_layer_that_keeps_a_table_of_layer_numbers_is_refused():
    """Zamba2's adapters: what was left ended in a KeyError, after the whole training."""
    blocks = ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"]
    config = transformers.Zamba2Config(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        layers_block_type=blocks,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        intermediate_size=64,
        num_mem_blocks=1,
        max_position_embeddings=64,
        use_mem_rope=False,
        pad_token_id=0,
    )
    model = random_model(config)
    with pytest.raises(ModelError, match="layer_dic"):
        remove_layers(model, [1])
