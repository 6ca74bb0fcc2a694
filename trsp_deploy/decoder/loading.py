"""Models, their configs and tokenizers, from a local folder; a model that a config describes, without weights."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trsp_deploy.errors import ModelError, first_line, passes_through, shown
from trsp_deploy.model_code import TOKENIZER_FILES, refuse_hidden_code, refuse_hidden_config, trusted

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a causal language model from a local folder in eval mode; "auto" keeps the stored dtype.

    Raises ModelError for a folder that lacks weights of its model, or would run code that the user did not ask for.
    """
    refuse_hidden_code(folder)
    # By name, although models without are refused before: a pickle that appears in the folder later is not loaded.
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trusted(folder),
            output_loading_info=True,
        )
    except ValueError as problem:  # such as values that contradict each other in generation_config.json
        raise ModelError(f"{folder}: transformers cannot load it: {first_line(problem)}") from problem
    missing = sorted(found["missing_keys"])
    if missing:  # transformers makes them up at random, with a warning
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{folder}: its weights lack {', '.join(missing[:3])}{more}; was it downloaded whole?")
    # Dropout stays off everywhere, in training too: gates at 1 must give the dense logits exactly.
    return model.to(device).eval()


def make_storable(model: PreTrainedModel) -> None:
    """Let save_pretrained take a model whose generation config it only warned of when it loaded it.

    Values for sampling without `do_sample` are such; they mean that it samples. Of one that is invalid in another way
    (a beam search's values without beams) the tokens that begin and end a text are kept.
    """
    settings = model.generation_config
    if settings is None or _storable(settings):
        return
    settings.do_sample = True
    if not _storable(settings):
        tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        valid = {name: token for name, token in tokens.items() if not isinstance(token, int) or token >= 0}
        model.generation_config = GenerationConfig(**valid)


def _storable(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def load_widened(folder: Path) -> PreTrainedModel:
    """Load a model whose forward pass is fp32's to the bit and whose weights take the memory that they are stored in.

    The stored weights stay as they are, pages of the file where transformers maps it; each is made fp32 for the module
    that reads it, and given up after it. Constants that are not stored are made in fp32. Only forward passes work: the
    parameters have no values in between. A model that reads weights elsewhere (JetMoE's experts) is loaded in fp32.
    """
    stored = load_model(folder)
    with without_weights():
        model = build_model(load_config(folder), dtype=torch.float32)
    widened = cpu_offload(model.eval(), "cpu", offload_buffers=True, state_dict=stored.state_dict())
    try:
        with torch.no_grad():
            widened(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    except (RuntimeError, NotImplementedError):  # what torch says of a weight on "meta"
        return load_model(folder, dtype=torch.float32)
    return widened


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model folder's weights are stored in: as its config says, else as the first float among them."""
    said: torch.dtype | None = load_config(folder).dtype
    return said or next(_float_dtypes(folder), torch.float32)


@torch.no_grad()
def cast_for_storage(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring a model to the CPU and to `dtype`, in place, but for what transformers loads in fp32 from such a folder.

    Which modules those are their class says, `_strict` for bf16 too: the routers of ERNIE 4.5's experts, for one.
    """
    kept = [*(model._keep_in_fp32_modules_strict or ())]
    if dtype == torch.float16:
        kept += model._keep_in_fp32_modules or ()
    in_fp32 = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in kept) or "$^")  # as transformers searches
    model.to("cpu")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not in_fp32.search(name):
            tensor.data = tensor.data.to(dtype)


def _float_dtypes(folder: Path) -> Iterator[torch.dtype]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            names = weights.keys()
            for name in names:
                dtype = FLOATS.get(weights.get_slice(name).get_dtype())
                if dtype is not None:
                    yield dtype


def load_config(folder: Path) -> Any:
    """Load transformers' config of the model in a folder; raises ModelError for one that would run code unasked."""
    refuse_hidden_config(folder)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted(folder))


def build_model(config: Any, **settings: Any) -> PreTrainedModel:
    """The model that a config describes, by code of its own where that was asked for; with no weights read."""
    own = bool(config.name_or_path) and trusted(Path(config.name_or_path))
    return AutoModelForCausalLM.from_config(config, trust_remote_code=own, **settings)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is built within has weights without storage, on "meta", and real buffers.

    Nor are weights initialised: that fails on "meta" where it sets values of its own (Bamba, StableLM with qk norms).
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model; raises ModelError where there is none that can be read, or saved."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers 5 would make up an empty one
        raise ModelError(f"{folder}: has no tokenizer that can be read ({', '.join(TOKENIZER_FILES[:2])} or the like)")
    refuse_hidden_config(folder)  # which it reads where the tokenizer's own does not name a class
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted(folder)
        )
    except Exception as problem:  # the tokenizers library's own errors are bare Exceptions
        if passes_through(problem):
            raise
        raise ModelError(f"{folder}: has no tokenizer that can be read ({first_line(problem)})") from problem
    templates = found.chat_template if isinstance(found.chat_template, dict) else {}
    for name in templates:  # transformers before 5.10 writes each to the path that its name makes (CVE-2026-9856)
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ModelError(f"{folder}: a chat template of its tokenizer is called {shown(name)}, no plain name")
    return found


def meta_model(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of that config in eval mode: weights without storage, on "meta", but with its attributes and buffers."""
    with without_weights():
        # Eager attention knows everything that a config can ask for; GPT-2's faster one leaves its scaling out.
        model = build_model(config, dtype=dtype, attn_implementation="eager").eval()
    model.tie_weights()  # each weight was put on "meta" by itself
    return model
