"""Trials that begin where they part from one another: the very losses of whole passes, for less work."""

from __future__ import annotations

import pytest
import torch

from tests.breadth import BREADTH
from tests.families import FAMILIES, family_model
from tests.tiny import LAYERS, tiny_model, tokens
from trsp_deploy.decoder import decoder_layers, layer_output, with_layer_output
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods.trials import Trials
from trsp_deploy.tools.training.losses import TokenLosses
from trsp_deploy.tools.training.shared import mean_loss

SETS = {
    "one layer each": [(layer,) for layer in range(LAYERS)],
    "beside a layer that is gone": [(2, layer) for layer in range(LAYERS) if layer != 2],
    "spans": [(first, first + 1, first + 2) for first in range(1, LAYERS - 2)],
    "a set inside another": [(1, 3), (1,), (1, 3, 4)],
    "one set": [(1, 4)],
    "nothing": [()],
}


def whole_passes(model, trials, windows) -> dict[tuple[int, ...], float]:
    found = {}
    with LayerGates(model) as gates:
        for trial in trials:
            gates.closed = set(trial)
            found[trial] = mean_loss(model, windows, 2)
    return found


@BREADTH
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_whole_passes_in_every_family(family):
    model, windows = family_model(family), tokens()
    trials = SETS["one layer each"]
    with LayerGates(model) as gates:
        tried = Trials(TokenLosses(model), gates)
        found = tried.losses(trials, windows, 2)
    assert tried.resumable
    assert found == whole_passes(model, trials, windows)
    assert len(set(found.values())) == LAYERS  # the layers mattered


@BREADTH
@pytest.mark.parametrize("sets", SETS)
def test_losses_are_those_of_whole_passes_for_any_sets(sets):
    model, windows = tiny_model("llama"), tokens(5)
    with LayerGates(model) as gates:
        gates.closed = {3}
        found = Trials(TokenLosses(model), gates).losses(SETS[sets], windows, 2)
        assert gates.closed == {3} and gates.start == 0 and not gates.entering
    assert found == whole_passes(model, SETS[sets], windows)
    assert list(found) == SETS[sets]


def test_what_trials_have_in_common_is_computed_once():
    model, calls = tiny_model("llama"), []
    with LayerGates(model) as gates:
        trials = Trials(TokenLosses(model), gates)
        trials.losses(SETS["one layer each"], tokens(), 2)  # finds out whether the model can be resumed
        for index, layer in enumerate(decoder_layers(model)):
            layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
        trials.losses(SETS["one layer each"], tokens(2), 2)
    # Without the last layer: all before it. Without layer n: those behind it.
    assert sorted(calls) == sorted([*range(LAYERS - 1), *(i for n in range(LAYERS - 1) for i in range(n + 1, LAYERS))])


def test_a_model_whose_layers_read_more_than_the_one_before_is_computed_whole():
    model, windows = tiny_model("llama"), tokens()
    layers, seen = decoder_layers(model), {}
    layers[1].mlp.register_forward_hook(lambda _, args, out: seen.update(early=out))
    layers[4].register_forward_hook(
        lambda _, args, out: with_layer_output(out, layer_output(out) + seen.pop("early", 0.0))
    )
    trials = SETS["one layer each"]
    with LayerGates(model) as gates:
        tried = Trials(TokenLosses(model), gates)
        found = tried.losses(trials, windows, 2)
    assert not tried.resumable
    assert found == whole_passes(model, trials, windows)


def test_a_report_follows_every_batch():
    model, told = tiny_model("llama"), []
    with LayerGates(model) as gates:
        found = Trials(TokenLosses(model), gates).losses(
            [(1,), (2,)], tokens(5), 2, lambda layers, loss, read: told.append((layers, loss, read))
        )
    assert [read for _, _, read in told] == [2, 2, 4, 4, 5, 5]
    assert {layers: loss for layers, loss, read in told if read == 5} == found


@torch.no_grad()
def test_gates_start_where_they_are_told():
    model = tiny_model("gpt2")
    with LayerGates(model) as gates:
        gates.entering = {3: None}
        model(input_ids=tokens(), use_cache=False)
        kept = gates.entering[3]
        gates.closed, gates.start = {3}, 3
        resumed = model(input_ids=tokens(), use_cache=False).logits
        gates.start = 0
        assert torch.equal(model(input_ids=tokens(), use_cache=False).logits, resumed)
        assert torch.equal(gates.entering[3], kept)
