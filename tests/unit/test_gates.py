"""Gates against the model itself: 1 is the dense model, 0 on a branch is removal, to the last bit."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import LAYERS, logits, tiny_model, tokens
from trsp_deploy.decoder import decoder_layers, remove_layers
from trsp_deploy.tools.gates import LayerGates

DROPPED = [1, 4]
RETURNS = ["llama", "gpt2"]  # layers that return a tensor, and a tuple; test_every_family.py has the others


@pytest.mark.parametrize("form", ["branch", "output"])
@pytest.mark.parametrize("family", RETURNS)
def test_gates_at_one_are_the_dense_model(family, form):
    model = tiny_model(family)
    dense = logits(model)
    with LayerGates(model, form):
        assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", RETURNS)
def test_a_branch_gate_at_zero_is_the_layer_removed(family):
    model = tiny_model(family)
    dense = logits(model)
    with LayerGates(model, "branch") as gates:
        with torch.no_grad():
            gates.values[DROPPED] = 0.0
        gated = logits(model)
    remove_layers(model, DROPPED)
    assert torch.equal(gated, logits(model))
    assert not torch.allclose(gated, dense)  # the layers mattered


@pytest.mark.parametrize("form", ["branch", "output"])
@pytest.mark.parametrize("family", RETURNS)
def test_a_closed_layer_is_the_layer_removed(family, form):
    model = tiny_model(family)
    with LayerGates(model, form) as gates:
        gates.closed.update(DROPPED)
        first, second = logits(model), logits(model)  # the second one skips the layers' computation
    remove_layers(model, DROPPED)
    assert torch.equal(first, logits(model))
    assert torch.equal(second, logits(model))


def test_closed_layers_are_not_computed():
    model = tiny_model("llama")
    calls = []
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with LayerGates(model) as gates:
        logits(model)
        gates.closed.add(1)
        logits(model)
    assert len(calls) == 1


def test_the_output_gate_scales_the_whole_stream_and_the_branch_gate_only_what_the_layer_adds():
    model = tiny_model("llama")
    seen = {}
    decoder_layers(model)[3].register_forward_hook(lambda _, args, out: seen.update(into=args[0], out=out))
    with torch.no_grad():
        plain = {}
        logits(model)
        plain = dict(seen)
        with LayerGates(model, "branch") as gates:
            gates.values[3] = 0.25
            logits(model)
            assert torch.allclose(seen["out"], plain["into"] + 0.25 * (plain["out"] - plain["into"]), atol=1e-5)
        with LayerGates(model, "output") as gates:
            gates.values[3] = 0.25
            logits(model)
            assert torch.allclose(seen["out"], 0.25 * plain["out"], atol=1e-5)


@pytest.mark.parametrize("form", ["branch", "output"])
def test_gates_learn_with_frozen_weights(form):
    model = tiny_model("opt").requires_grad_(False)
    with LayerGates(model, form) as gates:
        model(input_ids=tokens(), use_cache=False).logits.float().logsumexp(-1).mean().backward()
        assert gates.values.grad.shape == (LAYERS,)
        assert (gates.values.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_watched_layers_report_what_they_add():
    model = tiny_model("gpt2")
    with LayerGates(model) as gates:
        gates.watched.add(2)
        logits(model)
        assert set(gates.changes) == {2}
        assert gates.changes[2].shape == (*tokens().shape, 48)


def test_leaving_puts_the_layers_back():
    model = tiny_model("phi")
    dense = logits(model)
    with LayerGates(model) as gates, torch.no_grad():
        gates.values.fill_(0.5)
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
    assert torch.equal(logits(model), dense)


def test_leaving_puts_back_what_stood_in_front_of_a_layer():
    model = tiny_model("llama")
    layer, calls = decoder_layers(model)[2], []
    forward = layer.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    layer.forward = counted
    with LayerGates(model):
        logits(model)
    assert vars(layer)["forward"] is counted and len(calls) == 1
