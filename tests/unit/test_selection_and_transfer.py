"""Both stages on tiny models whose right answer is known."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from tests.breadth import BREADTH
from tests.families import family_model
from tests.tiny import next_token_loss, save_tiny, tiny_model, tiny_tokenizer
from tests.training import same_weights
from trsp_deploy.decoder import cast_for_storage, decoder_layers, load_model, stored_dtype
from trsp_deploy.errors import ModelError, RecipeError
from trsp_deploy.recipe import read_recipe
from trsp_deploy.stages import transfer
from trsp_deploy.stages.selection import runs_text, select_for_counts, select_layers
from trsp_deploy.stages.transfer import transfer_and_remove
from trsp_deploy.tools.methods import base
from trsp_deploy.tools.methods.trials import Trials
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.sources.models import ModelSource
from trsp_deploy.tools.training.checkpoints import Checkpoints
from trsp_deploy.tools.training.forms import L2
from trsp_deploy.tools.training.optimizers import clip_gradients
from trsp_deploy.tools.training.shared import TRAINING_DTYPES, batches, learning_rate, mean_loss

IDLE = [1, 4]  # layers that add nothing


def recipe(**groups):
    values = {"model": "tiny", "autocast": "off", "device": "cpu", **groups}
    return read_recipe(values, "test")


@pytest.fixture(scope="module", params=["llama", "opt"])
def with_idle_layers(request, windows):
    """A model trained for a few seconds on English, in which every layer works but IDLE."""
    model = tiny_model(request.param)
    for index in IDLE:
        for name, parameter in decoder_layers(model)[index].named_parameters():
            parameter.requires_grad_(False)
            if any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2")):
                parameter.data.zero_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    batch = batches(windows, 8, seed=0)
    for _ in range(250):
        optimizer.zero_grad()
        next_token_loss(model, next(batch)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("gate", ["branch", "output"])
def test_idle_layers_are_picked(with_idle_layers, gate, windows):
    settings = {"gate": gate, "steps": 2, "candidates": 6, "trial_windows": 16}
    # Tried on text it was trained on, where every layer that works is sure to help.
    plan = select_layers(with_idle_layers, windows[:16], windows[:16], 2, recipe(plan=settings), "manual")
    assert plan.dropped == (1, 4)
    assert plan.kept == (0, 2, 3, 5)
    for pick in plan.picks:
        assert pick.removal_loss[pick.layer] == min(pick.removal_loss.values())
        assert pick.removal_loss[pick.layer] == pytest.approx(plan.dense_loss, abs=1e-4)
        assert len(pick.gates) == len(pick.lm_loss) == 2


def test_one_candidate_trusts_the_smallest_gate(windows):
    settings = {"steps": 3, "candidates": 1}
    plan = select_layers(tiny_model("llama"), windows[:16], windows[16:20], 1, recipe(plan=settings), "manual")
    gates = plan.picks[0].gates[-1]
    assert plan.dropped == (min(range(6), key=lambda index: abs(gates[index])),)


def test_a_layer_that_cannot_go_is_not_among_the_candidates(windows, monkeypatch):
    monkeypatch.setattr(base, "fixed_ends", lambda _: frozenset({0, 5}))
    settings = {"steps": 1, "candidates": 6, "trial_windows": 4}
    plan = select_layers(tiny_model("llama"), windows[:8], windows[8:10], 3, recipe(plan=settings), "manual")
    assert {0, 5}.isdisjoint(plan.dropped)
    assert [pick.removal_loss.keys() & {0, 5} for pick in plan.picks] == [set()] * 3
    assert set(plan.settings["finals"]) <= {"1-3", "2-4", runs_text(tuple(sorted(pick.layer for pick in plan.picks)))}


def test_more_layers_than_may_go_are_refused_before_anything_is_learnt(windows, monkeypatch):
    monkeypatch.setattr(base, "fixed_ends", lambda _: frozenset({0, 5}))
    with pytest.raises(RecipeError, match=r"5 of the model's 6 layers.*valid: 1 to 4"):
        select_layers(tiny_model("llama"), windows[:8], windows[8:10], 5, recipe(), "manual")


def test_l1_alone_shrinks_the_gates(windows):
    settings = {"steps": 5, "candidates": 1, "l1": 100.0, "learning_rate": 0.05}
    plan = select_layers(tiny_model("llama"), windows[:16], windows[16:20], 1, recipe(plan=settings), "manual")
    assert all(gate < 0.9 for gate in plan.picks[0].gates[-1])


@pytest.mark.parametrize(
    ("weights", "advice"), [("fp32", "a smaller one may"), ("bf16", "a smaller one or --set weights=fp32 may")]
)
def test_a_gate_that_diverges_is_the_learning_rates_doing(windows, weights, advice):
    settings = {"gate": "output", "steps": 4, "learning_rate": 1e9}
    model = tiny_model("llama").to(TRAINING_DTYPES[weights])
    said = rf"a gate is (nan|-?inf) at update \d of pick 1, with plan\.learning_rate 1e\+09: {advice} keep it finite"
    with pytest.raises(ModelError, match=f"^{said}$"):
        select_layers(model, windows[:16], windows[16:20], 1, recipe(plan=settings, weights=weights), "manual")


def test_same_seed_same_plan(windows):
    chosen = recipe(plan={"steps": 2, "candidates": 2}, seed=3)
    first, second = (
        select_layers(tiny_model("gpt2"), windows[:16], windows[16:20], 2, chosen, "manual") for _ in range(2)
    )
    assert first == second


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("dense"), tie_word_embeddings=True)


PLAN = PruningPlan(
    model="tiny",
    num_layers=6,
    dropped=(1, 4),
    kept=(0, 2, 3, 5),
    method="hand",
    seed=0,
    settings={},
    calibration="manual",
)


def run_transfer(dense, out, windows, checkpoints=None, plan=PLAN, weights="fp32", **transfer):
    source = ModelSource(name="tiny", kind="folder", path=str(dense), origin=str(dense))
    settings = {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, **transfer}
    return transfer_and_remove(
        dense=dense,
        source=source,
        plan=plan,
        train=windows[:32],
        validation=windows[32:40],
        recipe=recipe(transfer=settings, weights=weights),
        out=out,
        checkpoints=checkpoints,
    )


def test_annealed_removal_is_exact(dense, tmp_path, windows):
    result = run_transfer(dense, tmp_path / "out", windows, form="anneal")
    assert result.ppl_before_removal == result.ppl_after_removal
    assert result.lm_loss[-1] < result.lm_loss[3]  # it learned after the layers had faded
    assert result.tokens == 12 * 4 * 32


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_penalty_lowers_what_the_dropped_layers_add(dense, tmp_path, windows, form):
    result = run_transfer(dense, tmp_path / "out", windows, form=form, weight=1.0)
    assert result.penalty[-1] < 0.9 * result.penalty[0]
    assert result.ppl_before_removal != result.ppl_after_removal  # small is not zero; the jump is reported


def test_both_norms_have_one_scale(dense, tmp_path, windows):
    first = {
        form: run_transfer(dense, tmp_path / form, windows, form=form, steps=1).penalty[0] for form in ("l1", "l2")
    }
    assert 0.5 * first["l2"] < first["l1"] <= first["l2"]


def test_what_trains_is_folded_first_unless_it_cannot_be(dense, tmp_path, windows):
    folded = run_transfer(dense, tmp_path / "folded", windows)
    assert (folded.form, folded.refit, folded.unfitted_because) == ("train", "span", "")
    asked = run_transfer(dense, tmp_path / "asked", windows, form="train", refit="span")
    assert same_weights(tmp_path / "folded", tmp_path / "asked") and asked.refit == "span"

    post_norm = tmp_path / "gemma2"
    family_model("gemma2").save_pretrained(post_norm)
    tiny_tokenizer().save_pretrained(post_norm)
    plain = run_transfer(post_norm, tmp_path / "plain", windows, steps=1)
    assert plain.refit == "none" and "Gemma2ForCausalLM cannot be folded: layer 0" in plain.unfitted_because
    with pytest.raises(ModelError, match="cannot be folded"):
        run_transfer(post_norm, tmp_path / "refused", windows, refit="span", steps=1)


@pytest.mark.parametrize(("form", "refit"), [("train", "auto"), ("train", "span"), ("anneal", "span")])
def test_what_begins_with_the_first_layer_is_not_said_to_be_folded(dense, tmp_path, windows, form, refit):
    plan = PLAN.model_copy(update={"dropped": (0, 1), "kept": (2, 3, 4, 5)})
    result = run_transfer(dense, tmp_path / "out", windows, plan=plan, steps=1, form=form, refit=refit)
    assert result.refit == "none" and "begins with the first layer" in result.unfitted_because


@pytest.mark.parametrize("change", [torch.zeros(2, 3), torch.tensor([[3.0, 4.0]])])
def test_the_norm_over_processes_has_the_gradient_of_one(change):
    def gradient(form):
        leaf = change.clone().requires_grad_()
        norm = form.norm(leaf)
        norm.backward()
        return norm.item(), leaf.grad

    alone = L2.__new__(L2)
    alone.processes = SimpleNamespace(count=1)
    together = L2.__new__(L2)
    together.processes = SimpleNamespace(count=2, all_reduce_sum=lambda tensor: tensor)
    (norm, wanted), (found, got) = gradient(alone), gradient(together)
    assert found == norm and torch.equal(got, wanted)


def test_a_loss_that_is_not_finite_ends_the_training(dense, tmp_path, windows):
    checkpoints = Checkpoints(tmp_path / "checkpoints", "key", every_s=0.0)
    with pytest.raises(
        ModelError, match=r"the training's loss is (nan|inf) at step \d of 12, at a learning rate of 1e\+09: "
    ):
        run_transfer(dense, tmp_path / "out", windows, checkpoints, form="train", refit="none", learning_rate=1e9)
    assert all(math.isfinite(loss) for loss in checkpoints.load()["lm_losses"]) and not (tmp_path / "out").exists()


def test_one_gradient_that_is_not_finite_spoils_no_checkpoint(dense, tmp_path, windows, monkeypatch):
    """The loss of its step is finite, and weights that it updates are not."""
    steps = itertools.count(1)

    def overflowing(optimizer):
        if next(steps) == 3:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
        return clip_gradients(optimizer)

    checkpoints = Checkpoints(tmp_path / "checkpoints", "key", every_s=0.0)
    monkeypatch.setattr(transfer, "clip_gradients", overflowing)
    with pytest.raises(ModelError, match=r"the training's gradient is (nan|inf) at step 3 of 12, at a learning rate"):
        run_transfer(dense, tmp_path / "out", windows, checkpoints, form="train", refit="none")
    assert len(checkpoints.load()["lm_losses"]) == 2
    again = run_transfer(dense, tmp_path / "out", windows, checkpoints, form="train", refit="none")
    assert again.lm_loss == run_transfer(dense, tmp_path / "whole", windows, form="train", refit="none").lm_loss


def test_a_last_step_that_spoils_the_weights_is_said(dense, tmp_path, windows):
    with pytest.raises(
        ModelError, match=r"the training's perplexity is (nan|inf) at step 1 of 1, at a learning rate of"
    ):
        run_transfer(dense, tmp_path / "out", windows, form="train", refit="none", learning_rate=1e9, steps=1)


def test_no_transfer_removes_only(dense, tmp_path, windows):
    result = run_transfer(dense, tmp_path / "out", windows, form="none")
    assert result.lm_loss == () and result.tokens == 0
    pruned = load_model(tmp_path / "out")
    original = load_model(dense)
    for new, old in enumerate(PLAN.kept):
        kept = decoder_layers(pruned)[new].state_dict()
        assert all(torch.equal(kept[key], value) for key, value in decoder_layers(original)[old].state_dict().items())


def test_checkpoint_is_complete(dense, tmp_path, windows):
    out = tmp_path / "out"
    result = run_transfer(dense, out, windows, form="anneal", steps=2)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    card = (out / "README.md").read_text()
    assert "1, 4" in card and "depth-pruning" in card and "2 of its 6 transformer layers" in card
    assert torch.exp(torch.tensor(mean_loss(load_model(out), windows[32:40], 4))).item() == pytest.approx(
        result.ppl_after_removal, rel=1e-5
    )


def test_a_model_with_sampling_values_and_no_do_sample_is_saved(dense, tmp_path, windows):
    """transformers loads it with a warning, and would refuse to save it after all the training."""
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    run_transfer(tmp_path / "dense", tmp_path / "out", windows, form="none")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.9 and kept["do_sample"] is True


@pytest.mark.parametrize(
    "values",
    [{"early_stopping": True}, {"length_penalty": 0.8}, {"pad_token_id": -1}],
    ids=lambda values: next(iter(values)),
)
def test_a_generation_config_that_is_invalid_costs_no_training(dense, tmp_path, windows, values):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **values}))
    run_transfer(tmp_path / "dense", tmp_path / "out", windows, form="none")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 2 and not values.items() <= kept.items()


def test_a_generation_config_that_contradicts_itself_is_one_line(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"num_return_sequences": 2}')
    with pytest.raises(ModelError, match=r"transformers cannot load it: .*num_return_sequences"):
        load_model(tmp_path / "dense")


def test_a_config_that_does_not_say_its_dtype_is_of_what_is_stored(tmp_path):
    folder = save_tiny("llama", tmp_path / "half")
    load_model(folder).half().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if "dtype" not in key}))
    assert stored_dtype(folder) == torch.float16


def test_a_model_that_lacks_weights_is_not_made_up(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if "layers.1." in name]
    save_file(
        {name: weights[name] for name in weights if name not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=rf"its weights lack {sorted(lost)[0]}, .* and {len(lost) - 3} more"):
        load_model(folder)


def test_stored_dtype_is_kept(tmp_path, windows):
    folder = save_tiny("llama", tmp_path / "half", dtype=torch.float16)
    load_model(folder).half().save_pretrained(folder)
    run_transfer(folder, tmp_path / "out", windows, form="anneal", steps=1)
    assert stored_dtype(tmp_path / "out") == torch.float16
    assert load_model(tmp_path / "out").dtype == torch.float16


@BREADTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_bf16_training_leaves_alone_is_stored_as_it_was(tmp_path, windows, dtype):
    """bf16 has 8 significant bits, fp16 has 11: embeddings, head and whatever else does not train would be rounded."""
    folder = save_tiny("qwen2", tmp_path / "dense")
    load_model(folder).to(dtype).save_pretrained(folder)
    dense = load_model(folder)
    layers = decoder_layers(dense)
    for index in reversed(PLAN.dropped):
        del layers[index]
    before = dense.state_dict()
    assert before["lm_head.weight"].dtype == dtype
    assert not torch.equal(before["lm_head.weight"].bfloat16().to(dtype), before["lm_head.weight"])

    def changed(**settings):
        run_transfer(folder, tmp_path / "out", windows, weights="bf16", **settings)
        after = load_model(tmp_path / "out").state_dict()
        assert after.keys() == before.keys() and after["lm_head.weight"].dtype == dtype
        return {name for name, weight in before.items() if not torch.equal(weight, after[name])}

    assert changed(form="none") == set()
    folded = {f"model.layers.{index}.mlp.down_proj.weight" for index in (0, 2)}
    assert changed(form="none", refit="span") == folded
    trained = changed(form="train", steps=2)
    assert folded < trained and all(".layers." in name for name in trained)


def test_what_transformers_keeps_in_fp32_is_stored_so(tmp_path, windows):
    """The routers of ERNIE 4.5's experts, whatever the rest is stored in."""
    size = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    experts = {"moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    config = Ernie4_5_MoeConfig(**size, **experts, num_attention_heads=4, num_key_value_heads=2)
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(config)
    cast_for_storage(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    run_transfer(tmp_path / "dense", tmp_path / "out", windows, form="none")
    kept, stored = PLAN.kept[1], load_file(tmp_path / "out" / "model.safetensors")
    router = stored["model.layers.1.mlp.gate.weight"]
    assert router.dtype == torch.float32
    assert torch.equal(router, model.get_parameter(f"model.layers.{kept}.mlp.gate.weight"))
    assert not torch.equal(router, router.bfloat16().float())
    others = {name: tensor.dtype for name, tensor in stored.items() if ".gate." not in name and "statics" not in name}
    assert set(others.values()) == {torch.bfloat16}
    assert load_model(tmp_path / "out").get_parameter("model.layers.1.mlp.gate.weight").dtype == torch.float32


def test_embeddings_stay_unless_asked(dense, tmp_path, windows):
    before = load_model(dense).get_input_embeddings().weight
    run_transfer(dense, tmp_path / "layers", windows, form="anneal", steps=2)
    assert torch.equal(load_model(tmp_path / "layers").get_input_embeddings().weight, before)
    run_transfer(dense, tmp_path / "all", windows, form="anneal", steps=2, train="all")
    assert not torch.equal(load_model(tmp_path / "all").get_input_embeddings().weight, before)


def test_batches_see_each_window_once_before_any_twice():
    stream = batches(torch.arange(10).view(10, 1), batch_size=5, seed=0)
    for _ in range(3):
        assert sorted(torch.cat([next(stream), next(stream)]).flatten().tolist()) == list(range(10))


def test_batches_of_fewer_windows_than_the_batch():
    assert next(batches(torch.arange(3).view(3, 1), batch_size=8, seed=0)).shape == (8, 1)


def test_learning_rate_warms_up_and_ends_near_zero():
    curve = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert curve[0] == pytest.approx(0.1) and max(curve) == pytest.approx(1.0) and curve[-1] < 0.01
    assert learning_rate(0, 1, 0.0) == 1.0


def test_the_trials_of_a_pick_halve_the_candidates_and_double_the_windows(with_idle_layers, windows, monkeypatch):
    read: dict[int, int] = {}
    plain = Trials.losses

    def counting(self, trials, part, *args):
        for layers in trials:
            read[layers[-1]] = read.get(layers[-1], 0) + len(part)
        return plain(self, trials, part, *args)

    monkeypatch.setattr(Trials, "losses", counting)
    chosen = recipe(plan={"steps": 1, "candidates": 6, "trial_windows": 2})
    plan = select_layers(with_idle_layers, windows[:16], windows[16:20], 1, chosen, "manual")
    assert sorted(read.values()) == [2, 2, 2, 6, 6, 6]
    assert set(plan.picks[0].removal_loss) == {layer for layer, count in read.items() if count == 6}


def test_a_span_that_no_greedy_pick_would_open_is_found(windows, monkeypatch):
    """Layers 2 and 3 undo each other: each alone is dear, both together are free."""

    def loss(layers):
        return 0.0 if set(layers) == {2, 3} else sum(5.0 if layer in (2, 3) else 1.0 for layer in layers)

    monkeypatch.setattr(Trials, "losses", lambda self, trials, *_: {layers: loss(layers) for layers in trials})
    greedy, both = (
        select_layers(
            tiny_model("llama"),
            windows[:16],
            windows[16:20],
            2,
            recipe(plan={"steps": 1, "candidates": 6, "spans": spans}),
            "manual",
        )
        for spans in (False, True)
    )
    assert not set(greedy.dropped) & {2, 3} and "finals" not in greedy.settings
    assert both.dropped == (2, 3)
    assert next(iter(both.settings["finals"])) == "2-3"
    assert tuple(sorted(pick.layer for pick in both.picks)) == greedy.dropped


def test_a_search_for_several_numbers_of_layers_gives_what_each_search_gives(windows):
    chosen = recipe(plan={"steps": 1, "candidates": 3})
    several = select_for_counts(tiny_model("llama"), windows[:16], windows[16:20], (2, 3), chosen, "manual")
    alone = select_layers(tiny_model("llama"), windows[:16], windows[16:20], 2, chosen, "manual")
    assert several[2] == alone and "finals" in alone.settings


def test_layers_as_text():
    assert runs_text((4, 13, 14, 15)) == "4,13-15" and runs_text((1, 3, 5)) == "1,3,5"
