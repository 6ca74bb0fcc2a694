"""Every method against planted layers, references and its own promises, on tiny models."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from torch import nn

from tests.tiny import COMMON, FAMILIES, LAYERS, ROTARY, next_token_loss, tiny_model, tokens
from trsp_deploy.decoder import (
    decoder_layers,
    layer_input,
    remove_layers,
    with_layer_output,
)
from trsp_deploy.errors import ModelError, RecipeError, TextError
from trsp_deploy.tools.closed_form import span
from trsp_deploy.tools.closed_form.equations import sink_positions
from trsp_deploy.tools.closed_form.hidden_states import visit_layers
from trsp_deploy.tools.closed_form.span import (
    RIDGE,
    fit_spans,
    fold_dropped_layers,
    output_projection,
    projections_before,
    runs,
    write_fold,
)
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.methods import METHODS, base
from trsp_deploy.tools.methods.uidl import angular_distance
from trsp_deploy.tools.training.shared import batches, mean_loss

# What a layer writes to the residual stream with, in every family.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2")
EXPECTED_PASSES = {
    "shortgpt": 1,
    "uidl": 1,
    "sleb": 6 + 5,
    # One to rank, 0.75 to fit, and each of the four spans behind layer 0 scored on a quarter.
    "fold": 1 + 0.75 + 4 * 0.25,
}


def make_idle(model, indices) -> None:
    """Let layers add nothing, for good: their output projections are zero and stay so."""
    for index in indices:
        for name, parameter in decoder_layers(model)[index].named_parameters():
            parameter.requires_grad_(False)
            if name.split(".")[-2] in OUTPUT_PROJECTIONS:
                parameter.data.zero_()


def train(model, windows, steps=300):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    batch = batches(windows, 8, seed=0)
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, next(batch)).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=["llama", "opt"])
def with_an_idle_span(request, windows):
    """A model trained for a few seconds on English, in which every layer works but 2 and 3."""
    model = tiny_model(request.param)
    make_idle(model, [2, 3])
    return train(model, windows)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@torch.no_grad()
def logits(model, ids=None) -> torch.Tensor:
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


@pytest.mark.parametrize("name", METHODS)
def test_an_idle_span_is_dropped(with_an_idle_span, windows, name):
    method = METHODS[name]
    model = with_an_idle_span
    before = weights(model)
    # Text that it was trained on, where every layer that works is sure to help.
    selection = method.select(model, windows[:16], 2, 4)
    assert selection.dropped == (2, 3)
    assert selection.forward_passes == EXPECTED_PASSES[name]
    assert json.loads(json.dumps(selection.scores)) == selection.scores
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_methods_find_idle_layers_in_every_family(family):
    model = tiny_model(family)
    make_idle(model, [1, 4])
    ids = tokens(batch=6)
    assert METHODS["shortgpt"].select(model, ids, 2, 4).dropped == (1, 4)
    assert METHODS["uidl"].select(model, ids, 1, 4).dropped in {(1,), (4,)}


@pytest.mark.parametrize("name", METHODS)
def test_batch_size_changes_nothing(name):
    model, ids = tiny_model("llama"), tokens(batch=8)
    whole, parts = (METHODS[name].select(model, ids, 2, size) for size in (8, 3))
    assert whole.dropped == parts.dropped


def test_table_names_its_entries():
    for name, method in METHODS.items():
        assert method.name == name and "arXiv" in method.source and method.description


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_dropped", [0, LAYERS])
def test_at_least_one_layer_goes_and_one_stays(name, num_dropped):
    with pytest.raises(RecipeError, match=f"{num_dropped} of the model's 6 layers.*valid: 1 to 5"):
        METHODS[name].select(tiny_model("llama"), tokens(), num_dropped, 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_cannot_go_stays_though_it_does_nothing(name, monkeypatch):
    monkeypatch.setattr(base, "fixed_ends", lambda _: frozenset({0, 5}))
    model = tiny_model("llama")
    make_idle(model, [0, 5])
    assert set(METHODS[name].select(model, tokens(8), 2, 4).dropped) <= {1, 2, 3, 4}
    with pytest.raises(RecipeError, match=r"5 of the model's 6 layers.*valid: 1 to 4"):
        METHODS[name].select(model, tokens(8), 5, 4)


def test_no_span_to_fold(monkeypatch):
    monkeypatch.setattr(base, "fixed_ends", lambda _: frozenset({5}))
    with pytest.raises(RecipeError, match="no span of 5 layers leaves both layer 0 and what cannot go"):
        METHODS["fold"].select(tiny_model("llama"), tokens(8), 5, 4)


@pytest.mark.parametrize("name", METHODS)
def test_no_windows(name):
    with pytest.raises(TextError, match="no calibration windows"):
        METHODS[name].select(tiny_model("llama"), tokens()[:0], 1, 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_overflows_is_refused(name):
    model = tiny_model("llama")
    decoder_layers(model)[2].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match="the model overflows on this text"):
        METHODS[name].select(model, tokens(8), 2, 2)


# --- shortgpt, uidl, sleb against references


def test_block_influence_is_equation_1():
    model, ids = tiny_model("llama"), tokens(batch=5)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    # transformers' last hidden state comes after the final norm, so the last layer has no reference here.
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(states[:-1])]
    selection = METHODS["shortgpt"].select(model, ids, 2, 2)
    assert selection.scores["block_influence"][:-1] == pytest.approx(expected, abs=1e-6)


def test_angular_distance_of_the_last_token():
    model, ids = tiny_model("gpt2"), tokens(batch=5)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = [
        (torch.cosine_similarity(states[i][:, -1], states[i + 2][:, -1], dim=-1).arccos() / torch.pi).mean().item()
        for i in range(LAYERS - 2)
    ]
    scores = METHODS["uidl"].select(model, ids, 2, 2).scores["angular_distance"]
    assert len(scores) == LAYERS - 2 + 1
    assert scores[:-1] == pytest.approx(expected, abs=1e-5)


def test_angular_distance_of_known_angles():
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert angular_distance(east, 3 * east) == 0
    assert angular_distance(east, north) == pytest.approx(0.5)
    assert angular_distance(east, -east) == pytest.approx(1.0)


def test_sleb_measures_true_removal(windows):
    ids = windows[:4]
    selection = METHODS["sleb"].select(tiny_model("opt"), ids, 2, 4)
    first, second = selection.scores["order"]
    for layer, loss in enumerate(selection.scores["removal_loss"][1]):
        if layer == first:
            assert loss is None
            continue
        cut = tiny_model("opt")
        remove_layers(cut, [first, layer])
        assert loss == pytest.approx(mean_loss(cut, ids, 4), abs=1e-5)
    assert selection.scores["removal_loss"][1][second] == min(
        loss for loss in selection.scores["removal_loss"][1] if loss is not None
    )


def test_visitor_sees_every_layer_of_every_batch_in_order():
    model = tiny_model("phi")
    seen = []
    visit_layers(model, tokens(batch=5), 2, lambda index, a, b: seen.append((index, len(a), a.shape == b.shape)), "x")
    assert seen == [(index, size, True) for size in (2, 2, 1) for index in range(LAYERS)]


# --- fold


def plant_linear_layer(model, index) -> None:
    """Let layer `index` add nothing but a linear map (and constant) of what the layer before it wrote last."""
    layer = decoder_layers(model)[index]
    projection = output_projection(model, index - 1, tokens(2, 8))
    (module,) = projection.modules
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(width, width, generator=generator) / width**0.5
    constant = torch.randn(width, generator=generator) if projection.has_bias else torch.zeros(width)
    written = {}
    module.register_forward_hook(lambda module, args, output: written.update(added=output))

    class Planted(type(layer)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            hidden = layer_input(args, kwargs)
            added = projection.scale * written["added"].reshape(hidden.shape)
            return with_layer_output(output, hidden + added @ matrix + constant)

    layer.__class__ = Planted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_span_folds_without_loss(family):
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    plant_linear_layer(model, 2)
    dense = logits(model)
    before = weights(model)
    fold_dropped_layers(model, [2], tokens(64, 20, seed=5), 16, ridge=1e-12)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    (module,) = output_projection(model, 1, tokens(2, 8)).modules
    assert len(changed) == len(list(module.parameters()))
    remove_layers(model, [2])
    assert torch.allclose(logits(model), dense, atol=1e-4)


def test_fold_measures_a_residual_multiplier():
    config = transformers.GraniteConfig(**ROTARY, num_key_value_heads=2, residual_multiplier=0.25)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert output_projection(model, 1, tokens(2, 8)).scale == 0.25
    plant_linear_layer(model, 2)
    dense = logits(model)
    fold_dropped_layers(model, [2], tokens(64, 20, seed=5), 16, ridge=1e-12)
    remove_layers(model, [2])
    assert torch.allclose(logits(model), dense, atol=1e-4)


@pytest.mark.parametrize("dropped", [[4, 5], [1, 2, 3], [1, 5]])
def test_fold_beats_plain_removal_on_its_own_text(with_an_idle_span, windows, dropped):
    model = with_an_idle_span
    before = weights(model)
    with LayerGates(model) as gates:
        gates.closed.update(dropped)
        plain = mean_loss(model, windows, 16)
    fold_dropped_layers(model, dropped, windows, 16)
    with LayerGates(model) as gates:
        gates.closed.update(dropped)
        folded = mean_loss(model, windows, 16)
    model.load_state_dict(before)
    assert folded < plain


def test_folding_runs_no_layer_behind_the_span():
    ids, model, ran = tokens(64, 20, seed=5), tiny_model("llama"), []
    wanted = tiny_model("llama")
    (fit,) = fit_spans(wanted, projections_before(wanted, [(2, 3)], ids), ids, 16)
    write_fold(fit, RIDGE)
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    fold_dropped_layers(model, [2, 3], ids, 16)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), wanted.parameters(), strict=True))
    look = 1  # for the projection, through all layers
    assert ran.count(3) == look + len(ids) // 16 and ran.count(4) == look


@pytest.mark.parametrize("family", ["llama", "opt"])  # without a bias and with one
def test_spans_that_are_folded_one_at_a_time_come_to_the_same(family, monkeypatch):
    ids, together, apart = tokens(64, 20, seed=5), tiny_model(family), tiny_model(family)
    fold_dropped_layers(together, [1, 3, 5], ids, 16)
    monkeypatch.setattr(span, "EQUATIONS_BYTES", 1)
    fold_dropped_layers(apart, [1, 3, 5], ids, 16)
    changed = [
        not torch.equal(weight, plain)
        for weight, plain in zip(apart.parameters(), tiny_model(family).parameters(), strict=True)
    ]
    assert sum(changed) == (3 if family == "llama" else 6)
    assert all(torch.equal(*pair) for pair in zip(together.parameters(), apart.parameters(), strict=True))


def plant_sink(model, index, size) -> None:
    """Let the MLP of layer `index` write a massive state at position 0, as layer 11 of SmolLM2-135M does."""
    direction = torch.randn(model.config.intermediate_size, generator=torch.Generator().manual_seed(2))

    def flood(module, args):
        (inner,) = args  # (batch, sequence, intermediate)
        inner = inner.clone()
        inner[:, 0] += size * direction
        return (inner,)

    decoder_layers(model)[index].mlp.down_proj.register_forward_pre_hook(flood)


def sink_leaving(model, ids, index) -> torch.Tensor:
    """Position 0 of what leaves layer `index`: (windows, hidden)."""
    states = []
    visit_layers(model, ids, len(ids), lambda i, entering, leaving: states.append(leaving[:, 0]), "x")
    return states[index]


def test_fold_keeps_the_attention_sink(windows):
    ids = windows[:40]
    model = tiny_model("llama")
    plant_sink(model, 1, 1e4)
    sinks = []
    visit_layers(model, ids, len(ids), lambda i, entering, leaving: sinks.append(sink_positions(leaving)), "x")
    assert not sinks[0].any() and sinks[1][:, 0].all() and not sinks[1][:, 1:].any()
    dense, plain = sink_leaving(model, ids, 3), sink_leaving(model, ids, 1)
    before = weights(model)

    def worst_error() -> float:
        """How far the sink behind the fold is from the dense one's, in its own size."""
        error = torch.linalg.vector_norm(sink_leaving(model, ids, 1) - dense, dim=-1)
        return (error / torch.linalg.vector_norm(dense, dim=-1)).max().item()

    (fit,) = fit_spans(model, projections_before(model, [(2, 3)], ids), ids, 8)
    write_fold(fit, 1e-4)
    assert worst_error() < 0.01
    assert torch.allclose(sink_leaving(model, ids, 1), plain, rtol=1e-2, atol=1e-3 * plain.abs().max().item())
    assert not torch.equal(decoder_layers(model)[1].mlp.down_proj.weight, before["model.layers.1.mlp.down_proj.weight"])

    model.load_state_dict(before)
    write_fold(fit_without_sinks(model, ids), 1e-4)
    assert worst_error() > 0.1  # the same fit with the sinks left out: what the treatment prevents


