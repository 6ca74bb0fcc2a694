"""Whether a local Hugging Face folder can be pruned: whole, no pickles, a decoder-only model, its code asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from trsp_deploy.artifacts import fingerprint, leaves
from trsp_deploy.errors import ModelError, first_line
from trsp_deploy.model_code import (
    TOKENIZER_FILES,
    copy_code,
    model_code,
    refuse_adapter,
    refuse_hidden_config,
    refuse_unless_trusted,
)
from trsp_deploy.reading import is_utf8, read_json, user_path
from trsp_deploy.tools.sources.names import HUB_ID, SHORT_NAMES

SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# Code, and what only code of others can read: a run's model folders hold none but the code that the user asked for.
UNSAFE_FILES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|npy|py|pyc|so)(\.index\.json)?", re.IGNORECASE)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # beside chat_template.jinja, where a tokenizer has several
# They go wherever the weights go: LICENSE, NOTICE.txt, LICENSE-MODEL, MODEL_LICENSE, ACCEPTABLE_USE_POLICY.md ...
LEGAL_FILES = re.compile(
    r"(?i:(\w+[-_])?(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)([-_]\w+(\.\d+)*)?(\.(txt|md|rst|pdf|html))?)"
)
# What a folder of links to a base model's files has of these.
LINKED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|spiece\.model"
)
TEXTS = (".json", ".jinja", ".md", ".txt")
PAPERS = re.compile(rf"README\.md|\.gitattributes|{LEGAL_FILES.pattern}")  # no part of what a model computes
PYTORCH_BINS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")


def copy_model(folder: Path, out: Path) -> None:
    """Make `out` a Hugging Face folder with the files of another, sharing their blocks where the file system can.

    A model need not lie on the disk twice; texts, which libraries change in place, are copied. Pickles stay behind, and
    so does code but what the configs name.
    """
    out.mkdir()
    copy_code(folder, out)
    for file in _files(folder):
        place = out / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        if file.suffix in TEXTS or not _linked(file, place):
            shutil.copyfile(file, place)


def fingerprint_model(folder: Path) -> str:
    """SHA-256 over what of a folder's files decides what the model computes, and not over a card that comes later."""
    code = model_code(folder)
    parts = [file for file in _files(folder) if not PAPERS.fullmatch(file.name)]
    files = [*parts, *(folder / file for file in (code.files if code else ()))]
    named = "".join(f"{file.relative_to(folder).as_posix()} {fingerprint(file)}\n" for file in sorted(files))
    return hashlib.sha256(os.fsencode(named)).hexdigest()


def _linked(file: Path, place: Path) -> bool:
    try:
        os.link(file.resolve(), place)
    except OSError:  # another disk, or one without such links
        return False
    return True


def goes_along(folder: Path, file: Path) -> bool:
    """Whether a file of a model's folder is taken with it: not what a link leads to outside, such as a secret under the
    name of a licence.

    What is read as weights or as a tokenizer's data may lie elsewhere, and a snapshot of the hub's cache is made of
    links to its blobs. Those may be a link to another disk; of a folder that came with its own it could be to anywhere.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = folder.resolve().parent.parent / "blobs"
    if blobs.is_relative_to(Path(HF_HUB_CACHE).resolve()):
        blobs = blobs.resolve()
    if not leaves(folder, file) or file.resolve().is_relative_to(blobs):
        return True
    read = file.suffix == ".safetensors" or SAFETENSORS.fullmatch(file.name) or LINKED.fullmatch(file.name)
    return file.parent == folder and bool(read)


def _files(folder: Path) -> list[Path]:
    """The files of a model, but its code and whatever else lies in its folder, such as runs.

    Names that no manifest can hold are no model's: transformers looks for none of them.
    """
    files = (path for path in [*folder.iterdir(), *folder.glob(CHAT_TEMPLATES)] if path.is_file())
    wanted = (file for file in files if "\\" not in file.name and is_utf8(file.name) and goes_along(folder, file))
    return sorted(file for file in wanted if not UNSAFE_FILES.fullmatch(file.name))


def check_decoder_only(folder: Path) -> str:
    """Return the model's class, such as "OPTForCausalLM".

    Raises ModelError when config.json cannot be read, when it or the tokenizer names code that comes with the model and
    the user did not ask for, when neither transformers nor that code knows the architecture, when it is an encoder or
    encoder-decoder model, and when the weights are quantised.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from trsp_deploy.decoder import load_config, meta_model

    path = folder / "config.json"
    values = read_json(path, ModelError)
    refuse_unless_trusted(folder)
    refuse_hidden_config(folder)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{path}: has no model_type, so it does not describe a transformers model")
    if values.get("transformers_weights") is not None:
        raise ModelError(
            f"{path}: `transformers_weights` names a file of weights that is not the one beside it; take that key out"
        )
    if "quantization_config" in values:
        raise ModelError(f"{folder}: holds quantised weights; pruning trains them, so give the unquantised model")
    own = values.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING_NAMES and "AutoConfig" not in own:
        raise ModelError(f"{path}: model_type '{model_type}' is not known to transformers {transformers.__version__}")
    if "AutoModelForCausalLM" in own:
        return _check_own_code(folder, path)
    try:
        config = load_config(folder)
    except Exception as problem:  # transformers 5 has an error of its own for a value of another type
        raise ModelError(f"{path}: transformers cannot read it ({first_line(problem)})") from problem
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    architecture = next(iter(config.architectures or ()), causal or model_type)
    # BERT and its kind are in both tables: they generate only when built as decoders.
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(names)}
    if causal is None or encoder or config.is_encoder_decoder or architecture not in known:
        raise ModelError(f"{folder}: is {architecture}, not a decoder-only causal language model")
    try:
        model = meta_model(config)
    except Exception as problem:  # whatever values that do not go together lead to
        raise ModelError(f"{path}: transformers cannot build the model ({first_line(problem)})") from problem
    _check_tokens(folder, model)
    _check_layers(config, path, f"'{model_type}' is a model of several parts; give the folder of its language model")
    return architecture


