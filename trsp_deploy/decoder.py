"""The only module that knows how a decoder-only model is put together.

It finds the layer list by shape instead of by name and cuts every per-layer list in the config, so that a new
architecture needs no entry here. In exchange it checks what it made: a model rebuilt from the cut config must have the
kept layers' weights and attributes, and the logits of the dense model with the dropped layers skipped.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trsp_deploy.errors import ModelError
from trsp_deploy.model_code import trusted
from trsp_deploy.recipe import Strict

# Lists in a config that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens"})
# Lists in a config that hold layer indices instead of one entry a layer.
LAYER_INDEX_LISTS = frozenset({"mlp_only_layers"})
# Numbers in a config that count the first layers, and the last ones.
FIRST_LAYERS = frozenset({"max_window_layers", "first_k_dense_replace"})
LAST_LAYERS = frozenset({"num_kv_shared_layers"})

PROBE_TOKENS = 16
# Largest difference of a probe's logits over their standard deviation. The two models run the same operations on the
# same weights: 0 was measured for every family. The rest is for a GPU that adds in another order, by rounding step.
PROBE_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.02}
FULL_PROBE_TOLERANCE = 1e-3


class WeightCounts(Strict):
    """Numbers of parameters, each tied weight counted once."""

    total: int
    layers: tuple[int, ...]
    lm_head: int  # read in full for every token, tied to the embedding or not
    embeddings: int  # input and position embeddings: looked up, not read in full


class DecoderSize(Strict):
    """What a token costs a model, in parameters and elements."""

    weights: WeightCounts
    cache_per_token: int  # elements of keys and values that one token adds to each layer's cache
    attention_width: int  # heads x head_dim


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a causal language model from a local folder in eval mode; "auto" keeps the stored dtype."""
    # By name, although models without are refused before: a pickle that appears in the folder later is not loaded.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=trusted(folder)
    )
    # Dropout stays off everywhere, in training too: gates at 1 must give the dense logits exactly.
    return model.to(device).eval()


def make_storable(model: PreTrainedModel) -> None:
    """Let save_pretrained take a model whose generation config it only warned of when it loaded it.

    Values for sampling without `do_sample` are such; they mean that it samples.
    """
    settings = model.generation_config
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True


def load_widened(folder: Path) -> PreTrainedModel:
    """Load a model whose forward pass is fp32's to the bit and whose weights take the memory that they are stored in.

    The stored weights stay as they are, pages of the file where transformers maps it; each is made fp32 for the module
    that reads it, and given up after it. Constants that are not stored are made in fp32. Only forward passes work: the
    parameters have no values in between.
    """
    stored = load_model(folder)
    with init_empty_weights(include_buffers=False):
        model = build_model(load_config(folder), dtype=torch.float32)
    return cpu_offload(model.eval(), "cpu", offload_buffers=True, state_dict=stored.state_dict())


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model folder's weights are stored in, as its config says; fp32 where it does not say."""
    return load_config(folder).dtype or torch.float32


def load_config(folder: Path) -> Any:
    """Load transformers' config of the model in a folder."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted(folder))


def build_model(config: Any, **settings: Any) -> PreTrainedModel:
    """The model that a config describes, by code of its own where that was asked for; with no weights read."""
    own = bool(config.name_or_path) and trusted(Path(config.name_or_path))
    return AutoModelForCausalLM.from_config(config, trust_remote_code=own, **settings)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted(folder))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's list of transformer layers.

    It is the outermost ModuleList with `num_hidden_layers` members. Raises ModelError when there is none
    or more than one.
    """
    parent, name = _layer_list_place(model)
    return getattr(parent, name)