def fit_without_sinks(model, ids):
    (fit,) = fit_spans(model, projections_before(model, [(2, 3)], ids), ids, 8)
    fit.equations.gram.zero_()
    inputs = []
    projection = decoder_layers(model)[1].mlp.down_proj
    with projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0][:, 1:])):
        logits(model, ids)
    features = torch.cat(inputs).flatten(0, 1).double()
    fit.equations.gram += features.T @ features
    return fit


def test_a_massive_token_elsewhere_is_a_sink_too():
    hidden = torch.ones(2, 5, 8)
    hidden[0, 0] *= 4
    hidden[1, 3] *= 100
    assert sink_positions(hidden).nonzero().tolist() == [[1, 3]]


def test_runs():
    assert runs([14, 4, 13, 15, 20]) == [(4, 4), (13, 15), (20, 20)]


def test_fold_never_starts_at_layer_0():
    model = tiny_model("llama")
    make_idle(model, [0])
    assert METHODS["fold"].select(model, tokens(8), 1, 8).dropped != (0,)
    before = weights(model)
    fold_dropped_layers(model, [0, 1], tokens(8), 8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    fold_dropped_layers(model, [0, 1, 4], tokens(8), 8)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"model.layers.3.mlp.down_proj.weight"}, "what stands behind a kept layer is folded"