def _check_layers(config: Any, path: Path, otherwise: str) -> None:
    """Raise ModelError where a config does not say how many layers there are, or that there is none.

    otherwise: what follows where it does not say.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise ModelError(f"{path}: {otherwise}")
    if layers < 1:
        raise ModelError(f"{path}: transformers cannot build the model (it has {layers} layers)")


def _check_tokens(folder: Path, model: Any) -> None:
    """Raise ModelError where the weights have another number of tokens than the config, as after tokens were added.

    transformers ends in an error of torch's for it, hours later. A folder that has no weights yet is fine.
    """
    import safetensors

    embeddings = model.get_input_embeddings().weight
    name = next((name for name, value in model.named_parameters() if value is embeddings), None)
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(safetensors.SafetensorError, OSError):  # said where weights are asked for
            with safetensors.safe_open(file, framework="np") as weights:
                found = weights.get_slice(name).get_shape() if name in weights.keys() else None  # noqa: SIM118
            if found is not None and tuple(found) != tuple(embeddings.shape):
                raise ModelError(
                    f"{folder}: config.json says {embeddings.shape[0]} tokens of {embeddings.shape[1]} numbers, its "
                    f"weights have {' x '.join(map(str, found))} ({name}); take the config.json that goes with them"
                )


def _check_own_code(folder: Path, path: Path) -> str:
    """Return the class of a model whose code the user asked for, having built it once without weights."""
    import torch

    from trsp_deploy.decoder import build_model, load_config

    try:
        with torch.device("meta"):
            model = build_model(load_config(folder))
    except Exception as problem:  # whatever that code does
        raise ModelError(f"{path}: the model's own code failed ({first_line(problem)})") from problem
    if model.config.is_encoder_decoder:
        raise ModelError(f"{folder}: is {type(model).__name__}, not a decoder-only causal language model")
    by = "by which layers are counted and cut; `attribute_map` in its configuration's class can name another"
    _check_layers(model.config, path, f"the model's own code has no `num_hidden_layers`, {by}")
    return type(model).__name__


def check_folder(folder: Path, name: str | None = None) -> None:
    """Raise ModelError when a model folder lacks something, or has its weights as pickles alone; name: for the line."""
    refuse_pickles(folder, name or str(folder))
    refuse_adapter(folder)
    templates = [*folder.glob("*.jinja"), *folder.glob(CHAT_TEMPLATES)]
    if (outside := next((file for file in templates if not goes_along(folder, file)), None)) is not None:
        raise ModelError(f"{outside}: is a link out of the model's folder; put the template itself there")
    missing = missing_part(folder)
    if missing is not None:
        raise ModelError(f"{folder}: is not a complete Hugging Face model: {missing}")


def refuse_pickles(folder: Path, name: str) -> None:
    """Raise ModelError for a folder whose weights are pickles alone; name: what the user called the model."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [file for file in names if PYTORCH_BINS.fullmatch(file)]
    if pickles and not any(SAFETENSORS.fullmatch(file) for file in names):
        raise ModelError(only_pickles(name, pickles[0]))


def only_pickles(model: str, file: str) -> str:
    """The line for a model whose weights are a pickle, with the command that helps."""
    hub = model in SHORT_NAMES or (HUB_ID.fullmatch(model) is not None and not user_path(model).is_dir())
    remedy = "makes safetensors of it with torch's reader of plain tensors, then"
    way = (
        f"`trsp-deploy convert {model}` {remedy} this command again"
        if hub
        else f"`trsp-deploy convert {model} --out DIR` {remedy} --model DIR"
    )
    return (
        f"model '{model}': its weights are a pickle ({file}), which can hold any code, and nothing is ever loaded from "
        f"one; {way}"
    )


def missing_part(folder: Path) -> str | None:
    """What a model folder lacks, or None."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        named = read_json(index, ModelError).get("weight_map")
        if not isinstance(named, dict) or not named:
            return f"{index.name} has no weight_map of tensors to files"
        shards = sorted(set(map(str, named.values())))
    else:
        return "no weights (model.safetensors, whole or in shards with an index)"
    for shard in shards:
        if Path(shard).name != shard or UNSAFE_FILES.fullmatch(shard):
            return f"{index.name} names {shard}, which is no safetensors file beside it"
        if not (folder / shard).is_file():
            return f"{shard} is missing"
        if not _readable(folder / shard):
            return f"{shard} is cut short or no safetensors file"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return f"no tokenizer ({', '.join(TOKENIZER_FILES[:2])} or the like)"
    return None


def has_its_code(folder: Path) -> bool:
    """Whether all code that the configs name lies in the folder."""
    try:
        model_code(folder)
    except ModelError:
        return False
    return True


def _readable(path: Path) -> bool:
    """Whether a safetensors header fits its file: half a download and a git-lfs pointer do not.

    Raises OSError for a file that may not be opened: whose writer keeps it to the user alone, it is whole.
    """
    import safetensors

    path.open("rb").close()
    try:
        with safetensors.safe_open(path, framework="np"):
            return True
    except (safetensors.SafetensorError, OSError):
        return False


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
