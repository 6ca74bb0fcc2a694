"""The teacher's cache and the options that save memory: what they change, and what they must not."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tests.breadth import BREADTH
from tests.families import GROUPED, MLP
from tests.tiny import FAMILIES, gradients, random_model, save_tiny, tiny_model, tokens
from tests.training import recipe, same_weights, transfer, windows
from trsp_deploy.decoder import decoder_layers, load_model, meta_model
from trsp_deploy.errors import RecipeError
from trsp_deploy.stages.selection import GatePicking
from trsp_deploy.tools.gates import LayerGates
from trsp_deploy.tools.resources.rehearsal import LiveBytes
from trsp_deploy.tools.training import losses
from trsp_deploy.tools.training.losses import TokenLosses
from trsp_deploy.tools.training.optimizers import clip_gradients, make_optimizer, rounded_at_random
from trsp_deploy.tools.training.parameters import (
    add_adapters,
    merge_adapters,
    recomputed_layers,
)
from trsp_deploy.tools.training.teacher import DenseStates

needs_peft = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('peft')",
    reason="peft is not installed: pip install 'trsp_deploy[train]'",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("dense"))


# -- the teacher -----------------------------------------------------------------------------------------------------


def test_states_are_of_the_windows_asked_for():
    model, ids = tiny_model("llama"), tokens(10, 12)
    module = TokenLosses(model)
    states = DenseStates(module, ids, torch.tensor([7, 2, 5]), batch_size=2)
    assert states.size_bytes == 3 * 11 * 48 * 2  # windows x tokens with a next one x hidden x bf16
    with torch.no_grad():
        wanted = module.hidden(ids[[5, 7]]).bfloat16()
    assert torch.equal(states[torch.tensor([5, 7])], wanted)


def test_a_state_does_not_depend_on_what_else_is_wanted():
    module, ids, order = TokenLosses(tiny_model("llama")), tokens(10, 12), torch.tensor([7, 2, 5, 0, 9])
    whole = DenseStates(module, ids, order, batch_size=2)
    part = DenseStates(module, ids, order, batch_size=2, wanted=torch.tensor([5, 5]))
    assert part.size_bytes == 2 / 5 * whole.size_bytes, "5 is read with 0, as ever; the other batches are not read"
    assert torch.equal(part[torch.tensor([0, 5])], whole[torch.tensor([0, 5])])


def test_cached_teacher_teaches_what_a_copy_of_the_model_would():
    model, ids = tiny_model("llama"), tokens(4, 12)
    with torch.no_grad():
        log_q = model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    module = TokenLosses(model, kl_weight=1.0)
    states = DenseStates(module, ids, torch.arange(4), batch_size=3)
    with torch.no_grad():
        decoder_layers(model)[2].mlp.down_proj.weight.mul_(3)
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        found = module(ids, states[torch.arange(4)]).divergence.item()
    wanted = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean").item()
    assert found == pytest.approx(wanted, rel=0.02) and wanted > 0.01  # the states are rounded to bf16


@BREADTH
def test_only_windows_that_will_be_seen_are_cached(dense, tmp_path, monkeypatch):
    cached = []
    original = DenseStates.__init__
    monkeypatch.setattr(
        DenseStates, "__init__", lambda self, *args: (cached.append(args[2].tolist()), original(self, *args))[1]
    )
    transfer(dense, tmp_path / "out", form="train", steps=3, kl_weight=1.0)
    assert len(cached[0]) == len(set(cached[0])) == 12
    transfer(dense, tmp_path / "more", form="train", steps=20, kl_weight=1.0)
    assert sorted(cached[1]) == list(range(32))


# -- memory ----------------------------------------------------------------------------------------------------------


def test_no_logits_of_the_whole_batch_are_ever_made(monkeypatch):
    monkeypatch.setattr(losses, "SLICE_BYTES", {"cpu": 4 * 384 * 5})
    model = tiny_model("llama")
    module, seen = TokenLosses(model, kl_weight=1.0), []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim and result.shape[-1] == 384:
                seen.append(result.shape[:-1].numel())
            return result

    with torch.no_grad():
        dense = module.hidden(tokens())
    with Shapes():
        module(tokens(), dense).total.backward()
    assert max(n for n in seen if n != 48) == 5  # 48: the head's own gradient, transposed


def test_selection_computes_no_weight_gradients():
    model = tiny_model("llama").requires_grad_(False)
    products = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                products.append(tuple(result.shape))
            return result

    picking = GatePicking(model, range(6), windows()[:8], windows()[8:12], recipe(plan={"batch_size": 4}), None)
    with picking._gates, Products():
        picking._update(torch.arange(4))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert picking._gates.values.grad.abs().min() > 0
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    assert products and not weights & set(products)  # what a weight's gradient would look like


@BREADTH
@pytest.mark.parametrize("checkpointing", ["selective", True])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_have_the_same_gradients(family, checkpointing):
    model, found = tiny_model(family), []
    for what in (False, checkpointing):
        model.zero_grad()
        with recomputed_layers(model, what), LayerGates(model) as gates:
            gates.watched.add(2)
            loss = TokenLosses(model)(tokens()).total + gates.changes[2].square().mean()
            loss.backward()
        found.append((loss.item(), gradients(model)))
    assert "forward" not in vars(decoder_layers(model)[0])
    assert found[0][0] == found[1][0] and found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@pytest.mark.parametrize("checkpointing", ["selective", True])
def test_a_layer_that_changes_a_product_in_place_has_its_own_gradients(checkpointing):
    """OLMo clips queries, keys and values where they lie: what was kept of the product was what it had become."""
    model, found = random_model(transformers.OlmoConfig(**MLP, clip_qkv=0.05)), []
    for what in (False, checkpointing):
        model.zero_grad()
        with recomputed_layers(model, what):
            TokenLosses(model)(tokens()).total.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_stood_in_front_of_a_recomputed_layer_comes_back():
    model = tiny_model("llama")
    layer, calls = decoder_layers(model)[2], []
    forward = layer.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    layer.forward = counted
    with recomputed_layers(model, True), LayerGates(model):
        TokenLosses(model)(tokens())
    assert vars(layer)["forward"] is counted and calls


def test_recomputed_layers_keep_less_for_backward():
    def kept(checkpointing):
        model = tiny_model("llama")
        known = [*model.parameters(), *model.buffers()]
        with LiveBytes(known) as live, recomputed_layers(model, checkpointing):
            loss = TokenLosses(model)(tokens(batch=4, length=64)).total
        assert loss.requires_grad
        return live.now

    everything = kept(False)
    assert kept(True) < 0.4 * everything and kept("selective") < 0.7 * everything


@BREADTH
@pytest.mark.parametrize("checkpointing", ["selective", True])
def test_gradient_checkpointing_changes_no_result(dense, tmp_path, checkpointing):
    plain = transfer(dense, tmp_path / "plain", form="l2", gradient_checkpointing=False)
    saving = transfer(dense, tmp_path / "saving", form="l2", gradient_checkpointing=checkpointing)
    assert plain == saving and same_weights(tmp_path / "plain", tmp_path / "saving")


# -- adapters and the optimiser --------------------------------------------------------------------------------------


@BREADTH
@needs_peft
def test_a_router_that_returns_its_choice_has_no_adapter():
    model = random_model(transformers.Llama4TextConfig(**GROUPED, intermediate_size_mlp=64, num_local_experts=2))
    add_adapters(model, rank=2, seed=0)
    TokenLosses(model)(tokens()).total.backward()
    assert any("lora_" in name and "q_proj" in name for name, p in model.named_parameters() if p.requires_grad)


@needs_peft
def test_a_family_without_adapters_is_one_line():
    config = transformers.FalconH1Config(**GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    with pytest.raises(RecipeError, match=r"transfer\.lora_rank 2: peft has no adapters for FalconH1ForCausalLM"):
        add_adapters(meta_model(config), rank=2, seed=0)


@BREADTH
@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_alone_and_merge_into_the_weights(family):
    model = tiny_model(family)
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    adapted = add_adapters(model, rank=2, seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    optimizer = make_optimizer(model, recipe(transfer={"learning_rate": 0.01}).transfer)
    first = TokenLosses(model)(tokens()).total
    first.backward()
    optimizer.step()
    with torch.no_grad():
        adapted_loss = TokenLosses(model)(tokens()).total.item()
    assert adapted_loss < first.item()
    merge_adapters(adapted)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == names
    with torch.no_grad():
        assert TokenLosses(model)(tokens()).total.item() == pytest.approx(adapted_loss, rel=1e-4)


@BREADTH
@needs_peft
def test_folder_trained_by_adapters_is_a_plain_one(dense, tmp_path):
    result = transfer(dense, tmp_path / "out", form="anneal", lora_rank=4, steps=12, learning_rate=0.02)
    assert result.lm_loss[-1] < result.lm_loss[3]
    assert result.ppl_before_removal == pytest.approx(result.ppl_after_removal, rel=1e-5)
    before, after = load_model(dense), load_model(tmp_path / "out")
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert not any("lora" in name for name, _ in after.named_parameters())
    assert not torch.equal(decoder_layers(before)[0].mlp.up_proj.weight, decoder_layers(after)[0].mlp.up_proj.weight)


@BREADTH
def test_8_bit_moments_train_as_well_and_take_a_quarter(dense, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trsp_deploy[train]'")
    full = transfer(dense, tmp_path / "full", form="train", steps=12)
    small = transfer(dense, tmp_path / "small", form="train", steps=12, optimizer="adamw-8bit")
    assert small.lm_loss[-1] == pytest.approx(full.lm_loss[-1], rel=0.02)
    weight = torch.nn.Parameter(torch.randn(256, 256))
    weight.grad = torch.randn(256, 256)
    held = {}
    for name in ("adamw", "adamw-8bit"):
        optimizer = make_optimizer(torch.nn.ParameterList([weight]), recipe(transfer={"optimizer": name}).transfer)
        optimizer.step()
        held[name] = sum(v.nbytes for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
    assert held["adamw-8bit"] < 0.3 * held["adamw"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("size", [0.02, 1.0])  # a weight matrix's, a norm's
def test_weights_in_bf16_move_as_far_as_in_fp32(optimizer, size):
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trsp_deploy[train]'")
    draws = torch.Generator().manual_seed(0)
    start = (size * torch.randn(64, 128, generator=draws)).bfloat16()
    pull = torch.randn(64, 128, generator=draws)  # what all gradients have in common
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        settings = recipe(transfer={"optimizer": optimizer, "learning_rate": 2e-5}).transfer
        made = make_optimizer(torch.nn.ParameterList([weight]), settings)
        for step in range(64):
            noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            weight.grad = (1e-3 * (pull + noise)).to(dtype)
            made.step()
        moved[dtype] = weight.detach().float() - start.float()
    exact, rounded = moved[torch.float32], moved[torch.bfloat16]
    along = (exact * rounded).mean() / exact.square().mean()  # 1: as far, on average
    assert along.item() == pytest.approx(1, abs=0.1)


def test_weights_in_bf16_stay_the_ones_that_ddp_listens_to():
    """8-bit moments: with another node to add up gradients, each process would train alone, without a word."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'trsp_deploy[train]'")
    weight = torch.nn.Parameter(torch.full((64, 128), 0.7, dtype=torch.bfloat16))
    optimizer = make_optimizer(torch.nn.ParameterList([weight]), recipe(transfer={"optimizer": "adamw-8bit"}).transfer)
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    for step in range(2):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
        assert weight.expand_as(weight).grad_fn.next_functions[0][0] is node
        assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)
    assert list(optimizer.state) == [weight] and optimizer.state[weight]["step"] == 2