def gemma2():
    return transformers.Gemma2Config(**ROTARY, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12)


def mixtral():
    return transformers.MixtralConfig(**ROTARY, num_key_value_heads=2, num_local_experts=4)


def post_norm_opt():
    return transformers.OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=48, do_layer_norm_before=False)


@pytest.mark.parametrize("config", [gemma2, mixtral, post_norm_opt])
def test_architectures_that_cannot_be_folded(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ModelError, match=r"cannot be folded: layer .* the other methods work"):
        METHODS["fold"].select(model, tokens(8), 2, 4)
    assert len(METHODS["shortgpt"].select(model, tokens(8), 2, 4).dropped) == 2


def test_fold_wants_enough_text():
    with pytest.raises(
        TextError,
        match="2 calibration windows of 20 tokens cannot fit a projection of hidden size 48: give at least 48 tok",
    ):
        fold_dropped_layers(tiny_model("llama"), [2], tokens(2, 20), 2)
    with pytest.raises(TextError, match="at least 2 calibration windows"):
        METHODS["fold"].select(tiny_model("llama"), tokens(1, 60), 2, 2)


def test_fold_in_half_precision(windows):
    model = tiny_model("llama").bfloat16()
    fold_dropped_layers(model, [2], windows[:16], 8)
    remove_layers(model, [2])
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()


def test_the_projection_found_is_an_nn_linear_or_conv1d():
    assert isinstance(output_projection(tiny_model("phi"), 0, tokens(2, 8)).modules[0], nn.Linear)
    assert output_projection(tiny_model("gpt2"), 3, tokens(2, 8)).modules[0].nf == 48