def _layer_list_place(model: PreTrainedModel) -> tuple[nn.Module, str]:
    count = getattr(model.config, "num_hidden_layers", None)
    if count is None:
        raise ModelError(
            f"{type(model).__name__}: its config has no num_hidden_layers, as of a multimodal model; give a text model"
        )
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0
    ]
    outermost = [p for p in found if p.count(".") == min(q.count(".") for q in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one list of {count} transformer layers, found {len(outermost)}"
            f" ({', '.join(outermost) or 'none'}); this architecture is not supported"
        )
    parent_path, _, name = outermost[0].rpartition(".")
    return model.get_submodule(parent_path), name


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states (batch, sequence, hidden) that a layer's forward was called with."""
    return args[0] if args else kwargs["hidden_states"]


def layer_output(output: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
    """The hidden states (batch, sequence, hidden) in what a layer's forward returned."""
    return output[0] if isinstance(output, tuple) else output


def with_layer_output(output: torch.Tensor | tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor | tuple[Any, ...]:
    """What the layer returned, with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def next_token_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, sequence - 1, vocabulary) float32 of each next token; input_ids is (batch, sequence) int64."""
    return model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()


def next_token_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood in nats of each next token; input_ids is (batch, sequence) int64."""
    return nn.functional.cross_entropy(next_token_logits(model, input_ids).flatten(0, 1), input_ids[:, 1:].flatten())


def count_weights(model: PreTrainedModel) -> WeightCounts:
    """Count parameters in all, by layer, in the LM head and in the look-up tables."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return WeightCounts(
        total=sum(p.numel() for p in model.parameters()),
        layers=tuple(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        lm_head=sum(p.numel() for p in head.parameters()),
        embeddings=sum(p.numel() for table in tables for p in table.parameters()),
    )


def count_config(config: Any) -> WeightCounts:
    """The same of the model that a config describes: no weights are read or made."""
    return count_weights(_skeleton(config))


def known_positions(folder: Path) -> int | None:
    """Tokens that the model in a folder was made for, where its config says."""
    config = load_config(folder)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), None)


def max_positions(folder: Path) -> int:
    """The same; 2,048 where its config does not say."""
    return known_positions(folder) or 2048


def decoder_size(folder: Path) -> DecoderSize:
    """Size of the model in a folder, from its config alone: no weights are read."""
    config = load_config(folder)
    return DecoderSize(
        weights=count_weights(_skeleton(config)),
        cache_per_token=cache_per_token(config),
        attention_width=config.num_attention_heads * _head_dim(config),
    )


def cache_per_token(config: Any) -> int:
    """Numbers that one layer keeps of a token in the KV cache, keys and values together."""
    # Falcon's newer architecture spreads its shared heads out before it caches them.
    one_head = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    cache_heads = getattr(config, "num_key_value_heads", None) or (1 if one_head else config.num_attention_heads)
    return int(2 * cache_heads * _head_dim(config))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _skeleton(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of that config in eval mode: weights without storage, on "meta", but with its attributes and buffers."""
    with init_empty_weights():
        # Eager attention knows everything that a config can ask for; GPT-2's faster one leaves its scaling out.
        model = build_model(config, dtype=dtype, attn_implementation="eager").eval()
    model.tie_weights()  # each weight was put on "meta" by itself
    return model


def check_prunable(model: PreTrainedModel) -> None:
    """Raise ModelError unless this model's layers can be gated and removed; cheap, for a call before any training.

    Layers must run once each, in order, and map hidden states to hidden states; then the first, the middle and the last
    layer are each removed by way of trial. A whole plan is for `check_removal`.
    """
    name, layers = type(model).__name__, decoder_layers(model)
    try:
        calls = _layer_calls(model, layers)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"{name} cannot run on token ids alone, or not from a KV cache ({reason})") from problem
    if [index for index, _ in calls] != 3 * list(range(len(layers))) or not all(same for _, same in calls):
        raise ModelError(
            f"{name}: its layers do not each run once, in order, from hidden states to hidden states of the same "
            "shape; this architecture is not supported"
        )
    if len(layers) > 1:
        for index in sorted({0, len(layers) // 2, len(layers) - 1}):
            check_removal(model, [index])


@torch.no_grad()
def _layer_calls(model: PreTrainedModel, layers: nn.ModuleList) -> list[tuple[int, bool]]:
    """Which layer ran in the probe's three passes, and whether what left it had the shape of what entered."""
    calls: list[tuple[int, bool]] = []
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def note(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                calls.append((index, layer_output(output).shape == layer_input(args, kwargs).shape))

            hooks.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        _probe_logits(model)
    return calls


def remove_layers(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Delete layers in place: the list, every layer number kept in a module, the layer count and per-layer lists.

    dropped: indices of the dense model. Raises ModelError as `check_removal` does, with the model untouched.
    """
    numbers = _checked_numbers(model, dropped)
    parent, name = _layer_list_place(model)
    layers = getattr(parent, name)
    kept = [index for index in range(len(layers)) if index not in set(dropped)]
    for (old, path, attribute), number in numbers.items():
        # The KV cache is addressed by these; a stale one exports without a word and fails at run time.
        setattr(layers[old].get_submodule(path), attribute, number)
    setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
    _cut_config(model.config, kept, len(layers))


def check_removal(model: PreTrainedModel, dropped: Sequence[int]) -> None:
    """Raise ModelError, one line, when the model would not survive the removal of `dropped`; the model is unchanged.

    The model is rebuilt twice, from its config and from the cut one as a reload would do, with the weights shared: that
    costs three forward passes over PROBE_TOKENS tokens each and no memory to speak of. Refused are configs that do not
    describe the weights, layers that change with their number, and layers that use the KV of one that goes.
    """
    _checked_numbers(model, dropped)


# (layer of the dense model, path of a module inside it, attribute)
Place = tuple[int, str, str]


def _checked_numbers(model: PreTrainedModel, dropped: Sequence[int]) -> dict[Place, int]:
    """Check a removal and return the layer numbers that it changes, with their new values."""
    everything = range(len(decoder_layers(model)))
    kept = [index for index in everything if index not in set(dropped)]
    try:
        dense, cut = _skeleton(copy.deepcopy(model.config), model.dtype), _reloaded_skeleton(model, kept)
        _share_weights(model, everything, dense)
        _share_weights(model, kept, cut)
        numbers = _changed_numbers(decoder_layers(dense), decoder_layers(cut), kept)
        _check_same_function(dense, cut, kept)
    except ModelError as problem:
        gone = ", ".join(str(index) for index in everything if index not in kept)
        raise ModelError(
            f"{type(model).__name__} without layers {gone}: {problem}; choose other layers, or another architecture"
        ) from problem
    return numbers


def _reloaded_skeleton(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """What a reload would make of the cut model, still without weights."""
    config = copy.deepcopy(model.config)
    try:
        _cut_config(config, kept, len(decoder_layers(model)))
        # Through JSON, as a reload: some configs recompute their patterns from a number and drop what is the default.
        reloaded = type(config).from_dict(json.loads(config.to_json_string()))
        reloaded.name_or_path = config.name_or_path  # where code of its own lies
        return _skeleton(reloaded, model.dtype)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as problem:
        raise ModelError(f"its config cannot describe what is left ({' '.join(str(problem).split())})") from problem


def _cut_config(config: Any, kept: Sequence[int], num_layers: int) -> None:
    new_index = {old: new for new, old in enumerate(kept)}
    for key, value in config.to_dict().items():
        if key in LAYER_INDEX_LISTS and value:
            setattr(config, key, [new_index[i] for i in value if i in new_index])
        elif isinstance(value, (list, tuple)) and len(value) == num_layers and key not in NOT_PER_LAYER:
            setattr(config, key, [value[i] for i in kept])
        elif key in FIRST_LAYERS and value is not None and value < num_layers:
            setattr(config, key, sum(i < value for i in kept))
        elif key in LAST_LAYERS and value is not None and value < num_layers:
            setattr(config, key, sum(i >= num_layers - value for i in kept))
    if getattr(config, "attention_types", None):  # GPT-Neo's pattern, from which it computes the list just cut
        config.attention_types = [[config.attention_layers, 1]]
    config.num_hidden_layers = len(kept)


def _share_weights(model: PreTrainedModel, kept: Sequence[int], skeleton: PreTrainedModel) -> None:
    """Give `skeleton` the very weights of the model with its `kept` layers; ModelError when it has room for others."""
    parent, list_name = _layer_list_place(model)
    layers = getattr(parent, list_name)
    setattr(parent, list_name, nn.ModuleList(layers[index] for index in kept))
    weights = model.state_dict()
    setattr(parent, list_name, layers)
    actual = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            is_, by_config = actual.get(name, "absent"), expected.get(name, "absent")
            raise ModelError(f"{name} is {is_} and by the config would be {by_config}")
    skeleton.load_state_dict(weights, assign=True)
    skeleton.to(model.device)


def _changed_numbers(dense: nn.ModuleList, cut: nn.ModuleList, kept: Sequence[int]) -> dict[Place, int]:
    """Layer numbers among the attributes of the kept layers' modules: where they are, and what they become.

    Raises ModelError when any other attribute changes: a sliding window, a rotary embedding, a constant.
    """
    new_index = {old: new for new, old in enumerate(kept)}
    numbers: dict[Place, int] = {}
    for new, old in enumerate(kept):
        before, after = _attributes(dense[old]), _attributes(cut[new])
        for path, name in sorted(before.keys() | after.keys()):
            was, becomes = before.get((path, name)), after.get((path, name))
            if was == becomes:
                continue
            # A layer's own number or another layer's may follow the layer; True and False are no numbers.
            if type(was) is not int or type(becomes) is not int or new_index.get(was) != becomes:
                attribute = f"{path}.{name}".lstrip(".")
                raise ModelError(
                    f"layer {old}, as layer {new} of the rest, would have {attribute} {becomes}, not {was}"
                )
            numbers[old, path, name] = becomes
    return numbers


def _attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """(module's path, attribute) -> value, for what is neither tensor nor module; a module's class is one of them.

    Without transformers' own mark of what it has initialised, which is on loaded models and not on built ones.
    """
    return {
        (path, name): value
        for path, module in layer.named_modules()
        for name, value in [*vars(module).items(), ("class", type(module).__name__)]
        if name != "_is_hf_initialized" and (value is None or isinstance(value, (bool, int, float, str)))
    }


@torch.no_grad()
def _check_same_function(dense: PreTrainedModel, cut: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise ModelError unless the cut model has the logits of the dense one with its dropped layers skipped."""
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(dense)):
            if index not in kept:
                hooks.callback(layer.register_forward_hook(_skip, with_kwargs=True).remove)
        wanted = _probe_logits(dense)
    error = (_probe_logits(cut) - wanted).abs().max() / wanted.std()
    if error > PROBE_TOLERANCE.get(dense.dtype, FULL_PROBE_TOLERANCE):
        raise ModelError(
            f"a kept layer computes something else under its new number: the logits would be {error:.2g} standard "
            "deviations from those with the same layers skipped"
        )


def _skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: the layer is computed, so that the KV cache has its entry, and adds nothing."""
    return with_layer_output(output, layer_input(args, kwargs))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Random token ids (1, PROBE_TOKENS), the same at every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)


def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (1, PROBE_TOKENS + 1, vocabulary) float32: a probe's, then its last token's again, from a KV cache."""
    ids = _probe(model)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    return torch.cat([whole, last], dim=1).float()
