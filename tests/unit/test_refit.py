"""Sequential refit on tiny models: what it finds in a layer, what it restores, what it leaves alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.breadth import BREADTH
from tests.tiny import tiny_model, tokens
from tests.unit.test_methods import plant_linear_layer
from trsp_deploy.decoder import decoder_layers, remove_layers
from trsp_deploy.errors import TextError
from trsp_deploy.recipe import TransferSettings
from trsp_deploy.tools.closed_form.equations import NormalEquations
from trsp_deploy.tools.closed_form.layer_modules import Group, layer_calls, linear_groups
from trsp_deploy.tools.closed_form.layers import Streams, choose_solution, refit_kept_layers
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.training.forms import FORMS
from trsp_deploy.tools.training.processes import Processes

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt"]


def groups_of(family: str, index: int = 1) -> list[tuple[tuple[str, ...], bool]]:
    """Names of the modules of each group, and whether it writes to the residual stream."""
    model = tiny_model(family)
    layer = decoder_layers(model)[index]
    name = {module: path.rpartition(".")[2] for path, module in layer.named_modules()}
    found = linear_groups(layer, layer_calls(model, tokens(2, 8))[index])
    return [(tuple(name[module] for module in group.modules), group.writes) for group in found]


@torch.no_grad()
def last_states(model, ids) -> torch.Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def closing(model, dropped) -> LayerGates:
    gates = LayerGates(model)
    gates.closed.update(dropped)
    return gates


def test_groups_of_a_llama_layer():
    assert groups_of("llama") == [
        (("q_proj", "k_proj", "v_proj"), False),
        (("o_proj",), True),
        (("gate_proj", "up_proj"), False),
        (("down_proj",), True),
    ]


def test_groups_of_a_gpt2_layer():
    assert groups_of("gpt2") == [(("c_attn",), False), (("c_proj",), True), (("c_fc",), False), (("c_proj",), True)]


def test_a_product_that_returns_more_is_no_member_of_a_group():
    class Router(torch.nn.Linear):  # as Llama 4's
        def forward(self, hidden):
            scores = super().forward(hidden)
            return scores, scores

    model = tiny_model("llama")
    layer = decoder_layers(model)[1]
    gate = layer.mlp.gate_proj
    layer.mlp.gate_proj = Router(gate.in_features, gate.out_features, bias=False)
    layer.mlp.act_fn.forward = lambda scores: torch.nn.functional.silu(scores[0])
    modules = [
        module for group in linear_groups(layer, layer_calls(model, tokens(2, 8))[1]) for module in group.modules
    ]
    assert layer.mlp.gate_proj not in modules and {layer.mlp.up_proj, layer.mlp.down_proj} < set(modules)


def test_groups_of_a_parallel_residual_layer():
    assert [names for names, writes in groups_of("gpt_neox") if writes] == [("dense",), ("dense_4h_to_h",)]


@BREADTH
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", [[2], [1, 3]])
def test_states_come_closer_to_the_dense_ones_than_by_plain_removal(family, dropped):
    model, held_out = tiny_model(family), tokens(16, 24, seed=9)
    dense = last_states(model, held_out)
    with closing(model, dropped):
        plain = (last_states(model, held_out) - dense).square().mean()
    refit_kept_layers(model, dropped, tokens(128, 24, seed=5), 8)
    remove_layers(model, dropped)
    assert (last_states(model, held_out) - dense).square().mean() < 0.8 * plain


def test_a_layer_that_is_a_linear_map_of_what_the_one_before_wrote_is_replaced_exactly():
    model = tiny_model("llama")
    plant_linear_layer(model, 2)
    dense = last_states(model, tokens(4, 12))
    refit_kept_layers(model, [2], tokens(64, 20, seed=5), 16)
    remove_layers(model, [2])
    plain = last_states(tiny_model("llama"), tokens(4, 12))
    assert (last_states(model, tokens(4, 12)) - dense).norm() < 0.1 * (plain - dense).norm()


def test_what_stands_before_the_cut_is_left_alone():
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    refit_kept_layers(model, [3], tokens(64, 20), 8)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    # Layer 2 stands before the cut: what writes to the stream may change there, and nothing else.
    allowed = {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    assert {name for name in changed if int(name.split(".")[2]) <= 2} <= allowed
    assert not any("layers.3." in name for name in changed)


def test_nothing_dropped_changes_nothing():
    model = tiny_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    refit_kept_layers(model, [], tokens(16, 20), 8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_same_windows_give_the_same_weights():
    states = []
    for _ in range(2):
        model = tiny_model("gpt2")
        refit_kept_layers(model, [2], tokens(32, 20), 8)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_first_layer_may_go():
    model, held_out = tiny_model("llama"), tokens(16, 24, seed=9)
    dense = last_states(model, held_out)
    with closing(model, [0]):
        plain = (last_states(model, held_out) - dense).square().mean()
    refit_kept_layers(model, [0], tokens(128, 24, seed=5), 8)
    remove_layers(model, [0])
    assert (last_states(model, held_out) - dense).square().mean() < plain


def test_one_window_is_refused_in_one_line():
    with pytest.raises(TextError, match=r"^1 calibration windows of 20 tokens cannot refit"):
        refit_kept_layers(tiny_model("llama"), [2], tokens(1, 20), 8)


def test_equations_that_do_not_carry_over_to_held_out_text_change_nothing():
    group = Group((torch.nn.Linear(4, 3, bias=False),), 1.0)
    fit, held_out, alike = (NormalEquations.empty(group, torch.float32) for _ in range(3))
    states, now, no_sinks = torch.randn(2, 50, 4), torch.randn(2, 50, 3), torch.zeros(2, 50, dtype=torch.bool)
    lacking = states @ torch.ones(4, 3)
    fit.add(states, now, now + lacking, no_sinks)
    held_out.add(states, now, now - lacking, no_sinks)
    assert choose_solution(fit, held_out) is None
    alike.add(states, now, now + lacking, no_sinks)
    solution = choose_solution(fit, alike)
    assert solution is not None
    assert torch.allclose(solution.float(), torch.ones(4, 3), atol=0.05)


def test_what_bf16_cannot_add_is_a_residue_until_it_can(monkeypatch):
    """A hundredth of the way is less than the last bit of most weights."""
    model = tiny_model("llama").to(torch.bfloat16)
    weight = decoder_layers(model)[1].mlp.up_proj.weight
    before = weight.detach().clone()
    settings = TransferSettings(form="anneal", refit="layers", steps=400, anneal_share=0.5)

    def refit(self, windows, autocast):
        with torch.no_grad():
            weight.mul_(1.03)

    monkeypatch.setattr(FORMS["anneal"], "refit", refit)
    with LayerGates(model) as gates:
        form = FORMS["anneal"](model, gates, [2], settings, Processes("cpu"))
        form.prepare(tokens(4, 8), contextlib.nullcontext())
        assert torch.equal(weight, before)
        wanted = before.float() * 1.03
        for step in range(settings.steps):
            form.before_step(step)
        form.finish()
    assert len(form.moved()) == 1, "the residue goes into checkpoints"
    undone = (weight.float() - wanted).norm() / (before.float() - wanted).norm()
    assert undone < 0.1, "0.95 without"


def test_no_states_are_held_beside_the_streams():
    streams = Streams(tiny_model("gpt2"), tokens(4, 8).split(2), contextlib.nullcontext())
    assert all(call.hidden.numel() == 0 for call in streams._calls)


@BREADTH
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_annealed_weights_end_where_the_refit_alone_would_put_them(share):
    windows, dropped = tokens(32, 20, seed=5), [2]
    refitted = tiny_model("llama")
    refit_kept_layers(refitted, dropped, windows, 8)
    model = tiny_model("llama")
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = TransferSettings(form="anneal", refit="layers", steps=4, batch_size=8, anneal_share=share)
    with LayerGates(model) as gates:
        form = FORMS["anneal"](model, gates, dropped, settings, Processes("cpu"))
        form.prepare(windows, contextlib.nullcontext())
        assert all(torch.equal(weight, dense[name]) for name, weight in model.state_dict().items())
        values = []
        for step in range(settings.steps):
            form.before_step(step)
            values.append(0.0 if 2 in gates.closed else gates.values[2].item())
        form.finish()
        assert values == sorted(values, reverse=True)
        assert gates.closed == {2}
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, refitted.state_dict()[name], atol=1e-5), name