def test_rounding_at_random_is_right_on_average_and_to_a_neighbour():
    values = torch.tensor([1.001, -0.3, 1e-3, 0.0, 2.0]).repeat(20_000, 1)
    found = rounded_at_random(values, torch.Generator().manual_seed(0)).float()
    assert (found - values).abs().max(0).values.le(values[0].abs() / 128).all()
    assert torch.allclose(found.mean(0), values[0], rtol=2e-4)
    assert torch.equal(found[:, 3:], values[:, 3:])  # what bf16 holds stays


def test_replicas_round_alike_and_so_does_a_training_that_goes_on():
    weights = [torch.nn.Parameter(torch.full((300,), 0.7, dtype=torch.bfloat16)) for _ in range(3)]
    optimizers = [make_optimizer(torch.nn.ParameterList([weight]), recipe().transfer) for weight in weights]
    for step in range(4):
        if step == 2:  # the third goes on from a checkpoint of the first
            weights[2].data.copy_(weights[0].data)
            optimizers[2].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for weight, optimizer in zip(weights, optimizers, strict=True):
            torch.rand(1)  # other random numbers are drawn beside it
            weight.grad = torch.linspace(-1, 1, 300).bfloat16()
            optimizer.step() if step >= 2 or weight is not weights[2] else None
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_gradients_are_clipped_to_a_norm_of_1():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight])
    for size, wanted in ((10.0, 1.0), (0.1, 0.2)):
        weight.grad = torch.full((4,), size)
        clip_gradients(optimizer)
        assert weight.grad.norm().item() == pytest.approx(wanted, rel=1e-4)


@BREADTH
@pytest.mark.parametrize("form", ["anneal", "train"])
def test_a_step_in_parts_is_the_same_step(dense, tmp_path, form):
    settings = {"form": form, "steps": 4, "batch_size": 4, "kl_weight": 0.5}
    whole = transfer(dense, tmp_path / "whole", **settings)
    for size in (1, 3):  # 3: and one window is left over
        parts = transfer(dense, tmp_path / f"parts-{size}", **settings, micro_batch=size)
        assert parts.lm_loss == pytest.approx(whole.lm_loss, abs=2e-5)
        assert parts.ppl_after_removal == pytest.approx(whole.ppl_after_removal, rel=1e-4)
        assert parts.tokens == whole.tokens


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_a_penalty_is_not_taken_in_parts(form):
    with pytest.raises(
        RecipeError, match=f"transfer.micro_batch: the penalty of form {form} is a norm over all windows"
    ):
        recipe(transfer={"form": form, "refit": "none", "micro_batch": 1})


def test_adapters_for_all_weights_make_no_sense():
    with pytest.raises(RecipeError, match=r"transfer\.train must be layers, got all"):
        recipe(transfer={"lora_rank": 4, "train": "all"})


def test_8_bit_moments_are_refused_with_fsdp():
    with pytest.raises(RecipeError, match=r"adamw-8bit: does not work with FSDP; valid: adamw"):
        make_optimizer(tiny_model("llama"), recipe(transfer={"optimizer": "adamw-8bit"}).transfer, sharded=True)


def test_every_process_closes_the_main_ones_choice(monkeypatch):
    """Losses that round unlike each other would let each go on with a model of its own."""
    model = tiny_model("llama").requires_grad_(False)
    settings = {"batch_size": 4, "steps": 1, "candidates": 3}
    picking = GatePicking(model, range(6), windows()[:8], windows()[8:12], recipe(plan=settings), None)
    given: list[int] = []

    def another(layer):
        given.append(next(index for index in range(6) if index != layer))
        return given[-1]

    monkeypatch.setattr(picking._processes, "from_main", another)
    picking.run([1])
    assert picking.picks[0].layer == given[0] and given[0] in picking._gates.closed
